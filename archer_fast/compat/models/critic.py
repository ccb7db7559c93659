"""DoubleCritic: the original's twin Q and V heads on a text encoder's pooled states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from archer_fast.compat.arguments import ignored
from archer_fast.compat.encoder import encode, heads, tokens_of
from archer_fast.compat.overrides import ours


def _head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class DoubleCritic(nn.Module):
    """Q1, Q2 on (observation, action) and V1, V2 on the observation, each text encoded apart by `base_lm`.

    state_dict: base_lm.*, critic1.{0,2,4}.*, critic2.*, v_critic1.*, v_critic2.*, as the original's.
    """

    def __init__(
        self,
        device: torch.device | str,
        accelerator: Any,
        critic_lm: str = "roberta-base",
        cache_dir: str | None = None,
        in_dim: int | None = None,
        out_dim: int = 1,
        **kwargs: Any,
    ) -> None:
        """in_dim: the encoder's width, which None reads from the encoder (the original takes 768 for granted).

        Errors: ValueError where in_dim is another width than the encoder's, or the encoder has no pooled output.
        """
        super().__init__()
        ignored("DoubleCritic", kwargs)
        self.device, self.accelerator = device, accelerator
        self.base_lm = AutoModel.from_pretrained(critic_lm, cache_dir=cache_dir).to(device)
        self.base_tokenizer = AutoTokenizer.from_pretrained(critic_lm, cache_dir=cache_dir)
        self.base_tokenizer.truncation_side = "left"
        width = int(self.base_lm.config.hidden_size)
        if in_dim is not None and in_dim != width:
            raise ValueError(f"in_dim: wanted {width}, the width of critic_lm {critic_lm!r}, got {in_dim}")
        if getattr(self.base_lm, "pooler", None) is None:
            raise ValueError(
                f"critic_lm: wanted an encoder with a pooled output such as roberta-base, got {critic_lm!r}"
            )
        self.critic1 = _head(2 * width, width, out_dim).to(device)
        self.critic2 = _head(2 * width, width, out_dim).to(device)
        self.v_critic1 = _head(width, width, out_dim).to(device)
        self.v_critic2 = _head(width, width, out_dim).to(device)

    @ours
    def forward(
        self, observation: Sequence[str], action: Sequence[str], detach_model: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q1, q2, v1, v2, each [n, out_dim]; detach_model: no gradient into the encoder."""
        with torch.no_grad() if detach_model else nullcontext():
            states = encode(self, [*observation, *action], tokens_of(self))
        return heads(self, states[: len(observation)], states[len(observation) :])

    def get_q(
        self, observation: Sequence[str], action: Sequence[str], detach_model: bool = False
    ) -> tuple[Tensor, Tensor]:
        """q1, q2, each [n, out_dim]."""
        q1, q2, _, _ = self(observation, action, detach_model=detach_model)
        return q1, q2

    def get_v(self, observation: Sequence[str], detach_model: bool = False) -> tuple[Tensor, Tensor]:
        """v1, v2, each [n, out_dim]."""
        with torch.no_grad() if detach_model else nullcontext():
            states = encode(self, observation, tokens_of(self))
        return self.v_critic1(states), self.v_critic2(states)

    def check_state(self, where: str, state: Mapping[str, Any]) -> None:
        """ValueError for the state of a `SharedCritic`."""
        if "trunk_fingerprint" in state:
            raise ValueError(f'{where}: wanted a critic with an encoder (mode="exact"), got heads of mode="shared"')
