"""`accelerate`: an installed original, a fork of it, or one agent or trainer, made fast in place."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType, ModuleType
from typing import Any

import torch

from archer_fast.compat.algorithms.archer import ArcherTrainer, check_agent
from archer_fast.compat.faults import Compat, choose_fixes
from archer_fast.compat.models import ArcherAgent, CHAIAgent
from archer_fast.compat.models.critic import DoubleCritic
from archer_fast.compat.models.shared_critic import Mode, SharedCritic, check_mode, is_shared, share_trunk, warn_of_rate
from archer_fast.compat.overrides import mark_of
from archer_fast.compat.same_numbers import differs

# Class of the original: (ours, the methods that are exchanged).
_CLASSES: dict[str, tuple[type, tuple[str, ...]]] = {
    "ArcherAgent": (ArcherAgent, ("get_action", "get_log_prob", "soft_update_target_critic")),
    "CHAIAgent": (CHAIAgent, ("get_action", "get_log_prob", "soft_update_target_critic")),
    "DoubleCritic": (DoubleCritic, ("forward",)),
    "ArcherTrainer": (ArcherTrainer, ("critic_loss", "actor_loss", "update")),
}
_SUBMODULES = ("models", "models.archer_agent", "models.chai_agent", "models.critic", "algorithms.archer",
               "algorithms.archer.trainer", "algorithms.offpolicy_train_loop")  # fmt: skip
_CRITICS = ("critic", "target_critic")
_SETTLE = "_archer_fast_settle"
_active: list[_Exchange] = []


@dataclass
class Report:
    """What `accelerate` did: names as "archer.models.archer_agent.ArcherAgent.get_action"."""

    patched: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)  # name: why

    def __str__(self) -> str:
        lines = [f"archer_fast: {len(self.patched)} patched, {len(self.left)} left"]
        lines += [f"  patched {name}" for name in self.patched]
        return "\n".join(lines + [f"  left    {name}: {why}" for name, why in self.left.items()])


@dataclass
class _Exchange:
    """One attribute that was exchanged, of a class, an object or a module."""

    owner: Any
    name: str
    before: Any
    was_own: bool  # in the owner's own __dict__ before

    def restore(self) -> None:
        if self.was_own:
            setattr(self.owner, self.name, self.before)
        else:
            delattr(self.owner, self.name)


def accelerate(
    target: Any,
    *more: Any,
    mode: Mode = "exact",
    fix: Iterable[str] | None = None,
    compat: Compat | None = None,
    undo: bool = False,
    verbose: bool = True,
) -> Report:
    """Exchange the slow methods of the original package, of modules of it or of a fork, or of an agent or trainer.

    target, more: `archer` itself, a list of modules, objects. A method that a subclass overrides stays and is called.
    What is exchanged is asked beside what it replaces, on one small example, once an agent is there to be asked; where
    the numbers differ the package's own method stays, and the report says so. mode: "shared" also gives an agent the
    critic of `models.shared_critic` (a package's: when its trainer is made), whose numbers are NOT the original's. fix,
    compat: which faults are mended (`archer_fast.compat.faults`). undo: give everything back as it was, but for the
    critic of a trainer that a shared package has made.
    Returns the report, which is also printed where `verbose`.
    Errors: TypeError for a target of another kind, ValueError for an agent that lacks what the original's has. Nothing
    is exchanged then.
    """
    targets = [own for t in (target, *more) for own in (t if isinstance(t, (list, tuple)) else [t])]
    fixes = choose_fixes(fix, compat)
    check_mode(mode)
    report = Report()
    found = [owner for own in targets for owner in _owners(own)]
    if undo:
        while _undo(found, report):  # a critic that comes back may itself have been exchanged
            found = [owner for own in targets for owner in _owners(own)]
    else:
        begun = len(_active)
        try:
            if mode == "shared":
                for own in targets:
                    owners = list(_owners(own))
                    for owner in owners if isinstance(own, ModuleType) else owners[:1]:  # the others are its parts
                        _share(owner, report)
                found = [owner for own in targets for owner in _owners(own)]  # critics are others now
            for owner in found:
                _exchange(owner, fixes, report)
        except BaseException:
            while len(_active) > begun:
                _active.pop().restore()
            raise
    if verbose:
        print(report)
    return report


def _owners(target: Any) -> Iterator[Any]:
    """The classes of a package, the module of its train loop; or an object and what it holds."""
    if isinstance(target, ModuleType):
        yield from _of_package(target)
    elif isinstance(target, type):
        raise TypeError(f"target: wanted a module, an agent or a trainer, got the class {target.__name__}")
    elif hasattr(target, "agent") and hasattr(target, "update"):
        check_agent(target.agent)
        yield from (target, *_of_agent(target.agent))
    elif hasattr(target, "get_action"):
        check_agent(target)
        yield from _of_agent(target)
    else:
        raise TypeError(f"target: wanted a module, an agent or a trainer, got {type(target).__name__}")


def _of_agent(agent: Any) -> tuple[Any, ...]:
    unwrap = agent.accelerator.unwrap_model if hasattr(agent, "accelerator") else lambda model: model
    return agent, unwrap(agent.critic), unwrap(agent.target_critic)


def _of_package(package: ModuleType) -> Iterator[Any]:
    name = package.__name__
    for sub in _SUBMODULES:
        if hasattr(package, "__path__"):
            try:
                importlib.import_module(f"{name}.{sub}")
            except ModuleNotFoundError as error:
                if not str(error.name).startswith(name):
                    raise  # something that the package itself needs
    modules = [m for key, m in sorted(sys.modules.items()) if m and (key == name or key.startswith(f"{name}."))]
    seen: list[Any] = []
    for module in modules:
        for known in _CLASSES:
            found = getattr(module, known, None)
            if isinstance(found, type) and found not in seen and not found.__module__.startswith("archer_fast."):
                seen.append(found)
        if callable(getattr(module, "offpolicy_train_loop", None)) and hasattr(getattr(module, "time", None), "sleep"):
            seen.append(module)
    if not seen:
        raise TypeError(
            f"target: wanted the package archer or a fork of it, {name!r} has none of {', '.join(_CLASSES)}"
        )
    yield from seen


def _share(owner: Any, report: Report) -> None:
    """Of an agent or trainer: exchange its critics, and what optimizes them; of the trainer's class: do so in each
    trainer that is made."""
    if isinstance(owner, type):
        if owner.__name__ == "ArcherTrainer":
            made = owner.__init__  # type: ignore[misc]

            @functools.wraps(made)
            def init(self: Any, *args: Any, **kwargs: Any) -> None:
                made(self, *args, **kwargs)
                if _share_agent(self.agent, report):
                    self.critic_optimizer = _optimizer_like(self)

            _set(owner, "__init__", init)
            report.patched.append(f"{owner.__module__}.{owner.__qualname__}.__init__")
    elif not isinstance(owner, ModuleType):
        agent = getattr(owner, "agent", owner)
        before = [(name, getattr(agent, name)) for name in _CRITICS]
        if _share_agent(agent, report):
            _active.extend(_Exchange(agent, name, critic, True) for name, critic in before)
            if agent is not owner:
                _set(owner, "critic_optimizer", _optimizer_like(owner))


def _share_agent(agent: Any, report: Report) -> bool:
    """Whether the agent's critics were exchanged, which the report says."""
    names = [f"{type(agent).__module__}.{type(agent).__qualname__}.{name}" for name in _CRITICS]
    if is_shared(agent):
        return False
    try:
        share_trunk(agent)
    except ValueError as reason:
        report.left |= dict.fromkeys(names, str(reason))
        print(f"archer_fast: left {', '.join(names)}: {reason}")
        return False
    report.patched += [name for name in names if name not in report.patched]
    return True


def _optimizer_like(trainer: Any) -> Any:
    """Adam for the agent's critic as it is now, at the rate of the one that the trainer has."""
    rate = trainer.critic_optimizer.param_groups[0]["lr"]
    warn_of_rate(rate)
    registered = getattr(trainer.accelerator, "_optimizers", [])  # of Hugging Face's: it would keep the encoder alive
    if trainer.critic_optimizer in registered:
        registered.remove(trainer.critic_optimizer)
    return trainer.accelerator.prepare(torch.optim.Adam(trainer.agent.critic.parameters(), lr=rate))


def _exchange(owner: Any, fixes: frozenset[str], report: Report) -> None:
    if isinstance(owner, ModuleType):
        _set(owner, "time", _WithoutSleep(owner.time))
        report.patched.append(f"{owner.__name__}: time.sleep")
        return
    cls = owner if isinstance(owner, type) else type(owner)
    base = next((c for c in cls.__mro__ if c.__name__ in _CLASSES), None)
    where = f"{cls.__module__}.{cls.__qualname__}"
    if isinstance(owner, SharedCritic):
        return  # ours already
    if base is None:
        report.left[where] = "it derives from no class of the original's"
        return
    replacement, names = _CLASSES[base.__name__]
    if replacement is not DoubleCritic:
        _set(owner, "fixes", fixes)
    for name in names:
        if not isinstance(owner, type) and mark_of(owner, name):
            continue
        definer = next((c for c in cls.__mro__ if name in vars(c)), None)
        if definer is None:
            report.left[f"{where}.{name}"] = "there is no such method"
        elif definer is not base or (not isinstance(owner, type) and name in vars(owner)):
            report.left[f"{where}.{name}"] = f"overridden by {definer.__name__}, which is called"
        else:
            _exchange_method(owner, name, getattr(replacement, name), f"{where}.{name}", report)


def _exchange_method(owner: Any, name: str, function: Callable[..., Any], where: str, report: Report) -> None:
    """Of an object: a method that is compared now. Of a class: one that is compared when it, or `update`, is first
    called."""
    if not isinstance(owner, type):
        if why := differs(owner, name, getattr(type(owner), name), function):
            report.left[where] = why
        else:
            _set(owner, name, MethodType(function, owner))
            report.patched.append(where)
        return
    original = vars(owner)[name]

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "update":
            for part in (self, *_of_agent(self.agent)):
                _settle(part)
        settle(self)
        chosen = original if where in report.left else function
        return chosen(self, *args, **kwargs)

    def settle(asked: Any) -> None:
        if vars(owner).get(name) is method and where not in compared:
            compared.add(where)
            if why := differs(asked, name, original, function):
                report.left[where] = why
                report.patched.remove(where)
                setattr(owner, name, original)
                print(f"archer_fast: left {where}: {why}")

    compared: set[str] = set()
    setattr(method, _SETTLE, settle)
    _set(owner, name, method)
    report.patched.append(where)


def _settle(owner: Any) -> None:
    """Compare what was exchanged of the owner's class and not yet compared."""
    for names in {names for _, names in _CLASSES.values()}:
        for name in names:
            settle = getattr(getattr(type(owner), name, None), _SETTLE, None)
            if settle is not None:
                settle(owner)


def _set(owner: Any, name: str, value: Any) -> None:
    own = vars(owner)
    _active.append(_Exchange(owner, name, own.get(name), name in own))
    setattr(owner, name, value)


def _undo(owners: Sequence[Any], report: Report) -> bool:
    """Whether anything was given back."""
    exchanges = [e for e in _active if any(e.owner is owner for owner in owners)]
    for exchange in reversed(exchanges):
        exchange.restore()
        _active.remove(exchange)
        if exchange.name != "fixes":
            cls = exchange.owner if isinstance(exchange.owner, (type, ModuleType)) else type(exchange.owner)
            report.left[f"{cls.__name__}.{exchange.name}"] = "given back"
    return bool(exchanges)


class _WithoutSleep:
    """The module `time`, whose sleep does not."""

    def __init__(self, time: ModuleType) -> None:
        self._time = time

    def __getattr__(self, name: str) -> Any:
        return getattr(self._time, name)

    def sleep(self, seconds: float) -> None:
        """Return at once."""
