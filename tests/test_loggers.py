"""metrics.jsonl row by row, and the loggers behind extras."""

from __future__ import annotations

import json
import logging
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archer_fast import loggers
from archer_fast.loggers import JsonLines, Loggers, check_installed, read_rows


def test_a_row_is_on_the_disk_before_log_returns(tmp_path: Path) -> None:
    with Loggers(tmp_path) as log:
        log.log({"iteration": 1, "return": np.float32(-17.5), "games": np.int64(128)})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 1, "return": -17.5, "games": 128.0}\n'
        log.log({"iteration": 2, "kl": math.nan, "loss": math.inf})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"iteration": 2, "kl": null, "loss": null}'  # JSON has no NaN
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[0] == {"iteration": 1, "return": -17.5, "games": 128}
    assert rows[1]["iteration"] == 2
    assert math.isnan(rows[1]["kl"])


def test_a_half_written_last_line_is_no_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3, "ret')
    assert [row["iteration"] for row in read_rows(path)] == [1, 2]
    assert caplog.records == []
    assert read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("bad", ["nonsense", "[1]", '{"return": 1}', '{"iteration": "x"}', "3"])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 1}}\n{bad}\n{{"iteration": 3}}\n')
    with caplog.at_level(logging.WARNING):
        assert [row["iteration"] for row in read_rows(path)] == [1, 3]
    assert "metrics.jsonl:2: not a row" in caplog.text


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n{"iteration": 1}\n{"iteration": 2, "kl": null}\n{"iteration": 3}\n{"itera')
    with Loggers(tmp_path, resumed=2) as log:
        log.log({"iteration": 3, "again": 1})
    assert path.read_text().splitlines() == [
        '{"iteration": 0}',
        '{"iteration": 1}',
        '{"iteration": 2, "kl": null}',
        '{"iteration": 3, "again": 1}',
    ]
    JsonLines(path).close()  # a new run begins anew
    assert path.read_text() == ""


def test_a_missing_package_names_its_extra_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(ValueError, match=rf"log: '{name}' is not installed; pip install 'archer-fast\[{name}\]'"):
            Loggers(tmp_path, (name,))
    assert list(tmp_path.iterdir()) == []
    check_installed(())


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an extra; `make test` installs it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Loggers(tmp_path, ("tensorboard",), config={"seed": 3}) as log:
        log.log({"iteration": 1, "return": -3.0})
        log.log({"iteration": 2, "return": -2.0})
    with Loggers(tmp_path, ("tensorboard",), resumed=1) as log:
        log.log({"iteration": 2, "return": -1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("return")] == [(1, -3.0), (2, -1.0)]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2


def test_wandb_is_told_every_row_and_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        id = "abc"

        def log(self, row: dict[str, float], step: int) -> None:
            calls.append((step, row))

        def finish(self) -> None:
            calls.append("finish")

    def init(**kwargs: Any) -> Run:
        calls.append((kwargs["id"], kwargs["config"], kwargs["name"]))
        return Run()

    fake = types.ModuleType("wandb")
    fake.__spec__ = loggers.importlib.util.spec_from_loader("wandb", loader=None)
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = tmp_path / "a"
    folder.mkdir()
    with Loggers(folder, ("wandb",), config={"seed": 3}) as log:
        log.log({"iteration": 4, "return": -3.0})
    with Loggers(folder, ("wandb",), resumed=4):
        pass
    assert calls == [(None, {"seed": 3}, "a"), (4, {"return": -3.0}), "finish", ("abc", {}, "a"), "finish"]


def test_one_logger_that_fails_to_close_does_not_keep_the_others_open(tmp_path: Path) -> None:
    log = Loggers(tmp_path)

    class Faulty:
        def log(self, row: object) -> None: ...

        def close(self) -> None:
            raise OSError("full")

    log._loggers.append(Faulty())
    with pytest.raises(OSError, match="full"):
        log.close()
    with pytest.raises(ValueError, match="closed file"):
        log.log({"iteration": 1})


def test_rows_are_json_for_everyone(tmp_path: Path) -> None:
    with Loggers(tmp_path) as log:
        log.log({"iteration": 1, "a": -math.inf})

    def refuse(token: str) -> None:
        raise AssertionError(token)

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
