"""Which methods of an agent, a critic or a trainer are this package's, and which a fork has written itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
_MARK = "_archer_fast"


def ours(function: F) -> F:
    """Mark a method whose work the fast path may do in another order or in larger batches."""
    setattr(function, _MARK, function.__qualname__)
    return function


def mark_of(owner: Any, method: str) -> str | None:
    """The marked method behind `owner.method`, e.g. "CHAIAgent.get_action"; None where a subclass or the object itself
    has another."""
    found = vars(owner).get(method, getattr(type(owner), method, None))
    mark: str | None = getattr(getattr(found, "__func__", found), _MARK, None)
    return mark


def is_ours(owner: Any, method: str) -> bool:
    """Whether `owner.method` is a marked one."""
    return mark_of(owner, method) is not None
