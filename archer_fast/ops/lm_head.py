"""The chunk loop over the vocabulary: matrix products by the library, row kernels by the chosen implementation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from archer_fast.ops.choice import load_kernels

# Logits alive at a time; on a GPU half as much again for their half-precision gradient. On a CPU an op may take 64 MB
# in all; on a GPU it takes a product of about a thousand rows to fill the card, and so this much for 152k columns.
CHUNK_BYTES = {"cpu": 61 << 20, "cuda": 1 << 30}
MAX_CHUNK_ROWS = {"cpu": 512, "cuda": 1 << 14}
# On a CPU the logits are made in blocks of so many columns: the row kernel finds them in the cache, and the library is
# up to a quarter faster than on the whole weight (NOTES.md, 2026-11-24).
COLUMN_BLOCK = 2048


class LmHead(NamedTuple):
    """The operands that every op on the vocabulary shares; `of` makes the row kernels' own contiguous."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H], dtype of hidden
    target_ids: Tensor  # [N] int64 in [0, V)
    rows: Tensor | None  # [N] int64 in [0, T); None: every row of hidden
    bias: Tensor | None  # [V]
    inv_temperature: Tensor  # [N] float32 (float64 where hidden is)
    softcap: float | None
    impl: str

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        rows: Tensor | None,
        bias: Tensor | None,
        inv_temperature: Tensor,
        softcap: float | None,
        impl: str,
    ) -> LmHead:
        rows = None if rows is None else rows.contiguous()
        return cls(hidden, weight, target_ids.contiguous(), rows, bias, inv_temperature.contiguous(), softcap, impl)


class Scores(NamedTuple):
    """What a row's softmax says; float32, or float64 where hidden is."""

    logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    row_max: Tensor  # [N] the largest scaled logit; lse = row_max + log_sum
    log_sum: Tensor  # [N]


class Gradients(NamedTuple):
    """An empty tensor stands for a gradient that nobody needs."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What holds a sum over rows that is still to be divided: float16 would overflow at 65504."""
    return torch.float32 if dtype == torch.float16 else dtype


def gradient_like(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], *, keep_sums: bool = False
) -> Gradients:
    """Uninitialised, as `ChunkLoop.gradients` gives them (for fake kernels); `needs`: of hidden, weight, bias."""
    dtype = sum_dtype(hidden.dtype) if keep_sums else hidden.dtype
    d_hidden, d_weight, d_bias = (
        x.new_empty(x.shape, dtype=wanted) if need and x is not None else hidden.new_empty(0)
        for x, need, wanted in zip((hidden, weight, bias), needs, (hidden.dtype, dtype, dtype), strict=True)
    )
    return Gradients(d_hidden, d_weight, d_bias)


def score(head: LmHead, scoring_only: bool) -> Scores:
    """What the softmax of every row says; `scoring_only`: no backward will ask for the logits again."""
    is_half = head.hidden.dtype in (torch.float16, torch.bfloat16)
    if head.impl == "triton" and scoring_only and is_half and head.target_ids.numel():
        from archer_fast.ops import triton_launch

        return _finish(triton_launch.linear_logprobs_fwd(*head[:-1]))
    loop = ChunkLoop(head, whole_rows=False)
    parts = [loop.scores(chunk, hidden) for chunk, hidden in loop.chunks()]
    if not parts:
        return Scores(*(loop.work.new_empty(0) for _ in range(4)))
    return parts[0] if len(parts) == 1 else Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))


class ChunkLoop:
    """Rows of the lm_head a chunk at a time: scores, and gradients added up over the chunks.

    whole_rows=False holds a tile of the logits only, enough for scores; `backward` needs whole rows.
    """

    def __init__(self, head: LmHead, *, whole_rows: bool = True, needs: tuple[bool, bool, bool] = (False,) * 3) -> None:
        self.head = head
        self.kernels = load_kernels(head.impl, "triton_launch")
        hidden, weight = head.hidden, head.weight
        self.num_rows, vocab = head.target_ids.shape[0], weight.shape[0]
        device, self.dtype = hidden.device.type, accumulation_dtype(hidden.dtype)
        self.column_block = COLUMN_BLOCK if device == "cpu" else vocab
        width = vocab if whole_rows else min(vocab, self.column_block)
        self.chunk_rows = _chunk_rows(self.num_rows, width * self.dtype.itemsize, device)
        empty = self.kernels.empty_in_huge_pages if head.impl == "cpu" else _empty
        self.work = empty(hidden, (min(self.num_rows, self.chunk_rows), width), self.dtype)
        # A GPU's row kernel writes half-precision gradients itself, into memory that is not its input's.
        split = head.impl == "triton" and hidden.dtype != self.dtype and whole_rows
        self.dlogits_work = self.work.new_empty(self.work.shape, dtype=hidden.dtype) if split else self.work
        self.needs = needs
        # Every row of hidden is written where all are scored; otherwise those that nobody scores get zeros.
        make = hidden.new_empty if head.rows is None else hidden.new_zeros
        self.d_hidden = make(hidden.shape) if needs[0] else None
        # Sums over chunks are kept in float32: in bfloat16 a long sum stops growing. The first chunk writes.
        self.d_weight = empty(weight, tuple(weight.shape), self.dtype) if needs[1] else None
        if self.d_weight is not None and self.num_rows == 0:
            self.d_weight.zero_()
        self.d_bias = weight.new_zeros(vocab, dtype=self.dtype) if needs[2] else None

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the chunk, their hidden states [n, H])."""
        hidden, rows = self.head.hidden, self.head.rows
        for start in range(0, self.num_rows, self.chunk_rows):
            chunk = slice(start, min(start + self.chunk_rows, self.num_rows))
            yield chunk, hidden[chunk] if rows is None else hidden.index_select(0, rows[chunk])

    def scores(self, chunk: slice, hidden: Tensor) -> Scores:
        """Scores of a chunk; its logits stay behind in `work` if that holds whole rows."""
        state = self.work.new_empty((hidden.shape[0], 4))
        state.zero_()  # filled on the device: a tensor made of numbers would be copied there, and waited for
        state[:, 0].fill_(-torch.inf)
        state[:, 3].fill_(torch.nan)
        target_ids, inv_temperature = self.head.target_ids[chunk], self.head.inv_temperature[chunk]
        for first_column, tile in self._logits(hidden):
            self.kernels.softmax_update(tile, first_column, target_ids, inv_temperature, self.head.softcap, state)
        return _finish(state)

    def recompute(self, hidden: Tensor) -> None:
        """The logits of a chunk whose scores are known, into `work`."""
        for _ in self._logits(hidden):
            pass

    def backward(
        self,
        chunk: slice,
        hidden: Tensor,
        scores: Scores,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
        grad_lse: Tensor | None,
    ) -> None:
        """Add a chunk's part of the gradients; `work` holds its logits, and no longer afterwards."""
        head, n = self.head, hidden.shape[0]
        dlogits = self.dlogits_work[:n]
        self.kernels.softmax_backward(
            self.work[:n],
            head.target_ids[chunk],
            head.inv_temperature[chunk],
            head.softcap,
            scores.row_max,
            scores.log_sum,
            scores.entropy,
            grad_logprobs.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            None if grad_lse is None else grad_lse.contiguous(),
            dlogits,
        )
        if self.d_bias is not None:
            self.d_bias += dlogits.sum(0, dtype=self.dtype)
        dlogits = dlogits.to(hidden.dtype)
        if self.d_hidden is not None:
            part = _times_weight(dlogits, head.weight)
            if head.rows is None:
                self.d_hidden[chunk] = part
            else:
                self.d_hidden.index_add_(0, head.rows[chunk], part)
        if self.d_weight is not None:
            _add_product(self.d_weight, dlogits.T, hidden, is_first=chunk.start == 0)

    def gradients(self, *, keep_sums: bool = False) -> Gradients:
        """In the operands' dtype, or as `sum_dtype` says; every tensor of its own, as an op's outputs must be."""
        hidden = self.head.hidden
        dtype = sum_dtype(hidden.dtype) if keep_sums else hidden.dtype
        d_hidden, d_weight, d_bias = (
            hidden.new_empty(0) if d is None else d.to(wanted)
            for d, wanted in ((self.d_hidden, hidden.dtype), (self.d_weight, dtype), (self.d_bias, dtype))
        )
        return Gradients(d_hidden, d_weight, d_bias)

    def _logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first column, tile [n, <= column_block] of the logits in `work`), left to right."""
        n, weight, bias = hidden.shape[0], self.head.weight, self.head.bias
        whole_rows = self.work.shape[1] == weight.shape[0]
        for start in range(0, weight.shape[0], self.column_block):
            columns = slice(start, min(start + self.column_block, weight.shape[0]))
            width = columns.stop - columns.start
            tile = self.work[:n, columns] if whole_rows else self.work[:n, :width]
            _product(tile, hidden, weight[columns])
            if bias is not None:
                tile += bias[columns]
            yield start, tile


def under_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in the dtype that autocast gives matrix products on this device, if it is on; it leaves float64."""
    device = hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """An op's body computes in the dtypes it was given; its public function has already asked autocast."""
    return torch.autocast(device.type, enabled=False)


def _chunk_rows(num_rows: int, row_bytes: int, device: str) -> int:
    """Rows a chunk: what the budget allows, evenly shared out, a multiple of 8 (103 cost a fifth more than 104)."""
    bytes_, most = CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]), MAX_CHUNK_ROWS.get(device, MAX_CHUNK_ROWS["cpu"])
    limit = max(8, min(bytes_ // row_bytes, most) // 8 * 8)
    num_chunks = max(1, -(-num_rows // limit))
    even = -(-num_rows // num_chunks)
    return max(1, min(limit, -(-even // 8) * 8))


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def _finish(state: Tensor) -> Scores:
    m, s, t, at_target = state.unbind(1)
    log_s = s.log()
    return Scores((at_target - m) - log_s, log_s - t / s, m.clone(), log_s)


def _product(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """out [n, v] = hidden [n, H] @ weight [v, H].T, float32 out of half-precision operands where the library can."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif out.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        out.copy_(hidden @ weight.T)


def _times_weight(dlogits: Tensor, weight: Tensor) -> Tensor:
    """dlogits [n, V] @ weight [V, H] -> [n, H]."""
    if dlogits.device.type == "cpu":
        return torch.mm(
            weight.T, dlogits.T
        ).T  # a tenth faster than the other way round: the large operand is packed once
    return torch.mm(dlogits, weight)


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """total [V, H] += left [V, n] @ right [n, H], or = where it is the first (total is uninitialised then)."""
    beta = 0 if is_first else 1  # beta = 0 does not read
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:
        for start in range(0, total.shape[0], COLUMN_BLOCK):  # a whole product would be a third [V, H]
            block = slice(start, start + COLUMN_BLOCK)
            part = left[block] @ right
            total[block] = part if is_first else total[block] + part
