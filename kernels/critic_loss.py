"""The losses of four value heads, their statistics and gradients in one pass: one program a head."""

import triton
import triton.language as tl


@triton.jit
def critic_loss_kernel(
    values,
    targets,
    losses,
    stats,
    grads,
    num_values,
    weight_above,
    weight_below,
    huber_delta,
    IS_HUBER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values, targets [4, n] float32, rows q1, q2, v1, v2 -> losses [4], stats [4, 4], grads [4, n]; n >= 1.

    u = target - value. Huber (delta), or w u^2 with w = weight_above where u >= 0 and weight_below where u < 0 in the
    rows of V, 1 in those of Q. stats: mean, min, max, population standard deviation of the values.
    The deviation is exact to rounding whatever the mean: values are shifted by the row's first one, every lane keeps
    a running mean and sum of squares (Welford 1962), and the lanes are merged around the common mean (Chan 1979).
    """
    row = tl.program_id(0)
    start = row.to(tl.int64) * num_values
    lane = tl.arange(0, BLOCK).to(tl.int64)
    above = tl.where(row >= 2, weight_above, 1.0)
    below = tl.where(row >= 2, weight_below, 1.0)
    per_value = 1.0 / num_values
    origin = tl.load(values + start)
    origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)

    loss = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)  # of value - origin
    mean = tl.zeros([BLOCK], tl.float32)  # of the same, as Welford has it
    squares = tl.zeros([BLOCK], tl.float32)  # sum of (value - lane's mean)^2
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    num_nan = tl.zeros([BLOCK], tl.int32)  # minimum and maximum pass over NaN
    for tile in range(tl.cdiv(num_values, BLOCK)):
        i = tile * BLOCK + lane
        live = i < num_values
        value = tl.load(values + start + i, mask=live, other=0.0)
        u = tl.load(targets + start + i, mask=live, other=0.0) - value
        if IS_HUBER:
            clipped = tl.where(u > huber_delta, huber_delta, tl.where(u < -huber_delta, -huber_delta, u))
            is_small = tl.abs(u) <= huber_delta
            each = tl.where(is_small, 0.5 * u * u, huber_delta * (tl.abs(u) - 0.5 * huber_delta))
            slope = -clipped
        else:
            weighted = tl.where(u < 0, below, above) * u
            each = weighted * u
            slope = -2.0 * weighted
        tl.store(grads + start + i, slope * per_value, mask=live)
        loss += tl.where(live, each, 0.0)

        shifted = value - origin
        deviation = shifted - mean
        mean += tl.where(live, deviation / (tile + 1), 0.0)
        squares += tl.where(live, deviation * (shifted - mean), 0.0)
        total += tl.where(live, shifted, 0.0)
        low = tl.minimum(low, tl.where(live, value, float("inf")))
        high = tl.maximum(high, tl.where(live, value, float("-inf")))
        num_nan += tl.where(live & (value != value), 1, 0)

    num_lane = (num_values - lane + BLOCK - 1) // BLOCK  # values that a lane has seen; of no lane below 0: n >= 1
    shifted_mean = tl.sum(total, 0) * per_value
    apart = mean - shifted_mean
    spread = tl.sum(squares + num_lane * apart * apart, 0) * per_value
    has_nan = tl.sum(num_nan, 0) > 0
    tl.store(losses + row, tl.sum(loss, 0) * per_value)
    tl.store(stats + row * 4, origin + shifted_mean)
    tl.store(stats + row * 4 + 1, tl.where(has_nan, float("nan"), tl.min(low, 0)))
    tl.store(stats + row * 4 + 2, tl.where(has_nan, float("nan"), tl.max(high, 0)))
    tl.store(stats + row * 4 + 3, tl.sqrt(spread))
