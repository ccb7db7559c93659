"""What a token costs in one model: FLOPs and memory, counted in passes without data (torch's meta device)."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from archer_fast.adapted_backbone import AdaptedBackbone
from archer_fast.attention import BranchGrid, Layout, TreeLayout
from archer_fast.backbone import Backbone, build_causal_lm
from archer_fast.config import LoRAConfig
from archer_fast.pass_counts import PassCounts

# Two passes: what grows between them is the tokens'. So many of them that memory peaks where backward begins, not at
# its end, where the gradients of all weights are there and the activations gone.
_TOKENS = (1 << 16, 1 << 17)


@dataclass(slots=True, frozen=True)
class GameShape:
    """A game as one pass sees it: GameShape(tokens=496, branches=32, branch_tokens=8)."""

    tokens: int
    branches: int = 0  # fresh actions that continue it, each from one of its states
    branch_tokens: int = 0

    @property
    def pass_tokens(self) -> int:
        """The game's own and those of its branches."""
        return self.tokens + self.branches * self.branch_tokens


@dataclass(slots=True, frozen=True)
class PassCosts:
    """One pass of the decoder's blocks; the vocabulary's matrix is met apart.

    Qwen2.5-7B forward in bfloat16: PassCosts(flops=13.05e9, flops_of_pair=401_408, memory=0.14e6).
    """

    flops: float  # a token, matrix products with weights
    flops_of_pair: float  # a query and a key that it sees, all layers and heads
    memory: float  # bytes a token at the peak, above the weights; in training where backward begins

    def of(self, num_tokens: float, num_pairs: float) -> float:
        """FLOPs of a pass."""
        return self.flops * num_tokens + self.flops_of_pair * num_pairs


@dataclass(slots=True, frozen=True)
class TrunkFlops:
    """What the passes of one backbone compute; of Qwen2.5-7B that trains: TrunkFlops((13.05e9, 401_408), (39.2e9,
    1_404_928), 1.09e9, 3.27e9)."""

    reading: tuple[float, float]  # a token; a query and a key that it sees
    training: tuple[float, float]  # forward and backward, and what is computed again
    head: float  # a hidden state that meets the vocabulary
    head_training: float  # the same with its backward

    def of(self, counts: PassCounts) -> float:
        """FLOPs of all these passes."""
        total = 0.0
        for found, (token, pair), row in (
            (counts.read, self.reading, self.head),
            (counts.trained, self.training, self.head_training),
        ):
            total += token * found.tokens + pair * found.pairs + row * found.rows
        return total


@dataclass(slots=True, frozen=True)
class ModelCosts:
    """What a decoder costs; `adapted` where LoRA adapters train instead of its weights."""

    num_parameters: int
    num_trained: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    itemsize: int  # bytes of a weight
    trained_itemsize: int  # bytes of a trained number
    kv_bytes: int  # keys and values of a token
    reading: PassCosts  # without gradients, of a frozen base
    training: PassCosts  # forward and backward of what trains
    whole: PassCosts  # forward and backward where all weights train
    tree: float  # bytes a game at the peak of a training pass over games with their branches
    adapted: bool

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.itemsize

    @property
    def trained_bytes(self) -> int:
        return self.num_trained * self.trained_itemsize

    @property
    def head_flops(self) -> int:
        """One hidden state that meets the whole vocabulary once."""
        return 2 * self.hidden_size * self.vocab_size


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that operations inside the block have made and nobody has freed, and their peak.

        with LiveMemory(model.parameters()) as memory:
            loss.backward()
        memory.peak     # the gradients too: they are made inside

    known: tensors whose memory was there before. Counted on any device, meta too; what a library takes inside one
    operation is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def count(
    config: dict[str, Any],
    dtype: torch.dtype,
    lora: LoRAConfig,
    game: GameShape,
    *,
    fused: bool,
    checkpointing: bool = False,
) -> ModelCosts:
    """The costs of the model of a Hugging Face configuration, in a few seconds and without its weights.

    checkpointing: blocks are computed again in backward (`model.activation_checkpointing`).
    fused: attention by a variable-length kernel (CUDA in half precision); else `attention`'s `sdpa`, with its copies.
    In both no matrix of scores is kept and a key that is not seen costs nothing; the scores of branches are kept, as
    `attention.branch_attention` does.
    Errors: ValueError for an unknown `model_type`, a size that fits no model, or adapters for layers it does not have.
    """
    values = {name: value for name, value in config.items() if name not in ("model_type", "dtype", "torch_dtype")}
    architecture = config.get("model_type")
    if not isinstance(architecture, str):
        raise ValueError("model: its configuration has no 'model_type'")
    try:
        with torch.device("meta"):
            model = build_causal_lm(architecture, **values)
    except Exception as error:  # transformers and huggingface_hub raise errors of their own
        raise ValueError(f"model: no decoder is made of this {architecture}: {_first_line(error)}") from error
    cast(nn.Module, model).to(dtype)
    base = Backbone(model, tokenizer=None)
    base.checkpoints_activations = checkpointing
    num_parameters = sum(p.numel() for p in base.parameters())
    trunk = _TraceLayout(fused)
    try:
        reading = _plain_pass(base, trunk, train=False)
        training = whole = _plain_pass(base, trunk, train=True)
    except Exception as error:  # whatever another's model raises
        raise ValueError(f"model: no pass runs through this {architecture}: {_first_line(error)}") from error
    trained = base
    if lora.rank:
        base.requires_grad_(False)
        trained = AdaptedBackbone(base, "actor", lora)
        training = _plain_pass(trained, trunk, train=True)
    parameters = list(trained.parameters())
    return ModelCosts(
        num_parameters=num_parameters,
        num_trained=sum(p.numel() for p in parameters),
        hidden_size=base.hidden_size,
        vocab_size=base.vocab_size,
        max_positions=base.max_positions,
        itemsize=dtype.itemsize,
        trained_itemsize=parameters[0].element_size(),
        kv_bytes=2 * base.num_layers * trunk.kv_heads * trunk.head_dim * dtype.itemsize,
        reading=reading,
        training=training,
        whole=whole,
        tree=_tree_memory(trained, trunk, game),
        adapted=lora.rank > 0,
    )


def trunk_flops(base: Backbone, lora: LoRAConfig | None = None) -> TrunkFlops:
    """Of a backbone whose weights all train, or with an adapter on it that trains alone.

    Errors: ValueError where no pass runs through this model without data.
    """
    model = base.model
    try:
        with torch.device("meta"):
            twin: Any = type(model)(copy.deepcopy(model.config))
        trunk = Backbone(twin.to(model.dtype), tokenizer=None)
        trunk.checkpoints_activations = base.checkpoints_activations
        if lora is not None:
            trunk.requires_grad_(False)
            trunk = AdaptedBackbone(trunk, "actor", lora)
        layout = _TraceLayout(fused=True)
        reading, training = (_flops(trunk, layout, train=train) for train in (False, True))
    except Exception as error:  # whatever another's model raises
        raise ValueError(f"no pass runs through this {model.config.model_type}: {_first_line(error)}") from error
    head = 2 * base.hidden_size * base.vocab_size
    # Its gradient is made in the forward pass, of the hidden states, and of the matrix where it trains.
    return TrunkFlops(reading, training, head, head * (3 if lora is None else 2))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


class _TraceLayout:
    """One sequence of any length: what is copied and kept for backward, as `attention` does, without its maths."""

    query_heads = kv_heads = head_dim = 0
    num_pairs = 0  # nobody asks

    def __init__(self, fused: bool) -> None:
        self.fused = fused
        self.lengths: tuple[int, ...] = ()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        del layer, scale, window
        self.query_heads, self.kv_heads, self.head_dim = query.shape[1], key.shape[1], query.shape[2]
        if self.fused:
            return _fused(query, key, value)
        place = torch.empty(query.shape[0], dtype=torch.int64, device="meta")
        q, k, v = (x[place] for x in (query, key, value))
        piece = _fused(q, k, v)[place]
        return torch.empty_like(query).index_copy(0, place, torch.cat([piece]))


class _FusedAttention(torch.autograd.Function):
    """The memory of flash attention (arXiv 2307.08691): output and log-sum-exp are kept, gradients made anew."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        log_sum = query.new_empty(query.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])  # type: ignore[return-value]


def _fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, _FusedAttention).apply(query, key, value))


# Matrix products of a block of queries with a block of keys: scores and weighted values forward; backward makes the
# scores anew and has four more.
_PRODUCTS_FORWARD, _PRODUCTS_BACKWARD = 2, 5


def _plain_pass(backbone: Backbone, layout: _TraceLayout, *, train: bool) -> PassCosts:
    few, many = _TOKENS
    memory = _peak(backbone, layout, many, train=train) - _peak(backbone, layout, few, train=train)
    # Not in the passes above: torch's counter keeps tensors alive.
    return PassCosts(*_flops(backbone, layout, train=train), memory / (many - few))


def _flops(backbone: Backbone, layout: _TraceLayout, *, train: bool) -> tuple[float, float]:
    """Of a token, and of a query and a key that it sees."""
    with FlopCounterMode(display=False) as counter:
        _pass(backbone, layout, 1, train=train)
    products = _PRODUCTS_FORWARD
    if train:
        products += _PRODUCTS_BACKWARD + backbone.checkpoints_activations * _PRODUCTS_FORWARD
    of_pair = 2 * products * layout.query_heads * layout.head_dim * backbone.num_layers
    return counter.get_total_flops(), of_pair


def _tree_memory(backbone: Backbone, trunk: _TraceLayout, game: GameShape) -> float:
    """Bytes a game of a training pass, its branches in it."""
    found = []
    num_games = -(-_TOKENS[0] // game.pass_tokens)
    for games in (num_games, 2 * num_games):
        num_trunk, own = games * game.tokens, games * game.branches * game.branch_tokens
        ids = torch.empty(own, dtype=torch.int64, device="meta")
        mask = torch.empty(games, game.branches, game.tokens, dtype=torch.bool, device="meta")
        trunk.lengths = (num_trunk,)
        index = torch.empty(games, game.tokens, dtype=torch.int64, device="meta")
        grids = [BranchGrid(mask, ids, ids, game.branch_tokens, num_pairs=0)] if own else []
        layout = TreeLayout(cast(Any, trunk), index, grids)
        found.append(_peak(backbone, layout, num_trunk + own, train=True))
    return (found[1] - found[0]) / num_games


def _peak(backbone: Backbone, layout: Layout, num_tokens: int, *, train: bool) -> int:
    """Bytes at the peak of a pass, above those of the weights."""
    known = [*backbone.model.parameters(), *backbone.model.buffers()]
    with LiveMemory(known) as live:
        _pass(backbone, layout, num_tokens, train=train)
    peak: int = live.peak
    return peak


def _pass(backbone: Backbone, layout: Layout, num_tokens: int, *, train: bool) -> None:
    ids = torch.zeros(num_tokens, dtype=torch.int32, device="meta")
    with torch.set_grad_enabled(train):
        hidden = backbone(ids, ids, layout)
        if train:
            torch.autograd.grad(hidden, list(backbone.parameters()), torch.empty_like(hidden), allow_unused=True)
