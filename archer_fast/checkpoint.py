"""Checkpoints: one folder each, complete or absent, every file verified on load."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from archer_fast.sealed_file import sync

FORMAT = 3  # 1 held the buffer in one file, 2 the critic's features beside it
MANIFEST = "manifest.json"
BUFFER = "buffer"
BEST = "best"
SHARDS = "shards"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read; the message names the file, and the field where one is at fault."""


@dataclass(slots=True)
class Checkpoint:
    """A verified checkpoint folder: `policy/` (Hugging Face), state.safetensors, state.json.

    And `buffer/`, which has a manifest of its own and is verified when it is loaded; `best/`, where a run may need the
    best policy so far; `shards/`, where the ranks of a run held tensors in parts: these are there, and not in
    state.safetensors.
    """

    path: Path
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    @property
    def policy(self) -> Path:
        return self.path / "policy"

    @property
    def buffer(self) -> Path:
        return self.path / BUFFER

    @property
    def best(self) -> Path:
        return self.path / BEST

    @property
    def shards(self) -> Path:
        return self.path / SHARDS

    def number(self, name: str) -> Any:
        if name not in self.numbers:
            raise CheckpointError(f"{self.path / 'state.json'}: field {name!r} is missing")
        return self.numbers[name]


def save_checkpoint(
    folder: Path,
    iteration: int,
    save_policy: Callable[[Path], None],
    save_buffer: Callable[[Path, Path | None], None],
    tensors: dict[str, Tensor],
    numbers: dict[str, Any],
    keep: int = 2,
    best: Path | None = None,
    shards: Path | None = None,
) -> Path:
    """Write folder/iteration-NNNNNN under a temporary name, sync it, rename it; then drop all but the last `keep`.

    `save_buffer(to, previous)` is given the folder of the last checkpoint's buffer, whose files it may link. `best`: a
    folder of the best policy so far, to be kept too. `shards`: a folder of what is not in `tensors`, to be moved here.
    Errors: OSError (a full disk, say) leaves every earlier checkpoint whole and no half-written one behind.
    """
    target = folder / f"iteration-{iteration:06d}"
    saved = list_checkpoints(folder)
    previous = saved[-1] / BUFFER if saved else None

    def write(path: Path) -> None:
        save_policy(path / "policy")
        if best is not None:
            shutil.copytree(best, path / BEST, copy_function=_link)
        if shards is not None:
            shards.rename(path / SHARDS)
        save_buffer(path / BUFFER, previous)
        copies = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        (path / "state.safetensors").write_bytes(safetensors.torch.save(copies))
        (path / "state.json").write_text(json.dumps(numbers, indent=1))
        files = [f for f in sorted(path.rglob("*")) if f.is_file() and path / BUFFER not in f.parents]
        digests = {str(f.relative_to(path)): _sha256(f) for f in files}
        (path / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": digests}, indent=1))

    replace_folder(target, write)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill `target` through a temporary folder beside it: what is there is the old content or the new, whole.

    Between two renames it is neither, for an instant; `restore_folder` mends what a kill in that instant left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, safetensors.SafetensorError):  # how it tells of a full disk
            raise OSError(f"{target}: {error}") from error
        raise
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old)
    else:
        temporary.rename(target)
    sync(target.parent)


def copy_folder(source: Path, target: Path) -> None:
    """Replace `target` by `source`, whose files nobody changes in place: by hard links where there are any."""

    def write(path: Path) -> None:
        shutil.copytree(source, path, copy_function=_link, dirs_exist_ok=True)

    replace_folder(target, write)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def restore_folder(target: Path) -> None:
    """Give `target` its old content back if a `replace_folder` was killed between its two renames."""
    old = target.with_name(f".{target.name}.old")
    if old.is_dir() and not target.exists():
        old.rename(target)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("iteration-*") if p.is_dir())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Errors: CheckpointError naming the file and the field."""
    manifest = _json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        got = manifest.get("format")
        hint = ": an older archer_fast wrote this run, which alone can go on with it" if got in (1, 2) else ""
        raise CheckpointError(f"{path / MANIFEST}: field 'format': wanted {FORMAT}, got {got!r}{hint}")
    if not isinstance(manifest.get("sha256"), dict):
        raise CheckpointError(f"{path / MANIFEST}: field 'sha256' is missing")
    for name, digest in manifest["sha256"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if _sha256(file) != digest:
            raise CheckpointError(f"{file}: its content is not what was written (sha256 differs)")
    try:
        tensors = safetensors.torch.load_file(path / "state.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path / 'state.safetensors'}: {error}") from error
    return Checkpoint(path, tensors, _json(path / "state.json"))


def _json(path: Path) -> dict[str, Any]:
    try:
        made = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(made, dict):
        raise CheckpointError(f"{path}: wanted an object, got {type(made).__name__}")
    return made


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_310(file)


def _sha256_310(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
