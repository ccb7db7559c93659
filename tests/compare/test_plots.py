"""The pictures of a comparison: what is in them, and a report without them."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest
from made_runs import made_plan, made_run
from matplotlib.figure import Figure
from matplotlib.image import imread

from archer_fast.compare.report import build_comparison


def make(out: Path) -> None:
    made_plan(out, ["archer", "ppo", "bc"], seeds=2, iterations=4)
    for seed in range(2):
        made_run(out, "archer", seed, [-10, -8, -6, -4 + seed], end=-4)
    made_run(out, "ppo", 0, [-10, -9, -8, -7], end=-7)
    made_run(out, "ppo", 1, [-10, -9], total=4)


def test_curves_bands_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k))[1])
    make(tmp_path)
    build_comparison(tmp_path, {})
    by_games, by_seconds = (figure.axes[0] for figure in drawn)
    lines = {line.get_label(): line for line in by_games.lines}
    named = [label for label in lines if not label.startswith("_")]
    assert named == ["archer, 2 seeds", "ppo, 1 seed", "start"], "bc has not begun, a seed of ppo is not finished"
    assert lines["archer, 2 seeds"].get_xydata().tolist() == [[100, -10], [200, -8], [300, -6], [400, -3.5]]
    assert by_games.get_xlabel() == "trajectories" and by_seconds.get_xlabel() == "seconds of training"
    seconds = {line.get_label(): line for line in by_seconds.lines}["ppo, 1 seed"].get_xydata()
    assert seconds[0].tolist() == [3.5, -10] and seconds[-1].tolist() == [14, -7]
    thin = [line for line in by_games.lines if line.get_linewidth() < 1]
    assert sorted(len(line.get_xdata()) for line in thin if len(line.get_xdata())) == [2, 4, 4, 4], "each seed"
    for name in ("return_by_trajectories.png", "return_by_seconds.png"):
        pixels = imread(io.BytesIO((tmp_path / name).read_bytes()))
        assert pixels.shape[0] > 400 and pixels.std() > 0.05


def test_without_matplotlib_there_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    _, said = build_comparison(tmp_path, {})
    line = "no pictures: matplotlib is not installed (pip install 'archer-fast[report]', then --report-only)"
    page = (tmp_path / "report.md").read_text()
    assert said[0] == line and f"- {line}" in page.replace("\n  ", " ") and ".png" not in page
    assert not list(tmp_path.glob("*.png")) and (tmp_path / "comparison.json").exists()
