"""The README's programs that take no training run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_replay_buffer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = [text for text in PROGRAMS if "TrajectoryBuffer(" in text]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(program, names)
    batch, rows, games, buffer = (names[name] for name in ("batch", "rows", "games", "buffer"))
    assert batch.turn.size == rows.turn.size == 256  # type: ignore[attr-defined]
    assert games.input_ids.tolist() == [17, 9, 41, 2, 12, 5, 2, 30] * 2  # type: ignore[attr-defined]
    assert buffer.num_turns == 4  # type: ignore[attr-defined]
