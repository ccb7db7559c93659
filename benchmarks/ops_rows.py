"""Rows of the lm_head's table and of the counted one, as sections of the page."""

from __future__ import annotations

from dataclasses import dataclass

import roofline
from lm_head_case import Shape, Work
from report_page import Section

from archer_fast.ops.lm_head import CHUNK_BYTES_WITH_WEIGHT

WORK_NAMES = {
    "score": "log-probs, no gradient",
    "frozen": "loss + backward, lm_head frozen",
    "train": "loss + backward",
}
NOTE = """\
float32, on a GPU bfloat16 (where liger-kernel runs its Triton kernel; elsewhere its fallback in plain torch). Every row
is one rival on one case; it is first compared with float64, and not timed if it is wrong. The loss is REINFORCE's,
-(advantages * log-probs).sum() / n, so per-token APIs return unreduced losses; gradients of hidden and weight both, or
of hidden alone where the lm_head is frozen, as under adapters. Where a setting decides a rival's speed, it runs with
the fastest of those listed in `benchmarks/lm_head_rivals.py`, which its name shows.

- rows: share of the tokens that are actions. Our ops take `rows=`; the others get gathered rows, which is timed.
- x floor: median ratio to rounds of the floor that alternate with the rival's. The floor is bare `torch.mm` of whole
  matrices into memory that is there already: one product to score, three (logits, dHidden, dWeight) for loss and
  backward, two where the lm_head is frozen. A chunk loop may beat a product of whole matrices on a CPU: a ratio below 1
  is possible.
- of all rows: time over that of the same rival on every row (ours: median ratio of rounds in turn; others: medians).
- extra MB: what the resident set of a fresh process grows by at its peak, beyond inputs and gradients (VmHWM, set back
  after a first call, so without what the first call leaves behind: code, thread pools, buffers of the maths library);
  on a GPU what torch's allocator hands out at its peak.
- errors: 2-norm of the difference to float64 over that of float64; of gradients the larger of hidden's and weight's."""
COUNTED_NOTE = f"""\
**Counted, not measured**: operations and bytes of each kernel by `benchmarks/roofline.py`, bf16 with float32 logits
chunks of at most {CHUNK_BYTES_WITH_WEIGHT["cuda"] / 2**30:g} GiB. The time is the sum over kernels of the slower of
arithmetic and traffic on A100 (312 TFLOP/s, 2.0 TB/s) and H100 SXM (989 TFLOP/s dense, 3.35 TB/s): what these kernels
cannot beat on that chip, not what they reach."""
HEADER = (
    "work",
    "tokens x hidden x vocabulary",
    "rows",
    "who",
    "ms",
    "x floor",
    "of all rows",
    "extra MB",
    "error log-probs",
    "error gradients",
    "remarks",
)


@dataclass
class OpsRow:
    """None: not measured, and `remark` says why."""

    work: Work
    shape: Shape
    fraction: float
    rival: str
    setting: str = ""
    seconds: float | None = None
    floor_seconds: float | None = None
    ratio: float | None = None
    rounds: int | None = None
    of_all_rows: float | None = None  # by rounds in turn; None: by medians
    extra_bytes: int | None = None
    logprob_error: float | None = None
    gradient_error: float | None = None
    remark: str = ""


def ops_section(rows: list[OpsRow]) -> Section:
    """Rows by case, the floor of each case above its rivals."""
    cells, seen = [], None
    whole = {(r.work, r.shape, r.rival): r.seconds for r in rows if r.fraction == 1.0}
    for row in rows:
        case = (row.work, row.shape, row.fraction)
        if case != seen:
            cells.append(_floor_cells([r for r in rows if (r.work, r.shape, r.fraction) == case]))
            seen = case
        cells.append(_cells(row, whole.get((row.work, row.shape, row.rival))))
    return Section("Vocabulary ops, measured", NOTE, HEADER, cells, 4, has_remarks=True)


def _cells(row: OpsRow, whole_seconds: float | None) -> tuple[str, ...]:
    of_all = row.of_all_rows
    if of_all is None and row.fraction != 1.0 and row.seconds is not None and whole_seconds is not None:
        of_all = row.seconds / whole_seconds
    return (
        WORK_NAMES[row.work],
        str(row.shape),
        f"{row.fraction:.0%}",
        f"{row.rival} [{row.setting}]" if row.setting else row.rival,
        _number(row.seconds, "{:.1f}", 1e3),
        _number(row.ratio, "{:.2f}"),
        _number(of_all, "{:.2f}"),
        "" if row.extra_bytes is None else str(round(row.extra_bytes / 2**20)),
        _number(row.logprob_error, "{:.1e}"),
        _number(row.gradient_error, "{:.1e}"),
        row.remark,
    )


def _floor_cells(rows: list[OpsRow]) -> tuple[str, ...]:
    seconds = sorted(r.floor_seconds for r in rows if r.floor_seconds is not None)
    row = OpsRow(rows[0].work, rows[0].shape, rows[0].fraction, "floor: bare products")
    if seconds:
        row.seconds, row.ratio = seconds[len(seconds) // 2], 1.0
    return _cells(row, None)


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else form.format(value * scale)


def counted_section() -> Section:
    rows = []
    for shape in roofline.SHAPES_7B:
        chunks = -(-shape.tokens * shape.vocab * roofline.FP32 // CHUNK_BYTES_WITH_WEIGHT["cuda"])
        for name, steps in (
            ("linear_policy_loss, 3 products", roofline.policy_loss(shape, chunks)),
            ("per-token API, 4 products", roofline.per_token(shape, chunks)),
            ("eager, whole logits, 3 products", roofline.eager(shape)),
        ):
            total = roofline.totals(steps)
            numbers = (
                f"{total.flops / 1e12:.1f}",
                f"{total.bytes / 1e9:.1f}",
                *(f"{s * 1e3:.1f}" for s in total.seconds),
            )
            rows.append((str(shape), name, *numbers))
    times = tuple(f"{chip.name} ms at least" for chip in roofline.CHIPS)
    header = ("tokens x hidden x vocabulary", "loss + backward, counted", "TFLOP", "GB", *times)
    return Section("Vocabulary ops at 7B shapes, counted, not measured", COUNTED_NOTE, header, rows, 2)
