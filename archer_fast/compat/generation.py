"""Actions and their log-probs for observations as an agent of the original sees them: packed, or plainly padded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from archer_fast.compat.faults import MENDED_BY_DEFAULT
from archer_fast.compat.policy import Unsupported, policy_of
from archer_fast.compat.text_engine import strip_newlines
from archer_fast.compat.token_cache import MAX_LENGTH

T = TypeVar("T")


def fixes_of(owner: Any) -> frozenset[str]:
    """The faults that an agent, trainer or buffer has mended."""
    found: frozenset[str] = getattr(owner, "fixes", MENDED_BY_DEFAULT)
    return found


def prompts_of(agent: Any, observations: Sequence[str]) -> list[str]:
    """The observations in the agent's template, where it has one."""
    template = getattr(agent, "template", None)
    return list(observations) if template is None else [template.replace("{obs}", text) for text in observations]


def finish_action(agent: Any, text: str, *, keep_eos: bool = False) -> str:
    """A sampled text as the action that the environment hears."""
    text = strip_newlines(text)
    if agent.eos_str is None:
        return text
    return text.split(agent.eos_str)[0] + (agent.eos_str if keep_eos else "")


def scored_actions(agent: Any, actions: Sequence[str]) -> list[str]:
    """The actions as their log-probs count them."""
    ending = agent.eos_str if "stop_token" in fixes_of(agent) and agent.eos_str else ""
    return [action + ending for action in actions]


def sample_texts(agent: Any, prompts: Sequence[str]) -> list[str]:
    """One sampled text a prompt, special tokens gone, not yet cut at eos_str."""
    top_k = 0 if "top_k" in fixes_of(agent) else None
    return _packed_or_plain(
        agent,
        "sample",
        lambda: policy_of(agent).sample(agent, prompts, top_k=top_k),
        lambda: sample_texts_plain(agent, prompts),
    )


def action_logprobs(agent: Any, prompts: Sequence[str], actions: Sequence[str]) -> Tensor | tuple[Tensor, ...]:
    """log p(action | prompt) [n], differentiable; or (values, log-probs, mask) [n, A] of a model that has values."""
    return _packed_or_plain(
        agent,
        "score",
        lambda: policy_of(agent).logprobs(agent, prompts, actions),
        lambda: action_logprobs_plain(agent, prompts, actions),
    )


def can_pack(agent: Any, what: Literal["sample", "score"]) -> bool:
    """Whether the agent's model is asked in packed passes; of the reason why not there was a warning."""
    return "padding" in fixes_of(agent) and what not in getattr(agent, "_plain_because", {})


def _packed_or_plain(
    agent: Any, what: Literal["sample", "score"], packed: Callable[[], T], plain: Callable[[], T]
) -> T:
    if can_pack(agent, what):
        try:
            return packed()
        except Unsupported as reason:
            agent._plain_because = getattr(agent, "_plain_because", {}) | {what: str(reason)}
            warnings.warn(f"archer_fast.compat: in padded batches instead of packed passes: {reason}", stacklevel=3)
    return plain()


def sample_texts_plain(agent: Any, prompts: Sequence[str]) -> list[str]:
    """`sample_texts` by one call of `generate`: the plain twin, and what is left for other models."""
    mended = fixes_of(agent)
    with _padding(agent.tokenizer, "left" if "padding" in mended else "right"):
        ids = _tokens(agent, prompts)
    model = agent.accelerator.unwrap_model(agent.model)
    options = {"top_k": 0} if "top_k" in mended else {}
    if agent.do_sample:
        options |= {"temperature": agent.temperature}
    modes = [(module, module.training) for module in model.modules()]
    try:
        if "dropout" in mended:
            model.eval()
        with torch.no_grad():
            out = model.generate(
                **ids, max_new_tokens=agent.max_new_tokens, do_sample=agent.do_sample,
                pad_token_id=agent.tokenizer.eos_token_id, **options,
            )  # fmt: skip
    finally:
        for module, training in modes:
            module.training = training
    texts: list[str] = agent.tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def action_logprobs_plain(agent: Any, prompts: Sequence[str], actions: Sequence[str]) -> Tensor | tuple[Tensor, ...]:
    """`action_logprobs` by one padded forward pass and whole logits."""
    mended = "padding" in fixes_of(agent)
    with _padding(agent.tokenizer, "left" if mended else "right"):
        prompt = _tokens(agent, prompts)
    with _padding(agent.tokenizer, "right"):
        action = _tokens(agent, actions)
    mask = torch.cat([prompt["attention_mask"], action["attention_mask"]], dim=1)
    input_ids = torch.cat([prompt["input_ids"], action["input_ids"]], dim=1).long()
    where = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if mended else {}
    out = agent.model(input_ids=input_ids, attention_mask=mask, **where)
    values, out = out if isinstance(out, tuple) else (None, out)
    rows = slice(prompt["input_ids"].shape[1] - 1, -1)
    chosen = out.logits[:, rows].log_softmax(-1).gather(2, action["input_ids"].long()[..., None]).squeeze(2)
    logprobs = chosen * action["attention_mask"]
    return logprobs.sum(1) if values is None else (values[:, rows], logprobs, action["attention_mask"])


def _tokens(agent: Any, texts: Sequence[str]) -> Any:
    return agent.tokenizer(list(texts), return_tensors="pt", padding=True, max_length=MAX_LENGTH, truncation=True).to(
        agent.device
    )


@contextmanager
def _padding(tokenizer: Any, side: str) -> Iterator[None]:
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        yield
    finally:
        tokenizer.padding_side = before
