"""An engine that acts by the policy that is trained: what algorithms ask of it beyond playing games."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from archer_fast.backbone import Backbone
from archer_fast.batch import Alternatives, PackedBatch
from archer_fast.rollout.interact import Engine


class PolicyEngine(Engine, Protocol):
    """Samples from the full softmax at one temperature, of whatever the backbone's weights are."""

    backbone: Backbone
    max_tokens: int  # of a game

    @property
    def num_forward_tokens(self) -> int:
        """Tokens that went through the model so far."""
        ...

    def reset(self) -> None:
        """Forget every running game (also needed after the weights changed)."""

    def sample_alternatives(self, batch: PackedBatch, turn_ids: Tensor) -> Alternatives:
        """Fresh actions at given turns, by the weights as they are now.

        turn_ids: [B, R] int64, the turn of `batch` that branch r of game b answers, -1 for none.
        """
        ...
