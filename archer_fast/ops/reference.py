"""The specification of every op in plain torch: any floating dtype, float64 too; tests hold the kernels to it."""

from __future__ import annotations

import torch
from torch import Tensor


def _scaled(logits: Tensor, inv_temperature: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """z = softcap tanh(logits / softcap) / temperature, and the tanh where there is a cap."""
    if softcap is None:
        return logits * inv_temperature[:, None], None
    tanh = (logits / softcap).tanh()
    return softcap * tanh * inv_temperature[:, None], tanh


def _in_tile(target_ids: Tensor, first_column: int, v: int) -> tuple[Tensor, Tensor]:
    """Whether a tile of v columns holds each row's target, and where: some column of it if not."""
    column = target_ids - first_column
    return (column >= 0) & (column < v), column.clamp(0, v - 1)


def softmax_update(
    logits: Tensor,
    first_column: int,
    target_ids: Tensor,
    inv_temperature: Tensor,
    softcap: float | None,
    state: Tensor,
) -> None:
    """Let the online softmax of each row see one more tile of columns (Milakov and Gimelshein 2018, arXiv 1805.02867).

    logits [n, v]: columns first_column .. first_column + v of the vocabulary; target_ids [n] int64;
    inv_temperature [n]; state [n, 4], in place: m = max z, s = sum e^(z-m), t = sum e^(z-m) (z-m), z at the target.
    The entropy comes from t: lse - sum p z would cancel where the policy is peaked.
    """
    z, _ = _scaled(logits, inv_temperature, softcap)
    m, s, t, _ = state.unbind(1)
    new_m = torch.maximum(m, z.amax(1))
    base = torch.where(new_m == -torch.inf, 0.0, new_m)  # all columns masked so far: nothing to shift by
    shift = torch.where(m == -torch.inf, 0.0, m - base)
    e = (z - base[:, None]).exp()
    t_new = shift.exp() * (t + s * shift) + torch.where(e == 0, 0.0, e * (z - base[:, None])).sum(1)
    s_new = shift.exp() * s + e.sum(1)
    state[:, 0], state[:, 1], state[:, 2] = new_m, s_new, t_new
    here, column = _in_tile(target_ids, first_column, logits.shape[1])
    at_target = z.gather(1, column[:, None]).squeeze(1)
    state[:, 3] = torch.where(here, at_target, state[:, 3])


def softmax_backward(
    logits: Tensor,
    first_column: int,
    target_ids: Tensor,
    inv_temperature: Tensor,
    softcap: float | None,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
) -> None:
    """Gradient of each row's log-prob, entropy and lse with respect to a tile of its logits, into out [n, v].

    logits [n, v]: columns first_column .. first_column + v of the vocabulary; the statistics are of all of it.

    log p = (z - row_max) - log_sum: lse = row_max + log_sum would round away digits where the logits are large.

    dz_j = p_j (g_lse - g_logprob - g_entropy (log p_j + entropy)) + g_logprob [j = target]
    """
    z, tanh = _scaled(logits, inv_temperature, softcap)
    log_p = (z - row_max[:, None]) - log_sum[:, None]
    factor = -grad_logprobs if grad_lse is None else grad_lse - grad_logprobs
    dz = factor[:, None].expand_as(z)
    if grad_entropy is not None:
        dz = dz - grad_entropy[:, None] * (log_p + entropy[:, None])
    p = log_p.exp()
    dz = torch.where(p == 0, 0.0, p * dz)  # a masked column has log p = -inf
    here, column = _in_tile(target_ids, first_column, logits.shape[1])
    dz.scatter_add_(1, column[:, None], torch.where(here, grad_logprobs, 0.0)[:, None])
    dz *= inv_temperature[:, None]
    if tanh is not None:
        dz *= 1 - tanh.square()
    out.copy_(dz)


def scale(x: Tensor, factor: Tensor) -> None:
    """x *= factor [], in place; on a CPU, where the factor can be read, not for a factor of 1."""
    if factor.device.type != "cpu" or float(factor) != 1:
        x.mul_(factor)


def segment_scan(a: Tensor, b: Tensor, cu: Tensor, out: Tensor) -> None:
    """y_t = b_t + a_t y_{t+1} in each segment [cu[k], cu[k+1]), into out [T]; an `a` at a segment's end is not read.

    a, b [T]; cu [B+1] int32. All segments walk together from their ends, so the longest tells the number of steps.
    """
    position, start = cu[1:].long() - 1, cu[:-1].long()
    y = None
    while True:
        inside = position >= start
        position, start = position[inside], start[inside]
        if position.numel() == 0:
            return
        y = b[position] if y is None else b[position] + a[position] * y[inside]
        out[position] = y
        position = position - 1


def critic_loss(
    values: Tensor,
    targets: Tensor,
    kind: str,
    expectile: float,
    huber_delta: float,
    losses: Tensor,
    stats: Tensor,
    grads: Tensor,
) -> None:
    """Mean loss of each head with its gradient, and what its values look like.

    values, targets [4, n], rows q1, q2, v1, v2; into losses [4], stats [4, 4] (mean, min, max, std of the population)
    and grads [4, n] = d losses[row] / d values[row]. n = 0: losses 0, stats NaN.
    """
    u = targets - values
    if kind == "huber":
        inner = u.abs() <= huber_delta
        each = torch.where(inner, 0.5 * u.square(), huber_delta * (u.abs() - 0.5 * huber_delta))
        slope = u.clamp(-huber_delta, huber_delta)
    else:
        weight = torch.ones_like(u)
        if kind == "expectile":
            weight[2:] = (expectile - (u[2:] < 0).to(u.dtype)).abs()
        each, slope = weight * u.square(), 2 * weight * u
    n = values.shape[1]
    grads.copy_(-slope / max(n, 1))
    losses.copy_(each.sum(1) / max(n, 1))
    if n == 0:
        stats.fill_(torch.nan)
        return
    columns = (values.mean(1), values.amin(1), values.amax(1), values.std(1, correction=0))
    stats.copy_(torch.stack(columns, 1))
