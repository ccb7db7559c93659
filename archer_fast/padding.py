"""Padded rows, for code that wants rectangles: every row of a batch in a line of its own."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeVar

import numpy as np

from archer_fast.arguments import MAX_INT32, MAX_INT64, as_integer
from archer_fast.packing import Bool, Float32, Int32, Int64, PackedArrays, empty_arrays, packed_sizes
from archer_fast.transitions import TransitionArrays, transition_sizes

Side = Literal["left", "right"]
SIDES: tuple[Side, ...] = ("left", "right")


class PaddedArrays(NamedTuple):
    """PackedArrays whose trajectories lie in B lines of L places. The two games of PackedArrays, padded on the left
    with 0 (L = 8):

        input_ids        [[17  9 41  2 12  5  2 30]   [ 0  0  0  0  0 17  8  2]]
        attention_mask   [[ T  T  T  T  T  T  T  T]   [ .  .  .  .  .  T  T  T]]
        position_ids     [[ 0  1  2  3  4  5  6  7]   [ 0  0  0  0  0  0  1  2]]
        turn_ids         [[ 0  0  0  0  1  1  1  1]   [-1 -1 -1 -1 -1  2  2  2]]
        state_positions   1  4 13
        cu_seqlens        0  8 11

    Positions are places in the flattened [B * L], so `hidden.reshape(B * L, -1)[state_positions]` reads the states.
    """

    input_ids: Int32  # [B, L]
    position_ids: Int32  # [B, L], 0 at pads
    cu_seqlens: Int32  # [B + 1], sums of the lengths, as if nothing were padded
    turn_ids: Int32  # [B, L], -1 at pads
    action_mask: Bool  # [B, L]
    cu_turns: Int32  # [B + 1]
    state_positions: Int64  # [N], index into [B * L]
    action_positions: Int64  # [N], index into [B * L]
    final_positions: Int64  # [B], index into [B * L]
    turn: Int32  # [N]
    rewards: Float32  # [N]
    returns: Float32  # [N]
    policy_versions: Int64  # [N]
    terminated: Bool  # [B]
    truncated: Bool  # [B]
    rollout_logprobs: Float32  # [B, L]
    attention_mask: Bool  # [B, L], True at tokens


class PaddedTransitions(NamedTuple):
    """TransitionArrays whose transitions lie in n lines of L places; see PaddedArrays. `rollout_logprobs` stay end to
    end: `x[action_mask] = rollout_logprobs` puts them in their places."""

    input_ids: Int32  # [n, L]
    cu_seqlens: Int32  # [n + 1], sums of the lengths, as if nothing were padded
    state_positions: Int64  # [n], index into [n * L]
    action_positions: Int64  # [n], index into [n * L]
    next_state_positions: Int64  # [n], index into [n * L]
    turn: Int32  # [n]
    rewards: Float32  # [n]
    returns: Float32  # [n]
    policy_versions: Int64  # [n]
    is_last: Bool  # [n]
    terminated: Bool  # [n]
    truncated: Bool  # [n]
    rollout_logprobs: Float32  # [A]
    cu_actions: Int32  # [n + 1]
    attention_mask: Bool  # [n, L], True at tokens
    action_mask: Bool  # [n, L], True at this action's tokens


_RECTANGLES = {
    PaddedArrays: ("input_ids", "position_ids", "turn_ids", "action_mask", "rollout_logprobs", "attention_mask"),
    PaddedTransitions: ("input_ids", "attention_mask", "action_mask"),
}
Padded = TypeVar("Padded", PaddedArrays, PaddedTransitions)


def padding_of(pad_token_id: int, side: Side, width: int | None) -> tuple[int | None, int, bool]:
    """As the C++ buffer takes it; TypeError or ValueError names what cannot be."""
    if side not in SIDES:
        raise ValueError(f"side: wanted {' or '.join(map(repr, SIDES))}, got {side!r}")
    return (
        None if width is None else as_integer("width", width, 0, MAX_INT64),
        as_integer("pad_token_id", pad_token_id, 0, MAX_INT32),
        side == "left",
    )


def pad_packed(packed: PackedArrays, pad_token_id: int, side: Side, width: int) -> PaddedArrays:
    """The plain twin, and the specification, of `TrajectoryBuffer.collate_padded`."""
    num_places = packed.terminated.size * width
    sizes = packed_sizes(packed.terminated.size, packed.rewards.size, num_places)
    padded = empty_arrays(PaddedArrays, sizes | {"attention_mask": num_places})
    _spread(packed, padded, pad_token_id, side, width)
    return _as_lines(padded, width)


def pad_transitions(packed: TransitionArrays, pad_token_id: int, side: Side, width: int) -> PaddedTransitions:
    """The plain twin, and the specification, of `TrajectoryBuffer.collate_padded_transitions`."""
    num_places = packed.turn.size * width
    sizes = transition_sizes(packed.turn.size, num_places, packed.rollout_logprobs.size)
    padded = empty_arrays(PaddedTransitions, sizes | dict.fromkeys(("attention_mask", "action_mask"), num_places))
    _spread(packed, padded, pad_token_id, side, width)
    padded.action_mask[:] = False
    for state, action in zip(padded.state_positions, padded.action_positions, strict=True):
        padded.action_mask[state + 1 : action + 1] = True
    return _as_lines(padded, width)


def _as_lines(flat: Padded, width: int) -> Padded:
    """The same memory with a row for each line."""
    shape = (flat.cu_seqlens.size - 1, width)
    return flat._replace(**{name: getattr(flat, name).reshape(shape) for name in _RECTANGLES[type(flat)]})


def _spread(
    packed: PackedArrays | TransitionArrays,
    padded: PaddedArrays | PaddedTransitions,
    pad_token_id: int,
    side: Side,
    width: int,
) -> None:
    """Write to the flat lines what `packed` holds, and the attention mask."""
    lengths = np.diff(packed.cu_seqlens).astype(np.int64)
    begins = np.arange(lengths.size) * width + ((width - lengths) if side == "left" else 0)
    places = np.repeat(begins - packed.cu_seqlens[:-1], lengths) + np.arange(packed.cu_seqlens[-1])
    for name, values in packed._asdict().items():
        out = getattr(padded, name)
        if name in _RECTANGLES[type(padded)]:
            out[:] = {"input_ids": pad_token_id, "turn_ids": -1}.get(name, 0)
            out[places] = values
        else:
            out[:] = places[values] if name.endswith("_positions") else values
    padded.attention_mask[:] = False
    padded.attention_mask[places] = True
