"""A Python thread that computes without end beside what is measured, as a tokenizer's or a logger's would."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def busy_thread() -> Iterator[None]:
    """It lets go of the GIL when the interpreter makes it, every `sys.getswitchinterval()` = 5 ms, and never else."""
    is_over = False

    def compute() -> None:
        while not is_over:
            for _ in range(1000):
                pass

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over = True
        thread.join()
