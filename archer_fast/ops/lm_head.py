"""The chunk loop over the vocabulary: matrix products by the library, row kernels by the chosen implementation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from archer_fast.ops.checks import accumulation_dtype
from archer_fast.ops.choice import load_kernels

# Own memory for logits. On a CPU an op may take 64 MB in all; on a GPU each chunk reads and writes the float32 sum of
# the weight's gradient, so that few large ones pay there where the weight is trained (NOTES.md, 2026-11-26).
CHUNK_BYTES = {"cpu": 61 << 20, "cuda": 1 << 30}
CHUNK_BYTES_WITH_WEIGHT = {"cpu": 61 << 20, "cuda": 3 << 30}
MAX_CHUNK_ROWS = {"cpu": 512, "cuda": 1 << 14}
MAX_LENT_ROWS = 1024  # in the memory of the weight's gradient; a block of columns of them is 8 MB
# On a CPU the vocabulary is walked in blocks of so many columns: the row kernel finds their logits in the cache, and
# the library is up to a quarter faster than on the whole weight (NOTES.md, 2026-11-24).
COLUMN_BLOCK = 2048
# Products of 190 rows took 6 % longer than those of 192; where rows are few, two more are too many.
ROW_MULTIPLE, ROWS_WORTH_PADDING = 8, 64


class LmHead(NamedTuple):
    """The operands that every op on the vocabulary shares."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H], dtype of hidden
    target_ids: Tensor  # [N] int64 in [0, V)
    rows: Tensor | None  # [N] int64 in [0, T); None: every row of hidden
    bias: Tensor | None  # [V]
    inv_temperature: Tensor  # [N] float32 (float64 where hidden is)
    softcap: float | None
    impl: str

    def contiguous(self) -> LmHead:
        """What the row kernels read by address, contiguous."""
        rows = None if self.rows is None else self.rows.contiguous()
        target_ids, inv_temperature = self.target_ids.contiguous(), self.inv_temperature.contiguous()
        return self._replace(rows=rows, target_ids=target_ids, inv_temperature=inv_temperature)


class Chunk(NamedTuple):
    """n of the scored rows, and rows of zeros up to m, which fill a product and are nobody's."""

    rows: slice  # of the scored rows, n
    hidden: Tensor  # [m, H]
    logits: Tensor  # [m, V], or [m, one block of columns] where no backward follows; uninitialised

    @property
    def size(self) -> int:
        n: int = self.rows.stop - self.rows.start
        return n


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
    parts = [loop.scores(chunk) for chunk in loop.chunks()]
    if not parts:
        return Scores(*(head.hidden.new_empty(0, dtype=loop.dtype) for _ in range(4)))
    return parts[0] if len(parts) == 1 else Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))


class ChunkLoop:
    """Rows of the lm_head a chunk at a time: scores, and gradients added up over the chunks.

    whole_rows=False holds one block of columns of the logits, enough for scores; `backward` needs whole rows.

    On a CPU logits lie column by column [V, n]: that is how a row of the weight meets all hidden states, and how a
    register holds many rows. And there the gradient of the weight [V, H] lends its memory, unused until then, to the
    logits of the first chunk: those of column j take the first n numbers of row j, and a block of columns leaves
    before the product that fills its rows.
    """

    def __init__(self, head: LmHead, *, whole_rows: bool = True, needs: tuple[bool, bool, bool] = (False,) * 3) -> None:
        self.head = head
        self.kernels = load_kernels(head.impl, "triton_launch")
        hidden, weight = head.hidden, head.weight
        device, self.dtype = hidden.device.type, accumulation_dtype(hidden.dtype)
        num_rows, vocab = head.target_ids.shape[0], weight.shape[0]
        self.by_columns = device == "cpu" and head.impl != "triton"
        self.column_block = min(COLUMN_BLOCK, vocab) if device == "cpu" else vocab
        width = vocab if whole_rows else self.column_block
        # Every row of hidden is written where all are scored; otherwise those that nobody scores get zeros.
        make = hidden.new_empty if head.rows is None else hidden.new_zeros
        self.d_hidden = make(hidden.shape) if needs[0] else None
        self.d_bias = weight.new_zeros(vocab, dtype=self.dtype) if needs[2] else None

        lent = 0
        if self.by_columns and needs[1]:
            lent = min(num_rows, min(hidden.shape[1], MAX_LENT_ROWS) // ROW_MULTIPLE * ROW_MULTIPLE)
        chunk_bytes = CHUNK_BYTES_WITH_WEIGHT if needs[1] else CHUNK_BYTES
        budget = chunk_bytes.get(device, chunk_bytes["cpu"]) - lent * self.column_block * self.dtype.itemsize
        own = min(budget // (width * self.dtype.itemsize), MAX_CHUNK_ROWS.get(device, MAX_CHUNK_ROWS["cpu"]))
        self.sizes = _chunk_sizes(num_rows, own, lent)
        self.is_lent = lent > 0 and self.sizes[0] == lent
        # A sum over chunks is kept in float32: in bfloat16 a long one stops growing. A single product already is a sum
        # in float32 that is rounded once. The first chunk writes.
        self.d_weight: Tensor | None = None
        if needs[1]:
            is_sum = len(self.sizes) > 1 or self.by_columns
            self.d_weight = self._empty(vocab, hidden.shape[1], self.dtype if is_sum else sum_dtype(hidden.dtype))
            if num_rows == 0:
                self.d_weight.zero_()
        self.work = self._logits(_padded(max(self.sizes[self.is_lent :], default=0)), width)
        # Where a block's gradient goes, if not back to where the block was: out of lent memory; and on a GPU into half
        # precision, as the row kernel writes it, over the first half of the row that it reads.
        self.dlogits: Tensor | None = None
        if self.is_lent:
            self.dlogits = self._logits(_padded(lent), self.column_block)
        elif head.impl == "triton" and hidden.dtype != self.dtype and whole_rows:
            self.dlogits = self.work.view(hidden.dtype)

    def chunks(self) -> Iterator[Chunk]:
        hidden, rows = self.head.hidden, self.head.rows
        start = 0
        for size in self.sizes:
            chunk, padded = slice(start, start + size), _padded(size)
            logits = self.work[:padded]
            if self.is_lent and start == 0:
                assert self.d_weight is not None
                logits = self.d_weight[:, :padded].T
            states = hidden[chunk] if rows is None else hidden.index_select(0, rows[chunk])
            yield Chunk(chunk, pad(states, (0, 0, 0, padded - size)) if padded > size else states, logits)
            start += size

    def scores(self, chunk: Chunk) -> Scores:
        """Scores of a chunk; its logits stay behind if there is room for whole rows."""
        n = chunk.size
        state = self.head.hidden.new_empty((n, 4), dtype=self.dtype)
        state.zero_()  # filled on the device: a tensor made of numbers would be copied there, and waited for
        state[:, 0].fill_(-torch.inf)
        state[:, 3].fill_(torch.nan)
        target_ids, inv_temperature = self.head.target_ids[chunk.rows], self.head.inv_temperature[chunk.rows]
        for start, tile in self._tiles(chunk):
            columns = slice(start, start + tile.shape[1])
            _product(tile, chunk.hidden, self.head.weight[columns])
            if self.head.bias is not None:
                tile += self.head.bias[columns]
            self.kernels.softmax_update(tile[:n], start, target_ids, inv_temperature, self.head.softcap, state)
        return _finish(state)

    def backward(
        self,
        chunk: Chunk,
        scores: Scores,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
        grad_lse: Tensor | None,
    ) -> None:
        """Add a chunk's part of the gradients, out of its scores and the logits they were made from, which are lost.

        Those of another product would not do: the last bits of a logit of 1000 are as large as a sure row's gradient.
        """
        head, n, padded, is_first_chunk = self.head, chunk.size, chunk.hidden.shape[0], chunk.rows.start == 0
        upstream = (None if g is None else g.contiguous() for g in (grad_logprobs, grad_entropy, grad_lse))
        d_hidden = None if self.d_hidden is None else self._logits(padded, head.hidden.shape[1])
        per_row = head.target_ids[chunk.rows], head.inv_temperature[chunk.rows], head.softcap
        statistics = scores.row_max, scores.log_sum, scores.entropy, *upstream
        for start, tile in self._tiles(chunk):
            columns = slice(start, start + tile.shape[1])
            dlogits = tile if self.dlogits is None else self.dlogits[:padded, : tile.shape[1]]
            self.kernels.softmax_backward(tile[:n], start, *per_row, *statistics, dlogits[:n])
            dlogits[n:] = 0
            if self.d_bias is not None:
                self.d_bias[columns] += dlogits.sum(0, dtype=self.dtype)
            dlogits = dlogits.to(head.hidden.dtype)
            if d_hidden is not None:
                _add_product(d_hidden, dlogits, head.weight[columns], is_first=start == 0)
            if self.d_weight is not None:
                _add_product(self.d_weight[columns], dlogits.T, chunk.hidden, is_first=is_first_chunk)
        if self.d_hidden is None or d_hidden is None:
            return
        if head.rows is None:
            self.d_hidden[chunk.rows] = d_hidden[:n]
        else:
            self.d_hidden.index_add_(0, head.rows[chunk.rows], d_hidden[:n].to(self.d_hidden.dtype))

    def gradients(self, *, keep_sums: bool = False) -> Gradients:
        """In the operands' dtype, or as `sum_dtype` says; every tensor of its own, as an op's outputs must be."""
        hidden = self.head.hidden
        dtype = sum_dtype(hidden.dtype) if keep_sums else hidden.dtype
        d_hidden, d_weight, d_bias = (
            hidden.new_empty(0) if d is None else d.to(wanted)
            for d, wanted in ((self.d_hidden, hidden.dtype), (self.d_weight, dtype), (self.d_bias, dtype))
        )
        return Gradients(d_hidden, d_weight, d_bias)

    def _tiles(self, chunk: Chunk) -> Iterator[tuple[int, Tensor]]:
        """(first column, its block of the chunk's logits), left to right; the only block there is room for, or each."""
        vocab = self.head.weight.shape[0]
        has_room = chunk.logits.shape[1] == vocab
        for start in range(0, vocab, self.column_block):
            end = min(start + self.column_block, vocab)
            yield start, chunk.logits[:, start:end] if has_room else chunk.logits[:, : end - start]

    def _empty(self, num_rows: int, num_columns: int, dtype: torch.dtype | None = None) -> Tensor:
        make = self.kernels.empty_in_huge_pages if self.head.impl == "cpu" else _empty
        made: Tensor = make(self.head.hidden, (num_rows, num_columns), dtype or self.dtype)
        return made

    def _logits(self, n: int, width: int) -> Tensor:
        """[n, width], uninitialised, in the order of this device."""
        return self._empty(width, n).T if self.by_columns else self._empty(n, width)


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


def _padded(n: int) -> int:
    return n if n <= ROWS_WORTH_PADDING else -(-n // ROW_MULTIPLE) * ROW_MULTIPLE


def _chunk_sizes(num_rows: int, own: int, lent: int) -> list[int]:
    """Rows of each chunk: `lent` first if its memory holds more than one's own, or all; the rest in even shares.

    In multiples of 8: a product for 103 rows took a quarter longer than one for 104.
    """
    own = max(ROW_MULTIPLE, own // ROW_MULTIPLE * ROW_MULTIPLE)
    sizes = [lent] if lent > own or lent == num_rows > 0 else []
    rest = num_rows - sum(sizes)
    for num_chunks in range(-(-rest // own), 0, -1):
        even = -(-rest // num_chunks)
        sizes.append(min(rest, own, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE))
        rest -= sizes[-1]
    return sizes


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
        out.T.copy_(weight @ hidden.T)


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """total += left @ right, or = where it is the first (total is uninitialised then); float32 out of halves too."""
    beta = 0 if is_first else 1  # beta = 0 does not read
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    elif is_first:
        total.copy_(left @ right)
    else:
        total += left @ right
