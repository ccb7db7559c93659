"""Rows of the scans' table, as a section of the page."""

from __future__ import annotations

from dataclasses import dataclass

from report_page import Section

BYTES_PER_TOKEN = 12  # a and b read, y written, float32
NOTE = """\
y_t = b_t + a_t y_{t+1} inside each segment, float32, a = 0.99 * 0.95. A scan has to move 12 bytes a token; *bandwidth*
is what `torch.add(x, y, out=z)` on as many tokens reaches with all threads, in rounds that alternate with the rival's;
*share* compares the fastest rounds of both, *ms* is the rival's median. Every answer is first compared with float64,
and not timed if it is wrong; *error* is the 2-norm of the difference over that of the truth. A loop marked so is timed
on the first 1/100 of the tokens, and its time multiplied by 100. The sum of powers needs a constant a and divides by
a^t, which float32 no longer holds beyond t = 1,400 (float64: 11,500) at this a. torchrl drops powers below 1e-7."""
HEADER = ("tokens", "who", "ms", "GB/s", "share of bandwidth", "error", "remarks")


@dataclass
class ScanRow:
    """None: not measured, and `remark` says why."""

    case: str
    total: int  # tokens
    rival: str
    seconds: float | None = None
    floor_seconds: float | None = None  # of the fastest round
    share: float | None = None
    error: float | None = None
    remark: str = ""


def scans_section(rows: list[ScanRow]) -> Section:
    cells, seen = [], None
    for row in rows:
        if row.case != seen:
            cells.append(_bandwidth_cells([r for r in rows if r.case == row.case]))
            seen = row.case
        cells.append(_cells(row))
    return Section("Scans, measured", NOTE, HEADER, cells, 2, has_remarks=True)


def _cells(row: ScanRow) -> tuple[str, ...]:
    timed = row.seconds is not None and row.share is not None
    return (
        row.case,
        row.rival,
        f"{row.seconds * 1e3:.2f}" if timed else "",
        f"{row.total * BYTES_PER_TOKEN / row.seconds / 1e9:.2f}" if timed else "",
        f"{row.share:.1%}" if timed else "",
        "" if row.error is None else f"{row.error:.1e}",
        row.remark,
    )


def _bandwidth_cells(rows: list[ScanRow]) -> tuple[str, ...]:
    seconds = [r.floor_seconds for r in rows if r.floor_seconds is not None]
    row = ScanRow(rows[0].case, rows[0].total, "bandwidth: torch.add")
    if seconds:
        row.seconds, row.share = min(seconds), 1.0
    return _cells(row)
