"""The loss of a double critic with the statistics of its heads, in one pass."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from archer_fast.ops.checks import FLOATS
from archer_fast.ops.choice import Impl, choose_impl, load_kernels, record

_NAME = "critic_loss"
_KINDS = ("mse", "expectile", "huber")


class HeadStats(NamedTuple):
    """Of the values that each head gave; rows q1, q2, v1, v2. NaN where there are none."""

    mean: Tensor  # [4]
    min: Tensor  # [4]
    max: Tensor  # [4]
    std: Tensor  # [4] of the population: 0 for one value


class CriticLoss(NamedTuple):
    loss: Tensor  # [] the sum of the four; the only one that carries a gradient
    q1: Tensor  # [] each head's mean
    q2: Tensor
    v1: Tensor
    v2: Tensor
    stats: HeadStats


def critic_loss(
    q1: Tensor,
    q2: Tensor,
    v1: Tensor,
    v2: Tensor,
    q1_target: Tensor,
    q2_target: Tensor,
    v1_target: Tensor,
    v2_target: Tensor,
    *,
    kind: Literal["mse", "expectile", "huber"] = "mse",
    expectile: float = 0.7,
    huber_delta: float = 1.0,
    impl: Impl | None = None,
) -> CriticLoss:
    """loss = sum over the four heads of mean_i l(u_i), u = target - value, each head against its own target.

        mse        l(u) = u^2: ArCHer's turn-level critic (Zhou et al. 2024, arXiv 2402.19446)
        expectile  l(u) = |expectile - [u < 0]| u^2 for V1 and V2, u^2 for Q1 and Q2: implicit Q-learning
                   (Kostrikov et al. 2021, arXiv 2110.06169). At 0.5 half the mse; towards 1 V rises to the best Q.
        huber      l(u) = u^2 / 2 where |u| <= huber_delta, else huber_delta (|u| - huber_delta / 2)

    Heads are paired, and no minimum over them is taken: that is the business of who makes the targets.

    Args:
        q1, q2, v1, v2: [n] float32, bfloat16 or float16 (computed in float32), or float64 (the reference).
        q1_target, ...: [n], which carry no gradient.
        impl: "reference" (plain torch), "cpu" (C++), "triton"; None chooses by device.
    Returns: n = 0 gives losses of 0 and statistics of NaN. Differentiable once.
    Errors: ValueError or TypeError naming the argument, what was wanted and what came.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind: wanted one of {', '.join(_KINDS)}, got {kind!r}")
    if not 0 < expectile < 1:
        raise ValueError(f"expectile: wanted a number between 0 and 1, got {expectile}")
    if not 0 < huber_delta < float("inf"):
        raise ValueError(f"huber_delta: wanted a finite number above 0, got {huber_delta}")
    heads = {"q1": q1, "q2": q2, "v1": v1, "v2": v2}
    targets = {"q1_target": q1_target, "q2_target": q2_target, "v1_target": v1_target, "v2_target": v2_target}
    for name, x in (heads | targets).items():
        if x.dim() != 1 or x.shape != q1.shape:
            wanted = "[n]" if q1.dim() != 1 else f"[n] = {tuple(q1.shape)} as q1"
            raise ValueError(f"{name}: wanted {wanted}, got {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: wanted a float tensor, got {x.dtype}")
        if x.device != q1.device:
            raise ValueError(f"{name}: wanted {q1.device}, where q1 is, got {x.device}")
    for name, x in targets.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: targets carry no gradient, got a tensor that requires one; detach it")
    is_double = any(x.dtype == torch.float64 for x in (heads | targets).values())
    dtype = torch.float64 if is_double else torch.float32
    values = torch.stack([x.to(dtype) for x in heads.values()])  # [4, n]
    wanted_values = torch.stack([x.to(dtype) for x in targets.values()])
    losses, stats, _ = _loss(values, wanted_values, kind, expectile, huber_delta, choose_impl(impl, values))
    each = losses.detach().unbind(0)
    return CriticLoss(losses.sum(), each[0], each[1], each[2], each[3], HeadStats(*stats.unbind(1)))


def _loss(
    values: Tensor, targets: Tensor, kind: str, expectile: float, huber_delta: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor]
    if impl == "triton" and values.is_cuda:
        from archer_fast.ops import triton_ops  # registering a triton_op imports Triton

        made = triton_ops.critic_loss(values, targets, kind, expectile, huber_delta)
    else:
        made = _op(values, targets, kind, expectile, huber_delta, impl)
    return made


def empty_outputs(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """losses [4], stats [4, 4] (mean, min, max, std of each head), grads [4, n] = d losses[row] / d values[row]."""
    return values.new_empty(4), values.new_empty(4, 4), values.new_empty(values.shape)


@torch.library.custom_op("archer_fast::critic_loss", mutates_args=())
def _op(
    values: Tensor, targets: Tensor, kind: str, expectile: float, huber_delta: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    record(_NAME, impl)
    losses, stats, grads = empty_outputs(values)
    run = load_kernels(impl, "triton_turns").critic_loss
    run(values.contiguous(), targets.contiguous(), kind, expectile, huber_delta, losses, stats, grads)
    return losses, stats, grads


@_op.register_fake
def _(
    values: Tensor, targets: Tensor, kind: str, expectile: float, huber_delta: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(values)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Of `archer_fast::critic_loss` and of its Triton twin."""
    _, stats, grads = output
    ctx.mark_non_differentiable(stats, grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grads)
    ctx.num_inputs = len(inputs)


@once_differentiable
def backward(ctx: Any, grad_losses: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    (grads,) = ctx.saved_tensors
    grad_values = None if grad_losses is None else grads * grad_losses[:, None]
    return grad_values, *[None] * (ctx.num_inputs - 1)


torch.library.register_autograd("archer_fast::critic_loss", backward, setup_context=setup_context)
