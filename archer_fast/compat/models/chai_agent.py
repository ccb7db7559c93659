"""CHAIAgent: of a few sampled actions the one that the target critic likes best (CHAI, arXiv 2204.08426)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from archer_fast.compat.faults import Compat
from archer_fast.compat.generation import finish_action, prompts_of, sample_texts
from archer_fast.compat.models.agent import Agent
from archer_fast.compat.models.shared_critic import Mode
from archer_fast.compat.overrides import ours

NUM_CANDIDATES = 5


class CHAIAgent(Agent):
    """A policy LM that never moves, and a critic that chooses among what it says."""

    def __init__(
        self,
        device: torch.device | str,
        accelerator: Any,
        policy_lm: str = "gpt2",
        critic_lm: str = "roberta-base",
        cache_dir: str | None = "~/.cache",
        max_new_tokens: int = 32,
        do_sample: bool = True,
        temperature: float = 1.0,
        eos_str: str = "\n",
        *,
        mode: Mode = "exact",
        fix: Iterable[str] | None = None,
        compat: Compat | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            device, accelerator, policy_lm=policy_lm, critic_lm=critic_lm, cache_dir=cache_dir, do_sample=do_sample,
            temperature=temperature, max_new_tokens=max_new_tokens, eos_str=eos_str, mode=mode, fix=fix,
            compat=compat, others=kwargs,
        )  # fmt: skip
        self.softmax = nn.Softmax(dim=-1)

    @ours
    def get_action(self, observation: Sequence[str]) -> list[str]:
        """The candidate with the greatest min(Q1, Q2) of the target critic, eos_str kept."""
        observation = list(observation)
        return choose_candidates(self, observation, sample_candidates(self, observation))


def sample_candidates(agent: Any, observations: Sequence[str]) -> list[list[str]]:
    """[NUM_CANDIDATES][n] actions."""
    texts = sample_texts(agent, prompts_of(agent, observations) * NUM_CANDIDATES)
    actions = [finish_action(agent, text, keep_eos=True) for text in texts]
    n = len(observations)
    return [actions[i * n : (i + 1) * n] for i in range(NUM_CANDIDATES)]


@torch.no_grad()
def choose_candidates(agent: Any, observations: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[str]:
    """The best candidate [n] of each observation by the target critic as it is now; the first of equals."""
    q1, q2, _, _ = agent.target_critic(
        list(observations) * len(candidates), [action for row in candidates for action in row], detach_model=True
    )
    best: Tensor = torch.minimum(q1, q2).view(len(candidates), len(observations)).argmax(0)
    return [candidates[k][i] for i, k in enumerate(best.tolist())]
