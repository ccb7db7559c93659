"""The C++ core. Arrays are one-dimensional, C-contiguous and of exactly the dtype stated, or a TypeError.

The kernels at the end take addresses (int, 0 for none) of memory that `archer_fast.ops.cpu` has checked. They keep
nothing, release the GIL, and may be called from any thread.
"""

from collections.abc import Callable
from typing import TypedDict, overload

import numpy as np
import numpy.typing as npt

_Bool = npt.NDArray[np.bool_]
_Float32 = npt.NDArray[np.float32]
_Float64 = npt.NDArray[np.float64]
_Int32 = npt.NDArray[np.int32]
_Int64 = npt.NDArray[np.int64]
_UInt8 = npt.NDArray[np.uint8]

class BufferState(TypedDict):
    """csrc/buffer_state.h. B live trajectories, N turns, T tokens, A action tokens."""

    max_tokens: int
    max_trajectories: int
    seed: int
    vocab_size: int
    gamma: float
    feature_bytes: int
    counter: int
    first_trajectory_id: int
    first_turn_id: int
    max_priority: float
    tokens: _Int32  # [T]
    rollout_logprobs: _Float32  # [A]
    observation_lengths: _Int32  # [N]
    action_lengths: _Int32  # [N]
    rewards: _Float32  # [N]
    policy_versions: _Int64  # [N]
    priorities: _Float64  # [N]
    num_tokens: _Int32  # [B]
    num_turns: _Int32  # [B]
    terminated: _Bool  # [B]
    truncated: _Bool  # [B]
    task_ids: _Int32  # [B]

class TrajectoryBuffer:
    """csrc/trajectory_buffer.h."""

    def __init__(
        self,
        *,
        max_tokens: int,
        max_trajectories: int,
        seed: int,
        vocab_size: int,
        gamma: float,
        feature_bytes: int,
        max_feature_memory: int,
        feature_folder: str,
    ) -> None: ...
    def extend(
        self,
        *,
        tokens: _Int32,
        num_tokens: _Int32,
        num_turns: _Int32,
        observation_lengths: _Int32,
        action_lengths: _Int32,
        rollout_logprobs: _Float32,
        rewards: _Float32,
        policy_versions: _Int64,
        terminated: _Bool,
        truncated: _Bool,
        task_ids: _Int32,
    ) -> tuple[int, int]: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def max_trajectories(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def gamma(self) -> float: ...
    @property
    def num_trajectories(self) -> int: ...
    @property
    def num_turns(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_evicted(self) -> int: ...
    @property
    def trajectory_range(self) -> tuple[int, int]: ...
    @property
    def turn_range(self) -> tuple[int, int]: ...
    def stats(self) -> tuple[int, int, int, int, int, dict[int, int], dict[int, int], int]: ...
    def sample_turns(
        self, n: int, *, replacement: bool = True, min_policy_version: int = ..., by_task: bool = False
    ) -> _Int64: ...
    def sample_trajectories(self, n: int, *, by_task: bool = False) -> _Int64: ...
    def sample_prioritised(self, n: int, beta: float) -> tuple[_Int64, _Float32]: ...
    def update_priorities(self, turn_ids: _Int64, priorities: _Float64) -> int: ...
    def priorities(self) -> _Float64: ...
    def trajectory_of(self, turn_ids: _Int64) -> _Int64: ...
    def turn_span(self, trajectory_ids: _Int64) -> tuple[_Int64, _Int64]: ...
    def lengths(self, trajectory_ids: _Int64) -> _Int64: ...
    def turn_records(self, turn_ids: _Int64) -> tuple[_Float32, _Int32, _Bool, _Bool, _Bool]: ...
    # padding: width (None: of the longest row), pad_token_id, is_left. The batch lies in memory(its number of bytes).
    def collate(
        self,
        trajectory_ids: _Int64,
        padding: tuple[int | None, int, bool] | None,
        threads: int,
        memory: Callable[[int], _UInt8],
    ) -> tuple[npt.NDArray[np.generic], ...]: ...
    def collate_transitions(
        self,
        turn_ids: _Int64,
        padding: tuple[int | None, int, bool] | None,
        threads: int,
        memory: Callable[[int], _UInt8],
    ) -> tuple[npt.NDArray[np.generic], ...]: ...
    @property
    def feature_bytes(self) -> int: ...
    def set_features(self, trajectory_ids: _Int64, trunk_version: int, rows: _UInt8) -> None: ...
    def read_features(
        self, turn_ids: _Int64, trunk_version: int, next_bytes: int, threads: int, memory: Callable[[int], _UInt8]
    ) -> tuple[_UInt8, _UInt8]: ...
    def trajectories_without_features(self, trunk_version: int) -> _Int64: ...
    @overload
    def features_stamp(self) -> int: ...
    @overload
    def features_stamp(self, first: int, end: int) -> int: ...
    def copy_features(
        self, first_trajectory_id: int, num_turns: _Int64, trunk_versions: _Int64, rows: _UInt8
    ) -> None: ...
    def state(self) -> BufferState: ...
    def snapshot(self, first_trajectory_id: int) -> tuple[BufferState, _Float64, _Int64]: ...
    @staticmethod
    def restore(
        *,
        max_tokens: int,
        max_trajectories: int,
        seed: int,
        vocab_size: int,
        gamma: float,
        feature_bytes: int,
        max_feature_memory: int,
        feature_folder: str,
        counter: int,
        first_trajectory_id: int,
        first_turn_id: int,
        max_priority: float,
        tokens: _Int32,
        rollout_logprobs: _Float32,
        observation_lengths: _Int32,
        action_lengths: _Int32,
        rewards: _Float32,
        policy_versions: _Int64,
        priorities: _Float64,
        num_tokens: _Int32,
        num_turns: _Int32,
        terminated: _Bool,
        truncated: _Bool,
        task_ids: _Int32,
    ) -> TrajectoryBuffer: ...

class OpenTrajectory:
    """csrc/open_trajectory.h."""

    def __init__(self, vocab_size: int, task_id: int) -> None: ...
    def add_turn(
        self,
        observation_ids: _Int32,
        action_ids: _Int32,
        rollout_logprobs: _Float32,
        reward: float,
        policy_version: int,
    ) -> None: ...
    def end(
        self, buffer: TrajectoryBuffer, final_observation_ids: _Int32, terminated: bool, truncated: bool
    ) -> int: ...
    @property
    def num_turns(self) -> int: ...

def pack_tokens(lengths: _Int64, max_tokens: int, num_ranks: int) -> tuple[_Int64, _Int64]:
    """csrc/token_packer.h: item_ids [n], cu_bins [k + 1]."""

def advise_huge_pages(data: int, bytes: int) -> None:
    """csrc/huge_pages.h: advice for memory that is about to be written for the first time."""

def simd_levels() -> tuple[str, ...]:
    """What this machine can run, best first, e.g. ("avx512", "avx2", "baseline"); `simd` is one of them or "auto"."""

def softmax_update(
    logits: int,
    column_stride: int,
    n: int,
    v: int,
    first_column: int,
    target_ids: int,
    inv_temperature: int,
    softcap: float,
    state: int,
    threads: int,
    simd: str,
) -> None:
    """csrc/row_softmax.h. softcap 0: none."""

def softmax_backward(
    logits: int,
    column_stride: int,
    n: int,
    v: int,
    first_column: int,
    target_ids: int,
    inv_temperature: int,
    softcap: float,
    row_max: int,
    log_sum: int,
    entropy: int,
    grad_logprobs: int,
    grad_entropy: int,
    grad_lse: int,
    out: int,
    out_column_stride: int,
    threads: int,
    simd: str,
) -> None:
    """csrc/row_softmax.h. softcap 0: none; grad_entropy, grad_lse 0: zeros."""

def segment_scan(a: int, b: int, cu: int, out: int, num_segments: int, threads: int, simd: str) -> None:
    """csrc/segment_scan.h."""

def copy_offsets(cu: int, count: int, total: int, out: int) -> bool:
    """csrc/segment_scan.h, of int32."""

def copy_long_offsets(cu: int, count: int, total: int, out: int) -> bool:
    """csrc/segment_scan.h, of int64."""

def critic_loss(
    values: int,
    targets: int,
    n: int,
    kind: str,
    expectile: float,
    huber_delta: float,
    losses: int,
    stats: int,
    grads: int,
) -> None:
    """csrc/critic_loss.h. An unknown `kind` is a ValueError."""
