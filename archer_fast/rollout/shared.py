"""One rollout played by all ranks, each its share of the games."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from archer_fast.envs.base import TextEnv
from archer_fast.ranks import Ranks
from archer_fast.rollout.guard import Encode
from archer_fast.rollout.interact import Decode, Engine, Rollout, check_dropped, play_games
from archer_fast.trajectory import Trajectory

_TOLD = ("seed", "kinds", "won")  # of a game's info, whatever else an environment puts there: it may not travel


def play_shared(
    ranks: Ranks,
    engine: Engine,
    make_env: Callable[[], TextEnv],
    encode: Encode,
    decode: Decode,
    seeds: Sequence[int],
    *,
    max_dropped_share: float,
    on_call: Callable[[str], None],
    **more: Any,
) -> Rollout:
    """`play_games` of these seeds, each by one rank; every rank is given all games, in the order of their seeds.

    Errors: TooManyDroppedGames, by the games of all ranks, on every rank.
    """
    mine = play_games(
        engine,
        make_env,
        encode,
        decode,
        ranks.share(seeds),
        max_dropped_share=max_dropped_share,
        num_games=len(seeds),
        on_call=on_call,
        **more,
    )
    if ranks.size == 1:
        return mine
    told = [replace(game, info=_told(game.info)) for game in mine.trajectories]
    on_call("waiting for the other ranks' games")
    every: list[Rollout] = ranks.gather(replace(mine, trajectories=told))
    games: list[Trajectory] = [game for theirs in every for game in theirs.trajectories]
    whole = Rollout(
        sorted(games, key=lambda game: game.info["seed"]),
        sum(theirs.num_dropped for theirs in every),
        sum(theirs.num_truncated_by_window for theirs in every),
    )
    for theirs in every:
        whole.drop_causes.update(theirs.drop_causes)
    check_dropped(whole, len(seeds), max_dropped_share)
    return whole


def _told(info: Mapping[str, Any]) -> dict[str, Any]:
    return {name: info[name] for name in _TOLD if name in info}
