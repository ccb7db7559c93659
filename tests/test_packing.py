"""pack_trajectories: the worked example, the edges, and what the invariants catch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from archer_fast.packing import PackedArrays, assert_invariants, pack_trajectories
from archer_fast.trajectory import Trajectory, Turn


def two_games() -> list[Trajectory]:
    """The example of PackedArrays' docstring."""
    first = Trajectory(
        (Turn([17, 9], [41, 2], [-1, -2], -1.0, 7), Turn([12], [5, 2], [-3, -4], 0.0, 7)),  # type: ignore[arg-type]
        np.array([30]),
        terminated=True,
        truncated=False,
    )
    second = Trajectory(
        (Turn([17], [8, 2], [-5, -6], -1.0, 7),),  # type: ignore[arg-type]
        np.array([]),
        terminated=False,
        truncated=True,
    )
    return [first, second]


def documented_example() -> dict[str, list[float]]:
    """The lists of PackedArrays' docstring, read from it."""
    value = {"T": 1.0, ".": 0.0}
    lines = [line.split() for line in (PackedArrays.__doc__ or "").splitlines()]
    return {
        words[0]: [value[word] if word in value else float(word) for word in words[1:]]
        for words in lines
        if words and words[0] in PackedArrays._fields
    }


def test_the_worked_example_is_true() -> None:
    packed = pack_trajectories(two_games())
    example = documented_example()
    assert set(example) == set(PackedArrays._fields)
    for name, array in packed._asdict().items():
        assert array.tolist() == example[name], name


def test_dtypes() -> None:
    packed = pack_trajectories(two_games())
    dtypes = {name: array.dtype.name for name, array in packed._asdict().items()}
    assert dtypes == {
        "input_ids": "int32",
        "position_ids": "int32",
        "cu_seqlens": "int32",
        "turn_ids": "int32",
        "action_mask": "bool",
        "cu_turns": "int32",
        "state_positions": "int64",
        "action_positions": "int64",
        "final_positions": "int64",
        "turn": "int32",
        "rewards": "float32",
        "returns": "float32",
        "policy_versions": "int64",
        "terminated": "bool",
        "truncated": "bool",
        "rollout_logprobs": "float32",
    }


def test_an_empty_batch_is_two_zeros() -> None:
    packed = pack_trajectories([])
    assert packed.cu_seqlens.tolist() == [0]
    assert packed.cu_turns.tolist() == [0]
    assert all(array.size == 0 for name, array in packed._asdict().items() if not name.startswith("cu_"))


def test_packing_is_the_concatenation_of_packing_one_by_one() -> None:
    games = two_games() * 2
    packed = pack_trajectories(games)
    for b, game in enumerate(games):
        alone = pack_trajectories([game])
        tokens = slice(packed.cu_seqlens[b], packed.cu_seqlens[b + 1])
        turns = slice(packed.cu_turns[b], packed.cu_turns[b + 1])
        for name in ("input_ids", "position_ids", "action_mask", "rollout_logprobs"):
            assert getattr(packed, name)[tokens].tolist() == getattr(alone, name).tolist()
        for name in ("turn", "rewards", "policy_versions"):
            assert getattr(packed, name)[turns].tolist() == getattr(alone, name).tolist()
        assert (packed.turn_ids[tokens] - packed.cu_turns[b]).tolist() == alone.turn_ids.tolist()
        assert (packed.action_positions[turns] - packed.cu_seqlens[b]).tolist() == alone.action_positions.tolist()


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("position_ids", 8, 8),
        ("cu_seqlens", 2, 10),
        ("turn_ids", 4, 0),
        ("action_mask", 0, True),
        ("action_mask", 3, False),
        ("cu_turns", 1, 1),
        ("state_positions", 1, 5),
        ("action_positions", 0, 2),
        ("final_positions", 0, 6),
        ("turn", 1, 0),
        ("truncated", 0, True),
        ("rollout_logprobs", 0, -1.0),
    ],
)
def test_the_invariants_catch_one_wrong_element(name: str, index: int, value: float) -> None:
    packed = pack_trajectories(two_games())
    assert_invariants(packed)
    getattr(packed, name)[index] = value
    with pytest.raises(AssertionError):
        assert_invariants(packed)


def test_the_invariants_catch_a_wrong_dtype() -> None:
    packed = pack_trajectories(two_games())
    with pytest.raises(AssertionError):
        assert_invariants(packed._replace(rewards=packed.rewards.astype(np.float64)))  # type: ignore[arg-type]


def test_nothing_left_of_pack_imports_torch() -> None:
    modules = "archer_fast.buffer, archer_fast.packing, archer_fast.trajectory"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
