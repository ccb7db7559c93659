"""The manifest of a buffer's folder: the file whose rename is the commit."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from archer_fast.sealed_file import SealedFile, temporary_name, write_bytes
from archer_fast.segment_file import FeatureFile, Segment

MANIFEST = "manifest.json"
VERSION = 3  # 1 was one file that held everything, 2 knew neither vocabulary nor features
_KEYS = ("version", "crc32c", "content")
_OURS = re.compile(r"(segment|features|priorities)-[0-9-]+\.safetensors")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One commit: the files that belong to it, and every number of the buffer that is not in them.

    Manifest(commit=3, scalars={"max_tokens": 1 << 20, "seed": 0, ...},
             segments=(Segment(0, 64, ..., features=None), Segment(64, 128, ..., features=FeatureFile(64, ...))),
             priorities=SealedFile("priorities-000000003.safetensors", 1104, 0x1F2E3D4C))
    """

    commit: int  # 1, 2, ...: how often this folder was committed to
    scalars: dict[str, int | float]  # of csrc/buffer_state.h
    segments: tuple[Segment, ...]  # in a row; the first one may hold evicted trajectories too
    priorities: SealedFile  # [N] float64: what of the live turns may change

    def names(self) -> set[str]:
        return {self.priorities.name}.union(*(segment.names() for segment in self.segments))


def is_ours(name: str) -> bool:
    """Whether it is the name of a segment, of features or of priorities."""
    return _OURS.fullmatch(name) is not None


def is_temporary(name: str) -> bool:
    """Whether it is what a commit that was stopped left half-written."""
    whole = name.removeprefix(".").removesuffix(".tmp")
    return name == temporary_name(whole) and (whole == MANIFEST or is_ours(whole))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the folder's manifest; see `sealed_file.write_bytes`."""
    segments = [
        {
            "first": s.first,
            "end": s.end,
            **s.file._asdict(),
            "features": s.features and {"first": s.features.first, **s.features.file._asdict()},
        }
        for s in manifest.segments
    ]
    content = {
        "commit": manifest.commit,
        "scalars": manifest.scalars,
        "segments": segments,
        "priorities": manifest.priorities._asdict(),
    }
    write_bytes(folder / MANIFEST, _encoded(content))


def read_manifest(folder: Path) -> Manifest:
    """Raises FileNotFoundError, or ValueError that names the file and the field at fault."""
    path = folder / MANIFEST
    if folder.is_file():
        raise ValueError(
            f"{folder}: wanted the folder of a saved trajectory buffer, got a file: an older archer_fast wrote it, "
            "which alone can read it"
        )
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: wanted a saved trajectory buffer, found no such file") from None
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: wanted JSON, got {data[:40]!r}: {error}") from error
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        newer = ": a newer archer_fast wrote it" if isinstance(version, int) and version > VERSION else ""
        raise ValueError(f"{path}: version: wanted {VERSION}, got {version!r}{newer}")
    if set(values) != set(_KEYS):
        raise ValueError(f"{path}: wanted the fields {_KEYS}, got {tuple(values)}")
    content = values["content"]
    if values["crc32c"] != (got := _crc32c(content)):
        raise ValueError(f"{path}: crc32c: wanted {values['crc32c']!r}, got {got}: the file was damaged")
    if data != _encoded(content):
        raise ValueError(f"{path}: wanted not a blank but those that were written: the file was damaged")
    try:
        return _parsed(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: content: {type(error).__name__}: {error}") from error


def _encoded(content: Any) -> bytes:
    return (json.dumps({"version": VERSION, "crc32c": _crc32c(content), "content": content}) + "\n").encode()


def _crc32c(content: Any) -> int:
    return int(google_crc32c.value(json.dumps(content).encode()))


def _parsed(content: dict[str, Any]) -> Manifest:
    scalars = content["scalars"]
    for name, value in scalars.items():
        if type(value) not in (int, float):
            raise TypeError(f"{name}: wanted a number, got {value!r}")
    segments = tuple(
        Segment(_integer(s, "first"), _integer(s, "end"), _sealed_file(s), _feature_file(s["features"]))
        for s in content["segments"]
    )
    for before, after in itertools.pairwise(segments):
        if before.end != after.first:
            raise ValueError(f"first: wanted {before.end} after {before.file.name}, got {after.first}")
    if any(segment.first >= segment.end for segment in segments):
        raise ValueError("end: wanted more than first in every segment")
    for s in segments:
        if s.features and not s.first <= s.features.first < s.end:
            raise ValueError(f"features: first: wanted {s.first} to {s.end - 1}, got {s.features.first}")
    return Manifest(_integer(content, "commit"), scalars, segments, _sealed_file(content["priorities"]))


def _feature_file(values: dict[str, Any] | None) -> FeatureFile | None:
    return None if values is None else FeatureFile(_integer(values, "first"), _sealed_file(values))


def _sealed_file(values: dict[str, Any]) -> SealedFile:
    name = values["name"]
    if not (isinstance(name, str) and is_ours(name)):  # no path that leads out of the folder
        raise ValueError(f"name: wanted a segment, features or priorities, got {name!r}")
    return SealedFile(name, _integer(values, "num_bytes"), _integer(values, "crc32c"))


def _integer(values: dict[str, Any], name: str) -> int:
    if type(value := values[name]) is not int or value < 0:
        raise TypeError(f"{name}: wanted an integer of 0 or more, got {value!r}")
    return value
