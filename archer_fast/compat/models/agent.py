"""What the original's agents share: a language model, a critic with its target, and how they are asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from archer_fast.adapter_folder import import_peft
from archer_fast.compat.arguments import ignored
from archer_fast.compat.faults import Compat, choose_fixes
from archer_fast.compat.generation import action_logprobs, prompts_of, scored_actions
from archer_fast.compat.models.critic import DoubleCritic
from archer_fast.compat.models.shared_critic import Mode, check_mode, share_trunk
from archer_fast.compat.overrides import ours
from archer_fast.ops import polyak_


class Agent(nn.Module):
    """A policy LM, its tokenizer, and a critic with its target: DoubleCritic, or SharedCritic of mode "shared"."""

    def __init__(
        self,
        device: torch.device | str,
        accelerator: Any,
        *,
        policy_lm: str,
        critic_lm: str,
        cache_dir: str | None,
        do_sample: bool,
        temperature: float,
        max_new_tokens: int,
        eos_str: str | None,
        template: str | None = None,
        use_lora: bool = False,
        dtype: torch.dtype | None = None,
        mode: Mode = "exact",
        fix: Iterable[str] | None = None,
        compat: Compat | None = None,
        others: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_mode(mode)
        ignored(type(self).__name__, others or {})
        self.fixes = choose_fixes(fix, compat)
        self.tokenizer = AutoTokenizer.from_pretrained(policy_lm, cache_dir=cache_dir)
        if self.tokenizer.eos_token is None:
            raise ValueError(f"policy_lm: wanted a tokenizer with an eos_token, got that of {policy_lm!r}")
        self.tokenizer.truncation_side = "left"
        self.tokenizer.pad_token = self.tokenizer.eos_token
        precision = {} if dtype is None else {"dtype": dtype}
        model: Any = AutoModelForCausalLM.from_pretrained(policy_lm, cache_dir=cache_dir, **precision)
        self.model = model.to(device)
        if use_lora:
            self.model = _with_adapters(self.model)
        self.device, self.accelerator, self.policy_lm, self.template = device, accelerator, policy_lm, template
        self.do_sample, self.temperature, self.max_new_tokens = do_sample, temperature, max_new_tokens
        self.eos_str = eos_str
        self.critic: Any
        self.target_critic: Any
        if mode == "shared":
            share_trunk(self)
        else:
            self.critic, self.target_critic = (
                DoubleCritic(device, accelerator, critic_lm=critic_lm, cache_dir=cache_dir) for _ in range(2)
            )
            self.target_critic.load_state_dict(self.critic.state_dict())

    def prepare(self) -> None:
        """Hand model, critic and target critic to the accelerator."""
        self.model, self.critic, self.target_critic = self.accelerator.prepare(
            self.model, self.critic, self.target_critic
        )

    @ours
    def get_log_prob(self, observation: Sequence[str], action: Sequence[str]) -> Tensor | tuple[Tensor, ...]:
        """log p(action | observation) [n], differentiable; (values, log-probs, mask) where the model has values."""
        return action_logprobs(self, prompts_of(self, observation), scored_actions(self, action))

    @ours
    def soft_update_target_critic(self, tau: float) -> None:
        """target <- (1 - tau) target + tau online."""
        with torch.no_grad():
            polyak_(list(self.target_critic.parameters()), list(self.critic.parameters()), tau)

    def get_q(self, observation: Sequence[str], action: Sequence[str], detach_model: bool = False) -> Any:
        """q1, q2 of the critic, each [n, 1]."""
        return self._critic_of(self.critic).get_q(observation, action, detach_model=detach_model)

    def get_v(self, inputs: Sequence[str], detach_model: bool = False) -> Any:
        """v1, v2 of the critic, each [n, 1]."""
        return self._critic_of(self.critic).get_v(inputs, detach_model=detach_model)

    def get_target_q(self, observation: Sequence[str], action: Sequence[str], detach_model: bool = False) -> Any:
        """q1, q2 of the target critic, each [n, 1]."""
        return self._critic_of(self.target_critic).get_q(observation, action, detach_model=detach_model)

    def _critic_of(self, critic: Any) -> Any:
        return self.accelerator.unwrap_model(critic)


def _with_adapters(model: Any) -> Any:
    """LoRA as the original sets it up."""
    peft = import_peft("use_lora: wanted False")
    config = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )  # fmt: skip
    return peft.get_peft_model(model, config)
