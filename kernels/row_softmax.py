"""Softmax statistics of rows of logits, and their gradient: one program a row, one pass over its columns."""

import triton
import triton.language as tl


@triton.jit
def exp_minus_twice(x):
    """exp(-2 |x|), the one transcendental of tanh(x) and of its derivative."""
    return tl.exp(-2.0 * tl.abs(x))


@triton.jit
def tanh(x):
    """tanh to float32 accuracy without libdevice, which Triton's interpreter does not have.

    (1 - e) / (1 + e) loses its digits where e = exp(-2 |x|) is near 1: there the series to x^9 (error < 1e-8 relative).
    """
    e = exp_minus_twice(x)
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    square = x * x
    near = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.0625, near, far)


@triton.jit
def tanh_derivative(x):
    """1 - tanh(x)^2 = 4 e / (1 + e)^2, which cancels nowhere."""
    e = exp_minus_twice(x)
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def cap(x, softcap, HAS_SOFTCAP: tl.constexpr):
    if HAS_SOFTCAP:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def aligned_row(pointer, offset, VECTOR: tl.constexpr):
    """pointer + offset, known to the compiler as aligned to VECTOR elements, so that it loads that many at once."""
    return tl.multiple_of(pointer + offset, VECTOR * pointer.dtype.element_ty.primitive_bitwidth // 8)


# Arguments are not specialised by value: one choice of the launch function is one compilation. VECTOR (elements that
# every row starts and ends on a multiple of) tells the compiler what it would have read off the values.
@triton.jit(
    do_not_specialize=["row_stride", "num_columns", "first_column", "softcap"],
    do_not_specialize_on_alignment=["logits", "target_ids", "inv_temperature", "state"],
)
def softmax_update_kernel(
    logits,  # [n, v] float32 | bfloat16 | float16
    row_stride,
    num_columns,  # v
    first_column,
    target_ids,  # [n] int64, columns of the whole vocabulary
    inv_temperature,  # [n] float32
    softcap,
    state,  # [n, 4] float32: m, s, t, z_target
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Fold columns first_column .. first_column + v of one row into its running (m, s, t, z_target)."""
    row = tl.program_id(0).to(tl.int64)
    logits = aligned_row(logits, row * row_stride, VECTOR)
    num_columns = num_columns // VECTOR * VECTOR  # the same number, now known as a multiple
    state += row * 4
    inv_t = tl.load(inv_temperature + row)
    m = tl.load(state)
    s = tl.load(state + 1)
    t = tl.load(state + 2)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        x = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
        # Phantom columns leave before the maximum sees them, and after the cap, which would make -inf finite.
        z = tl.where(inside, cap(x, softcap, HAS_SOFTCAP) * inv_t, -float("inf"))
        m_new = tl.maximum(m, tl.max(z, axis=0))
        # While every column so far is -inf, measure from 0: exp(-inf - 0) = 0 where exp(-inf - -inf) is NaN.
        origin = tl.where(m_new == -float("inf"), 0.0, m_new)
        shift = tl.where(m == -float("inf"), 0.0, m - origin)
        scale = tl.exp(shift)
        distance = z - origin
        p = tl.exp(distance)  # a NaN logit, which the maximum dropped, comes back here
        # Finite in place of -inf, so that p = 0 gives 0 there; a NaN in p stays.
        t = scale * (t + s * shift) + tl.sum(p * tl.maximum(distance, -1e30), axis=0)
        s = scale * s + tl.sum(p, axis=0)
        m = m_new
    tl.store(state, m)
    tl.store(state + 1, s)
    tl.store(state + 2, t)
    target = tl.load(target_ids + row) - first_column
    is_here = (target >= 0) & (target < num_columns)
    x = tl.load(logits + target, mask=is_here, other=0.0).to(tl.float32)
    tl.store(state + 3, cap(x, softcap, HAS_SOFTCAP) * inv_t, mask=is_here)


@triton.jit(
    do_not_specialize=[
        "row_stride",
        "num_columns",
        "first_column",
        "softcap",
        "has_grad_entropy",
        "has_grad_lse",
        "out_row_stride",
    ],
    do_not_specialize_on_alignment=[
        "logits",
        "target_ids",
        "inv_temperature",
        "row_max",
        "log_sum",
        "entropy",
        "grad_logprobs",
        "grad_entropy",
        "grad_lse",
        "out",
    ],
)
def softmax_backward_kernel(
    logits,  # [n, v] float32 | bfloat16 | float16
    row_stride,
    num_columns,  # v
    first_column,
    target_ids,  # [n] int64, columns of the whole vocabulary
    inv_temperature,  # [n] float32
    softcap,
    row_max,  # [n] float32
    log_sum,  # [n] float32
    entropy,  # [n] float32
    grad_logprobs,  # [n] float32
    grad_entropy,  # [n] float32, not read unless has_grad_entropy
    has_grad_entropy,
    grad_lse,  # [n] float32, not read unless has_grad_lse
    has_grad_lse,
    out,  # [n, v]; may begin where `logits` does, in its dtype or, over the first half of each row, in a half one
    out_row_stride,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """d loss / d logits of columns first_column .. first_column + v of one row."""
    row = tl.program_id(0).to(tl.int64)
    logits = aligned_row(logits, row * row_stride, VECTOR)
    out = aligned_row(out, row * out_row_stride, VECTOR)
    num_columns = num_columns // VECTOR * VECTOR  # the same number, now known as a multiple
    inv_t = tl.load(inv_temperature + row)
    m = tl.load(row_max + row)
    log_s = tl.load(log_sum + row)
    row_entropy = tl.load(entropy + row)
    g_logprob = tl.load(grad_logprobs + row)
    g_entropy = tl.load(grad_entropy + row, mask=has_grad_entropy != 0, other=0.0)
    g_lse = tl.load(grad_lse + row, mask=has_grad_lse != 0, other=0.0)
    target = tl.load(target_ids + row) - first_column
    slope = g_lse - g_logprob
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        x = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
        # z - lse would round away digits where the logits are large.
        logprob = (cap(x, softcap, HAS_SOFTCAP) * inv_t - m) - log_s
        p = tl.exp(logprob)
        # Where p is 0 the bracket may be infinite: 0, not 0 * inf.
        dz = tl.where(p == 0.0, 0.0, p * (slope - g_entropy * (logprob + row_entropy)))
        dx = (dz + tl.where(columns == target, g_logprob, 0.0)) * inv_t
        if HAS_SOFTCAP:
            dx *= tanh_derivative(x / softcap)
        # Half as wide, the block lies over numbers before it, or over its own first ones: all are read by now, if every
        # warp of the program has got here.
        tl.debug_barrier()
        tl.store(out + columns, dx.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_elements"], do_not_specialize_on_alignment=["x", "factor"])
def scale_kernel(
    x,  # [num_elements] float32 | bfloat16
    num_elements,
    factor,  # [] float32
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """x *= factor; a factor of 1, which the host would have to wait for, costs one load."""
    by = tl.load(factor)
    if by != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        offsets = tl.arange(0, BLOCK)
        inside = offsets < num_elements - start
        block = aligned_row(x, start, VECTOR) + offsets
        scaled = tl.load(block, mask=inside).to(tl.float32) * by
        tl.store(block, scaled.to(x.dtype.element_ty), mask=inside)
