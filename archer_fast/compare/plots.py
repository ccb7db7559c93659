"""The pictures of a comparison: return against trajectories and against time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from archer_fast.compare.curves import Band, Curve
from archer_fast.compare.figures import Contestant, Figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's, told apart by the colour-blind too; line styles begin anew where there are more contestants.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
STYLES = ("-", "--", "-.", ":")


def draw(figures: Figures) -> dict[str, bytes]:
    """File name: PNG."""
    some = figures.contestants.values()
    by_trajectories = [(one, one.curve, one.seed_curves) for one in some]
    by_seconds = [(one, one.curve_in_seconds, one.seed_curves_in_seconds) for one in some]
    return {
        "return_by_trajectories.png": _draw(figures, "trajectories", by_trajectories),
        "return_by_seconds.png": _draw(figures, "seconds of training", by_seconds),
    }


def _draw(figures: Figures, label: str, curves: Sequence[tuple[Contestant, Band | None, Mapping[int, Curve]]]) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        panel = figure.subplots()
        for number, (contestant, band, seeds) in enumerate(curves):
            colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
            for curve in seeds.values():
                panel.plot(curve.x, curve.y, color=colour, lw=0.6, alpha=0.35)
            if band is not None:
                _draw_band(panel, band, f"{contestant.name}, {_count(band.n)}", colour, style)
        starts = [start for contestant, _, _ in curves for start in contestant.starts.values()]
        if starts:
            panel.axhline(sum(starts) / len(starts), ls=":", lw=1, color="grey", label="start")
        panel.set(xlabel=label, ylabel=f"return, mean of the last {figures.plan.window:,} games")
        title = f"mean over seeds, {100 * figures.confidence:g} % Student-t band, thin: one seed"
        panel.set_title(f"{figures.played}: {title}")
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=8)
        out = BytesIO()
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _draw_band(panel: Axes, band: Band, label: str, colour: str, style: str) -> None:
    panel.plot(band.x, band.mean, style, color=colour, lw=1.8, label=label)
    panel.fill_between(band.x, band.low, band.high, color=colour, alpha=0.15, lw=0)


def _count(seeds: int) -> str:
    return f"{seeds} seed" + "s" * (seeds != 1)
