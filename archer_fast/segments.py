"""A trajectory buffer in a folder: immutable segments under a manifest.

    buffer/
        manifest.json                                    names what belongs to the last commit, with sizes and crc32c
        segment-000000000000-000000000064.safetensors    trajectories [0, 64), as one commit found them
        segment-000000000064-000000000128.safetensors
        features-000000000000-000000000064.safetensors   what a trunk computed of them: new where it changed
        features-000000000064-000000000128.safetensors
        priorities-000000002.safetensors                 what of the live turns may change: new with every commit
        .lock                                            held while somebody commits

A commit writes files that no manifest names yet, then renames the manifest that names them, then deletes what is
named no longer. Each file is synced before its rename, the folder before and after the manifest's. So whenever the
process or the machine stops, the folder holds the last commit whole, and at worst files that nobody names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from archer_fast import _C
from archer_fast.feature_file import read_feature_file, write_feature_file
from archer_fast.folder_lock import folder_lock
from archer_fast.kept_files import KeptFiles
from archer_fast.sealed_file import Arrays, read_arrays, sync, write_arrays
from archer_fast.segment_file import (
    FIELDS,
    FeatureFile,
    Segment,
    batches,
    part,
    read_segment,
    write_segment,
)
from archer_fast.segment_manifest import MANIFEST, Manifest, is_ours, is_temporary, read_manifest, write_manifest

if TYPE_CHECKING:
    from archer_fast._C import BufferState  # a name of the stub alone

Int64 = npt.NDArray[np.int64]

# More pushed at once becomes several segments: the memory of one file, some 25 MB, is used again for the next (above
# 32 MB malloc gives it back: 1 s a GB of faults). Beside the buffer a commit holds what is new once more, as arrays of
# one moment, and a load all of it twice.
MAX_SEGMENT_TOKENS = 1 << 22
PRIORITIES: dict[str, type[np.generic]] = {"priorities": np.float64}
SCALARS: dict[str, type] = {
    "max_tokens": int,
    "max_trajectories": int,
    "seed": int,
    "vocab_size": int,
    "gamma": float,
    "feature_bytes": int,
    "counter": int,
    "first_trajectory_id": int,
    "first_turn_id": int,
    "max_priority": float,
}


class Saved(NamedTuple):
    """What a commit or a load of a buffer left on the disk, so that the next commit writes only what is new."""

    segments: tuple[Segment, ...] = ()  # in a row
    features_stamp: int = 0  # of the core: features that were set later are not in the segments' files


NOTHING = Saved()


def commit(folder: Path, core: _C.TrajectoryBuffer, known: Saved = NOTHING, previous: Path | None = None) -> Saved:
    """Make `folder` hold what `core` holds now, and give what is there.

    `known`: what an earlier commit or load of this very buffer gave. The files of it that `folder` holds are kept,
    those that the folder `previous` holds are linked; only what was pushed since is written, and the features of
    segments where some were set since. Where files are gone, or the file system refuses to link, they are written
    again. Features of a trajectory that another thread's push evicts while they are written may be left out.
    Raises OSError (a full disk, say; the last commit stays whole and nothing half-written behind), or ValueError
    where another writer is in the folder or its manifest cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        old = _manifest_or_none(folder)
        try:
            features_stamp = core.features_stamp()  # before any are read: what is set meanwhile counts as set since
            new = _write(folder, core, known, old, previous)
        except BaseException:
            # A manifest that was renamed but not synced may yet give way to the old one: both keep their files.
            with contextlib.suppress(OSError, ValueError):  # a second error would hide the first
                _sweep(folder, _names(old) | _names(_manifest_or_none(folder)))
            raise
        _sweep(folder, new.names())
    return Saved(new.segments, features_stamp)


def load(folder: Path, max_feature_memory: int, feature_folder: str) -> tuple[_C.TrajectoryBuffer, Saved]:
    """The buffer that was committed last, verified, and what of it is on the disk. A writer may be at work.

    Raises FileNotFoundError, or ValueError that names the file and the field at fault; OSError where the features
    find no room in `feature_folder`.
    """
    while True:
        manifest = read_manifest(folder)
        try:
            state, num_turns = _read_state(folder, manifest)
            try:
                core = _C.TrajectoryBuffer.restore(
                    **state, max_feature_memory=max_feature_memory, feature_folder=feature_folder
                )
            except (TypeError, ValueError) as error:  # TypeError: a number that is none of its C++ type
                raise ValueError(f"{folder}: {error}") from error
            del state  # the core has it all
            _read_features(folder, manifest.segments, core, num_turns)
            return core, Saved(manifest.segments, core.features_stamp())
        except (OSError, ValueError):
            if read_manifest(folder) == manifest:
                raise
            # Else a commit deleted what we were about to read: its own is there now.


def _write(
    folder: Path, core: _C.TrajectoryBuffer, known: Saved, old: Manifest | None, previous: Path | None
) -> Manifest:
    kept = KeptFiles(folder, old, previous)
    segments = _kept(kept, core, known)
    state, priorities, num_turns = core.snapshot(segments[-1].end if segments else 0)
    oldest = state["first_trajectory_id"]
    first = max(oldest, segments[-1].end) if segments else oldest
    segments = [s for s in segments if s.end > oldest]
    arrays = cast("Arrays", state)
    for begin, end in batches(arrays["num_tokens"], MAX_SEGMENT_TOKENS):
        name = kept.new_name("segment", first + begin, first + end)
        segments.append(write_segment(folder / name, first + begin, part(arrays, begin, end)))
    segments = [_with_features(kept, core, s, oldest, num_turns) for s in segments]
    number = old.commit + 1 if old else 1
    sealed = write_arrays(folder / f"priorities-{number:09d}.safetensors", {"priorities": priorities})
    scalars = {name: cast("dict[str, Any]", state)[name] for name in SCALARS}
    manifest = Manifest(number, scalars, tuple(segments), sealed)
    sync(folder)  # what the manifest names must last before it does
    write_manifest(folder, manifest)
    sync(folder)
    return manifest


def _kept(kept: KeptFiles, core: _C.TrajectoryBuffer, known: Saved) -> list[Segment]:
    """The first of the known segments, as many as need not be written; without features where some were set since."""
    segments: list[Segment] = []
    for segment in known.segments:
        is_current = core.features_stamp(segment.first, segment.end) <= known.features_stamp
        found = kept.find(segment, with_features=is_current)
        if found is None:
            break
        segments.append(found)
    return segments


def _with_features(
    kept: KeptFiles, core: _C.TrajectoryBuffer, segment: Segment, oldest: int, num_turns: Int64
) -> Segment:
    """The segment with the features of its live trajectories, written now unless it has them.

    oldest: the first live trajectory; num_turns: of every live one.
    """
    first = max(segment.first, oldest)
    if segment.features or core.features_stamp(first, segment.end) == 0:
        return segment
    path = kept.folder / kept.new_name("features", first, segment.end)
    file = write_feature_file(path, core, first, num_turns[first - oldest : segment.end - oldest])
    return segment._replace(features=FeatureFile(first, file))


def _read_state(folder: Path, manifest: Manifest) -> tuple[BufferState, list[Int64]]:
    """The state, and the number of turns of each trajectory of each segment, evicted ones too."""
    scalars, segments = manifest.scalars, manifest.segments
    if {name: type(value) for name, value in scalars.items()} != SCALARS:
        raise ValueError(f"{folder / MANIFEST}: scalars: wanted {SCALARS}, got {scalars}")
    first = int(scalars["first_trajectory_id"])
    if segments and not segments[0].first <= first < segments[0].end:
        raise ValueError(
            f"{folder / MANIFEST}: first_trajectory_id: wanted one of the first segment, "
            f"{segments[0].first} to {segments[0].end - 1}, got {first}"
        )
    for segment in segments:
        if segment.features and (scalars["feature_bytes"] == 0 or segment.features.first > max(first, segment.first)):
            raise ValueError(
                f"{folder / MANIFEST}: features: wanted none, or those of all live trajectories, got "
                f"{segment.features} with feature_bytes = {scalars['feature_bytes']}"
            )
    wholes = [read_segment(folder, segment) for segment in segments]
    num_turns = [whole["num_turns"].astype(np.int64) for whole in wholes]
    parts = [part(whole, max(first - s.first, 0), s.end - s.first) for whole, s in zip(wholes, segments, strict=True)]
    wholes.clear()
    arrays = {
        name: np.concatenate([np.empty(0, dtype), *(p.pop(name) for p in parts)]) for name, dtype in FIELDS.items()
    }
    priorities = read_arrays(folder, manifest.priorities, PRIORITIES)["priorities"]
    arrays["priorities"] = priorities.copy()  # where there are none, they may lie at an odd address
    return cast("BufferState", scalars | arrays), num_turns


def _read_features(
    folder: Path, segments: Iterable[Segment], core: _C.TrajectoryBuffer, num_turns: list[Int64]
) -> None:
    for segment, turns in zip(segments, num_turns, strict=True):
        if segment.features:
            first, file = segment.features
            read_feature_file(folder, file, core, first, turns[first - segment.first :])


def _manifest_or_none(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except FileNotFoundError:
        return None


def _names(manifest: Manifest | None) -> set[str]:
    return manifest.names() if manifest else set()


def _sweep(folder: Path, keep: set[str]) -> None:
    """Delete the files of commits that are neither kept nor the manifest; other people's files stay."""
    for path in folder.iterdir():
        name = path.name
        if (is_ours(name) and name not in keep) or is_temporary(name):
            path.unlink(missing_ok=True)
