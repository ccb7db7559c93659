"""The commit of the checkout that this package runs from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import archer_fast

ROOT = Path(archer_fast.__file__).resolve().parents[1]


def commit(root: Path = ROOT) -> str:
    """The checkout's, "-dirty" where files differ from it; a dash where there is none."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "-"
