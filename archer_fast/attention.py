"""Causal attention over packed (never padded) sequences: which kernel, and the call to it."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from archer_fast.config import AttentionImpl

IMPLS: tuple[str, ...] = get_args(AttentionImpl)

# Where each package keeps its kernels. flash-attn-4 is a part of the namespace `flash_attn` without the rest of it.
FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn.flash_attn_interface", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn.cute", "flash-attn-4"),
}
VARIABLE_LENGTH = ("varlen", *FLASH_PACKAGES)  # kernels that take packed sequences as they are: CUDA, half precision


class Layout(Protocol):
    """How the tokens of one forward pass relate: who may attend to whom, and where keys are kept."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query [T, h, d], key and value [T, h_kv, d] of one layer -> [T, h, d]."""
        ...

    @property
    def num_pairs(self) -> int:
        """Queries and keys that they see, of one head of one layer: what attention costs. No sliding window."""
        ...


def choose_impl(impl: AttentionImpl, device: torch.device, dtype: torch.dtype) -> AttentionImpl:
    """The implementation that `auto` stands for on this device; any other name is checked and kept."""
    if impl not in IMPLS:
        raise ValueError(f"attention: wanted one of {', '.join(IMPLS)}, got {impl!r}")
    half = dtype in (torch.float16, torch.bfloat16)
    if impl == "auto":
        if device.type != "cuda" or not half:
            return "sdpa"
        return "flash_attention_2" if has_package("flash_attention_2") else "varlen"
    if impl in VARIABLE_LENGTH and (device.type != "cuda" or not half):
        raise ValueError(f"attention={impl!r}: wanted a CUDA device and float16 or bfloat16, got {device} and {dtype}")
    if impl in FLASH_PACKAGES and not has_package(impl):
        raise ValueError(f"attention={impl!r}: the package {FLASH_PACKAGES[impl][1]} is not installed or cannot load")
    return impl


def has_package(impl: str) -> bool:
    """Whether the package of one of `FLASH_PACKAGES` is there."""
    try:
        return importlib.util.find_spec(FLASH_PACKAGES[impl][0]) is not None
    except ImportError:  # of what it lies in: not there, or built for another torch
        return False


def check_no_window(window: int | None, num_tokens: int) -> None:
    """Branches see their whole game: ValueError where a sliding window would hide some of it."""
    if window is not None and window < num_tokens:
        raise ValueError(
            f"branches keep no sliding window ({window} tokens) and this game has up to {num_tokens}; "
            "use a full-attention model or shorter games"
        )


@dataclass(slots=True, eq=False)
class PackedLayout:
    """B sequences laid end to end; token t attends to the earlier tokens of its own sequence.

    Two sequences of 3 and 2 tokens: cu_seqlens=[0, 3, 5], lengths=(3, 2), impl="sdpa".
    """

    cu_seqlens: Tensor  # [B+1] int32
    lengths: tuple[int, ...]  # the same on the host, so that no layer synchronises
    impl: AttentionImpl
    _buckets: list[tuple[Tensor, Tensor]] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        del layer
        return _ATTEND[self.impl](self, query, key, value, scale, window)

    @property
    def num_pairs(self) -> int:
        return sum(n * (n + 1) // 2 for n in self.lengths)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    def buckets(self) -> list[tuple[Tensor, Tensor]]:
        """Sequences of similar length together: (token index [b, L], is_real [b, L]), made once a batch.

        Only attention sees these right-padded rows; a causal mask keeps the padding (which repeats the
        row's last token) out of every real token's sight, so no mask tensor is needed.
        """
        if self._buckets is None:
            self._buckets = make_buckets(self.lengths, self.cu_seqlens.device)
        return self._buckets


def make_buckets(lengths: Sequence[int], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Group sequences, longest first, so that no row is padded by more than a quarter of its bucket."""
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[i] >= 0.75 * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    out = []
    for group in groups:
        length = torch.tensor([lengths[i] for i in group], device=device)[:, None]
        start = torch.tensor([starts[i] for i in group], device=device)[:, None]
        column = torch.arange(lengths[group[0]], device=device)[None]
        out.append((start + column.clamp(max=length - 1), column < length))
    return out


def _attend_reference(
    layout: PackedLayout, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """One dense softmax a sequence: the plain twin of every other implementation."""
    out = torch.empty_like(query)
    groups = query.shape[1] // key.shape[1]
    start = 0
    for n in layout.lengths:
        rows = slice(start, start + n)
        q, k, v = (x[rows].transpose(0, 1) for x in (query, key, value))  # [h, n, d]
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = (q @ k.mT).float() * scale
        scores = scores.masked_fill(~causal_mask(n, window, query.device), -torch.inf)
        out[rows] = (scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1)
        start += n
    return out


def _attend_sdpa(
    layout: PackedLayout, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """torch's scaled_dot_product_attention, one call for each bucket of similar lengths; any device."""
    gqa = query.shape[1] != key.shape[1]
    pieces, places = [], []
    for index, is_real in layout.buckets():
        q, k, v = (x[index].transpose(1, 2) for x in (query, key, value))  # [b, h, L, d]
        n = index.shape[1]
        mask = causal_mask(n, window, query.device) if window is not None and window < n else None
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
        )
        pieces.append(attended.transpose(1, 2)[is_real])  # [tokens, h, d]
        places.append(index[is_real])
    if not pieces:
        return torch.empty_like(query)
    return torch.empty_like(query).index_copy(0, torch.cat(places), torch.cat(pieces))


def _attend_varlen(
    layout: PackedLayout, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """torch's own variable-length flash attention (CUDA)."""
    from torch.nn.attention.varlen import varlen_attn

    cu, n = layout.cu_seqlens, layout.max_seqlen
    sizes = (window - 1 if window is not None else -1, 0)  # causal: nothing to the right
    gqa = query.shape[1] != key.shape[1]
    out = varlen_attn(query, key, value, cu, cu, n, n, scale=scale, window_size=sizes, enable_gqa=gqa)
    return cast(Tensor, out)


def _attend_flash_2(
    layout: PackedLayout, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """The flash-attn package (CUDA)."""
    from flash_attn import flash_attn_varlen_func

    cu, n = layout.cu_seqlens, layout.max_seqlen
    sizes = (window - 1 if window is not None else -1, 0)
    out = flash_attn_varlen_func(query, key, value, cu, cu, n, n, softmax_scale=scale, causal=True, window_size=sizes)
    return cast(Tensor, out)


def _attend_flash_3(
    layout: PackedLayout, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """flash-attention's kernels for Hopper (folder hopper/ of its repository)."""
    from flash_attn_interface import flash_attn_varlen_func

    cu, n = layout.cu_seqlens, layout.max_seqlen
    sizes = (window - 1 if window is not None else -1, 0)
    out = flash_attn_varlen_func(query, key, value, cu, cu, n, n, softmax_scale=scale, causal=True, window_size=sizes)
    return _without_lse(out)


def _attend_flash_4(
    layout: PackedLayout, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """flash-attention's kernels for Hopper and Blackwell in CuTe (arguments of 4.0.0b16)."""
    from flash_attn.cute import flash_attn_varlen_func

    cu, n = layout.cu_seqlens, layout.max_seqlen
    out = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        max_seqlen_q=n,
        max_seqlen_k=n,
        softmax_scale=scale,
        causal=True,
        window_size=(None, None) if window is None else (window - 1, 0),  # None: no bound
    )
    return _without_lse(out)


def _without_lse(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some releases return the log-sum-exp beside the output."""
    return out[0] if isinstance(out, tuple) else out


_ATTEND: dict[str, Callable[[PackedLayout, Tensor, Tensor, Tensor, float, int | None], Tensor]] = {
    "reference": _attend_reference,
    "sdpa": _attend_sdpa,
    "varlen": _attend_varlen,
    "flash_attention_2": _attend_flash_2,
    "flash_attention_3": _attend_flash_3,
    "flash_attention_4": _attend_flash_4,
}


@functools.lru_cache(maxsize=64)
def causal_mask(n: int, window: int | None, device: torch.device) -> Tensor:
    """True where query i may see key j: j <= i, and i - j < window. [n, n] bool."""
    i = torch.arange(n, device=device)
    mask = i[:, None] >= i[None]
    return mask if window is None else mask & (i[:, None] - i[None] < window)


class BranchGrid(NamedTuple):
    """Branches of like length, R a game at most, on a padded grid that attention alone sees."""

    prefix_mask: Tensor  # [B, R, L] bool: may branch r of game b see position l of its game
    tokens: Tensor  # [n] int64: which of all branch tokens lie here
    place: Tensor  # [n] int64: where, in [B, R, width] flattened
    width: int  # tokens of the longest branch here
    num_pairs: int  # queries and keys that they see


def branch_grids(lengths: Tensor, prefix_mask: Tensor) -> list[BranchGrid]:
    """Lay branches on one grid, or on one for each power of two of their lengths where that has half the cells.

    lengths [B, R] int64, 0 where there is no branch; prefix_mask [B, R, L] bool. Branch tokens are numbered branch
    after branch. A row without a branch sees itself alone: its numbers are finite, and nobody reads them.
    """
    device = prefix_mask.device
    lengths, prefixes = torch.stack([lengths, prefix_mask.sum(-1)]).cpu()  # the one wait for the device
    games, widest = lengths.shape[0], int(lengths.max()) if lengths.numel() else 0
    if not widest:
        return []
    bounds = [0, 4]
    while bounds[-1] < widest:
        bounds.append(2 * bounds[-1])
    classes = [(lengths > low) & (lengths <= high) for low, high in itertools.pairwise(bounds)]
    rows = [int(member.sum(1).max()) for member in classes]
    cells = sum(r * min(high, widest) for r, high in zip(rows, bounds[1:], strict=True))
    if 2 * cells > lengths.shape[1] * widest:
        classes, rows = [lengths > 0], [lengths.shape[1]]
    starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)
    grids = []
    for member, num_rows in zip(classes, rows, strict=True):
        if not num_rows:
            continue
        game, row = member.nonzero(as_tuple=True)
        rank = row if num_rows == lengths.shape[1] else (member.cumsum(1) - 1)[game, row]
        own = lengths[game, row, None]
        width = int(own.max())
        num_pairs = int((own * prefixes[game, row, None] + own * (own + 1) // 2).sum())
        column = torch.arange(width)
        real = column < own
        tokens = (starts[game, row, None] + column)[real]
        place = ((game * num_rows + rank)[:, None] * width + column)[real]
        game, row, rank, tokens, place = (x.to(device, non_blocking=True) for x in (game, row, rank, tokens, place))
        mask = prefix_mask.new_zeros(games, num_rows, prefix_mask.shape[2])
        mask[game, rank] = prefix_mask[game, row]
        grids.append(BranchGrid(mask, tokens, place, width, num_pairs))
    return grids


@dataclass(slots=True, eq=False)
class TreeLayout:
    """B packed trajectories, then branches that each continue one of them from some position.

    A branch token attends to its trajectory up to and including the branch's cut, and to the earlier
    tokens of its own branch: K alternative actions at each of a game's turns cost their own tokens,
    never another copy of the history. Branch tokens are packed like all others; only attention sees
    them on padded grids.

        trunk = two games of 5 and 4 tokens, then branches of 2, 1 (game 0) and 2 tokens (game 1): the pass
        runs over 9 + 5 tokens; a branch of game 0 with its cut at 3 sees tokens 0..2 of game 0 and itself.
    """

    trunk: PackedLayout
    prefix_index: Tensor  # [B, L] int64: trunk token of game b at position l (clamped to the game's last)
    grids: list[BranchGrid]

    @property
    def num_pairs(self) -> int:
        return self.trunk.num_pairs + sum(grid.num_pairs for grid in self.grids)

    @property
    def num_branch_tokens(self) -> int:
        return sum(grid.tokens.numel() for grid in self.grids)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        check_no_window(window, self.prefix_index.shape[1] + max((grid.width for grid in self.grids), default=0))
        num_trunk = sum(self.trunk.lengths)
        trunk_out = self.trunk.attend(layer, query[:num_trunk], key[:num_trunk], value[:num_trunk], scale, None)
        if not self.grids:
            return trunk_out
        prefix_key, prefix_value = key[:num_trunk][self.prefix_index], value[:num_trunk][self.prefix_index]
        pieces = []
        for grid in self.grids:
            shape = (*grid.prefix_mask.shape[:2], grid.width)
            q, k, v = (_on_grid(x[num_trunk:], grid, shape) for x in (query, key, value))
            own_mask = causal_mask(grid.width, None, query.device)
            attended = branch_attention(q, prefix_key, prefix_value, grid.prefix_mask, k, v, own_mask, scale)
            pieces.append(attended.reshape(-1, *query.shape[1:])[grid.place])
        branch_out = torch.cat(pieces)
        if len(self.grids) > 1:
            tokens = torch.cat([grid.tokens for grid in self.grids])
            branch_out = torch.empty_like(branch_out).index_copy(0, tokens, branch_out)
        return torch.cat([trunk_out, branch_out])


def _on_grid(x: Tensor, grid: BranchGrid, shape: tuple[int, ...]) -> Tensor:
    own = x if grid.tokens.numel() == x.shape[0] else x[grid.tokens]
    return x.new_zeros(math.prod(shape), *x.shape[1:]).index_copy(0, grid.place, own).view(*shape, *x.shape[1:])


def branch_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_mask: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    own_mask: Tensor,
    scale: float,
) -> Tensor:
    """Softmax over a shared prefix and a branch's own tokens, without copying the prefix to the branches.

    query [B, R, W, h, d]; prefix_key, prefix_value [B, L, g, d] (g key-value heads, h a multiple of g);
    prefix_mask [B, R, L]; own_key, own_value [B, R, S, g, d]; own_mask [W, S] or [B, R, W, S] -> [B, R, W, h, d].
    """
    b, r, w, h, d = query.shape
    g = own_key.shape[3]
    q = query.view(b, r, w, g, h // g, d) * scale
    by_prefix = torch.einsum("brwgmd,blgd->brwgml", q, prefix_key)
    by_own = torch.einsum("brwgmd,brsgd->brwgms", q, own_key)
    # In place: the products' backward needs what went in, not what came out.
    by_prefix.masked_fill_(~prefix_mask[:, :, None, None, None, :], -torch.inf)
    by_own.masked_fill_(~own_mask[..., None, None, :], -torch.inf)
    weights = torch.cat([by_prefix, by_own], -1).float().softmax(-1).to(query.dtype)
    on_prefix, on_own = weights.split([prefix_key.shape[1], own_key.shape[2]], -1)
    out = torch.einsum("brwgml,blgd->brwgmd", on_prefix, prefix_value)
    out = out + torch.einsum("brwgms,brsgd->brwgmd", on_own, own_value)
    return out.reshape(b, r, w, h, d)
