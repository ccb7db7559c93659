"""The report of made-up runs, whose truth is computed by hand: figures, sentences, and runs that are broken."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import GAMES, made_plan, made_run

from archer_fast.compare import plots
from archer_fast.compare.figures import Figures
from archer_fast.compare.page import difference_text, race_text, step_text
from archer_fast.compare.report import build_comparison, plain

FAST = [-10.0, -8.0, -6.0, -4.0, -4.0]
SLOW = [-10.0, -9.0, -8.0, -7.0, -6.0]


def made(out: Path, iterations: int = 5) -> None:
    """archer learns twice as fast as ppo; each seed is the one before, .1 higher."""
    made_plan(out, ["archer", "ppo"], seeds=3, iterations=iterations)
    for seed in range(3):
        up = 0.1 * seed
        made_run(out, "archer", seed, [r + up for r in FAST], start=-10 + up, end=-4 + up)
        made_run(out, "ppo", seed, [r + up for r in SLOW], start=-10 + up, end=-6 + 2 * up)


def page_of(out: Path, **more: Any) -> tuple[Figures, str]:
    figures, _ = build_comparison(out, more.pop("tuning", {}), **more)
    text = (out / "report.md").read_text()
    return figures, re.sub(r"\n  (?=\S)", " ", text)  # bullets in one line


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn is in test_plots.py, and takes half a second."""
    monkeypatch.setattr(plots, "draw", lambda figures: {"return_by_trajectories.png": b"drawn"})


@pytest.fixture
def figures(tmp_path: Path) -> Figures:
    made(tmp_path)
    return page_of(tmp_path)[0]


def test_the_ends_are_means_over_seeds(figures: Figures) -> None:
    archer, ppo = figures.contestants["archer"], figures.contestants["ppo"]
    assert archer.ends["start"] is not None and archer.ends["end"] is not None and ppo.ends["end"] is not None
    assert archer.ends["start"].mean == pytest.approx(-9.9)
    assert archer.ends["end"].mean == pytest.approx(-3.9) and archer.ends["end"].se == pytest.approx(0.1 / 3**0.5)
    assert ppo.ends["end"].mean == pytest.approx(-5.8) and ppo.ends["end"].se == pytest.approx(0.2 / 3**0.5)
    assert archer.ends["seconds"] is not None and archer.ends["seconds"].mean == 5 * 3.5, "evaluations are not training"
    assert archer.behaviour["guess"] is not None and archer.behaviour["guess"].mean == 0.6
    assert archer.behaviour["kl"] is not None and archer.behaviour["kl"].mean == pytest.approx(0.05)


def test_the_curves_against_games_and_seconds(figures: Figures) -> None:
    archer = figures.contestants["archer"]
    assert archer.curve is not None and archer.curve_in_seconds is not None
    assert archer.curve.x.tolist() == [100, 200, 300, 400, 500]
    assert archer.curve.mean.tolist() == pytest.approx([r + 0.1 for r in FAST])
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert archer.curve.high.tolist() == pytest.approx([r + 0.1 + half for r in FAST], abs=1e-5)
    assert (archer.curve_in_seconds.x[0], archer.curve_in_seconds.x[-1]) == (3.5, 17.5)
    assert archer.curve_in_seconds.mean[-1] == pytest.approx(-3.9)


def test_the_ladder_says_when_each_was_there(figures: Figures) -> None:
    assert list(figures.ladder) == [-9, -8, -7, -6, -5, -4]
    steps = figures.ladder[-6]
    assert steps["archer"].by_seed == {0: 300, 1: 300, 2: 300}
    assert steps["ppo"].by_seed == {0: 500, 1: 500, 2: 500} and steps["ppo"].median == 500
    assert (
        figures.ladder[-4]["ppo"].median == math.inf and step_text(figures.ladder[-4]["ppo"]) == "not reached (0 of 3)"
    )
    assert step_text(figures.ladder[-9]["ppo"]) == "200"


def test_the_race_is_for_the_rivals_best(figures: Figures) -> None:
    whole, most = figures.races
    assert (whole.share, whole.level, whole.gain) == (1.0, pytest.approx(-5.9), pytest.approx(4.0))
    assert (whole.subject_trajectories, whole.rival_trajectories, whole.ratio) == (300, 500, pytest.approx(5 / 3))
    assert list(whole.ratios.values()) == pytest.approx([5 / 3] * 3) and whole.median_ratio == pytest.approx(5 / 3)
    assert (most.share, most.level) == (0.9, pytest.approx(-9.9 + 0.9 * 4))
    assert (most.subject_trajectories, most.rival_trajectories) == (300, 500)
    assert race_text(whole, 500) == (
        "archer reached ppo's best return (-5.90) after 300 trajectories; ppo took 500, 1.7 times as many "
        "(by seed, ppo : archer: 1.7, 1.7, 1.7)."
    )
    assert race_text(most, 500).startswith("archer reached ppo's return at 90% of its gain (-6.30) after 300")


def test_the_difference_is_of_pairs(figures: Figures) -> None:
    (difference,) = figures.differences
    assert list(difference.by_seed.values()) == pytest.approx([2.0, 1.9, 1.8])
    assert (difference.estimate.mean, difference.estimate.se) == pytest.approx((1.9, 0.1 / 3**0.5))
    assert difference_text(difference, 0.95) == (
        "At the end archer is 1.90 above ppo (95 % interval +1.65 to +2.15, 3 seeds in pairs)."
    )


def test_the_page_and_the_file_say_the_same(tmp_path: Path) -> None:
    made(tmp_path)
    figures, page = page_of(tmp_path, tuning={"ppo": "3 learning rates x 1 seed"})
    whole = json.loads((tmp_path / "comparison.json").read_text())
    assert whole == plain(figures)
    assert whole["races"][0]["ratio"] == pytest.approx(5 / 3, rel=1e-5)
    assert whole["ladder"]["-4"]["ppo"] == {"median": None, "by_seed": {"0": None, "1": None, "2": None}, "reached": 0}
    assert whole["contestants"]["archer"]["curve"]["mean"] == pytest.approx([r + 0.1 for r in FAST])
    assert "- archer reached ppo's best return (-5.90) after 300 trajectories; ppo took 500, 1.7 times as many" in page
    assert "| archer | -9.90 ± 0.06 | -3.90 ± 0.06 | -2.90 ± 0.06 | -3.40 ± 0.06 | 50% ± 0% | 0:18 | 0, 1, 2 |" in page
    assert "| -4 | 400 | not reached (0 of 3) |" in page
    assert "| archer - ppo | +1.90 | +1.65 to +2.15 | +2.00, +1.90, +1.80 |" in page
    assert '| `algorithm` | `"archer"` | `"ppo"` |' in page and "- ppo: 3 learning rates x 1 seed" in page
    assert "commit `abc`, 2 cores" in page and "```sh\narcher-fast compare ...\n```" in page
    assert "Not finished" not in page and "Collapsed" not in page
    assert "\n![return by trajectories](return_by_trajectories.png)\n" in page
    assert (tmp_path / "return_by_trajectories.png").read_bytes() == b"drawn"


def test_a_slower_first_algorithm_is_told_so(tmp_path: Path) -> None:
    made(tmp_path)
    made_plan(tmp_path, ["ppo", "archer"], seeds=3, iterations=5)
    figures, page = page_of(tmp_path)
    assert (
        "- ppo did not reach archer's best return (-3.90) in 500 trajectories (its own best is -5.90); archer took 400"
        in page
    )
    assert "(by seed, archer : ppo: not reached, not reached, not reached)." in page
    assert (figures.races[0].ratio, figures.races[0].median_ratio) == (0, 0)
    assert "- At the end ppo is 1.90 below archer (95 % interval -2.15 to -1.65, 3 seeds in pairs)." in page


def test_a_later_first_algorithm_took_more(tmp_path: Path) -> None:
    made_plan(tmp_path, ["archer", "ppo"], seeds=1, iterations=4)
    made_run(tmp_path, "archer", 0, [-10, -9, -8, -5], end=-5)
    made_run(tmp_path, "ppo", 0, [-10, -6, -7, -7], end=-6)
    figures, page = page_of(tmp_path)
    assert race_text(figures.races[0], 400) == (
        "archer reached ppo's best return (-6.00) after 400 trajectories; ppo took 200, 2.0 times fewer."
    )
    assert "At the end archer is 1.00 above ppo; of one seed, which says nothing of others." in page
    assert "| archer - ppo | +1.00 | – | +1.00 |" in page


def test_a_rival_that_never_rose_is_no_goal(tmp_path: Path) -> None:
    made_plan(tmp_path, ["archer", "ppo"], seeds=2, iterations=3)
    for seed, end in enumerate((-12, -9)):
        made_run(tmp_path, "archer", seed, [-10, -11, -12], end=end)
        made_run(tmp_path, "ppo", seed, [-10, -11, -10], end=-10)
    _, page = page_of(tmp_path)
    assert page.count("ppo never rose above its start: there is nothing to race archer for.") == 1
    assert "No mean curve rose above the start." in page
    assert (
        "- At the end archer is 0.50 below ppo, which these seeds cannot tell from no difference (95 % interval" in page
    )


def test_collapsed_seeds_are_named(tmp_path: Path) -> None:
    made_plan(tmp_path, ["archer", "ppo"], seeds=2, iterations=3)
    made_run(tmp_path, "archer", 0, [-10, -9, -9], end=-11.1)  # 1.1 below, 2 sqrt(.5^2 + .3^2) = 1.17
    made_run(tmp_path, "archer", 1, [-10, -9, -9], end=-11.2)
    made_run(tmp_path, "ppo", 0, [-10, -9, -14], total=9)  # by its curve: -14 of 100 games, ± .2
    path = made_run(tmp_path, "ppo", 1, [-10, -9, -9], total=9)
    rows = (path / "metrics.jsonl").read_text().replace('"kl": 0.02', '"kl": 0.02, "collapsed": 1')
    (path / "metrics.jsonl").write_text(rows)
    figures, page = page_of(tmp_path)
    assert figures.collapsed == {
        "archer seed 1": "return -11.20 at the end, -10.00 at the start, ± 0.58 of the difference",
        "ppo seed 0": "return -14.00 at the end, -10.00 at the start, ± 0.54 of the difference",
        "ppo seed 1": "its log says so, first in iteration 2",
    }
    assert "- **Collapsed**: archer seed 1 (return -11.20 at the end" in page


def test_what_is_not_finished_is_named_and_not_in_the_means(tmp_path: Path) -> None:
    made(tmp_path)
    made_run(tmp_path, "ppo", 1, [-10, -1], total=5)
    (tmp_path / "ppo" / "seed-1" / "summary.json").unlink()
    made_plan(tmp_path, ["archer", "ppo"], seeds=4, iterations=5)
    made_run(tmp_path, "archer", 3, FAST)
    figures, page = page_of(tmp_path)
    assert figures.contestants["ppo"].seeds == [0, 2]
    assert figures.missing == {
        "ppo seed 1": "2 of 5 iterations",
        "archer seed 3": "all 5 iterations, its last evaluation not",
        "ppo seed 3": "not started",
    } and list(figures.differences[0].by_seed) == [0, 2]
    assert "- **Not finished**, and in no mean where another seed is: archer seed 3 (all 5 iterations" in page


def test_a_report_while_nothing_is_finished_yet(tmp_path: Path) -> None:
    made_plan(tmp_path, ["archer", "ppo"], seeds=2, iterations=9)
    made_run(tmp_path, "archer", 0, [-10, -8, -6], total=9)
    made_run(tmp_path, "archer", 1, [-10, -8], total=9)
    made_run(tmp_path, "ppo", 0, [], total=9)
    figures, page = page_of(tmp_path)
    curve = figures.contestants["archer"].curve
    assert curve is not None and (curve.x.tolist(), curve.n) == ([100, 200], 2)
    assert "No run is finished of archer: curves are of what there is." in page
    assert "| archer | – | – | – | – | – | – | 0, 1 |" in page and "| ppo | – | – | – | – | – | – | – |" in page
    assert "No seed is finished of two algorithms." in page


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out: wanted the folder of a comparison, but .* has no plan\.json"):
        build_comparison(tmp_path, {})
    made_plan(tmp_path, ["archer"], seeds=1, iterations=9)
    with pytest.raises(ValueError, match="nothing to compare: no run has ended an iteration yet"):
        build_comparison(tmp_path, {})


def test_returns_that_are_no_number_are_left_out_and_named(tmp_path: Path) -> None:
    made_plan(tmp_path, ["archer"], seeds=1, iterations=4)
    made_run(tmp_path, "archer", 0, [-10, None, math.nan, -7], end=-7)  # null, as loggers write it, and Python's NaN
    figures, page = page_of(tmp_path)
    curve = figures.contestants["archer"].curve
    assert curve is not None and (curve.x.tolist(), curve.mean.tolist()) == ([100, 400], [-10, -7])
    assert "Without a finite return, and left out: archer seed 0 (iterations 2, 3)." in page
    assert "NaN" not in (tmp_path / "comparison.json").read_text()


def test_a_log_that_is_cut_in_a_line_or_broken_in_the_middle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made_plan(tmp_path, ["archer"], seeds=1, iterations=4)
    log = made_run(tmp_path, "archer", 0, [-10, -9, -8, -7], total=4) / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    assert page_of(tmp_path)[0].missing == {"archer seed 0": "3 of 4 iterations"}
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:2], '{"iteration": 2, "ga', *lines[3:]]))
    with caplog.at_level(logging.WARNING):
        curve = page_of(tmp_path)[0].contestants["archer"].curve
    assert curve is not None and curve.x.tolist() == [100, 300] and "not a row of metrics" in caplog.text


def test_broken_files_are_named(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "archer" / "seed-1" / "summary.json").write_text('{"before')
    with pytest.raises(ValueError, match=r"seed-1/summary\.json:1:2: broken JSON"):
        build_comparison(tmp_path, {})
    (tmp_path / "plan.json").write_text('{"algorithms": ["archer"], "seed": 3}')
    with pytest.raises(ValueError, match="unknown key 'seed'; did you mean 'seeds'"):
        build_comparison(tmp_path, {})


def test_two_seeds_with_other_settings_are_no_contestant(tmp_path: Path) -> None:
    made_plan(tmp_path, ["archer"], seeds=2, iterations=2)
    made_run(tmp_path, "archer", 0, [-10, -9])
    made_run(tmp_path, "archer", 1, [-10, -9], checkpoint_every=3)
    with pytest.raises(ValueError, match="archer seed 1 and archer seed 0 differ in checkpoint_every"):
        build_comparison(tmp_path, {})


def test_an_offline_algorithm_has_no_curve(tmp_path: Path) -> None:
    made_plan(tmp_path, ["archer", "offline-iql"], seeds=1, iterations=25)
    made_run(tmp_path, "archer", 0, [-10.0] * 20 + [-9.0] * 5, end=-9)
    made_run(tmp_path, "offline-iql", 0, [-10.0] * 25, end=-8)
    figures, page = page_of(tmp_path)
    assert figures.contestants["offline-iql"].curve is None and figures.races == []
    assert "- offline-iql: learns offline, from the games of its first iterations, so it has no curve." in page
    assert next(iter(figures.ladder.values())).keys() == {"archer"}
    assert "| offline-iql | -10.00 | -8.00 |" in page and figures.differences[0].estimate.mean == -1


def test_a_window_of_more_games(tmp_path: Path) -> None:
    made(tmp_path)
    figures, page = page_of(tmp_path, window=2 * GAMES)
    curve = figures.contestants["archer"].curve
    assert curve is not None and curve.mean.tolist() == pytest.approx([-8.9, -6.9, -4.9, -3.9])
    assert "mean return of the last 200 games" in " ".join(page.split())
    short, _ = page_of(tmp_path, window=501)
    assert short.contestants["archer"].curve is None and short.races == [] and short.ladder == {}
