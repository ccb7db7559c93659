"""The lock by which one writer at a time is let into a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Be the one writer in `folder`; ValueError that names the folder and the process that is in it.

    The kernel opens the lock when its holder ends, however it ends. The file stays: if it were deleted, one
    writer could hold the old file and another one the new.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "its pid is not known"
            raise ValueError(f"folder: another writer is in {str(folder)!r} ({holder})") from None
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # to close is not enough: a fork may hold the descriptor too
    finally:
        os.close(descriptor)
