"""Whether a method of an original says the same as its fast twin, found by asking both about one small example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

# What the original's ArcherTrainer.update and its helpers mention. One that mentions more does more.
_UPDATE_MENTIONS = frozenset(
    """step autograd set_detect_anomaly range epochs sample grad_accum_steps batch_size items DataLoader DummyDataset
    accelerator prepare critic_optimizer lm_optimizer zero_grad tqdm append critic_loss actor_loss clip_grad_norm_ agent
    parameters max_grad_norm soft_update_target_critic tau update dict_mean print policy_lm actor_epochs torch no_grad
    get_action critic minimum copy deepcopy time sleep is_main_process len keys sum""".split()  # noqa: SIM905
)
_OBSERVATION, _ACTION = "Questions:\nIs it alive? Yes.\n", "Is it a dog?"
_ROWS = 2  # equal ones: no padding, and a standard deviation


def differs(owner: Any, name: str, original: Callable[..., Any], fast: Callable[..., Any]) -> str | None:
    """Why `fast(owner, ...)` may not stand for `original(owner, ...)`; None where it may.

    The owner is left as it was: weights, gradients, random state, settings.
    """
    device_states = torch.random.get_rng_state()
    try:
        return _COMPARISONS[name](owner, original, fast)
    except Exception as error:  # whatever a fork does to us
        return f"it could not be compared: {type(error).__name__}: {error}"
    finally:
        torch.random.set_rng_state(device_states)


def _get_action(agent: Any, original: Callable[..., Any], fast: Callable[..., Any]) -> str | None:
    with _instead(agent, "do_sample", False):
        theirs, own = original(agent, [_OBSERVATION]), fast(agent, [_OBSERVATION])
    return None if theirs == own else f"greedily it says {theirs[0]!r} where the original says {own[0]!r}"


@torch.no_grad()
def _get_log_prob(agent: Any, original: Callable[..., Any], fast: Callable[..., Any]) -> str | None:
    asked = [_OBSERVATION] * _ROWS, [_ACTION] * _ROWS
    return _unlike(original(agent, *asked), fast(agent, *asked))


@torch.no_grad()
def _soft_update(agent: Any, original: Callable[..., Any], fast: Callable[..., Any]) -> str | None:
    del fast  # target <- (1 - tau) target + tau online
    targets, online = list(agent.target_critic.parameters()), list(agent.critic.parameters())
    before = [p.clone() for p in targets]
    try:
        original(agent, 0.25)
        wanted = (b.lerp(p, 0.25) for b, p in zip(before, online, strict=True))
        return next(filter(None, map(_unlike, targets, wanted)), None)
    finally:
        for p, b in zip(targets, before, strict=True):
            p.copy_(b)


@torch.no_grad()
def _forward(critic: Any, original: Callable[..., Any], fast: Callable[..., Any]) -> str | None:
    asked = [_OBSERVATION] * _ROWS, [_ACTION] * _ROWS
    return _unlike(original(critic, *asked), fast(critic, *asked))


def _critic_loss(trainer: Any, original: Callable[..., Any], fast: Callable[..., Any]) -> str | None:
    batch = {
        "observation": [_OBSERVATION] * _ROWS,
        "action": [_ACTION] * _ROWS,
        "reward": torch.tensor([-1.0, 0.5]),
        "next_observation": [f"{_OBSERVATION}{_ACTION} No.\n"] * _ROWS,
        "done": torch.tensor([False, True]),
        "mc_return": torch.tensor([0.0, 0.0]),
    }
    return _unlike_losses(trainer, trainer.agent.critic, original, fast, batch)


def _actor_loss(trainer: Any, original: Callable[..., Any], fast: Callable[..., Any]) -> str | None:
    batch = {
        "observation": [_OBSERVATION] * _ROWS,
        "pi_action": [_ACTION] * _ROWS,
        "advantage": torch.tensor([[0.5], [-0.25]]),
    }
    return _unlike_losses(trainer, trainer.agent.model, original, fast, batch)


def _unlike_losses(
    trainer: Any, network: Any, original: Callable[..., Any], fast: Callable[..., Any], batch: dict[str, Any]
) -> str | None:
    """Compare metrics and the gradient, as a' is _ACTION for all."""
    agent, found = trainer.agent, []
    parameters = [p for p in network.parameters() if p.requires_grad]
    kept = [(p, p.grad) for p in agent.parameters()]
    try:
        with _instead(agent, "get_action", lambda observation: [_ACTION] * len(observation)):
            for function in (original, fast):
                for p in agent.parameters():
                    p.grad = None
                info = function(trainer, **batch)
                norms = [torch.zeros(()) if p.grad is None else p.grad.float().norm() for p in parameters]
                found.append((info, torch.stack(norms).norm()))
    finally:
        for p, gradient in kept:
            p.grad = gradient
    (theirs, norm), (own, own_norm) = found
    if theirs.keys() != own.keys():
        return f"its metrics are others: {', '.join(sorted(theirs.keys() ^ own.keys()))}"
    for key in own:
        if why := _unlike(torch.as_tensor(theirs[key]), torch.as_tensor(own[key])):
            return f"{key}: {why}"
    why = _unlike(norm, own_norm)
    return None if why is None else f"gradient norm: {why}"


def _update(trainer: Any, original: Callable[..., Any], fast: Callable[..., Any]) -> str | None:
    del fast
    if (processes := getattr(trainer.accelerator, "num_processes", 1)) > 1:
        return f"{processes} processes share the work"
    more = _mentions(trainer, original) - _UPDATE_MENTIONS
    return f"it does more than the original's: {', '.join(sorted(more))}" if more else None


_COMPARISONS: dict[str, Callable[[Any, Callable[..., Any], Callable[..., Any]], str | None]] = {
    "get_action": _get_action,
    "get_log_prob": _get_log_prob,
    "soft_update_target_critic": _soft_update,
    "forward": _forward,
    "critic_loss": _critic_loss,
    "actor_loss": _actor_loss,
    "update": _update,
}


def _mentions(trainer: Any, function: Any) -> set[str]:
    """The names in a function's code, and in that of the helpers which it calls of its own class or module."""
    found, waiting = set[str](), [function.__code__]
    while waiting:
        code = waiting.pop()
        waiting += [c for c in code.co_consts if isinstance(c, CodeType)]
        for name in set(code.co_names) - found:
            helper = getattr(type(trainer), name, function.__globals__.get(name))
            if name not in _UPDATE_MENTIONS and isinstance(helper, FunctionType):
                waiting.append(helper.__code__)
            else:
                found.add(name)
    return found


def _unlike(theirs: Any, own: Any) -> str | None:
    if isinstance(own, tuple) or isinstance(theirs, tuple):
        return next(filter(None, map(_unlike, theirs, own)), None)
    a, b = (x.detach().double().flatten() for x in (theirs, own))
    half = any(x.dtype in (torch.bfloat16, torch.float16) for x in (theirs, own) if isinstance(x, Tensor))
    tolerance = 3e-2 if half else 1e-4
    if a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
        return None
    return f"it says {a.tolist()[:4]} where the original says {b.tolist()[:4]}"


@contextmanager
def _instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block."""
    was_own, before = name in vars(owner), vars(owner).get(name)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if was_own:
            vars(owner)[name] = before
        else:
            del vars(owner)[name]
