"""The actor's whole loss straight from hidden states: three matrix products, the gradient made in the forward pass."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from archer_fast.ops.checks import (
    accumulation_dtype,
    check_operands,
    check_per_row,
    check_values,
    inverse_temperature,
)
from archer_fast.ops.choice import Impl, choose_impl, load_kernels, record
from archer_fast.ops.lm_head import (
    ChunkLoop,
    LmHead,
    gradient_like,
    under_autocast,
    without_autocast,
)

_NAME = "linear_policy_loss"
PolicyLossKind = Literal["reinforce", "ppo_clip", "awr"]


class PolicyMetrics(NamedTuple):
    """[] each, without gradient; but for the first means over the scored tokens, None with nothing to compare with."""

    policy_loss: Tensor  # the loss without its KL and entropy terms
    ratio: Tensor | None  # pi / the policy of rollout_logprobs
    clip_fraction: Tensor | None  # of tokens whose ratio is outside [1 - clip_low, 1 + clip_high]
    approx_kl: Tensor | None  # KL(rollout policy || pi), estimated by ratio - 1 - log ratio ("k3", Schulman 2020)
    ref_kl: Tensor | None  # KL(pi || reference), estimated by (log pi - log ref)^2 / 2 ("k2", ibid.)


class LinearPolicyLoss(NamedTuple):
    loss: Tensor  # [] float32, the only output that carries a gradient
    logprobs: Tensor  # [N] float32
    entropy: Tensor  # [N] float32, nats
    metrics: PolicyMetrics


class PolicyTerms(NamedTuple):
    """A row's share of the loss and its derivatives: all that the vocabulary's gradient needs to know of the loss."""

    loss: Tensor  # [n]
    grad_logprobs: Tensor  # [n] d loss / d logprob
    grad_entropy: Tensor | None  # [n] d loss / d entropy; None where it is 0


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    advantages: Tensor,
    *,
    rows: Tensor | None = None,
    kind: PolicyLossKind = "reinforce",
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    awr_beta: float = 1.0,
    awr_max_weight: float = 20.0,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    num_actions: int | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    impl: Impl | None = None,
) -> LinearPolicyLoss:
    """loss = 1/n sum_i [ policy_i + kl_coef (log pi_i - log ref_i)^2 / 2 - entropy_coef H_i ] over the scored tokens.

        reinforce  policy_i = -A_i log pi_i                                    (ArCHer, arXiv 2402.19446)
        ppo_clip   policy_i = -min(r_i A_i, clip(r_i, 1 - clip_low, 1 + clip_high) A_i), r_i = pi_i / rollout_i
                                                                               (Schulman et al. 2017, arXiv 1707.06347)
        awr        policy_i = -min(exp(awr_beta A_i), awr_max_weight) log pi_i (Peng et al. 2019, arXiv 1910.00177)

    A row's loss depends on its own logits alone, so their gradient is known while the chunk of logits is alive: one
    product for the logits and two for the gradients, where an op that returns log-probs needs the first twice. The KL
    term is the "k2" estimator (Schulman 2020, joschu.net/blog/kl-approx.html): for tokens sampled from pi its gradient
    is an unbiased estimate of that of each token's KL(pi || ref), the prefix taken as given.

    The gradient is kept from forward to backward: [T, H] and, where the weight is trained, [V, H], which is scaled in
    place by what comes from above, so that a second backward through the same call (retain_graph=True) is refused.
    Differentiable once, in reverse mode.

    Args (those of `linear_logprobs` mean the same here):
        advantages: [N], one a scored token; no gradient flows into them.
        rollout_logprobs: [N] by the policy that sampled; wanted by ppo_clip, and by the metrics where given.
        ref_logprobs: [N] by the reference; wanted where kl_coef is not 0.
        num_actions: n, what the sum over tokens is divided by; None: the number of scored tokens. ArCHer divides by the
            number of actions, so that long actions do not weigh less.
    Errors: ValueError or TypeError naming the argument, what was wanted and what came.
    """
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    num_rows = check_operands(hidden, weight, target_ids, rows, bias, softcap)
    per_row = {"advantages": advantages, "rollout_logprobs": rollout_logprobs, "ref_logprobs": ref_logprobs}
    for name, x in per_row.items():
        check_per_row(name, x, num_rows, hidden)
    if kind not in get_args(PolicyLossKind):
        raise ValueError(f"kind: wanted one of {', '.join(get_args(PolicyLossKind))}, got {kind!r}")
    if kind == "ppo_clip" and rollout_logprobs is None:
        raise ValueError("rollout_logprobs: kind 'ppo_clip' wants the log-probs of the policy that sampled, got None")
    if kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: kl_coef {kl_coef} wants the log-probs of a reference, got None")
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(
            f"clip_low, clip_high: wanted 0 <= clip_low <= 1 and 0 <= clip_high, got {clip_low}, {clip_high}"
        )
    if num_actions is not None and (not isinstance(num_actions, (int, torch.SymInt)) or num_actions < 1):
        raise ValueError(f"num_actions: wanted an integer above 0 or None, got {num_actions}")
    for name, number in (("kl_coef", kl_coef), ("entropy_coef", entropy_coef), ("awr_beta", awr_beta)):
        if not abs(number) < float("inf") or (name == "kl_coef" and number < 0):
            raise ValueError(
                f"{name}: wanted a finite number{', 0 or more' if name == 'kl_coef' else ''}, got {number}"
            )
    if not awr_max_weight > 0:
        raise ValueError(f"awr_max_weight: wanted a number above 0, got {awr_max_weight}")

    wants = torch.is_grad_enabled()
    needs = [wants and hidden.requires_grad, wants and weight.requires_grad, False]
    needs[2] = wants and bias is not None and bias.requires_grad
    dtype = accumulation_dtype(hidden.dtype)
    loss, logprobs, entropy, *_ = _op(
        hidden,
        weight,
        target_ids,
        advantages.to(dtype),
        rows,
        bias,
        None if rollout_logprobs is None else rollout_logprobs.to(dtype),
        None if ref_logprobs is None else ref_logprobs.to(dtype),
        inverse_temperature(temperature, num_rows, hidden),
        softcap,
        kind,
        [clip_low, clip_high, awr_beta, awr_max_weight, kl_coef, entropy_coef],
        num_actions,
        needs,
        choose_impl(impl, hidden),
    )
    with torch.no_grad():
        n = _divisor(num_actions, target_ids)
        policy_loss = loss.detach() + entropy_coef * entropy.sum() / n
        ratio = clip_fraction = approx_kl = ref_kl = None
        if rollout_logprobs is not None:
            log_ratio = logprobs - rollout_logprobs
            r = log_ratio.exp()
            ratio, approx_kl = r.mean(), (r - 1 - log_ratio).mean()
            clip_fraction = ((r < 1 - clip_low) | (r > 1 + clip_high)).to(r.dtype).mean()
        if ref_logprobs is not None:
            k2 = 0.5 * (logprobs - ref_logprobs).square()
            ref_kl = k2.mean()
            if kl_coef != 0:
                policy_loss = policy_loss - kl_coef * k2.sum() / n
    metrics = PolicyMetrics(policy_loss, ratio, clip_fraction, approx_kl, ref_kl)
    return LinearPolicyLoss(loss, logprobs, entropy, metrics)


def policy_terms(
    kind: str,
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    coefficients: list[float],
) -> PolicyTerms:
    """The bracket of `linear_policy_loss` for n rows, and its derivatives by hand.

    coefficients: clip_low, clip_high, awr_beta, awr_max_weight, kl_coef, entropy_coef.
    """
    clip_low, clip_high, awr_beta, awr_max_weight, kl_coef, entropy_coef = coefficients
    if kind == "ppo_clip":
        assert rollout_logprobs is not None
        ratio = torch.where(advantages == 0, 1.0, (logprobs - rollout_logprobs).exp())  # 0 * inf has no say either
        plain, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
        loss = -torch.minimum(plain, clipped)
        # Where the clipped branch is the smaller, moving the policy changes nothing.
        grad = torch.where(plain > clipped, 0.0, -plain)
    else:
        weight = advantages
        if kind == "awr":
            weight = (awr_beta * advantages).exp().clamp(max=awr_max_weight)
        # 0 * -inf is NaN: a token of advantage 0 has no say, also where the policy now excludes it.
        loss, grad = torch.where(weight == 0, 0.0, -weight * logprobs), -weight
    if kl_coef != 0:
        assert ref_logprobs is not None
        difference = logprobs - ref_logprobs
        loss = loss + 0.5 * kl_coef * difference.square()
        grad = grad + kl_coef * difference
    if entropy_coef == 0:
        return PolicyTerms(loss, grad, None)
    return PolicyTerms(loss - entropy_coef * entropy, grad, torch.full_like(entropy, -entropy_coef))


@torch.library.custom_op("archer_fast::linear_policy_loss", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    advantages: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    inv_temperature: Tensor,
    softcap: float | None,
    kind: str,
    coefficients: list[float],
    num_actions: int | None,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, logprobs, entropy, and the gradients of `_kept_factor` times the loss in hidden, weight, bias."""
    check_values(target_ids, weight.shape[0], rows, hidden.shape[0], inv_temperature)
    record(_NAME, impl)
    head = LmHead(hidden, weight, target_ids, rows, bias, inv_temperature, softcap, impl).contiguous()

    def terms(chunk: slice, logprobs: Tensor, entropy: Tensor) -> PolicyTerms:
        rollout = None if rollout_logprobs is None else rollout_logprobs[chunk]
        ref = None if ref_logprobs is None else ref_logprobs[chunk]
        return policy_terms(kind, logprobs, entropy, advantages[chunk], rollout, ref, coefficients)

    n = _divisor(num_actions, target_ids)
    per_row = _kept_factor(hidden.dtype, n) / n
    with without_autocast(hidden.device):
        loop = ChunkLoop(head, whole_rows=any(needs), needs=(needs[0], needs[1], needs[2]))
        logprobs = hidden.new_empty(target_ids.shape, dtype=loop.dtype)
        entropy = torch.empty_like(logprobs)
        for chunk in loop.chunks():
            scores = loop.scores(chunk)
            logprobs[chunk.rows], entropy[chunk.rows] = scores.logprobs, scores.entropy
            if any(needs):
                _, of_logprobs, of_entropy = terms(chunk.rows, scores.logprobs, scores.entropy)
                of_entropy = None if of_entropy is None else of_entropy * per_row
                loop.backward(chunk, scores, of_logprobs * per_row, of_entropy, None)
        loss = terms(slice(None), logprobs, entropy).loss.sum() / n
        return loss, logprobs, entropy, *loop.gradients(keep_sums=True)


@_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, advantages: Tensor, rows: Tensor | None, bias: Any, *rest: Any
) -> Any:
    loss = hidden.new_empty((), dtype=accumulation_dtype(hidden.dtype))
    logprobs, entropy = (loss.new_empty(target_ids.shape) for _ in range(2))
    return loss, logprobs, entropy, *gradient_like(hidden, weight, bias, rest[-2], keep_sums=True)


def _divisor(num_actions: int | None, target_ids: Tensor) -> int:
    return max(target_ids.shape[0], 1) if num_actions is None else num_actions


def _kept_factor(dtype: torch.dtype, n: int) -> int:
    """The gradients that wait for backward are those of so many times the loss.

    float16 would lose digits to underflow, were they divided by n before they are rounded to it. Elsewhere they are
    what backward hands out, unless the loss is scaled.
    """
    return n if dtype == torch.float16 else 1


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])
    ctx.dtype, ctx.impl = inputs[0].dtype, inputs[14]
    ctx.kept_factor = _kept_factor(ctx.dtype, _divisor(inputs[12], inputs[2]))
    ctx.is_spent = False


@once_differentiable
def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad_loss is None:
        return tuple(out)
    if ctx.is_spent:
        raise RuntimeError(
            "linear_policy_loss: the gradient of weight was handed out by an earlier backward; call the op once more "
            "instead of keeping its graph (retain_graph=True)"
        )
    d_hidden, d_weight, d_bias = ctx.saved_tensors
    factor = grad_loss / ctx.kept_factor  # 0-dim float32: a product with it does not leave half precision's range early
    if ctx.needs_input_grad[0]:
        out[0] = d_hidden * factor
    if ctx.needs_input_grad[1]:
        # In place: a second [V, H] would double what the gradient takes. Traced, the compiler plans memory itself.
        is_eager = type(d_weight) is Tensor
        ctx.is_spent = is_eager
        if is_eager:
            load_kernels(ctx.impl, "triton_launch").scale(d_weight, factor)
        out[1] = (d_weight if is_eager else d_weight * factor).to(ctx.dtype)
    if ctx.needs_input_grad[5]:
        out[5] = (d_bias * factor).to(ctx.dtype)
    return tuple(out)


torch.library.register_autograd("archer_fast::linear_policy_loss", _backward, setup_context=_setup_context)
