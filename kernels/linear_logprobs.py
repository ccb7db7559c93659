"""Scores straight from hidden states: a product of tiles whose logits live in registers only."""

import triton
import triton.language as tl

from archer_fast.kernels.row_softmax import cap


@triton.jit
def aligned_rows(pointer, row, stride, VECTOR: tl.constexpr):
    """Where each row [n] starts, as [n, 1], known to the compiler as aligned to VECTOR elements."""
    start = pointer + row.to(tl.int64)[:, None] * stride
    BYTES: tl.constexpr = VECTOR * pointer.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(start, [BYTES, BYTES])


@triton.jit
def fold(
    acc, columns, vocab_size, bias, has_bias, inv_t, softcap, target, m, s, t, z_target, HAS_SOFTCAP: tl.constexpr
):
    """Fold a tile of raw logits [rows, columns] into each row's (m, s, t, z_target)."""
    inside = columns < vocab_size
    acc += tl.load(bias + columns, mask=columns < vocab_size * has_bias, other=0.0)[None, :]
    # Phantom columns leave before the maximum sees them, and after the cap, which would make -inf finite.
    z = tl.where(inside[None, :], cap(acc, softcap, HAS_SOFTCAP) * inv_t[:, None], -float("inf"))
    m_new = tl.maximum(m, tl.max(z, axis=1))
    # While every column so far is -inf, measure from 0: exp(-inf - 0) = 0 where exp(-inf - -inf) is NaN.
    origin = tl.where(m_new == -float("inf"), 0.0, m_new)
    shift = tl.where(m == -float("inf"), 0.0, m - origin)
    scale = tl.exp(shift)
    z_target += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), axis=1)
    distance = z - origin[:, None]
    p = tl.exp(distance)  # a NaN logit, which the maximum dropped, comes back here
    # Finite in place of -inf, so that p = 0 gives 0 there; a NaN in p stays.
    t = scale * (t + s * shift) + tl.sum(p * tl.maximum(distance, -1e30), axis=1)
    s = scale * s + tl.sum(p, axis=1)
    return m_new, s, t, z_target


@triton.jit
def row_block_and_split(num_rows, num_splits, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Which rows and which part of the vocabulary this program has.

    Programs that run at the same time are GROUP row blocks times some splits: each weight tile is read by GROUP
    programs at once, and the hidden states of GROUP row blocks stay in the L2 cache.
    """
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(num_rows, BLOCK_N)
    first_block = pid // (GROUP * num_splits) * GROUP
    group = tl.minimum(num_blocks - first_block, GROUP)
    place = pid % (GROUP * num_splits)
    return first_block + place % group, place // group


@triton.jit
def store_state(state, row, num_rows, split, m, s, t, z_target):
    state += (split.to(tl.int64) * num_rows + row) * 4
    inside = row < num_rows
    tl.store(state, m, mask=inside)
    tl.store(state + 1, s, mask=inside)
    tl.store(state + 2, t, mask=inside)
    tl.store(state + 3, z_target, mask=inside)


# Not specialised by value, VECTOR: see row_softmax.py.
@triton.jit(
    do_not_specialize=[
        "hidden_stride",
        "weight_stride",
        "has_rows",
        "has_bias",
        "num_rows",
        "vocab_size",
        "hidden_size",
        "tiles_per_split",
        "num_splits",
        "softcap",
    ],
    do_not_specialize_on_alignment=[
        "hidden",
        "weight",
        "target_ids",
        "rows",
        "bias",
        "inv_temperature",
        "state",
    ],
)
def linear_logprobs_fwd_kernel(
    hidden,  # [T, H] float32 | bfloat16 | float16
    hidden_stride,
    weight,  # [V, H]; a tensor descriptor of tiles [BLOCK_V, BLOCK_H] if WEIGHT_TMA
    weight_stride,
    target_ids,  # [N] int64
    rows,  # [N] int64, not read unless has_rows
    has_rows,  # 0 or 1
    bias,  # [V] float32, not read unless has_bias
    has_bias,  # 0 or 1
    inv_temperature,  # [N] float32
    softcap,
    state,  # [num_splits, N, 4] float32: m, s, t, and z at the target (0 where it is in another split)
    num_rows,
    vocab_size,
    hidden_size,
    tiles_per_split,
    num_splits,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HIDDEN_TMA: tl.constexpr,  # `hidden` is a tensor descriptor of tiles [BLOCK_N, BLOCK_H]; needs has_rows = 0
    WEIGHT_TMA: tl.constexpr,
    INTERPRET: tl.constexpr,  # Triton's interpreter multiplies bfloat16 wrongly
):
    """Online softmax statistics of BLOCK_N rows over one split of the vocabulary."""
    block, split = row_block_and_split(num_rows, num_splits, BLOCK_N, GROUP)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < num_rows
    target = tl.load(target_ids + row, mask=is_row, other=-1).to(tl.int32)
    inv_t = tl.load(inv_temperature + row, mask=is_row, other=0.0)
    h = tl.arange(0, BLOCK_H)
    hidden_size = hidden_size // VECTOR * VECTOR  # the same number, now known as a multiple
    if not HIDDEN_TMA:
        source = tl.load(rows + row, mask=row < num_rows * has_rows, other=0)
        # A row past the end reads row 0, which exists, and is not stored.
        source = tl.where(is_row & (has_rows == 0), row.to(tl.int64), source)
        hidden_tile = aligned_rows(hidden, source, hidden_stride, VECTOR)
    m = tl.full([BLOCK_N], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    t = tl.zeros([BLOCK_N], tl.float32)
    z_target = tl.zeros([BLOCK_N], tl.float32)
    first = split * tiles_per_split * BLOCK_V
    last = tl.minimum(first + tiles_per_split * BLOCK_V, vocab_size)
    for v in range(first, last, BLOCK_V):
        columns = v + tl.arange(0, BLOCK_V)
        if not WEIGHT_TMA:
            weight_tile = aligned_rows(weight, tl.where(columns < vocab_size, columns, 0), weight_stride, VECTOR)
        acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for k in range(0, hidden_size, BLOCK_H):
            if HIDDEN_TMA:
                a = hidden.load([block * BLOCK_N, k])
            else:
                a = tl.load(hidden_tile + (k + h)[None, :], mask=(k + h < hidden_size)[None, :], other=0.0)
            if WEIGHT_TMA:
                b = weight.load([v, k])
            else:
                b = tl.load(weight_tile + (k + h)[None, :], mask=(k + h < hidden_size)[None, :], other=0.0)
            if INTERPRET:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")  # no effect on half precision
        m, s, t, z_target = fold(
            acc, columns, vocab_size, bias, has_bias, inv_t, softcap, target, m, s, t, z_target, HAS_SOFTCAP
        )
    store_state(state, row, num_rows, split, m, s, t, z_target)
