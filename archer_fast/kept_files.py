"""The files that a commit need not write: they are in its folder already, or in one whose files it can link."""

from __future__ import annotations

import os
from pathlib import Path

from archer_fast.sealed_file import SealedFile
from archer_fast.segment_file import FeatureFile, Segment, numbered_name
from archer_fast.segment_manifest import Manifest, read_manifest


class KeptFiles:
    """What `folder` holds by the manifest of its last commit, and beside it what the folder `previous` does.

    taken: names of that manifest, which nothing new may have.
    """

    def __init__(self, folder: Path, old: Manifest | None, previous: Path | None) -> None:
        self.folder, self.previous = folder, previous
        self.taken = old.names() if old else set()
        self._mine = {(s.first, s.end): s for s in old.segments} if old else {}
        self._theirs = {(s.first, s.end): s for s in _segments_of(previous)} if previous else {}

    def find(self, wanted: Segment, with_features: bool) -> Segment | None:
        """A segment in `folder` with the content of `wanted`, perhaps under other names; None where there is none.

        It has its features too, if these are asked for and there.
        """
        ids = wanted.first, wanted.end
        mine, theirs = self._mine.get(ids), self._theirs.get(ids)
        file = self._find_file(wanted.file, mine and mine.file, theirs and theirs.file, self.new_name("segment", *ids))
        features = None
        if file and wanted.features and with_features:
            first = wanted.features.first
            kept = self._find_file(
                wanted.features.file,
                mine.features.file if mine and mine.features else None,
                theirs.features.file if theirs and theirs.features else None,
                self.new_name("features", first, wanted.end),
            )
            features = FeatureFile(first, kept) if kept else None
        return wanted._replace(file=file, features=features) if file else None

    def new_name(self, kind: str, first: int, end: int) -> str:
        return numbered_name(kind, first, end, self.taken)

    def _find_file(
        self, wanted: SealedFile, mine: SealedFile | None, theirs: SealedFile | None, new_name: str
    ) -> SealedFile | None:
        if mine and _is_intact(self.folder, mine, wanted):
            return mine
        if self.previous and theirs and _is_intact(self.previous, theirs, wanted):
            try:
                os.link(self.previous / theirs.name, self.folder / new_name)
            except OSError:  # another file system, one without links, a name left by a killed commit: to be written
                return None
            return theirs._replace(name=new_name)
        return None


def _is_intact(folder: Path, file: SealedFile, wanted: SealedFile) -> bool:
    """Whether it is there in full length and has that content; the names may differ."""
    try:
        return file[1:] == wanted[1:] and (folder / file.name).stat().st_size == file.num_bytes
    except OSError:
        return False


def _segments_of(folder: Path) -> tuple[Segment, ...]:
    """What could be linked from there: nothing where the folder cannot be read, and all is written anew."""
    try:
        return read_manifest(folder).segments
    except (OSError, ValueError):
        return ()
