"""An agent's language model asked in few packed passes: sampled actions, and log-probs of actions, for strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from archer_fast.backbone import Backbone, borrowed
from archer_fast.compat.packed_texts import PackedTexts
from archer_fast.compat.text_engine import TextEngine
from archer_fast.ops import linear_logprobs, linear_policy_loss

# Of a generation config: what the packed sampler does, or what concerns nobody here.
_UNDERSTOOD = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "transformers_version",
    "_from_model_config",
    "max_length",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "use_cache",
}
# And the values at which everything else does nothing: these, and None and False.
_NEUTRAL = {"top_p": 1, "typical_p": 1, "repetition_penalty": 1, "num_beams": 1, "num_return_sequences": 1}
HF_TOP_K = 50  # what `generate` samples from where nobody says otherwise


class Unsupported(ValueError):
    """Why a model cannot be asked in packed passes."""


def base_model(model: Any) -> Any:
    """The transformers model inside an adapter wrapper (peft's get_base_model), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class PackedPolicy:
    """The language model of one agent, read through the agent's own attributes at every call.

    Prompts are tokenised once; a prompt that begins another is computed as part of it; the vocabulary meets sampled and
    scored tokens alone.
    """

    def __init__(self, agent: Any) -> None:
        self.texts = PackedTexts(agent.tokenizer)
        self.num_sampled_actions = 0
        self._may_end: dict[str, Tensor] = {}
        self._checked: int | None = None  # id of the model that `_check` found fit

    def check(self, agent: Any) -> None:
        """Unsupported where packed passes cannot read the agent's model."""
        with self._open(agent):
            pass

    def sample(self, agent: Any, prompts: Sequence[str], *, top_k: int | None = None) -> list[str]:
        """One action a prompt (its template filled in), as `generate` would sample it: by the agent's do_sample,
        temperature, max_new_tokens and the model's generation config, without special tokens, not yet cut at eos_str.

        Behind eos_str nothing more is sampled. top_k: instead of the generation config's; 0 is the full softmax.
        Errors: Unsupported where the model or its generation config needs what packed passes do not do.
        """
        with self._open(agent) as backbone, torch.no_grad():
            config = _unwrapped(agent).generation_config
            settings = config.to_diff_dict()
            others = {name: value for name, value in settings.items() if value and name not in _UNDERSTOOD}
            if odd := sorted(name for name, value in others.items() if value != _NEUTRAL.get(name)):
                raise Unsupported(f"generation_config: {', '.join(odd)}")
            chosen = settings.get("top_k") if top_k is None else top_k
            engine = TextEngine(
                backbone, agent, self._ending_tokens(agent), _ids(settings.get("eos_token_id")),
                top_k=HF_TOP_K if chosen is None else chosen,
            )  # fmt: skip
            unique, inverse = np.unique(np.array(prompts, object), return_inverse=True)
            counts = np.bincount(inverse, minlength=unique.size)
            drawn: list[list[str]] = [[] for _ in unique]
            for batch, rows, asked in self.texts.states(
                unique.tolist(), counts, int(agent.max_new_tokens), backbone.device
            ):
                alternatives = engine.sample_alternatives(batch, rows)
                ids, used = alternatives.action_ids[alternatives.used], alternatives.lengths[alternatives.used]
                texts = engine.texts([row[:n] for row, n in zip(ids.tolist(), used.tolist(), strict=True)])
                for prompt, text in zip(asked.tolist(), texts, strict=True):
                    drawn[prompt].append(text)
            self.texts.num_tokens += engine.num_forward_tokens
            self.num_sampled_actions += len(prompts)
            return [drawn[i].pop() for i in inverse.tolist()]

    def logprobs(self, agent: Any, prompts: Sequence[str], actions: Sequence[str]) -> Tensor:
        """log p(action | prompt) [n] float32, differentiable: the sum over the action's own tokens; 0 for none."""
        with self._open(agent, dropout=True) as backbone:
            total = torch.zeros(len(prompts), device=backbone.device)
            for score in self.texts.scores(backbone, prompts, actions):
                out = linear_logprobs(
                    score.hidden, backbone.lm_head_weight, score.tree.target_ids, rows=score.tree.rows
                ).logprobs
                pairs = torch.from_numpy(score.pairs).to(out.device)
                total = total.index_add(0, pairs[score.tree.branch_ids], out)
            return total

    def policy_gradient(
        self,
        agent: Any,
        prompts: Sequence[str],
        actions: Sequence[str],
        weights: Tensor,
        backward: Callable[[Tensor], object],
    ) -> Tensor:
        """Differentiate -sum_i w_i log p(a_i | s_i), pass by pass; weights [n].

        Returns the log-probs [n], float32.
        """
        with self._open(agent, dropout=True) as backbone:
            total = torch.zeros(len(prompts), device=backbone.device)
            for score in self.texts.scores(backbone, prompts, actions):
                pairs = torch.from_numpy(score.pairs).to(total.device)[score.tree.branch_ids]
                out = linear_policy_loss(
                    score.hidden, backbone.lm_head_weight, score.tree.target_ids, weights.float()[pairs],
                    rows=score.tree.rows, num_actions=1,
                )  # fmt: skip
                backward(out.loss)
                total.index_add_(0, pairs, out.logprobs)
            return total

    @contextmanager
    def _open(self, agent: Any, *, dropout: bool = False) -> Iterator[Backbone]:
        """The agent's model as a packed trunk, under the accelerator's autocast."""
        model = base_model(_unwrapped(agent))
        if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
            raise Unsupported(f"model: wanted a causal LM of transformers, got {type(model).__name__}")
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            raise Unsupported("model: its lm_head has a bias")
        rates = (getattr(model.config, name, 0) for name in ("attn_pdrop", "attention_dropout"))
        if dropout and model.training and any(rates):
            raise Unsupported("model: it is in training mode, with dropout in its attention")
        with borrowed(model, agent.tokenizer, dropout=dropout) as backbone:
            if self._checked != id(model):
                try:
                    backbone.check_logits(str(agent.policy_lm))
                except (ValueError, AttributeError, TypeError) as error:  # e.g. a model that returns values too
                    raise Unsupported(str(error)) from error
                self._checked = id(model)
            with autocast_of(agent):
                yield backbone

    def _ending_tokens(self, agent: Any) -> Tensor | None:
        """[V] bool: tokens whose text holds the last character of eos_str; None where there is no eos_str."""
        text = agent.eos_str
        if not text:
            return None
        if text not in self._may_end:
            size = int(base_model(_unwrapped(agent)).get_output_embeddings().weight.shape[0])
            texts = agent.tokenizer.batch_decode([[i] for i in range(min(size, len(agent.tokenizer)))])
            # A character of several bytes may come in pieces: then any token can end it.
            holds = torch.tensor([not text[-1].isascii() or text[-1] in own for own in texts])
            self._may_end[text] = torch.cat([holds, torch.zeros(size - holds.numel(), dtype=torch.bool)])
        return self._may_end[text]


_POLICIES: WeakKeyDictionary[Any, PackedPolicy] = WeakKeyDictionary()


def policy_of(agent: Any) -> PackedPolicy:
    """The agent's packed policy, made at the first call; another tokenizer makes another one."""
    found = _POLICIES.get(agent)
    if found is None or found.texts.tokens.tokenizer is not agent.tokenizer:
        found = _POLICIES[agent] = PackedPolicy(agent)
    return found


def _unwrapped(agent: Any) -> Any:
    return agent.accelerator.unwrap_model(agent.model)


def autocast_of(agent: Any) -> AbstractContextManager[object]:
    mixed = getattr(agent.accelerator, "mixed_precision", "no") not in (None, "no")
    return agent.accelerator.autocast() if mixed else nullcontext()


def _ids(eos: int | list[int] | None) -> list[int]:
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
