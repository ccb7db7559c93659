"""Problems, truths and yardsticks that the tests of the ops on the vocabulary share."""

from __future__ import annotations

import torch
from torch import Tensor

V, H = 1003, 17  # an odd vocabulary: no tile divides it

KINDS = ["random", "peaked", "peaked at the target", "near -256", "last column", "first column", "flat"]


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, the same on every device, on the default one."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return numbers.to(torch.get_default_device())


def rounded(x: Tensor, parts: int) -> Tensor:
    """To multiples of 1 / parts."""
    return (x * parts).round() / parts


def problem(num_rows: int, kind: str = "random", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], target_ids [N]; `kind` is what the logits look like.

    Large logits are exact in float32, in whatever order their products are added up: otherwise the last bit of one of
    two that nearly tie decides which implementation looks the better.
    """
    hidden = normal(num_rows, H, seed=seed)
    weight = normal(V, H, seed=seed + 100) / H**0.5
    target_ids = torch.arange(num_rows) * 7919 % V
    if kind == "peaked":
        hidden, weight = rounded(hidden, 16), rounded(weight * 200, 4)
    elif kind == "peaked at the target":
        hidden, weight = rounded(hidden, 16), rounded(weight * 50, 4)
        target_ids = (hidden @ weight.T).argmax(-1)
    elif kind == "near -256":
        hidden, weight = rounded(hidden, 16), rounded(weight * 0.1, 256)
        hidden[:, 0], weight[:, 0] = 1.0, -256.0
    elif kind == "last column":
        target_ids[:] = V - 1
    elif kind == "first column":
        target_ids[:] = 0
    elif kind == "flat":
        weight = torch.zeros(V, H)
    return hidden.requires_grad_(), weight.requires_grad_(), target_ids


def plain(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log-prob, entropy, lse by whole torch in the dtype given: how exact one can be there; in float64 the truth."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[:, None].to(logits.dtype)
    logits = logits / temperature
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)  # masked columns: 0 * -inf
    return logprobs.gather(1, target_ids[:, None]).squeeze(1), entropy, logits.logsumexp(-1)


def upstream(num_rows: int, seed: int = 1) -> Tensor:
    """Both signs, and every fourth row 0."""
    weight = normal(num_rows, seed=seed).double()
    weight[::4] = 0
    return weight


def assert_no_worse(got: Tensor, yardstick: Tensor, wanted: Tensor, factor: float = 2.0, condition: float = 1) -> None:
    """|got - wanted| <= factor |yardstick - wanted| + a few units in the last place.

    condition: by how much the function enlarges the rounding of its input, where that is more than 1: with few rows the
    yardstick may hit the truth by luck.
    """
    assert got.shape == wanted.shape
    wanted = wanted.double()
    error, theirs = (got.double() - wanted).norm(), (yardstick.double() - wanted).norm()
    floor = 3e-7 * condition * (wanted.norm() + wanted.numel() ** 0.5)
    assert error <= factor * theirs + floor, f"error {error:.3g}, plain torch's {theirs:.3g}"
