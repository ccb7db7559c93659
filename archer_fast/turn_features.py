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
    log p(action) in float32. Behind the rows of a game's turns comes one for the state after the last action.

    Of a trunk with H = 2 in bfloat16, whose rows have 12 bytes, a game of one turn is two rows:

        state 1 2 | action 3 4 | logprob -0.5
        state 5 6 | action 0 0 | logprob 0       (the final state; the rest is not read)

    Every part lies at a multiple of its own size, so what comes back are views of the rows.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.state_bytes = hidden_size * dtype.itemsize
        self._logprob_at = -(-2 * self.state_bytes // 4) * 4
        unit = max(dtype.itemsize, 4)
        self.row_bytes = -(-(self._logprob_at + 4) // unit) * unit

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
        state, action, logprob = self._parts(rows)
        assert features.state.hidden.dtype == state.dtype, (features.state.hidden.dtype, state.dtype)
        at_turns = torch.from_numpy(np.delete(np.arange(rows.shape[0]), final)).to(device, non_blocking=True)
        state[at_turns], action[at_turns] = features.state.hidden, features.action.hidden
        logprob[at_turns] = features.action.logprob.float()
        state[torch.from_numpy(final).to(device, non_blocking=True)] = features.final.hidden
        made: UInt8 = rows.cpu().numpy()
        return made

    def read(self, rows: FeatureRows, turn: Tensor) -> tuple[StateFeatures, ActionFeatures, StateFeatures]:
        """States, actions and the states behind them, of turns with these indices in their games [n], on `turn`'s
        device. `rows` were read with next_bytes = state_bytes."""
        state, action, logprob = self._parts(torch.from_numpy(rows.rows).to(turn.device, non_blocking=True))
        behind = torch.from_numpy(rows.next_rows).to(turn.device, non_blocking=True).view(self.dtype)
        return StateFeatures(state, turn), ActionFeatures(action, logprob), StateFeatures(behind, turn + 1)

    def _parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views: state [n, H], action [n, H], logprob [n]."""
        middle, end = self.state_bytes, 2 * self.state_bytes
        logprob = rows[:, self._logprob_at : self._logprob_at + 4].view(torch.float32).squeeze(1)
        return rows[:, :middle].view(self.dtype), rows[:, middle:end].view(self.dtype), logprob
