"""What the critic reads of a turn, laid out as the rows of bytes that the trajectory buffer keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from archer_fast.backbone import Backbone
from archer_fast.buffer_records import FeatureRows
from archer_fast.critic import ActionFeatures, GameFeatures, StateFeatures
from archer_fast.staging import UInt8


class FeatureLayout:
    """A row is the state's hidden [H], then the action's hidden [H], both in the trunk's own dtype, then
    log p(action) and whether the action is a repeated one, in float32. Behind the rows of a game's turns comes one for
    the state after the last action.

    Of a trunk with H = 2 in bfloat16, whose rows have 16 bytes, a game of one turn is two rows:

        state 1 2 | action 3 4 | logprob -0.5 | repeated 0
        state 5 6 | action 0 0 | logprob 0    | repeated 0       (the final state; the rest is not read)

    Every part lies at a multiple of its own size, so what comes back are views of the rows.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.state_bytes = hidden_size * dtype.itemsize
        self._numbers_at = -(-2 * self.state_bytes // 4) * 4
        unit = max(dtype.itemsize, 4)
        self.row_bytes = -(-(self._numbers_at + 8) // unit) * unit

    @classmethod
    def of(cls, trunk: Backbone) -> FeatureLayout:
        return cls(trunk.hidden_size, trunk.lm_head_weight.dtype)

    def write(self, features: GameFeatures, num_turns: Sequence[int]) -> UInt8:
        """Rows [N + B, row_bytes] of B games of these numbers of turns, N in all, on the host."""
        final = np.cumsum(np.asarray(num_turns) + 1) - 1
        device = features.state.hidden.device
        rows = torch.zeros(
            final.size + features.state.hidden.shape[0], self.row_bytes, dtype=torch.uint8, device=device
        )
        state, action, numbers = self._parts(rows)
        assert features.state.hidden.dtype == state.dtype, (features.state.hidden.dtype, state.dtype)
        at_turns = torch.from_numpy(np.delete(np.arange(rows.shape[0]), final)).to(device, non_blocking=True)
        state[at_turns], action[at_turns] = features.state.hidden, features.action.hidden
        numbers[at_turns] = torch.stack([features.action.logprob.float(), features.action.repeated.float()], -1)
        state[torch.from_numpy(final).to(device, non_blocking=True)] = features.final.hidden
        made: UInt8 = rows.cpu().numpy()
        return made

    def read(self, rows: FeatureRows, turn: Tensor) -> tuple[StateFeatures, ActionFeatures, StateFeatures]:
        """States, actions and the states behind them, of turns with these indices in their games [n], on `turn`'s
        device. `rows` were read with next_bytes = state_bytes."""
        state, action, numbers = self._parts(torch.from_numpy(rows.rows).to(turn.device, non_blocking=True))
        behind = torch.from_numpy(rows.next_rows).to(turn.device, non_blocking=True).view(self.dtype)
        logprob, repeated = numbers.unbind(-1)
        return StateFeatures(state, turn), ActionFeatures(action, logprob, repeated), StateFeatures(behind, turn + 1)

    def _parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views: state [n, H], action [n, H], log-prob and repeated [n, 2]."""
        middle, end = self.state_bytes, 2 * self.state_bytes
        numbers = rows[:, self._numbers_at : self._numbers_at + 8].view(torch.float32)
        return rows[:, :middle].view(self.dtype), rows[:, middle:end].view(self.dtype), numbers
