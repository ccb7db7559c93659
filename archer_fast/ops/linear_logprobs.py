"""Log-probabilities of given tokens straight from hidden states, the logits never whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from archer_fast.ops.checks import accumulation_dtype, check_operands, check_values, inverse_temperature
from archer_fast.ops.choice import Impl, choose_impl, record
from archer_fast.ops.lm_head import (
    ChunkLoop,
    LmHead,
    gradient_like,
    score,
    under_autocast,
    without_autocast,
)

_NAME = "linear_logprobs"


class LinearLogprobs(NamedTuple):
    logprobs: Tensor  # [N] float32
    entropy: Tensor | None  # [N] float32, nats; None unless asked for
    lse: Tensor | None  # [N] float32, log sum exp of the scaled logits; None unless asked for


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    impl: Impl | None = None,
) -> LinearLogprobs:
    """log p(target_ids[i] | hidden[rows[i]]) under softmax(z), z = cap(hidden @ weight.T + bias) / temperature.

    Differentiable in hidden, weight and bias, through log-probs, entropy and lse alike, once and in reverse mode
    (torch.func's forward mode would see zeros). The logits are made again in backward, a chunk at a time; for a loss
    that is a sum over rows `linear_policy_loss` spares that product.

    Args:
        hidden: [T, H] float32, bfloat16 or float16 (float64: the reference), the states that predict, of any strides;
            gathered by `rows` here, so that positions nobody scores never meet the vocabulary.
        weight: [V, H], the lm_head, in hidden's dtype. Under autocast both are cast.
        target_ids: [N] int64, each in [0, V).
        rows: [N] int64 positions in `hidden`, repeats allowed; None scores every row.
        bias: [V]; -inf masks a token out.
        temperature: > 0, that of the sampler: a number or one a scored row [N].
        softcap: cap(x) = softcap * tanh(x / softcap), Gemma's; None: no cap.
        impl: "reference" (plain torch), "cpu" (C++ row kernel), "triton"; None chooses by device.
    Errors: ValueError or TypeError naming the argument, what was wanted and what came. Values out of range on a GPU are
        found by an assertion on the device.
    """
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    num_rows = check_operands(hidden, weight, target_ids, rows, bias, softcap)
    inv_temperature = inverse_temperature(temperature, num_rows, hidden)
    differentiable = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    scoring_only = not (differentiable and torch.is_grad_enabled())
    logprobs, entropy, row_max, log_sum = _op(
        hidden, weight, target_ids, rows, bias, inv_temperature, softcap, scoring_only, choose_impl(impl, hidden)
    )
    return LinearLogprobs(logprobs, entropy if return_entropy else None, row_max + log_sum if return_lse else None)


@torch.library.custom_op("archer_fast::linear_logprobs", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    inv_temperature: Tensor,
    softcap: float | None,
    scoring_only: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log-prob, entropy, the largest scaled logit, and log_sum = lse - that one, which counts as a constant."""
    check_values(target_ids, weight.shape[0], rows, hidden.shape[0], inv_temperature)
    record(_NAME, impl)
    with without_autocast(hidden.device):
        head = LmHead(hidden, weight, target_ids, rows, bias, inv_temperature, softcap, impl)
        return score(head.contiguous(), scoring_only)


@_op.register_fake
def _(hidden: Tensor, weight: Tensor, target_ids: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def scores() -> Tensor:
        return hidden.new_empty(target_ids.shape, dtype=accumulation_dtype(hidden.dtype))

    return scores(), scores(), scores(), scores()


@torch.library.custom_op("archer_fast::linear_logprobs_backward", mutates_args=())
def _backward_op(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    inv_temperature: Tensor,
    softcap: float | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    record(f"{_NAME}_backward", impl)
    head = LmHead(hidden, weight, target_ids, rows, bias, inv_temperature, softcap, impl).contiguous()
    with without_autocast(hidden.device):
        loop = ChunkLoop(head, needs=(needs[0], needs[1], needs[2]))
        for chunk in loop.chunks():
            loop.backward(
                chunk,
                loop.scores(chunk),
                grad_logprobs[chunk.rows],
                None if grad_entropy is None else grad_entropy[chunk.rows],
                None if grad_lse is None else grad_lse[chunk.rows],
            )
        return loop.gradients()


@_backward_op.register_fake
def _(hidden: Tensor, weight: Tensor, target_ids: Tensor, rows: Tensor | None, bias: Tensor | None, *rest: Any) -> Any:
    needs = rest[-2]
    return gradient_like(hidden, weight, bias, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target_ids, rows, bias, inv_temperature, softcap, _, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(hidden, weight, target_ids, rows, bias, inv_temperature)
    ctx.softcap, ctx.impl = softcap, impl


def _backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, target_ids, rows, bias, inv_temperature = ctx.saved_tensors
    needs = [bool(ctx.needs_input_grad[i]) for i in (0, 1, 4)]
    gradients = _backward_op(
        hidden,
        weight,
        target_ids,
        rows,
        bias,
        inv_temperature,
        ctx.softcap,
        inv_temperature.new_zeros(target_ids.shape) if grad_logprobs is None else grad_logprobs,
        grad_entropy,
        grad_lse,
        needs,
        ctx.impl,
    )
    d_hidden, d_weight, d_bias = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return d_hidden, d_weight, None, None, d_bias, None, None, None, None


torch.library.register_autograd("archer_fast::linear_logprobs", _backward, setup_context=_setup_context)
