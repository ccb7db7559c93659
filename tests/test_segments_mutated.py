"""A folder that a hostile writer left is read as a whole buffer or refused by name.

A short run of what scripts/fuzz_loader.py does for longer; and what that has found, again.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from choices import Choices
from mutated_folder import Original, check, originals, write_mutated

CORPUS = Path(__file__).parent / "corpus" / "fuzz_loader"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Original]:
    return originals(tmp_path_factory.mktemp("originals"))


def is_read(saved: list[Original], data: bytes, folder: Path) -> bool:
    choices = Choices(data)
    return check(folder, write_mutated(choices.of(saved), choices, folder))


def test_what_is_as_it_was_is_read(saved: list[Original], tmp_path: Path) -> None:
    for number in range(len(saved)):
        nothing = bytes([number, 7, 0, 0, 0, 0, 0])  # flips the first bit of a file, and so does the next line
        assert not is_read(saved, nothing, tmp_path / "buffer")


def test_random_mutations(saved: list[Original], tmp_path: Path) -> None:
    rng = random.Random(0)
    read = [is_read(saved, rng.randbytes(rng.randrange(4, 60)), tmp_path / "buffer") for _ in range(400)]
    assert 20 < sum(read) < 380


def test_what_the_fuzzer_has_found(saved: list[Original], tmp_path: Path) -> None:
    files = sorted(CORPUS.iterdir())
    assert files
    for path in files:
        print(path)  # the last one printed is at fault
        is_read(saved, path.read_bytes(), tmp_path / "buffer")
