"""The checks of arguments that tasks share: each raises with the name, what was wanted, what came."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from difflib import get_close_matches

MAX_LISTED = 12  # names that an error lists: it is to be read


def unknown(what: str, got: object, accepted: Sequence[str]) -> ValueError:
    """The error for a name that is not in `accepted`: what came, the nearest match, what is wanted."""
    nearest = get_close_matches(str(got), accepted, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    shown = ", ".join(accepted[:MAX_LISTED]) or "none"
    if len(accepted) > MAX_LISTED:
        shown += f" and {len(accepted) - MAX_LISTED} more"
    return ValueError(f"unknown {what} {got!r}{hint} (accepted: {shown})")


def check_count(name: str, value: object) -> int:
    """`value` as an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: wanted an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: wanted at least 1, got {value}")
    return value


def check_seed(seed: object) -> int:
    """`seed` as an int; NumPy's integers count."""
    try:
        return operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"seed: wanted an int, got {seed!r}") from None
