"""Where the metrics of a run go: metrics.jsonl always, TensorBoard and wandb where asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from archer_fast.run_folder import write_text

logger = logging.getLogger(__name__)

Row = Mapping[str, float]


class Logger(Protocol):
    """One place that rows of metrics go to; every row has an "iteration"."""

    def log(self, row: Row) -> None: ...
    def close(self) -> None: ...


def check_installed(names: Iterable[str]) -> None:
    """ValueError naming the extra of the first logger whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"log: {name!r} is not installed; pip install 'archer-fast[{name}]', or leave it out")


class Loggers:
    """All loggers of a run, as one.

    `names` beside metrics.jsonl: "tensorboard", "wandb". `resumed`: the iteration of the checkpoint that
    a run goes on from, whose later rows are void; None starts anew.

    >>> with Loggers(folder.path, ("tensorboard",), config={}) as log:    # doctest: +SKIP
    ...     log.log({"iteration": 1, "return": -17.5})
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str] = (),
        *,
        config: Mapping[str, Any] | None = None,
        resumed: int | None = None,
    ) -> None:
        check_installed(names)
        self._loggers: list[Logger] = [JsonLines(folder / "metrics.jsonl", resumed=resumed)]
        for name in names:
            self._loggers.append(_MAKERS[name](folder, config or {}, resumed))

    def log(self, row: Row) -> None:
        for one in self._loggers:
            one.log(row)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # every logger is closed, also when one of them raises
            for one in self._loggers:
                stack.callback(one.close)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JsonLines:
    """metrics.jsonl: a row is one line, on the disk before `log` returns; NaN and infinity become null."""

    def __init__(self, path: Path, *, resumed: int | None = None) -> None:
        if resumed is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            _cut(path, resumed)
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: Row) -> None:
        self._file.write(json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, float]]:
    """The whole rows of a metrics.jsonl, null as NaN; the last line may be half written, as the run may be on."""
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row = {name: math.nan if value is None else value for name, value in row.items()}
            if not isinstance(row["iteration"], int | float):
                raise TypeError
        except (ValueError, AttributeError, KeyError, TypeError):
            if number < len(lines):
                logger.warning("%s:%d: not a row of metrics, left out: %.60r", path, number, line)
            continue
        rows.append(row)
    return rows


def _cut(path: Path, iteration: int) -> None:
    """Drop the rows after `iteration`, and a half-written one."""
    rows = [row for row in read_rows(path) if row["iteration"] <= iteration]
    lines = [json.dumps({name: _plain(value) for name, value in row.items()}) for row in rows]
    write_text(path, "".join(line + "\n" for line in lines))


def _plain(value: Any) -> Any:
    """A number as JSON has it: NumPy's and torch's scalars too."""
    if isinstance(value, int | str):  # bool is an int
        return value
    number = float(value)
    return number if math.isfinite(number) else None


class TensorBoard:
    """Event files in the run's `tensorboard/`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed is None else resumed + 1
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")

    def log(self, row: Row) -> None:
        step = int(row["iteration"])
        for name, value in row.items():
            if name != "iteration" and not isinstance(value, str):
                self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, continued under the same id on resume; its files lie in the run's folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed: int | None) -> None:
        import wandb

        id_file = folder / "wandb_id.txt"
        run_id = id_file.read_text().strip() if resumed is not None and id_file.exists() else None
        self._run: Any = wandb.init(
            project="archer-fast", name=folder.name, dir=str(folder), config=dict(config), id=run_id, resume="allow"
        )
        write_text(id_file, self._run.id)

    def log(self, row: Row) -> None:
        self._run.log({k: v for k, v in row.items() if k != "iteration"}, step=int(row["iteration"]))

    def close(self) -> None:
        self._run.finish()


_MAKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB}
