"""A trajectory buffer in a folder: immutable segments under a manifest.

    buffer/
        manifest.json                                    names what belongs to the last commit, with sizes and crc32c
        segment-000000000000-000000000064.safetensors    trajectories [0, 64), as one commit found them
        segment-000000000064-000000000128.safetensors
        priorities-000000002.safetensors                 what of the live turns may change: new with every commit
        .lock                                            held while somebody commits

A commit writes files that no manifest names yet, then renames the manifest that names them, then deletes what is
named no longer. Each file is synced before its rename, the folder before and after the manifest's. So whenever the
process or the machine stops, the folder holds the last commit whole, and at worst files that nobody names.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from archer_fast.folder_lock import folder_lock
from archer_fast.sealed_file import Arrays, read_arrays, sync, write_arrays
from archer_fast.segment_file import FIELDS, Segment, batches, part, read_segment, segment_name, write_segment
from archer_fast.segment_manifest import MANIFEST, Manifest, is_ours, is_temporary, read_manifest, write_manifest

if TYPE_CHECKING:
    from archer_fast._C import BufferState, TrajectoryBuffer  # BufferState is a name of the stub alone

# More pushed at once becomes several segments: neither writing nor reading holds a second copy of it all, and the
# memory of one file, some 25 MB, is used again for the next (above 32 MB malloc gives it back: 1 s a GB of faults).
MAX_SEGMENT_TOKENS = 1 << 22
PRIORITIES: dict[str, type[np.generic]] = {"priorities": np.float64}
SCALARS: dict[str, type] = {
    "max_tokens": int,
    "max_trajectories": int,
    "seed": int,
    "vocab_size": int,
    "gamma": float,
    "counter": int,
    "first_trajectory_id": int,
    "first_turn_id": int,
    "max_priority": float,
}


def commit(
    folder: Path, core: TrajectoryBuffer, known: Iterable[Segment] = (), previous: Path | None = None
) -> tuple[Segment, ...]:
    """Make `folder` hold what `core` holds now, and give the segments that do.

    `known`: the segments, in a row, that an earlier commit or load of this very buffer gave. Those of them that
    `folder` holds are kept, those that the folder `previous` holds are linked; only what was pushed since is
    written. Where they are gone, or the file system refuses to link, they are written again.
    Raises OSError (a full disk, say; the last commit stays whole and nothing half-written behind), or ValueError
    where another writer is in the folder or its manifest cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        old = _manifest_or_none(folder)
        try:
            new = _write(folder, core, known, old, previous)
        except BaseException:
            # A manifest that was renamed but not synced may yet give way to the old one: both keep their files.
            with contextlib.suppress(OSError, ValueError):  # a second error would hide the first
                _sweep(folder, _names(old) | _names(_manifest_or_none(folder)))
            raise
        _sweep(folder, new.names())
    return new.segments


def load(folder: Path) -> tuple[BufferState, tuple[Segment, ...]]:
    """The state that was committed last, verified, and the segments that hold it. A writer may be at work.

    Raises FileNotFoundError, or ValueError that names the file and the field at fault.
    """
    while True:
        manifest = read_manifest(folder)
        try:
            return _read(folder, manifest), manifest.segments
        except (OSError, ValueError):
            if read_manifest(folder) == manifest:
                raise
            # Else a commit deleted what we were about to read: its own is there now.


def _write(
    folder: Path, core: TrajectoryBuffer, known: Iterable[Segment], old: Manifest | None, previous: Path | None
) -> Manifest:
    segments = _kept(folder, known, old, previous)
    state, priorities = _snapshot(core, segments[-1].end if segments else 0)
    oldest = state["first_trajectory_id"]
    first = max(oldest, segments[-1].end) if segments else oldest
    segments = [s for s in segments if s.end > oldest]
    arrays = cast("Arrays", state)
    for begin, end in batches(arrays["num_tokens"], MAX_SEGMENT_TOKENS):
        name = segment_name(first + begin, first + end, _names(old))
        segments.append(write_segment(folder / name, first + begin, part(arrays, begin, end)))
    number = old.commit + 1 if old else 1
    sealed = write_arrays(folder / f"priorities-{number:09d}.safetensors", {"priorities": priorities})
    scalars = {name: cast("dict[str, Any]", state)[name] for name in SCALARS}
    manifest = Manifest(number, scalars, tuple(segments), sealed)
    sync(folder)  # what the manifest names must last before it does
    write_manifest(folder, manifest)
    sync(folder)
    return manifest


def _kept(folder: Path, known: Iterable[Segment], old: Manifest | None, previous: Path | None) -> list[Segment]:
    """The first of the `known` segments, as many as `folder` holds or can link, under their names there."""
    here = old.segments if old else ()
    there = _segments_of(previous) if previous else ()
    mine, theirs = {s.first: s for s in here}, {s.first: s for s in there}
    kept: list[Segment] = []
    for segment in known:
        found = _intact(folder, mine, segment)
        if found is None and previous and (source := _intact(previous, theirs, segment)):
            found = _linked(folder, previous, source, _names(old))
        if found is None:
            break
        kept.append(found)
    return kept


def _intact(folder: Path, segments: dict[int, Segment], wanted: Segment) -> Segment | None:
    """The segment of `folder` with the content of `wanted`, if its file is there in full length."""
    found = segments.get(wanted.first)
    if found is None or not found.has_content_of(wanted):
        return None
    try:
        num_bytes = (folder / found.file.name).stat().st_size
    except OSError:
        return None
    return found if num_bytes == found.file.num_bytes else None


def _linked(folder: Path, previous: Path, segment: Segment, taken: set[str]) -> Segment | None:
    """A second name, in `folder`, of a file in `previous`; None where the file system refuses."""
    name = segment_name(segment.first, segment.end, taken)
    try:
        os.link(previous / segment.file.name, folder / name)
    except OSError:  # another file system, one without links, a name left by a killed commit: write it instead
        return None
    return segment._replace(file=segment.file._replace(name=name))


def _snapshot(core: TrajectoryBuffer, first: int) -> tuple[BufferState, npt.NDArray[np.float64]]:
    """The state from trajectory `first` on, and every live turn's priority, as they were at one moment."""
    while True:
        live = core.trajectory_range
        priorities = core.priorities()
        state = core.state_since(first)
        oldest = state["first_trajectory_id"]
        if live == (oldest, max(first, oldest) + state["num_turns"].size):
            return state, priorities
        # Else another thread pushed in between.


def _read(folder: Path, manifest: Manifest) -> BufferState:
    scalars, segments = manifest.scalars, manifest.segments
    if {name: type(value) for name, value in scalars.items()} != SCALARS:
        raise ValueError(f"{folder / MANIFEST}: scalars: wanted {SCALARS}, got {scalars}")
    first = int(scalars["first_trajectory_id"])
    if segments and not segments[0].first <= first < segments[0].end:
        raise ValueError(
            f"{folder / MANIFEST}: first_trajectory_id: wanted one of the first segment, "
            f"{segments[0].first} to {segments[0].end - 1}, got {first}"
        )
    parts = [read_segment(folder, segment, first) for segment in segments]
    arrays = {
        name: np.concatenate([np.empty(0, dtype), *(p.pop(name) for p in parts)]) for name, dtype in FIELDS.items()
    }
    priorities = read_arrays(folder, manifest.priorities, PRIORITIES)["priorities"]
    arrays["priorities"] = priorities.copy()  # where there are none, they may lie at an odd address
    return cast("BufferState", scalars | arrays)


def _manifest_or_none(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except FileNotFoundError:
        return None


def _segments_of(folder: Path) -> tuple[Segment, ...]:
    """What could be linked from there: nothing where the folder cannot be read, and all is written anew."""
    try:
        return read_manifest(folder).segments
    except (OSError, ValueError):
        return ()


def _names(manifest: Manifest | None) -> set[str]:
    return manifest.names() if manifest else set()


def _sweep(folder: Path, keep: set[str]) -> None:
    """Delete the files of commits that are neither kept nor the manifest; other people's files stay."""
    for path in folder.iterdir():
        name = path.name
        if (is_ours(name) and name not in keep) or is_temporary(name):
            path.unlink(missing_ok=True)
