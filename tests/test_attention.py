"""Packed attention: every implementation against a dense float64 softmax with a block mask."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from archer_fast import attention
from archer_fast.attention import (
    FLASH_PACKAGES,
    IMPLS,
    AttentionImpl,
    BranchGrid,
    PackedLayout,
    TreeLayout,
    branch_grids,
    choose_impl,
    has_package,
    make_buckets,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = [(7,), (1,), (1, 1, 1), (5, 1, 3), (16, 2, 15, 1, 4, 12), (3, 0, 2)]


def packed(lengths: tuple[int, ...], impl: AttentionImpl) -> PackedLayout:
    cu = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return PackedLayout(cu, lengths, impl)


def random_qkv(
    num_tokens: int, heads: int = 4, kv_heads: int = 2, dim: int = 6, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(num_tokens, heads, dim), (num_tokens, kv_heads, dim), (num_tokens, kv_heads, dim)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return tuple((x * 2).to(dtype).requires_grad_() for x in (q, k, v))  # type: ignore[return-value]


def dense_truth(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """One softmax over all T tokens in float64; mask [T, T] is True where row i may see column j."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def block_mask(lengths: tuple[int, ...], window: int | None) -> Tensor:
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    i = torch.arange(owner.numel())
    mask = (owner[:, None] == owner[None]) & (i[:, None] >= i[None])
    return mask if window is None else mask & (i[:, None] - i[None] < window)


def value_and_gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(99)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def assert_all_close(got: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    """Out, then the gradients of q, k and v."""
    torch.testing.assert_close([x.double() for x in got], [x.double() for x in wanted], rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_equals_a_dense_masked_softmax(impl: AttentionImpl, lengths: tuple[int, ...], window: int | None) -> None:
    inputs = random_qkv(sum(lengths))
    got = packed(lengths, impl).attend(0, *inputs, 0.4, window)
    wanted = dense_truth(*inputs, block_mask(lengths, window), 0.4)
    assert_all_close(value_and_gradients(got, inputs), value_and_gradients(wanted, inputs))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_shared_key_value_heads(impl: AttentionImpl, heads: int, kv_heads: int) -> None:
    lengths = (5, 1, 9)
    inputs = random_qkv(15, heads, kv_heads)
    got = packed(lengths, impl).attend(0, *inputs, 0.3, None)
    wanted = dense_truth(*inputs, block_mask(lengths, None), 0.3)
    assert_all_close(value_and_gradients(got, inputs), value_and_gradients(wanted, inputs))


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_a_huge_score_does_not_overflow(impl: AttentionImpl) -> None:
    q, k, v = (x.detach() for x in random_qkv(6))
    got = packed((6,), impl).attend(0, q * 1e4, k, v, 1.0, None)
    wanted = dense_truth(q * 1e4, k, v, block_mask((6,), None), 1.0)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_no_sequence_at_all(impl: AttentionImpl) -> None:
    assert packed((), impl).attend(0, *random_qkv(0), 0.4, None).shape == (0, 4, 6)


@pytest.mark.parametrize("lengths", [*LENGTHS, (), tuple(range(1, 40)), (1000, 1, 750, 749)], ids=lambda x: str(x)[:30])
def test_buckets_hold_every_token_once_and_pad_little(lengths: tuple[int, ...]) -> None:
    buckets = make_buckets(lengths, CPU)
    seen = Counter(t for index, is_real in buckets for t in index[is_real].tolist())
    assert seen == Counter(range(sum(lengths)))
    for index, is_real in buckets:
        assert (is_real.sum(1) >= 0.75 * index.shape[1]).all()
        assert is_real[:, 0].all() and (is_real.int().diff(dim=1) <= 0).all()  # right-padded


class Recorder:
    """Stands in for a CUDA kernel: keeps what it was called with, answers with the float64 truth."""

    def __init__(self, name: str, signature: inspect.Signature, lengths: tuple[int, ...], window: int | None) -> None:
        self.__name__ = name
        self.signature, self.lengths, self.window = signature, lengths, window
        self.arguments: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        bound = self.signature.bind(*args, **kwargs)  # TypeError where the real function would raise it
        self.arguments = dict(bound.arguments)
        q, k, v = args[:3]
        scale = self.arguments.get("scale", self.arguments.get("softmax_scale"))
        assert scale is not None
        return dense_truth(q, k, v, block_mask(self.lengths, self.window), scale).to(q.dtype)


# The parameters that we give, and those between them, of flash-attn 2.8, of hopper/ at 2026 and of 4.0.0b16.
SIGNATURES = {
    "flash_attention_2": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal "
    "window_size softcap alibi_slopes deterministic return_attn_probs block_table",
    "flash_attention_3": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k softmax_scale "
    "causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa deterministic",
    "flash_attention_4": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k page_table "
    "softmax_scale causal window_size learnable_sink softcap",
}


def signature_of(names: str) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(name, kind, default=None) for name in names.split()])


@pytest.mark.parametrize(
    ("impl", "window", "window_size", "returns_lse"),
    [
        ("flash_attention_2", None, (-1, 0), False),
        ("flash_attention_2", 3, (2, 0), False),
        ("flash_attention_3", None, (-1, 0), False),
        ("flash_attention_3", 3, (2, 0), True),
        ("flash_attention_4", None, (None, None), False),
        ("flash_attention_4", 3, (2, 0), True),
    ],
)
def test_flash_attention_is_called_with(
    monkeypatch: pytest.MonkeyPatch,
    impl: AttentionImpl,
    window: int | None,
    window_size: tuple[int | None, int | None],
    returns_lse: bool,
) -> None:
    lengths = (5, 1, 3)
    recorder = Recorder("flash_attn_varlen_func", signature_of(SIGNATURES[impl]), lengths, window)
    function = (lambda *a, **k: (recorder(*a, **k), torch.zeros(4, 9))) if returns_lse else recorder
    name = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(impl, "flash_attn.cute")
    module = ModuleType(name)
    module.flash_attn_varlen_func = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, name, module)
    q, k, v = random_qkv(9)
    layout = packed(lengths, impl)
    got = layout.attend(1, q, k, v, 0.4, window)
    call = recorder.arguments
    assert call.pop("q") is q and call.pop("k") is k and call.pop("v") is v  # two key-value heads: not repeated
    assert call.pop("cu_seqlens_q") is layout.cu_seqlens and call.pop("cu_seqlens_k") is layout.cu_seqlens
    assert call == {
        "max_seqlen_q": 5,
        "max_seqlen_k": 5,
        "softmax_scale": 0.4,
        "causal": True,
        "window_size": window_size,
    }
    torch.testing.assert_close(got, packed(lengths, "reference").attend(1, q, k, v, 0.4, window))


@pytest.mark.parametrize(("window", "window_size"), [(None, (-1, 0)), (3, (2, 0))])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_varlen_is_called_with(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, window: int | None, window_size: tuple[int, int]
) -> None:
    lengths = (5, 1, 3)
    recorder = Recorder("varlen_attn", inspect.signature(varlen.varlen_attn), lengths, window)
    monkeypatch.setattr(varlen, "varlen_attn", recorder)
    q, k, v = random_qkv(9, kv_heads=kv_heads)
    layout = packed(lengths, "varlen")
    got = layout.attend(1, q, k, v, 0.4, window)
    call = recorder.arguments
    assert call.pop("query") is q and call.pop("key") is k and call.pop("value") is v
    assert call.pop("cu_seq_q") is layout.cu_seqlens and call.pop("cu_seq_k") is layout.cu_seqlens
    assert call == {"max_q": 5, "max_k": 5, "scale": 0.4, "window_size": window_size, "enable_gqa": kv_heads == 2}
    torch.testing.assert_close(got, packed(lengths, "reference").attend(1, q, k, v, 0.4, window))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
def test_varlen_on_a_gpu(window: int | None) -> None:
    lengths = (5, 1, 64, 3)
    inputs = tuple(x.detach().to(CUDA, torch.bfloat16) for x in random_qkv(sum(lengths), 4, 2, 64))
    layout = packed(lengths, "varlen")
    layout.cu_seqlens = layout.cu_seqlens.to(CUDA)
    got = layout.attend(0, *inputs, 0.1, window)
    wanted = dense_truth(*inputs, block_mask(lengths, window).to(CUDA), 0.1)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)


FLASH_2 = "flash_attn.flash_attn_interface"


def installed(name: str | None) -> Callable[[str], object | None]:
    return lambda wanted: object() if wanted == name else None


@pytest.mark.parametrize(
    ("device", "dtype", "package", "chosen"),
    [
        (CPU, torch.float32, FLASH_2, "sdpa"),
        (CPU, torch.bfloat16, FLASH_2, "sdpa"),
        (CUDA, torch.float32, FLASH_2, "sdpa"),
        (CUDA, torch.bfloat16, FLASH_2, "flash_attention_2"),
        (CUDA, torch.float16, None, "varlen"),
        (CUDA, torch.float16, "flash_attn.cute", "varlen"),  # which lies in `flash_attn` too, without version 2
    ],
)
def test_auto_chooses(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype, package: str | None, chosen: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", installed(package))
    assert choose_impl("auto", device, dtype) == chosen


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "auto"])
def test_a_name_is_kept_where_it_can_run(monkeypatch: pytest.MonkeyPatch, impl: AttentionImpl) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", installed(FLASH_PACKAGES.get(impl, (None,))[0]))
    assert choose_impl(impl, CUDA, torch.bfloat16) == impl


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "message"),
    [
        ("flash", CPU, torch.float32, "attention: wanted one of auto, .*, got 'flash'"),
        ("varlen", CPU, torch.bfloat16, "attention='varlen': wanted a CUDA device and float16 or bfloat16, got cpu"),
        ("flash_attention_2", CPU, torch.bfloat16, "wanted a CUDA device"),
        ("varlen", CUDA, torch.float32, "got cuda and torch.float32"),
        ("flash_attention_2", CUDA, torch.float16, "flash-attn is not installed"),
        ("flash_attention_3", CUDA, torch.float16, "flash-attn-3 is not installed"),
        ("flash_attention_4", CUDA, torch.float16, "flash-attn-4 is not installed"),
    ],
)
def test_a_name_that_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, impl: Any, device: torch.device, dtype: torch.dtype, message: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", installed(None))
    with pytest.raises(ValueError, match=message):
        choose_impl(impl, device, dtype)


def test_a_package_that_cannot_load_is_not_there() -> None:
    assert not has_package("flash_attention_2"), "its parent is not installed here"


# Three games of 5, 1 and 4 tokens; the tokens of each branch lie behind them, branch after branch.
TRUNK, STARTS = (5, 1, 4), (0, 5, 6)
BRANCHES = [(0, 0, 3, 2), (0, 1, 5, 1), (1, 0, 1, 3), (2, 1, 4, 3)]  # game, row, trunk tokens it sees, own tokens
NUM_TREE = sum(TRUNK) + sum(own for *_, own in BRANCHES)


def tree_layout(impl: AttentionImpl) -> TreeLayout:
    """Two rows a game, of which (1, 1) and (2, 0) hold no branch."""
    last = torch.tensor(TRUNK)[:, None] - 1
    index = torch.tensor(STARTS)[:, None] + torch.minimum(torch.arange(5), last)
    cuts = torch.ones(3, 2, dtype=torch.int64)
    for game, row, cut, _ in BRANCHES:
        cuts[game, row] = cut
    lengths = torch.zeros(3, 2, dtype=torch.int64)
    for game, row, _, own in BRANCHES:
        lengths[game, row] = own
    return TreeLayout(packed(TRUNK, impl), index, branch_grids(lengths, torch.arange(5) < cuts[..., None]))


def tree_mask() -> Tensor:
    """What the drawing of TreeLayout means, token by token."""
    mask = torch.zeros(NUM_TREE, NUM_TREE, dtype=torch.bool)
    row = sum(TRUNK)
    mask[:row, :row] = block_mask(TRUNK, None)
    for game, _, cut, own in BRANCHES:
        for i in range(own):
            mask[row + i, STARTS[game] : STARTS[game] + cut] = True
            mask[row + i, row : row + i + 1] = True
        row += own
    return mask


def test_pairs_are_what_the_mask_lets_through() -> None:
    assert packed(TRUNK, "sdpa").num_pairs == int(block_mask(TRUNK, None).sum())
    assert tree_layout("sdpa").num_pairs == int(tree_mask().sum())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_branches_equal_sequences_of_their_own(impl: AttentionImpl, heads: int, kv_heads: int) -> None:
    inputs = random_qkv(NUM_TREE, heads, kv_heads)
    got = tree_layout(impl).attend(0, *inputs, 0.4, None)
    wanted = dense_truth(*inputs, tree_mask(), 0.4)
    assert_all_close(value_and_gradients(got, inputs), value_and_gradients(wanted, inputs))

    # And literally: game 2's branch after its whole game, as one sequence of 4 + 3 tokens.
    rows = torch.tensor([6, 7, 8, 9, NUM_TREE - 3, NUM_TREE - 2, NUM_TREE - 1])
    alone = packed((7,), impl).attend(0, *(x[rows] for x in inputs), 0.4, None)
    torch.testing.assert_close(got[rows], alone, rtol=1e-5, atol=1e-6)


def test_branches_of_unlike_lengths_lie_on_grids_of_their_own() -> None:
    """One of 20 tokens among many short ones; what comes out is what one grid for all gives."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 4, (3, 12), generator=generator)
    lengths[1, 5], lengths[2, 2], lengths[0, 9:] = 20, 7, 0
    cuts = torch.minimum(torch.randint(1, 6, (3, 12), generator=generator), torch.tensor(TRUNK)[:, None])
    mask = torch.arange(5) < cuts[..., None]
    several = branch_grids(lengths, mask)
    assert [grid.width for grid in several] == [3, 7, 20] and sum(g.tokens.numel() for g in several) == lengths.sum()
    num_pairs = int((lengths * cuts + lengths * (lengths + 1) // 2).sum())
    assert sum(grid.num_pairs for grid in several) == num_pairs
    real = (torch.arange(20) < lengths[..., None]).flatten().nonzero().squeeze(1)
    one = BranchGrid(mask, torch.arange(real.numel()), real, 20, num_pairs)
    index = tree_layout("sdpa").prefix_index
    inputs = random_qkv(sum(TRUNK) + int(lengths.sum()))
    outs = [TreeLayout(packed(TRUNK, "sdpa"), index, grids).attend(0, *inputs, 0.4, None) for grids in (several, [one])]
    assert_all_close(*(value_and_gradients(out, inputs) for out in outs))


def test_a_tree_without_branches_is_its_trunk() -> None:
    inputs = random_qkv(10)
    layout = tree_layout("sdpa")
    layout.grids = branch_grids(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2, 5, dtype=torch.bool))
    torch.testing.assert_close(layout.attend(0, *inputs, 0.4, None), layout.trunk.attend(0, *inputs, 0.4, None))


def test_no_branch_over_a_sliding_window_that_hides_something() -> None:
    qkv = random_qkv(NUM_TREE)
    with pytest.raises(ValueError, match=r"branches keep no sliding window \(3 tokens\) and this game has up to 8"):
        tree_layout("sdpa").attend(0, *qkv, 0.4, 3)
    wide, free = (tree_layout("sdpa").attend(0, *qkv, 0.4, window) for window in (8, None))
    assert torch.equal(wide, free)


@pytest.mark.parametrize("per_branch", [False, True])
def test_branch_attention_takes_one_mask_or_one_a_branch(per_branch: bool) -> None:
    b, r, w, s, length, h, g, d = 2, 3, 1, 4, 5, 4, 2, 6
    generator = torch.Generator().manual_seed(0)
    q, pk, pv, ok, ov = (
        torch.randn(shape, generator=generator)
        for shape in [(b, r, w, h, d), (b, length, g, d), (b, length, g, d), (b, r, s, g, d), (b, r, s, g, d)]
    )
    prefix = torch.rand(b, r, length, generator=generator) < 0.6
    own = torch.rand(b, r, w, s, generator=generator) < 0.6 if per_branch else torch.ones(w, s, dtype=torch.bool)
    prefix[..., 0] = True
    got = attention.branch_attention(q, pk, pv, prefix, ok, ov, own, 0.3)
    for i in range(b):
        for j in range(r):
            keys, values = torch.cat([pk[i], ok[i, j]]), torch.cat([pv[i], ov[i, j]])
            mask = torch.cat([prefix[i, j].expand(w, -1), own[i, j] if per_branch else own], -1)
            wanted = dense_truth(q[i, j], keys, values, mask, 0.3)
            torch.testing.assert_close(got[i, j].double(), wanted, rtol=1e-5, atol=1e-6)
