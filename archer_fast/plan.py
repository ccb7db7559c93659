"""What an iteration will cost: memory by role and phase, FLOPs, bytes, time at the roofline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from archer_fast.config import Config
from archer_fast.critic import StateValue, ValueHeads
from archer_fast.model_costs import GameShape, ModelCosts
from archer_fast.workload import Workload

_FLOAT = 4  # bytes
# A GPU op on the vocabulary holds one chunk of logits in float32, and their gradient over it: ops.lm_head.CHUNK_BYTES
# where the matrix is frozen, CHUNK_BYTES_WITH_WEIGHT where it trains.
_LOGITS_CHUNK, _LOGITS_CHUNK_WITH_WEIGHT = 1 << 30, 3 << 30
# Of the embedded engine's sampling: logits in two dtypes, log-probs, probabilities and their sums in float64.
_SAMPLING_BYTES = 4 + 4 + 8 + 8


@dataclass(slots=True, frozen=True)
class Phase:
    """One part of an iteration: Phase("rollout", 15872, 2.1e14, 3.9e12, 4.0e9)."""

    name: str
    tokens: float  # that pass the decoder's blocks
    flops: float
    bytes: float  # weights and stored keys and values that are read, at least
    memory: float  # bytes at the phase's peak, on top of what stays


@dataclass(slots=True, frozen=True)
class Saving:
    """What one choice of ours costs, beside the original's way: Saving("one sequence a game", 496, 5208, "tokens")."""

    choice: str
    ours: float
    original: float
    unit: str

    @property
    def factor(self) -> float:
        return self.original / self.ours if self.ours else math.inf


@dataclass(slots=True, frozen=True)
class Plan:
    """The whole answer."""

    roles: dict[str, float]  # bytes that stay through the run, by role
    phases: list[Phase]
    savings: list[Saving]
    pass_memory: float  # bytes a token of the actor's pass with gradients
    gradients: float  # bytes of the actor's
    vocabulary: float  # bytes of the chunk of logits, and of what is summed over chunks
    sampling: float  # bytes at the peak of sampling fresh actions, of all games of a step at once
    game_in_pass: int  # tokens of a game in the actor's pass, its branches included
    step_tokens: int  # of all games of an actor's step

    @property
    def resident(self) -> float:
        return sum(self.roles.values())

    @property
    def peak(self) -> float:
        return self.resident + max(phase.memory for phase in self.phases)

    def max_pass_tokens(self, memory: float) -> int:
        """The largest `model.max_pass_tokens` whose passes fit into this memory; 0 where nothing fits."""
        others = max(self.sampling, *(phase.memory for phase in self.phases if phase.name != "actor"))
        if self.resident + others > memory:
            return 0
        room = memory - self.resident - self.vocabulary
        whole = int((room - self.gradients) / self.pass_memory)
        if whole >= self.step_tokens:
            return whole
        # Several passes a step: the sum of their gradients lies beside those of the one that runs.
        return max(0, min(int((room - 2 * self.gradients) / self.pass_memory), self.step_tokens - 1))


def game_shape(config: Config, workload: Workload) -> GameShape:
    """A game in a pass of the actor: with the fresh actions that a step adds to it."""
    actor = config.actor
    if config.algorithm != "archer" or actor.actions == "logged":
        return GameShape(workload.game_tokens)
    branches = min(actor.states_per_game, workload.turns) * actor.alternatives
    return GameShape(workload.game_tokens, branches, workload.action_tokens)


def make_plan(costs: ModelCosts, config: Config, workload: Workload) -> Plan:
    """The costs of one iteration of `config`, once its warm-up is over and its replay full."""
    work = _Work(costs, config, workload)
    phases = [work.rollout(), work.insert()]
    if config.algorithm == "archer":
        phases.append(work.critic())
    elif config.algorithm == "ppo":
        phases.append(work.value_head())
    phases.append(work.actor())
    roles = work.roles()
    return Plan(
        roles=roles,
        phases=phases,
        savings=list(work.savings(sum(roles.values()), sum(phase.flops for phase in phases))),
        pass_memory=work.pass_memory,
        gradients=costs.trained_bytes,
        vocabulary=work.vocabulary,
        sampling=work.sampling,
        game_in_pass=work.tokens_of_tree,
        step_tokens=work.step_games * work.tokens_of_tree,
    )


class _Work:
    """The counts that the phases share."""

    def __init__(self, costs: ModelCosts, config: Config, workload: Workload) -> None:
        self.costs, self.config, self.game = costs, config, workload
        self.reading, self.training = costs.reading, costs.training
        with torch.device("meta"):
            self.head_numbers = sum(p.numel() for p in ValueHeads(costs.hidden_size, config.critic).parameters())
        self.is_archer = config.algorithm == "archer"
        self.trunk = config.critic.trunk if self.is_archer else "frozen"
        self.shape = game_shape(config, workload)
        self.branches, self.tokens_of_tree = self.shape.branches, self.shape.pass_tokens
        self.grows_tree, self.steps = self.branches > 0, config.update.epochs

    # -- memory ------------------------------------------------------------------------------------

    def roles(self) -> dict[str, float]:
        c = self.costs
        moments = self._optimizer(c.num_trained, c.trained_itemsize)
        roles: dict[str, float] = {"start policy: reference, frozen trunk": c.weight_bytes}
        if c.adapted:
            roles["actor: an adapter on it"] = c.trained_bytes
        else:
            roles["actor: a copy"] = c.weight_bytes
        masters = " and float32 weights" if c.trained_itemsize < _FLOAT else ""
        roles[f"actor: Adam's moments{masters}"] = moments
        if self.trunk == "separate":
            roles["critic: a trunk and its target"] = 2 * c.weight_bytes
            roles["critic: Adam's moments"] = self._optimizer(c.num_parameters, c.itemsize)
        elif self.trunk == "lora":
            roles["critic: an adapter and its target"] = 2 * c.trained_bytes
            roles["critic: Adam's moments"] = moments
        elif self.trunk == "shared":
            roles["critic: Adam's moments of the trunk"] = moments
        if self.is_archer:
            roles["critic: heads, targets, moments"] = 4 * _FLOAT * self.head_numbers
        return roles

    def _optimizer(self, num_weights: int, itemsize: int) -> float:
        """Bytes on the device: two moments a weight, in half precision of a float32 master weight that comes on top."""
        if self.config.model.offload_optimizer:
            return 0.0
        return num_weights * (3 * _FLOAT if itemsize < _FLOAT else 2 * itemsize)

    @property
    def _sampled_row(self) -> float:
        """Bytes a row that is sampled."""
        return self.costs.vocab_size * (self.costs.itemsize + _SAMPLING_BYTES)

    @property
    def pass_memory(self) -> float:
        """Bytes a token of the actor's pass with gradients."""
        return self.costs.tree / self.shape.pass_tokens

    @property
    def vocabulary(self) -> float:
        """The chunk of logits, and where the matrix trains what is summed over chunks."""
        c = self.costs
        logits = _FLOAT * c.vocab_size * self._scored * self.step_games
        if c.adapted:
            return min(_LOGITS_CHUNK, logits)
        # A sum of the weight's gradient over several chunks is kept in float32.
        itemsize = c.itemsize if logits <= _LOGITS_CHUNK_WITH_WEIGHT else _FLOAT
        return min(_LOGITS_CHUNK_WITH_WEIGHT, logits) + itemsize * c.vocab_size * c.hidden_size

    @property
    def sampling(self) -> float:
        """Fresh actions of all games of an actor's step, where it samples any."""
        return self._sampling_memory(self.step_games, self.branches) if self.grows_tree and self.steps else 0.0

    @property
    def _scored(self) -> float:
        """Action tokens of a game that an actor step scores."""
        taken = 0 if self.grows_tree and self.config.actor.actions == "fresh" else self.game.game_actions
        return self.branches * self.game.action_tokens + taken

    @property
    def _tokens_of_pass(self) -> float:
        """Of the actor's passes: games are not split."""
        most = max(self.config.model.max_pass_tokens, self.tokens_of_tree)
        return min(most // self.tokens_of_tree, self.step_games) * self.tokens_of_tree

    @property
    def step_games(self) -> int:
        """Games of an actor's step."""
        return min(self.config.update.batch_games, self.games_to_choose)

    @property
    def games_to_choose(self) -> int:
        """Games that the actor's steps choose from: the newest or the replay, or the best of them."""
        config = self.config
        stored = config.rollout.games if config.learns_from_newest else config.buffer.max_trajectories
        share = config.filtered_bc.share if config.algorithm == "filtered-bc" else 1.0
        return max(1, round(share * stored))

    # -- the phases --------------------------------------------------------------------------------

    def rollout(self) -> Phase:
        c, g, games = self.costs, self.game, self.config.rollout.games
        slots = min(games, self.config.rollout.num_slots)
        tokens = games * g.game_tokens
        flops = self.reading.of(tokens, games * g.game_pairs) + games * g.game_actions * c.head_flops
        steps = math.ceil(games / slots) * g.game_actions
        read = steps * (c.weight_bytes + slots * c.kv_bytes * g.game_tokens / 2)
        room = min(1 << max(6, math.ceil(math.log2(g.game_tokens))), c.max_positions)  # rows grow by doubling
        return Phase("rollout", tokens, flops, read, slots * (c.kv_bytes * room + self._sampled_row))

    def insert(self) -> Phase:
        return self._read_once("insert", self.config.rollout.games)

    def _read_once(self, name: str, games: float, *, scores: bool = True) -> Phase:
        """Games through the start policy, with the log-probs of their actions or without."""
        c, g = self.costs, self.game
        tokens = games * g.game_tokens
        flops = self.reading.of(tokens, games * g.game_pairs) + scores * games * g.game_actions * c.head_flops
        passes = math.ceil(tokens / self.config.model.max_pass_tokens)
        memory = self.reading.memory * min(self.config.model.max_pass_tokens, tokens)
        return Phase(name, tokens, flops, passes * c.weight_bytes, memory)

    def value_head(self) -> Phase:
        """PPO's: it reads the newest games once more for its advantages, and then fits the two heads to returns."""
        ppo, g, games = self.config.ppo, self.game, self.config.rollout.games
        with torch.device("meta"):
            numbers = sum(
                p.numel() for p in StateValue(self.costs.hidden_size, self.config.critic.hidden_size).parameters()
            )
        steps = games * (g.turns if ppo.level == "turn" else g.game_actions)
        found = self._read_once("critic", games, scores=False)
        return replace(found, flops=found.flops + 2.0 * numbers * (steps * (1 + 3 * ppo.value_epochs) + games))

    def critic(self) -> Phase:
        c, g, critic = self.costs, self.game, self.config.critic
        transitions = critic.epochs * critic.batch_turns
        flops = transitions * 2.0 * self.head_numbers * 4  # forward, backward twice that, the target's forward
        tokens, read, memory = 0.0, critic.epochs * 5.0 * _FLOAT * self.head_numbers, 0.0
        if self.trunk != "frozen":
            games = transitions / g.turns
            of_target = self.trunk != "shared"
            training = c.whole if self.trunk == "separate" else self.training
            flops += training.of(games * g.game_tokens, games * g.game_pairs)
            flops += of_target * self.reading.of(games * g.game_tokens, games * g.game_pairs)
            tokens += games * g.game_tokens * (1 + of_target)
            read += critic.epochs * c.weight_bytes * (3 + of_target)
            # The target's trunk reads while the other's activations wait for their backward.
            kept = training.memory + of_target * self.reading.memory
            gradients = c.weight_bytes if self.trunk == "separate" else c.trained_bytes
            memory = kept * critic.batch_turns / g.turns * g.game_tokens + gradients
        if critic.value_target == "resample":
            # Every game of the replay that is drawn from is read once to sample, once to be valued, with its branches.
            games = self._distinct_games
            own = transitions * g.action_tokens
            pairs = games * g.game_pairs + own * g.history_tokens
            flops += 2 * self.reading.of(games * g.game_tokens + own, pairs) + 2 * own * c.head_flops
            tokens += 2 * (games * g.game_tokens + own)
            batches = math.ceil(games / self.config.actor.batch_games)
            read += batches * (g.action_tokens + 2) * c.weight_bytes
            memory = max(memory, self._sampling_memory(self.config.actor.batch_games, transitions / games))
        return Phase("critic", tokens, flops, read, memory)

    @property
    def _distinct_games(self) -> float:
        """Expected number of different games that the critic's draws of an iteration are from."""
        critic, stored = self.config.critic, self.config.buffer.max_trajectories
        if self.trunk == "frozen":
            drawn, times = 1.0, critic.epochs * critic.batch_turns
        else:  # whole games, none twice in a step
            drawn, times = min(stored, max(1.0, round(critic.batch_turns / self.game.turns))), critic.epochs
        return stored * (1 - (1 - drawn / stored) ** times)

    def actor(self) -> Phase:
        c, g, update = self.costs, self.game, self.config.update
        steps, games = update.epochs, self.step_games
        if not steps:  # CHAI: the policy never moves
            return Phase("actor", 0.0, 0.0, 0.0, 0.0)
        own = games * self.branches * g.action_tokens
        tokens, pairs = games * self.tokens_of_tree, games * g.game_pairs + own * g.history_tokens
        flops = self.training.of(tokens, pairs)
        flops += games * self._scored * c.head_flops * (2 if c.adapted else 3)  # the gradient is made in the forward
        passes = math.ceil(tokens / self._tokens_of_pass)
        passed, read = tokens, passes * 3.0 * c.weight_bytes
        memory = self.pass_memory * self._tokens_of_pass + self.vocabulary + min(2, passes) * c.trained_bytes
        if self.is_archer:
            reads = 1 if self.trunk == "frozen" else 2  # by the critic's trunk and by the reference
            flops += reads * (self.reading.of(tokens, pairs) + games * self._scored * c.head_flops)
            passed += reads * tokens
            read += reads * passes * c.weight_bytes
        if self.grows_tree:
            flops += self.reading.of(tokens, pairs) + own * c.head_flops
            passed += tokens
            read += (1 + g.action_tokens) * c.weight_bytes
            memory = max(memory, self.sampling)
        found = Phase("actor", steps * passed, steps * flops, steps * read, memory)
        if update.kl_coef > 0 and self.config.algorithm == "filtered-bc" and not self.config.learns_from_newest:
            newest = min(
                1.0, self.config.rollout.games / self.config.buffer.max_trajectories
            )  # whose log-probs are known
            asked = self._read_once("", (1 - newest) * self.games_to_choose)
            found = replace(found, tokens=found.tokens + asked.tokens, flops=found.flops + asked.flops)
        return found

    def _sampling_memory(self, games: float, branches: float) -> float:
        """Of fresh actions: keys and values as they were recorded and by heads; the branches' own; the logits."""
        g, rows = self.game, games * branches
        kept = self.costs.kv_bytes * (2 * games * g.game_tokens + rows * g.action_tokens)
        return kept + self.reading.memory * games * g.game_tokens + rows * self._sampled_row

    # -- beside the original's way -----------------------------------------------------------------

    def savings(self, resident: float, flops: float) -> Iterator[Saving]:
        c, g = self.costs, self.game
        row = g.history_tokens + g.action_tokens  # a turn with everything before it
        yield Saving("one sequence a game, not a row a turn: tokens scored", g.game_tokens, g.turns * row, "tokens")
        yield Saving("the vocabulary at action tokens alone", g.game_actions, g.turns * row, "rows")
        copies = 3 * c.weight_bytes + 2 * self._optimizer(c.num_parameters, c.itemsize)
        yield Saving("one base: weights and moments that stay", resident, copies, "bytes")
        yield Saving("the whole iteration", flops, self.original_flops(), "FLOPs")

    def original_flops(self) -> float:
        """The same games, transitions and fresh actions as YifeiZhou02/ArCHer computes them.

        A row a turn, an encoder of the model's own size that reads observation and action at every draw, a' sampled at
        every draw, logits of all tokens. Its padding and its 32 tokens an action are not counted.
        """
        c, g, critic = self.costs, self.game, self.config.critic
        row = g.history_tokens + g.action_tokens
        next_row = row + g.observation_tokens
        forward = self.reading.of(row, row * (row + 1) / 2)
        trained = self.reading.of(3 * row, 3.5 * row * (row + 1) / 2)  # nothing is computed again but scores
        following = self.reading.of(next_row, next_row * (next_row + 1) / 2)
        sampled = forward + g.action_tokens * c.head_flops
        total = self.config.rollout.games * g.turns * sampled
        if self.is_archer:
            draws = critic.epochs * critic.batch_turns
            total += draws * (trained + forward + following)  # online; the target's of (s, a') and of s'
            total += draws * sampled
        actions = self.config.update.epochs * self.step_games * (self.branches or g.turns)
        # sampled, valued, and scored with the logits of every token
        total += actions * ((sampled + forward if self.is_archer else 0) + trained + 3 * row * c.head_flops)
        return total
