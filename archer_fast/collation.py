"""Batches that the C++ buffer writes, packed or padded, into memory of the caller's choice."""

from __future__ import annotations

from archer_fast import _C
from archer_fast.packing import Int64, PackedArrays, empty_packed_arrays
from archer_fast.padding import (
    SIDES,
    PaddedArrays,
    PaddedTransitions,
    Side,
    as_lines,
    empty_padded_arrays,
    empty_padded_transitions,
)
from archer_fast.staging import Memory
from archer_fast.transitions import TransitionArrays, empty_transition_arrays

Padding = tuple[int, int, bool]  # csrc/row_layout.h: width, pad_token_id, is_left


def collate(core: _C.TrajectoryBuffer, ids: Int64, memory: Memory, threads: int) -> PackedArrays:
    num_trajectories, num_turns, num_tokens, _ = core.collated_sizes(ids)
    packed = empty_packed_arrays(num_trajectories, num_turns, num_tokens, memory)
    core.collate(ids, None, threads, **packed._asdict())
    return packed


def collate_transitions(core: _C.TrajectoryBuffer, ids: Int64, memory: Memory, threads: int) -> TransitionArrays:
    num_transitions, num_tokens, num_action_tokens, _ = core.transition_sizes(ids)
    packed = empty_transition_arrays(num_transitions, num_tokens, num_action_tokens, memory)
    core.collate_transitions(ids, None, threads, **packed._asdict())
    return packed


def collate_padded(
    core: _C.TrajectoryBuffer, ids: Int64, pads: tuple[int, Side, int | None], memory: Memory, threads: int
) -> PaddedArrays:
    """pads: pad_token_id, side, width or None."""
    num_trajectories, num_turns, _, longest = core.collated_sizes(ids)
    padding = _padding(*pads, longest)
    flat = empty_padded_arrays(num_trajectories, num_turns, padding[0], memory)
    core.collate(ids, padding, threads, **flat._asdict())
    return as_lines(flat, padding[0])


def collate_padded_transitions(
    core: _C.TrajectoryBuffer, ids: Int64, pads: tuple[int, Side, int | None], memory: Memory, threads: int
) -> PaddedTransitions:
    """pads: pad_token_id, side, width or None."""
    num_transitions, _, num_action_tokens, longest = core.transition_sizes(ids)
    padding = _padding(*pads, longest)
    flat = empty_padded_transitions(num_transitions, num_action_tokens, padding[0], memory)
    core.collate_transitions(ids, padding, threads, **flat._asdict())
    return as_lines(flat, padding[0])


def _padding(pad_token_id: int, side: Side, width: int | None, longest: int) -> Padding:
    if side not in SIDES:
        raise ValueError(f"side: wanted {' or '.join(map(repr, SIDES))}, got {side!r}")
    if not 0 <= pad_token_id < 2**31:
        raise ValueError(f"pad_token_id: wanted 0 to 2**31 - 1, got {pad_token_id}")
    if width is not None and width < longest:
        raise ValueError(f"width: wanted at least {longest}, the longest row, got {width}")
    return longest if width is None else width, pad_token_id, side == "left"
