"""The sections of the buffer's page, made of what was measured."""

from __future__ import annotations

from collections.abc import Callable

from replay_report import (
    COLD,
    DISTURBED,
    HOT,
    OURS,
    Condition,
    Copied,
    ReplayReport,
    ReplayRow,
    Target,
    share,
)
from report_page import Section

STORES_NOTE = """\
{transitions:,} transitions of 20 turns a game, {tokens:,} tokens: about 12 action and 8 observation tokens a turn
(lognormal, seed 0). Every store holds all of them, and before anything is timed some of its batches, packed and padded,
are compared with the work: the same tokens, reward, end and log-probs under the same transition's number. Whose are not
is not timed. Stores are measured in turn, medians of rounds; one thread.

- insert: 128 games at once, as an iteration of training brings them, into a full store, which overwrites its oldest
  ones. What a store takes (rectangles, items, texts) is made before the clock starts: padding is a gift to the others.
  Tokens are those of the games, each counted once, however often a store repeats it.
- packed, padded: draw {drawn} transitions and make a batch of them, in ms. Packed is one slice of state, action and
  next observation a transition, end to end, with offsets and the places where state and action end. Padded is what
  the store makes of it: lines as long as the longest with masks (ours, arena), or rectangles of state, action and next
  state (the others).
- bytes: held by a full store that overwrites, for each token of the games. Log-probs are 4 bytes an action token. Ours
  takes memory by chunks of a 32nd of what it holds, and frees a chunk when nothing in it lives.
- The original's texts are in a made-up language whose words are one token each, so that tokenising gives back the
  work's tokens; a fast tokenizer of `tokenizers` reads them.
- one row: a layout that no store suggests by itself and that helps it; the next state's tokens hold state and action.
- NumPy arena: no loop over rows but *slices*, which is one `concatenate` of views. It keeps no versions, returns or
  tasks, and once full begins again, which is less work than to evict the oldest."""
CONDITIONS_NOTE = """\
{drawn} transitions, packed where nothing else is said, ms; shares are of memcpy's bandwidth: bytes of the batch over
its time, beside bytes over time of the fastest memcpy of {copied_bytes:,} bytes (NumPy's, or torch's on as many
threads) from a random place of memory as large as our buffer, in the same rounds and the same state.

- hot: called again and again; what is read lies in this machine's caches, and so does what is written.
- cold: {cold_mb:,} MB of other memory are read before every single call, and then one transition is drawn (of memcpy:
  a byte is copied), so that the code is there again and the data is not.
- 2 threads: for those who can use them. Where one thread serves all it is empty.
- busy: a Python thread computes beside, and gives up the GIL only when asked, every 5 ms. Who lets go of the GIL in a
  call waits that long to have it back."""
BANDWIDTH_NOTE = """\
Our collation alone (ids are drawn before) into memory that is there already, beside the fastest memcpy of as many
bytes as it writes from a random place of memory as large as the buffer, in turn; hot and cold as above. Every token of
the buffers was replaced once. *games*: whole ones, with positions, masks and turn of every token, 17 bytes a
token of which 13 are made and not read. What is called hot of a buffer larger than the caches named above is there in
part. Last rows: a memcpy of more than the caches hold, which is what is called the memory's bandwidth."""
TARGETS_NOTE = "Ours is *ours, memory kept* with 4-byte tokens; of the NumPy arena the fastest row counts."


def buffer_sections(report: ReplayReport) -> tuple[Section, ...]:
    made = (
        stores_section(report) if report.rows else None,
        conditions_section(report) if report.rows else None,
        bandwidth_section(report) if report.bandwidth else None,
        targets_section(report),
    )
    return tuple(section for section in made if section is not None)


def stores_section(report: ReplayReport) -> Section:
    header = (
        *("who", "insert, 1,000 transitions/s", "M tokens/s", "packed ms", "padded ms", "x ours", "bytes a token"),
        *("without log-probs", "remarks"),
    )
    ours = _ours(report)
    cells = []
    for row in report.rows:
        packed, padded = (row.seconds.get(Condition(form)) for form in ("packed", "padded"))
        base = None if ours is None else ours.seconds.get(HOT)
        cells.append(
            (
                row.name,
                _number(row.insert_seconds, lambda s: f"{report.num_transitions / s / 1e3:,.0f}"),
                _number(row.insert_seconds, lambda s: f"{report.num_tokens / s / 1e6:,.1f}"),
                _number(packed, _ms),
                _number(padded, _ms),
                "" if base is None or packed is None else f"{packed / base:,.1f}",
                _number(row.num_bytes, lambda b: f"{b / report.num_tokens:.1f}"),
                "" if row.num_bytes is None else f"{_without_logprobs(row, report) / report.num_tokens:.1f}",
                row.remark,
            )
        )
    note = STORES_NOTE.format(transitions=report.num_transitions, tokens=report.num_tokens, drawn=report.num_drawn)
    return Section("Stores", note, header, cells, 1, has_remarks=True)


def conditions_section(report: ReplayReport) -> Section:
    shown = (HOT, COLD, Condition(threads=2), Condition(threads=2, is_cold=True))
    header = (
        "who",
        *(
            f"{name} {what}"
            for name in ("hot", "cold", "hot, 2 threads", "cold, 2 threads")
            for what in ("ms", "share")
        ),
        *("busy, packed ms", "busy, padded ms", "hot, 2 threads, padded ms"),
    )
    cells = []
    for row in report.rows:
        line = [row.name]
        for condition in shown:
            seconds, copied = row.seconds.get(condition), report.copied.get(condition)
            is_known = seconds is not None and copied is not None and row.batch_bytes is not None
            line += [_number(seconds, _ms), f"{share(row.batch_bytes, seconds, copied):.1%}" if is_known else ""]
        others = DISTURBED, DISTURBED._replace(form="padded"), Condition("padded", threads=2)
        line += [_number(row.seconds.get(condition), _ms) for condition in others]
        cells.append(tuple(line))
    line = ["memcpy"]
    for condition in shown:
        copied = report.copied.get(condition)
        line += [_number(copied and copied.seconds, _ms), "" if copied is None else _gigabytes(copied)]
    cells.append((*line, "", "", ""))
    copied_bytes = next((copied.num_bytes for copied in report.copied.values()), 0)
    note = CONDITIONS_NOTE.format(drawn=report.num_drawn, copied_bytes=copied_bytes, cold_mb=report.cold_bytes >> 20)
    return Section("Under other conditions", note, header, cells, 1)


def bandwidth_section(report: ReplayReport) -> Section:
    header = ("buffer", "batch", "memory", "threads", "MB written", "ms", "GB/s", "memcpy GB/s", "share")
    cells = [
        (
            row.source,
            row.batch,
            "cold" if row.is_cold else "hot",
            str(row.threads),
            f"{row.num_bytes / 1e6:.2f}",
            _ms(row.seconds),
            _gigabytes(Copied(row.num_bytes, row.seconds)).removesuffix(" GB/s"),
            _gigabytes(row.copied).removesuffix(" GB/s"),
            f"{row.share:.0%}",
        )
        for row in report.bandwidth
    ]
    for threads, copied in report.large_copies.items():
        speed = _gigabytes(copied).removesuffix(" GB/s")
        sizes = f"{copied.num_bytes / 1e6:.2f}", _ms(copied.seconds)
        cells.append(("memcpy", "", "", str(threads), *sizes, "", speed, ""))
    return Section("Share of the memory's bandwidth", BANDWIDTH_NOTE, header, cells, 3)


def targets_section(report: ReplayReport) -> Section:
    targets = [*_ratios(report), *_bandwidths(report), *_sizes(report), *report.other_targets]
    cells = [(t.what, t.wanted, t.got, "met" if t.is_met else "**missed**") for t in targets]
    return Section("Targets", TARGETS_NOTE, ("what", "wanted", "got", ""), cells, 4)


def _ratios(report: ReplayReport) -> list[Target]:
    ours = _ours(report)
    if ours is None or HOT not in ours.seconds:
        return []
    targets = []
    for family, limit in (("cpprb", 10), ("arena", 4), ("original", 1000)):
        rows = [row for row in report.rows if row.family == family and HOT in row.seconds]
        for row in sorted(rows, key=lambda row: row.seconds[HOT])[: 1 if family == "arena" else None]:
            ratio = row.seconds[HOT] / ours.seconds[HOT]
            what = f"packed draw and collation of {report.num_drawn}, beside {row.name}"
            targets.append(Target(what, f"1/{limit:,} of its time", f"1/{ratio:,.1f}", ratio >= limit))
    return targets


def _bandwidths(report: ReplayReport) -> list[Target]:
    return [
        Target(
            f"memcpy's bandwidth, cold, {row.source}, {row.batch}",
            f"at least {row.wanted:.0%}",
            f"{row.share:.0%}",
            row.share >= row.wanted,
        )
        for row in report.bandwidth
        if row.is_cold and row.threads == 1
    ]


def _sizes(report: ReplayReport) -> list[Target]:
    ours = _ours(report)
    targets = []
    if ours is not None and ours.insert_seconds is not None:
        rate = report.num_tokens / ours.insert_seconds
        targets.append(Target("insert, tokens/s", "at least 50 M", f"{rate / 1e6:,.0f} M", rate >= 50e6))
    if ours is not None and ours.num_bytes is not None:
        held = _without_logprobs(ours, report) / report.num_tokens
        what = "bytes a stored token without log-probs, this work"
        targets.append(Target(what, "at most 6", f"{held:.2f}", held <= 6))
    return targets


def _without_logprobs(row: ReplayRow, report: ReplayReport) -> int:
    assert row.num_bytes is not None
    return row.num_bytes - (0 if row.family == "original" else report.logprob_bytes)


def _ours(report: ReplayReport) -> ReplayRow | None:
    return next((row for row in report.rows if row.name == OURS), None)


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)


def _ms(seconds: float) -> str:
    """Four digits at most: 0.0412, 1.204, 251.3."""
    return f"{seconds * 1e3:.{4 if seconds < 1e-4 else 3 if seconds < 1e-2 else 1}f}"


def _gigabytes(copied: Copied) -> str:
    return f"{copied.num_bytes / copied.seconds / 1e9:.1f} GB/s"
