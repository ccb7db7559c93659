"""An agent's language model asked in few packed passes: sampled actions, and log-probs of actions, for strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from archer_fast.backbone import Backbone, borrowed
from archer_fast.batch import Alternatives, PackedBatch, TreeBatch, plant_tree
from archer_fast.compat.prefixes import branch_rows, group_trunks, share_prefixes, states_batch
from archer_fast.compat.token_cache import TokenCache
from archer_fast.ops import linear_logprobs, linear_policy_loss
from archer_fast.packing import Int64
from archer_fast.rollout.embedded import EmbeddedEngine

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
MAX_PASS_TOKENS = 1 << 15


class Unsupported(ValueError):
    """Why a model cannot be asked in packed passes."""


class Score(NamedTuple):
    """One pass over some (observation, action) pairs."""

    pairs: Int64  # [n] which of the pairs asked for
    tree: TreeBatch  # whose branch b is pair `pairs[b]`
    hidden: Tensor  # [T + M, H]


def base_model(model: Any) -> Any:
    """The transformers model inside an adapter wrapper (peft's get_base_model), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def strip_newlines(text: str) -> str:
    """`text` without its first newlines, three at most."""
    for _ in range(3):
        text = text.removeprefix("\n")
    return text


class PackedPolicy:
    """The language model of one agent, read through the agent's own attributes at every call.

    Prompts are tokenised once; a prompt that begins another is computed as part of it; the vocabulary meets sampled and
    scored tokens alone. `num_*` count what was done.
    """

    def __init__(self, agent: Any) -> None:
        self.tokens = TokenCache(agent.tokenizer)
        self.num_passes = self.num_tokens = self.num_sampled_actions = 0
        self._may_end: dict[str, Tensor] = {}
        self._checked: int | None = None  # id of the model that `_check` found fit

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
            engine = _TextEngine(
                backbone, agent, self._ending_tokens(agent), _ids(settings.get("eos_token_id")),
                top_k=HF_TOP_K if chosen is None else chosen,
            )  # fmt: skip
            unique, inverse = np.unique(np.array(prompts, object), return_inverse=True)
            counts = np.bincount(inverse, minlength=unique.size)
            drawn: list[list[str]] = [[] for _ in unique]
            for batch, rows, asked in self._passes(agent, unique.tolist(), counts, int(agent.max_new_tokens)):
                alternatives = engine.sample_alternatives(batch, rows)
                ids, used = alternatives.action_ids[alternatives.used], alternatives.lengths[alternatives.used]
                texts = engine.texts([row[:n] for row, n in zip(ids.tolist(), used.tolist(), strict=True)])
                for prompt, text in zip(asked.tolist(), texts, strict=True):
                    drawn[prompt].append(text)
            self.num_tokens += engine.num_forward_tokens
            self.num_sampled_actions += len(prompts)
            return [drawn[i].pop() for i in inverse.tolist()]

    def logprobs(self, agent: Any, prompts: Sequence[str], actions: Sequence[str]) -> Tensor:
        """log p(action | prompt) [n] float32, differentiable: the sum over the action's own tokens; 0 for none."""
        with self._open(agent, dropout=True) as backbone:
            total = torch.zeros(len(prompts), device=backbone.device)
            for score in self._scores(agent, backbone, prompts, actions):
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
            for score in self._scores(agent, backbone, prompts, actions):
                pairs = torch.from_numpy(score.pairs).to(total.device)[score.tree.branch_ids]
                out = linear_policy_loss(
                    score.hidden, backbone.lm_head_weight, score.tree.target_ids, weights.float()[pairs],
                    rows=score.tree.rows, num_actions=1,
                )  # fmt: skip
                backward(out.loss)
                total.index_add_(0, pairs, out.logprobs)
            return total

    # -- passes ------------------------------------------------------------------------------------

    def _scores(
        self, agent: Any, backbone: Backbone, prompts: Sequence[str], actions: Sequence[str]
    ) -> Iterator[Score]:
        """Passes over all pairs whose action has a token."""
        prompts, ids = list(prompts), self.tokens(actions)
        scored = [i for i, own in enumerate(ids) if own]
        unique, inverse = np.unique(np.array([prompts[i] for i in scored], object), return_inverse=True)
        waiting: list[list[int]] = [[] for _ in unique]
        for place, prompt in zip(scored, inverse.tolist(), strict=True):
            waiting[prompt].append(place)
        counts = np.array([len(own) for own in waiting], np.int64)
        widest = max((len(ids[i]) for i in scored), default=0)
        for batch, rows, asked in self._passes(agent, unique.tolist(), counts, widest):
            pairs = np.array([waiting[prompt].pop() for prompt in asked.tolist()], np.int64)
            alternatives = _alternatives([ids[i] for i in pairs], rows)
            tree = plant_tree(batch, alternatives, backbone.layout(batch.cu_seqlens, batch.lengths))
            self.num_tokens += tree.input_ids.numel()
            yield Score(pairs, tree, backbone(tree.input_ids, tree.position_ids, tree.layout))

    def _passes(
        self, agent: Any, prompts: list[str], counts: Int64, tokens_each: int
    ) -> Iterator[tuple[PackedBatch, Tensor, Int64]]:
        """Passes in which prompt i gets counts[i] branches of at most `tokens_each` tokens: the states, the branches
        [B, R] as `sample_alternatives` wants them, and the prompt of each used branch, row after row."""
        ids = self.tokens(prompts)
        if empty := [text for text, own in zip(prompts, ids, strict=True) if not own]:
            raise ValueError(f"observation: wanted text of at least one token, got {empty[0]!r}")
        trunks = share_prefixes(ids)
        members: list[list[int]] = [[] for _ in trunks.sequences]
        for prompt, owner in enumerate(trunks.owner.tolist()):
            members[owner].append(prompt)
        most = max(1, MAX_PASS_TOKENS // max(1, tokens_each))  # branches of one sequence in a pass
        pieces: list[tuple[int, Int64]] = []  # sequence, and the prompt of each branch
        for owner, own in enumerate(members):
            asked = np.repeat(own, counts[own])
            pieces += [(owner, part) for part in np.array_split(asked, -(-asked.size // most)) if part.size]
        sizes = [len(trunks.sequences[owner]) for owner, _ in pieces]
        widths = np.array([part.size for _, part in pieces], np.int64)
        for group in group_trunks(sizes, widths, tokens_each, MAX_PASS_TOKENS):
            sequences, lengths, branches = [], [], []
            for owner, part in (pieces[i] for i in group.tolist()):
                states, turn = np.unique(trunks.length[part], return_inverse=True)
                sequences.append(trunks.sequences[owner])
                lengths.append(states)
                branches.append(turn)
            batch = states_batch(sequences, lengths, _unwrapped(agent).device)
            self.num_passes += 1
            yield batch, branch_rows(batch, branches), np.concatenate([pieces[i][1] for i in group.tolist()])

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


class _TextEngine(EmbeddedEngine):
    """Sampling as `generate` does it, ended by a text instead of a token."""

    def __init__(
        self, backbone: Backbone, agent: Any, may_end: Tensor | None, eos_ids: list[int], *, top_k: int
    ) -> None:
        super().__init__(
            backbone, eos_ids[0] if eos_ids else 0, num_slots=1, max_new_tokens=int(agent.max_new_tokens),
            temperature=float(agent.temperature), greedy=not agent.do_sample,
        )  # fmt: skip
        self.tokenizer, self.eos_str, self.top_k = agent.tokenizer, agent.eos_str, top_k
        self.may_end = None if may_end is None else may_end.to(backbone.device)
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.int64, device=backbone.device)

    def texts(self, ids: list[list[int]]) -> list[str]:
        found: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return found

    def _sample(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [n, H] -> token ids [n]; the log-probs [n], which nobody reads, are 0."""
        weight = self.backbone.lm_head_weight
        k = min(self.top_k, weight.shape[0])
        if not self.greedy and k == 0:
            return super()._sample(hidden)
        found = []
        for part in hidden.split(max(1, (1 << 24) // weight.shape[0])):
            logits = (part @ weight.T).float() / self.temperature
            if self.greedy:
                found.append(logits.argmax(-1))
            else:
                values, ids = logits.topk(k)
                found.append(ids.gather(1, values.softmax(-1).multinomial(1)).squeeze(1))
        tokens = torch.cat(found)
        return tokens, torch.zeros(tokens.shape, device=tokens.device)

    def _ends(self, tokens: Tensor, action_ids: Tensor) -> Tensor:
        ended = torch.isin(tokens, self.eos_ids)
        if self.may_end is not None:
            doubtful = (self.may_end[tokens] & ~ended).nonzero().squeeze(1)
            if doubtful.numel():
                texts = self.texts(action_ids[doubtful].tolist())
                over = [self.eos_str in strip_newlines(text) for text in texts]
                ended[doubtful] = torch.tensor(over, device=ended.device)
        return ended


_POLICIES: WeakKeyDictionary[Any, PackedPolicy] = WeakKeyDictionary()


def policy_of(agent: Any) -> PackedPolicy:
    """The agent's packed policy, made at the first call; another tokenizer makes another one."""
    found = _POLICIES.get(agent)
    if found is None or found.tokens.tokenizer is not agent.tokenizer:
        found = _POLICIES[agent] = PackedPolicy(agent)
    return found


def _unwrapped(agent: Any) -> Any:
    return agent.accelerator.unwrap_model(agent.model)


def autocast_of(agent: Any) -> AbstractContextManager[object]:
    mixed = getattr(agent.accelerator, "mixed_precision", "no") not in (None, "no")
    return agent.accelerator.autocast() if mixed else nullcontext()


def _ids(eos: int | list[int] | None) -> list[int]:
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _alternatives(ids: Sequence[tuple[int, ...]], rows: Tensor) -> Alternatives:
    """Given actions on the used branches of rows [B, R], row after row."""
    device, used = rows.device, rows >= 0
    own = torch.tensor([len(a) for a in ids], device=device)
    action_ids = torch.zeros(*rows.shape, int(own.max()), dtype=torch.int32, device=device)
    lengths = torch.zeros(rows.shape, dtype=torch.int64, device=device)
    lengths[used] = own
    real = torch.arange(action_ids.shape[2], device=device) < lengths[..., None]
    flat = np.concatenate([np.array(a, np.int32) for a in ids])
    action_ids[real] = torch.from_numpy(flat).to(device)
    return Alternatives(action_ids, torch.zeros(action_ids.shape, device=device), lengths, rows)
