"""The object set of a game of Twenty Questions, as an option names it."""

from __future__ import annotations

from collections.abc import Sequence

from archer_fast.envs.checks import check_count, unknown
from archer_fast.envs.twenty_questions_table import fact_table, normalise


def resolve_objects(objects: int | Sequence[str] | None) -> tuple[int, ...]:
    """Indices of the objects meant: all (None), n of them spread evenly over the list, or those named.

    10 is the subset of the paper, indices 1, 11, ..., 91; any other n takes the middle of n equal stretches.
    """
    table = fact_table()
    total = len(table.objects)
    if objects is None:
        return tuple(range(total))
    if isinstance(objects, bool) or not isinstance(objects, int | Sequence) or isinstance(objects, str):
        raise TypeError(f"objects: wanted an int, a list of names or None, got {objects!r}")
    if isinstance(objects, int):
        if check_count("objects", objects) > total:
            raise ValueError(f"objects: wanted at most {total}, got {objects}")
        if objects == 10:
            return tuple(range(1, 92, 10))
        return tuple((2 * i + 1) * total // (2 * objects) for i in range(objects))
    if not objects:
        raise ValueError("objects: wanted at least one name, got an empty list")
    indices = []
    for name in objects:
        index = table.names.get(normalise(name)) if isinstance(name, str) else None
        if index is None:
            raise unknown("object", name, [thing.name for thing in table.objects])
        if index in indices:
            raise ValueError(f"objects: {table.objects[index].name!r} is named twice")
        indices.append(index)
    return tuple(indices)
