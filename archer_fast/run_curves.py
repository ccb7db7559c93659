"""The curves of a run: its rows of metrics by column, and the panels that show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASES = ("rollout", "critic", "actor", "other")
SHARES = ("guess", "question", "repeat", "invalid")
COLOURS = {"rollout": "#4e79a7", "critic": "#f28e2b", "actor": "#59a14f", "other": "#bab0ac"}


@dataclass(slots=True, frozen=True)
class Metrics:
    """The rows of metrics.jsonl, asked by column; a row may lack any key but "iteration"."""

    rows: Sequence[dict[str, float]]

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Games played (or iterations, where no row counts games) against the finite values of `name`."""
        x = "games" if any("games" in row for row in self.rows) else "iteration"
        pairs = [(row[x], row[name]) for row in self.rows if is_finite(row.get(name)) and is_finite(row.get(x))]
        return [p[0] for p in pairs], [p[1] for p in pairs]

    @property
    def x_label(self) -> str:
        return "games" if any("games" in row for row in self.rows) else "iteration"

    def total(self, name: str) -> float:
        return sum(self.column(name)[1])

    def last(self, name: str) -> float | None:
        values = self.column(name)[1]
        return values[-1] if values else None

    def first(self, name: str) -> float | None:
        values = self.column(name)[1]
        return values[0] if values else None

    def bins(self, name: str) -> list[int]:
        """Of a histogram's columns `name`_0, `name`_1, `name`_2, `name`_4, ...: the smallest value of each bin."""
        found = {
            column.removeprefix(f"{name}_") for row in self.rows for column in row if column.startswith(f"{name}_")
        }
        return sorted(int(first) for first in found)


def draw_curves(metrics: Metrics) -> bytes:
    """All curves as one PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 24.8), layout="constrained")
        panels = figure.subplots(8, 2)
        for panel, draw in zip(panels.flat, _PANELS, strict=True):
            draw(panel, metrics)
            panel.set_xlabel(metrics.x_label)
            panel.grid(alpha=0.25)
            if not panel.has_data():
                why = "the device's peak is not known" if draw is _draw_utilisation else "nothing yet"
                panel.text(0.5, 0.5, why, transform=panel.transAxes, ha="center", color="grey")
            elif panel.get_legend_handles_labels()[0]:
                panel.legend(frameon=False, fontsize=8)
        out = BytesIO()
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _collapses(metrics: Metrics) -> list[tuple[float, float]]:
    """Spans of x in which the policy counted as collapsed, from the row before."""
    x, collapsed = metrics.column("collapsed")
    return [(before, now) for before, now, flag in zip([0.0, *x], x, collapsed, strict=False) if flag > 0]


def _plot(panel: Axes, metrics: Metrics, name: str, label: str | None = None, **style: Any) -> None:
    x, y = metrics.column(name)
    if x:
        panel.plot(x, y, label=label or name, marker="." if len(x) == 1 else None, **style)


def _draw_return(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("return of a game")
    for first, last in _collapses(metrics):
        panel.axvspan(first, last, color="#e15759", alpha=0.15, lw=0)
    _plot(panel, metrics, "return", "rollouts", color="#4e79a7", alpha=0.45, lw=1)
    x, y = metrics.column("eval_return")
    if x:
        errors = [row.get("eval_return_se", 0.0) for row in metrics.rows if is_finite(row.get("eval_return"))]
        errors = [e if math.isfinite(e) else 0.0 for e in errors]
        panel.errorbar(x, y, errors, fmt="o-", ms=4, capsize=3, color="#e15759", label="evaluation ± standard error")
        panel.axhline(y[0], ls="--", lw=1, color="grey", label="start")


def _draw_win_rate(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("games won")
    _plot(panel, metrics, "win_rate", "rollouts", color="#4e79a7", alpha=0.45, lw=1)
    _plot(panel, metrics, "eval_win_rate", "evaluation", color="#e15759", ls="-")
    panel.set_ylim(-0.02, 1.02)


def _draw_shares(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("share of turns")
    for name in SHARES:
        _plot(panel, metrics, name, lw=1.2)
    panel.set_ylim(-0.02, 1.02)


def _draw_lengths(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("length")
    _plot(panel, metrics, "turns", "turns a game", color="#4e79a7")
    _plot(panel, metrics, "action_length", "tokens an action", color="#59a14f")


def _draw_entropy(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("entropy, nats a token")
    _plot(panel, metrics, "entropy", color="#4e79a7")
    panel.set_ylim(bottom=0)


def _draw_kl(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("KL to the start, nats an action")
    _plot(panel, metrics, "kl", "KL to the start", color="#e15759")


def _draw_critic(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("critic: explained variance of its targets")
    _plot(panel, metrics, "explained_variance", "explained variance", color="#f28e2b")
    _, y = metrics.column("explained_variance")
    if y:
        panel.set_ylim(max(-1.0, min(0.0, *y)) - 0.02, 1.02)


def _draw_losses(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("critic loss, spread of advantages")
    _plot(panel, metrics, "critic_loss", "critic loss", color="#f28e2b")
    _plot(panel, metrics, "advantage_std", "advantages' standard deviation", color="#59a14f")


def _draw_time(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("seconds an iteration, by phase")
    rows = [row for row in metrics.rows if any(is_finite(row.get(f"seconds_{p}")) for p in PHASES)]
    if rows:
        x = [row.get(metrics.x_label, row["iteration"]) for row in rows]
        stacks = [[_or_zero(row.get(f"seconds_{phase}")) for row in rows] for phase in PHASES]
        panel.stackplot(x, stacks, labels=PHASES, colors=[COLOURS[p] for p in PHASES], alpha=0.85)


def _draw_speed(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("tokens a second, by phase")
    for phase in PHASES:
        _plot(panel, metrics, f"tokens_per_second_{phase}", phase, color=COLOURS[phase])
    panel.set_ylim(bottom=0)


def _draw_flops(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("TFLOP/s, by phase")
    for phase in PHASES:
        _plot(panel, metrics, f"tflop_per_second_{phase}", phase, color=COLOURS[phase])
    panel.set_ylim(bottom=0)


def _draw_utilisation(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("utilisation: share of the devices' peak FLOP/s, by phase")
    for phase in PHASES:
        _plot(panel, metrics, f"utilisation_{phase}", phase, color=COLOURS[phase])
    _plot(panel, metrics, "utilisation", "the whole iteration", color="grey", ls="--")
    panel.set_ylim(bottom=0)


def _draw_staleness(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("age of the replay's turns, optimizer steps of the actor")
    rows = [row for row in metrics.rows if "staleness_share_0" in row]
    if rows:
        bins = metrics.bins("staleness_share")
        shares = [[_or_zero(row.get(f"staleness_share_{first}")) for row in rows] for first in bins]
        x = [row.get(metrics.x_label, row["iteration"]) for row in rows]
        panel.stackplot(x, shares, labels=map(_bin_label, bins), colors=_shades(len(bins)), alpha=0.55)
    panel.set_ylim(0, 1)


def _draw_sharing(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("tokens of a row a turn, for each token processed")
    _plot(panel, metrics, "deduplication", "games", color="#f28e2b")
    _plot(panel, metrics, "deduplication_actor", "actor's passes", color="#59a14f")
    panel.set_ylim(bottom=0)


def _draw_mismatch(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("KL(sampler || trainer) at equal weights, nats an action")
    bins = metrics.bins("mismatch_kl_turn")
    for first, shade in zip(bins, _shades(len(bins)), strict=True):
        label = f"turn {_bin_label(first)}" if first != bins[-1] else f"turn {first} and later"
        _plot(panel, metrics, f"mismatch_kl_turn_{first}", label, color=shade, lw=1)
    _plot(panel, metrics, "mismatch_kl", "all turns", color="#e15759", ls="--")


def _draw_tokens(panel: Axes, metrics: Metrics) -> None:
    panel.set_title("tokens so far (millions)")
    for name, label in (("processed_tokens", "processed"), ("useful_tokens", "useful: sampled actions")):
        x, y = metrics.column(name)
        if x:
            panel.plot(x, [total / 1e6 for total in _running(y)], label=label)


def _bin_label(first: int) -> str:
    """Of a bin of `doubling_bins`: 0 -> "0", 4 -> "4 to 7"."""
    return str(first) if first < 2 else f"{first} to {2 * first - 1}"


def _shades(num: int) -> list[str]:
    """From light to dark."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis_r"]((i + 0.5) / num)) for i in range(num)]


_PANELS = (
    _draw_return,
    _draw_win_rate,
    _draw_shares,
    _draw_lengths,
    _draw_entropy,
    _draw_kl,
    _draw_critic,
    _draw_losses,
    _draw_time,
    _draw_speed,
    _draw_flops,
    _draw_utilisation,
    _draw_tokens,
    _draw_sharing,
    _draw_staleness,
    _draw_mismatch,
)


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _or_zero(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _running(values: Iterable[float]) -> list[float]:
    total, out = 0.0, []
    for value in values:
        total += value
        out.append(total)
    return out
