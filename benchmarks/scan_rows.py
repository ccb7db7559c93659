"""Rows of the scans' table, as a section of the page."""

from __future__ import annotations

from dataclasses import dataclass

from report_page import Section

BYTES_PER_TOKEN = 12  # a and b read, y written, float32
NOTE = """\
y_t = b_t + a_t y_{t+1} inside each segment, float32, a = 0.99 * 0.95. A scan has to move 12 bytes a token, as
`torch.add(x, y, out=z)` does with all threads; both run in turn. The shares compare a rival's fastest round with the
add's fastest on as many tokens.

- of add in cache: call after call, as *ms* (median) and *GB/s*. At this size everything stays in the processor's cache:
  the add's GB/s are the cache's, not the memory's.
- of memory: every call after 512 MB of something else went through the cache; *cold ms* is the fastest round.
- error: every answer is first compared with float64, and not timed if it is wrong; 2-norm of the difference over that
  of the truth.

A loop marked so is timed on the first 1/100 of the tokens, and its time multiplied by 100. The sum of powers needs a
constant a and divides by a^t, which float32 no longer holds beyond t = 1,400 (float64: 11,500) at this a. torchrl drops
powers below 1e-7."""
HEADER = ("tokens", "who", "ms", "GB/s", "of add in cache", "cold ms", "of memory", "error", "remarks")


@dataclass
class ScanRow:
    """None: not measured, and `remark` says why."""

    case: str
    total: int  # tokens
    rival: str
    seconds: float | None = None  # median
    best_seconds: float | None = None  # of the fastest round, as all below
    floor_seconds: float | None = None
    cold_seconds: float | None = None
    cold_floor_seconds: float | None = None
    error: float | None = None
    remark: str = ""


def scans_section(rows: list[ScanRow]) -> Section:
    cells, seen = [], None
    for row in rows:
        if row.case != seen:
            floor = _floor(row.case, [r for r in rows if r.total == row.total])
            cells.append(_cells(floor, floor))
            seen = row.case
        cells.append(_cells(row, floor))
    return Section("Scans, measured", NOTE, HEADER, cells, 2, has_remarks=True)


def _cells(row: ScanRow, floor: ScanRow) -> tuple[str, ...]:
    return (
        row.case,
        row.rival,
        "" if row.seconds is None else f"{row.seconds * 1e3:.2f}",
        "" if row.seconds is None else f"{row.total * BYTES_PER_TOKEN / row.seconds / 1e9:.2f}",
        _share(floor.best_seconds, row.best_seconds),
        "" if row.cold_seconds is None else f"{row.cold_seconds * 1e3:.2f}",
        _share(floor.cold_seconds, row.cold_seconds),
        "" if row.error is None else f"{row.error:.1e}",
        row.remark,
    )


def _share(floor: float | None, seconds: float | None) -> str:
    return "" if floor is None or seconds is None else f"{floor / seconds:.1%}"


def _floor(case: str, rows: list[ScanRow]) -> ScanRow:
    """The add at its best beside any rival on as many tokens: a disturbed add would flatter somebody."""
    row = ScanRow(case, rows[0].total, "torch.add")
    warm = [r.floor_seconds for r in rows if r.floor_seconds is not None]
    cold = [r.cold_floor_seconds for r in rows if r.cold_floor_seconds is not None]
    if warm:
        row.seconds = row.best_seconds = min(warm)
    if cold:
        row.cold_seconds = min(cold)
        row.remark = f"{row.total * BYTES_PER_TOKEN / row.cold_seconds / 1e9:.1f} GB/s from memory"
    return row
