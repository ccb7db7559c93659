"""The original's faults that a user can choose to mend or to keep, by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal

# What numbers depend on and can be had either way; the numbers in brackets count the faults as docs/compat.md does.
FAULTS: dict[str, str] = {
    "padding": "[1] rows shorter than their micro-batch are sampled and scored behind padding",
    "stop_token": "[2] the text that ends an action is no part of its log-prob",
    "top_k": "[2] actions are sampled from the 50 likeliest tokens, but scored under all of them",
    "clip": "[3] gradient clipping spans the whole agent, stale gradients of the other network included",
    "sum": "[4] the gradients of micro-batches are summed, not averaged",
    "buffer": "[5] the first insert fixes the replay's dtype, and slots are drawn unevenly once it is full",
    "dropout": "[11] dropout of adapters stays on while sampling",
}
# Those that change no number on input that the original treats rightly.
MENDED_BY_DEFAULT = frozenset({"padding", "buffer", "dropout"})

Compat = Literal["bug-for-bug"]


def choose_fixes(fix: Iterable[str] | None, compat: Compat | None) -> frozenset[str]:
    """The faults to mend. fix: their names, None for the default; compat="bug-for-bug" mends only those in `fix`.

    Errors: ValueError for an unknown name, with the nearest known one.
    """
    if compat not in (None, "bug-for-bug"):
        raise ValueError(f"compat: wanted None or 'bug-for-bug', got {compat!r}")
    if fix is None:
        return MENDED_BY_DEFAULT if compat is None else frozenset()
    names = [fix] if isinstance(fix, str) else list(fix)
    for name in names:
        if name not in FAULTS:
            near = difflib.get_close_matches(str(name), FAULTS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"fix: wanted names out of {', '.join(FAULTS)}, got {name!r}{hint}")
    return frozenset(names)
