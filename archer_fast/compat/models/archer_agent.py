"""ArcherAgent, as the original names and calls it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from archer_fast.compat.faults import Compat
from archer_fast.compat.generation import finish_action, prompts_of, sample_texts
from archer_fast.compat.models.agent import Agent
from archer_fast.compat.models.shared_critic import Mode
from archer_fast.compat.overrides import ours


class ArcherAgent(Agent):
    """A policy LM that acts by one sampled text a turn, and its critic.

    mode: "shared" gives it the critic of `models.shared_critic`, reading no critic_lm: not the original's numbers.
    fix, compat: which faults of the original are mended (`archer_fast.compat.faults`).
    """

    def __init__(
        self,
        device: torch.device | str,
        accelerator: Any,
        policy_lm: str = "gpt2",
        critic_lm: str = "roberta-base",
        cache_dir: str | None = "~/.cache",
        dropout: float = 0.5,
        TEMPLATE: str | None = None,
        use_lora: bool = False,
        do_sample: bool = True,
        temperature: float = 1.0,
        max_new_tokens: int = 32,
        use_bfloat16: bool = False,
        eos_str: str | None = "\n",
        *,
        mode: Mode = "exact",
        fix: Iterable[str] | None = None,
        compat: Compat | None = None,
        **kwargs: Any,
    ) -> None:
        """Errors: ValueError for an unknown fix, a tokenizer without eos_token, an encoder without pooled output."""
        super().__init__(
            device, accelerator, policy_lm=policy_lm, critic_lm=critic_lm, cache_dir=cache_dir, do_sample=do_sample,
            temperature=temperature, max_new_tokens=max_new_tokens, eos_str=eos_str, template=TEMPLATE,
            use_lora=use_lora, dtype=torch.bfloat16 if use_bfloat16 else None, mode=mode, fix=fix, compat=compat,
            others=kwargs,
        )  # fmt: skip
        self.dropout = nn.Dropout(p=dropout)  # nothing calls it, here or in the original: forks may
        self.softmax = nn.Softmax(dim=-1)

    @ours
    def get_action(self, observation: Sequence[str]) -> list[str]:
        """One action an observation, cut before eos_str."""
        return [finish_action(self, text) for text in sample_texts(self, prompts_of(self, observation))]
