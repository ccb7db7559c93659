"""Keywords that the original would not have known."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any


def ignored(what: str, keywords: Mapping[str, Any]) -> None:
    """Say which extra keywords of a fork are accepted and not used."""
    if keywords:
        names = ", ".join(sorted(keywords))
        warnings.warn(f"{what}: these keywords are accepted and not used: {names}", stacklevel=3)
