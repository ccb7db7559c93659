"""The folder of a run: where each of its files lies, and who may write there."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from archer_fast.config import Config, from_dict, to_dict


class RunFolder:
    """`RunFolder("runs/a")` makes the folder; `RunFolder.existing("runs/a")` wants a run to be there.

    runs/a/
        config.json      every setting, as `--config` takes it back
        metrics.jsonl    one row an iteration
        checkpoints/     what `--resume` continues from (see checkpoint.py)
        start/ best/ final/    Hugging Face folders of the policy
        games_before.txt games_after.txt summary.json report.html curves.png
        stalls.txt       where the threads stood when nothing moved, if that ever was
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"out: wanted a folder, got {str(path)!r}, where a file is in the way") from None
        self._lock = filelock.FileLock(self.path / ".lock")

    @classmethod
    def existing(cls, path: Path | str) -> RunFolder:
        """The folder of a run that was started; ValueError with the nearest name where none was."""
        path = Path(path)
        if not is_run(path):
            raise ValueError(no_run(path))
        return cls(path)

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def start(self) -> Path:
        return self.path / "start"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def games_before(self) -> Path:
        return self.path / "games_before.txt"

    @property
    def games_after(self) -> Path:
        return self.path / "games_after.txt"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def stalls(self) -> Path:
        return self.stalls_of(0)

    def stalls_of(self, rank: int) -> Path:
        return self.path / (f"stalls-rank{rank}.txt" if rank else "stalls.txt")

    def policy(self, which: str) -> Path:
        """The Hugging Face folder of "best", "final", "start" or the "last" checkpoint; else ValueError."""
        checkpoints = sorted(self.checkpoints.glob("iteration-*/policy"))
        folders = {"best": self.best, "final": self.final, "start": self.start}
        if checkpoints:
            folders["last"] = checkpoints[-1]
        there = [name for name, folder in folders.items() if folder.is_dir()]
        if which not in there:
            raise ValueError(
                f"which: {str(self.path)!r} has no policy {which!r} yet (there: {', '.join(there) or 'none'})"
            )
        return folders[which]

    @property
    def num_saved(self) -> int:
        """Iterations that the last checkpoint holds; 0 without one."""
        names = [p.name for p in self.checkpoints.glob("iteration-*") if p.is_dir()]
        return max((int(name.removeprefix("iteration-")) for name in names), default=0)

    def check_free(self, *, resume: bool) -> None:
        """ValueError if a run was started here and nobody asked to resume it; changes nothing."""
        if resume:
            return
        # A config alone is a run that never got to its first game: nothing of it would be lost.
        traces = [p.name for p in (self.metrics, self.checkpoints, self.summary) if p.exists()]
        if traces:
            state = "finished" if self.summary.exists() else "started"
            raise ValueError(
                f"out: {str(self.path)!r} holds a {state} run ({', '.join(traces)}); "
                "pass --resume to go on with it, or another --out"
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep every other run out of this folder; ValueError naming the process that is in it."""
        if self._lock.is_locked:  # by this very object
            yield
            return
        holder = self.path / ".holder.json"  # a file of its own: opening a lock file may empty it
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(f"out: another run is writing into {str(self.path)!r} ({_who(holder)})") from None
        try:
            write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
            yield
        finally:
            holder.unlink(missing_ok=True)
            self._lock.release()

    def save_config(self, config: Config) -> None:
        # To resume is an act of one call, not a setting of the run.
        write_json(self.config, to_dict(config) | {"resume": False})

    def load_config(self) -> Config:
        return read_config(self.config)


def is_run(path: Path | str) -> bool:
    """Whether a run was started in that folder; a Hugging Face model has a config.json of another kind."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return False
    try:
        values = read_json(file)
    except ValueError:
        return True  # whoever reads it next says what is broken
    return not (isinstance(values, dict) and "model_type" in values)


def no_run(path: Path | str) -> str:
    """Why `is_run` is false, and the nearest name beside it."""
    path = Path(path)
    cause = "is none: it has no config.json of a run" if path.is_dir() else "does not exist"
    return f"wanted the folder of a run, but {str(path)!r} {cause}{_nearest_beside(path)}"


def read_config(path: Path | str) -> Config:
    """A saved config, given by its file or its run's folder; ValueError names file, line or key."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"config: no file {str(file)!r}{_nearest_beside(file)}")
    values = read_json(file)
    try:
        config = from_dict(Config, values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    assert isinstance(config, Config)
    return config


def read_json(path: Path) -> Any:
    """The value in a JSON file; ValueError with file, line and column where it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: broken JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted JSON in UTF-8, got byte {error.start} that is none") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a temporary name, fsync, rename."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """See `write_text`."""
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o666 & ~_umask())  # mkstemp's 0600 would hide a run from one's colleagues
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _who(holder: Path) -> str:
    try:
        values = json.loads(holder.read_text())
        return f"pid {values['pid']} on {values['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its pid is not known"


def _nearest_beside(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near and near[0] != path.name else ""
