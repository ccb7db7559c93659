"""Frozen-trunk features of every turn in the buffer, so that critic epochs cost the heads alone."""

from __future__ import annotations

import torch
from torch import Tensor

from archer_fast.critic import ActionFeatures, GameFeatures, StateFeatures


class FeatureCache:
    """Rings of features addressed by the buffer's turn and trajectory ids (id modulo capacity).

    Both kinds of id count up and the live ones are a contiguous range, so a ring at least as long as
    that range never mixes two of them. Capacity doubles when the range outgrows it. `trunk_version`
    is the fingerprint of the weights that made the features.
    """

    def __init__(self, trunk_size: int, device: torch.device, trunk_version: int) -> None:
        self.trunk_version = trunk_version
        self._live_turns = (0, 0)
        self._live_games = (0, 0)
        self._state = torch.zeros(1024, trunk_size, device=device)
        self._action = torch.zeros(1024, trunk_size, device=device)
        self._logprob = torch.zeros(1024, device=device)
        self._final = torch.zeros(128, trunk_size, device=device)

    def insert(
        self,
        features: GameFeatures,
        first_turn: int,
        first_game: int,
        live_turns: tuple[int, int],
        live_games: tuple[int, int],
    ) -> None:
        """Features of games just pushed: their turns are first_turn.., their trajectories first_game.. .

        live_turns, live_games: the buffer's [first, end) id ranges after the push. Games that the
        push itself already evicted are skipped.
        """
        self._reserve(live_turns, live_games)
        for ring, values, first, low in (
            (self._state, features.state.hidden, first_turn, live_turns[0]),
            (self._action, features.action.hidden, first_turn, live_turns[0]),
            (self._logprob, features.action.logprob, first_turn, live_turns[0]),
            (self._final, features.final.hidden, first_game, live_games[0]),
        ):
            ids = torch.arange(first, first + values.shape[0], device=values.device)
            keep = ids >= low
            ring[ids[keep] % ring.shape[0]] = values[keep].to(ring.dtype)

    def states(self, turn_ids: Tensor, turn: Tensor) -> StateFeatures:
        """turn_ids [n] int64 (live), turn [n] their index in the game."""
        return StateFeatures(self._state[turn_ids % self._state.shape[0]], turn)

    def actions(self, turn_ids: Tensor) -> ActionFeatures:
        at = turn_ids % self._state.shape[0]
        return ActionFeatures(self._action[at], self._logprob[at])

    def next_states(self, turn_ids: Tensor, turn: Tensor, is_last: Tensor, trajectory_ids: Tensor) -> StateFeatures:
        """The state after each action: the next turn's, or the game's final observation."""
        following = self._state[(turn_ids + 1) % self._state.shape[0]]
        final = self._final[trajectory_ids % self._final.shape[0]]
        return StateFeatures(torch.where(is_last[:, None], final, following), turn + 1)

    def _reserve(self, live_turns: tuple[int, int], live_games: tuple[int, int]) -> None:
        for names, live, old_live in (
            (("_state", "_action", "_logprob"), live_turns, self._live_turns),
            (("_final",), live_games, self._live_games),
        ):
            for name in names:
                ring: Tensor = getattr(self, name)
                capacity = ring.shape[0]
                while capacity < live[1] - live[0]:
                    capacity *= 2
                if capacity > ring.shape[0]:
                    grown = ring.new_zeros(capacity, *ring.shape[1:])
                    first = min(max(old_live[0], live[0]), old_live[1])  # a push may evict all that was there
                    kept = torch.arange(first, old_live[1], device=ring.device)
                    grown[kept % capacity] = ring[kept % ring.shape[0]]
                    setattr(self, name, grown)
        self._live_turns, self._live_games = live_turns, live_games

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that restore this cache exactly."""
        return {
            "state": self._state,
            "action": self._action,
            "logprob": self._logprob,
            "final": self._final,
            "live": torch.tensor([*self._live_turns, *self._live_games, self.trunk_version]),
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        live = tensors["live"].tolist()
        if live[4] != self.trunk_version:
            raise ValueError(
                f"cache.live: features of a trunk {live[4]:08x}, but the start policy is {self.trunk_version:08x}"
            )
        device = self._state.device
        self._state, self._action = tensors["state"].to(device), tensors["action"].to(device)
        self._logprob, self._final = tensors["logprob"].to(device), tensors["final"].to(device)
        self._live_turns, self._live_games = (live[0], live[1]), (live[2], live[3])
