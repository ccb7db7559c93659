"""Many games at once, played to their ends by an agent of the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import track

from archer_fast.arguments import as_integer
from archer_fast.compat.generation import fixes_of
from archer_fast.compat.overrides import is_ours

Transition = dict[str, Any]
# observation, next_observation: str; reward: number; done: bool; action: str, raw, before decode_f.
Trajectory = list[Transition]


class BatchedEnv(Protocol):
    """`bsize` games at once: what the original asks of an environment."""

    bsize: int

    def reset(self, idx: Any = None) -> list[str]:
        """Begin `bsize` new games, of the task `idx` where it is given; their observations."""
        ...

    def step(self, actions: list[str], /) -> Sequence[tuple[str, float, bool] | None]:
        """(next_observation, reward, done) of each game; None for one that is already over."""
        ...


def add_trajectory_reward(trajectory: Trajectory) -> Trajectory:
    """Give each transition `trajectory_reward`, the sum of all rewards of its game; returns the same list."""
    total = np.sum([transition["reward"] for transition in trajectory])
    for transition in trajectory:
        transition["trajectory_reward"] = total
    return trajectory


def add_mc_return(trajectory: Trajectory, gamma: float = 0.95) -> Trajectory:
    """Give each transition `mc_return`: G_t = r_t + gamma G_{t+1}, and 0 behind the last; returns the same list.

    gamma = 0 gives the reward, gamma = 1 the rewards to come. The original divides powers of gamma by one another in a
    [T, T] matrix, which is nan where they underflow: for gamma = 0, and at .95 from some 14,000 turns on.
    """
    to_come = 0.0
    for transition in reversed(trajectory):
        to_come = float(transition["reward"]) + gamma * to_come
        transition["mc_return"] = np.float64(to_come)
    return trajectory


def batch_interact_environment(
    agent: Any,
    tokenizer: Any,
    env: BatchedEnv,
    num_trajectories: int,
    post_f: Callable[[Trajectory], Trajectory] = lambda x: x,
    use_tqdm: bool = True,
    decode_f: Callable[[list[str]], Sequence[str]] = lambda x: x,
    env_idx: Any = None,
) -> list[Trajectory]:
    """Play `num_trajectories // env.bsize` rounds of env.bsize games; a game is a list of `Transition`.

    [[{"observation": "Questions:\\n", "action": "Is it alive?", "next_observation": "Questions:\\nIs it alive? No.\\n",
    "reward": -1, "done": False, "trajectory_reward": -7, "mc_return": -6.03}, ...], ...]

    decode_f: what the environment hears of the agent's actions; they are kept as the agent said them. post_f: applied
    to each game, which has its returns by then. use_tqdm: show a progress bar, on the standard error.

    An agent with a `get_action` of its own is asked for all games at every turn, as the original does. Ours, which acts
    in each game as if it were alone, is asked only for games that the environment has not yet called over: the same
    distribution of games. A game that is over then repeats its last action, for decode_f and an environment that
    nevertheless reads it.

    Errors: ValueError for fewer games than env.bsize (the original plays none and says nothing), for an environment,
    agent or decode_f that gives another number of results than there are games, and for a turn in which the environment
    calls every game over though some never ended (the original asks for ever).
    """
    bsize = batch_size_of("env", env)
    if num_trajectories < bsize:
        raise ValueError(f"num_trajectories: wanted at least env.bsize = {bsize}, got {num_trajectories}")
    rounds = track(
        range(num_trajectories // bsize), "games", console=Console(stderr=True), disable=not use_tqdm, transient=True
    )
    games = [game for _ in rounds for game in _play(agent, env, decode_f, env_idx)]
    return [post_f(add_mc_return(add_trajectory_reward(game))) for game in games]


def batch_size_of(name: str, env: Any) -> int:
    """env.bsize; ValueError or TypeError naming the environment where it has none."""
    if not hasattr(env, "bsize"):
        raise ValueError(f"{name}: wanted an environment with .bsize, .reset(idx) and .step(actions), got {env!r:.80}")
    return as_integer(f"{name}.bsize", env.bsize, 1, 2**31)


def _play(
    agent: Any, env: BatchedEnv, decode_f: Callable[[list[str]], Sequence[str]], env_idx: Any
) -> list[Trajectory]:
    bsize = env.bsize
    observations = _one_each("env.reset", env.reset(idx=env_idx), bsize)
    games: list[Trajectory] = [[] for _ in range(bsize)]
    actions = [""] * bsize
    ended, over = [False] * bsize, [False] * bsize  # over: the environment has answered None since it ended
    # Behind padding, whose fault may be kept, what an agent says depends on the rest of its batch.
    alone = is_ours(agent, "get_action") and "padding" in fixes_of(agent)
    while not all(ended):
        asked = [i for i in range(bsize) if not (alone and over[i])]
        said = _one_each("agent.get_action", agent.get_action([observations[i] for i in asked]), len(asked))
        for i, action in zip(asked, said, strict=True):
            actions[i] = action
        heard = _one_each("decode_f", decode_f(list(actions)), bsize)
        results = _one_each("env.step", env.step(heard), bsize)
        if all(result is None for result in results):
            raise ValueError(
                "env.step: wanted (next_observation, reward, done) for games that are not over, got None for all of "
                f"them, while {ended.count(False)} of {bsize} have not ended"
            )
        for i, result in enumerate(results):
            if result is None:
                over[i] = ended[i]
                continue
            next_observation, reward, done = _transition(result)
            games[i].append(
                {
                    "observation": observations[i],
                    "next_observation": next_observation,
                    "reward": reward,
                    "done": done,
                    "action": actions[i],
                }
            )
            observations[i], ended[i] = next_observation, bool(done)
    return games


def _one_each(what: str, results: Any, num: int) -> list[Any]:
    """The results as a list of its own."""
    if isinstance(results, str) or not hasattr(results, "__len__") or len(results) != num:
        count = f" of {len(results)}" if hasattr(results, "__len__") else ""
        raise ValueError(f"{what}: wanted a list of {num}, one a game, got {type(results).__name__}{count}")
    return list(results)


def _transition(result: Any) -> tuple[str, Any, Any]:
    if not isinstance(result, Sequence) or isinstance(result, str) or len(result) != 3:
        raise ValueError(f"env.step: wanted (next_observation, reward, done) or None for a game, got {result!r:.80}")
    observation, reward, done = result
    return observation, reward, done
