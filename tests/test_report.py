"""The page of a run: from a whole run, from half of one, from nothing; one file, and all text escaped."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from archer_fast.config import Config
from archer_fast.report import build_report
from archer_fast.run_curves import Metrics, draw_curves
from archer_fast.run_folder import RunFolder

ROWS = [
    {"iteration": 0, "games": 0, "eval_return": -16.0, "eval_return_se": 0.5, "eval_win_rate": 0.25},
    *(
        {
            "iteration": i,
            "games": 100 * i,
            "return": -15.0 + i,
            "win_rate": 0.1 * i,
            "guess": 0.3,
            "repeat": 0.1,
            "turns": 12.0,
            "action_length": 3.0,
            "entropy": 1.0 / i,
            "kl": 0.01 * i,
            "explained_variance": -0.5 if i == 1 else 0.8,
            "critic_loss": 1.0 / i,
            "advantage_std": 0.2,
            "processed_tokens": 3000,
            "useful_tokens": 750,
            "seconds_rollout": 1.0,
            "seconds_critic": 2.0,
            "seconds_actor": 0.5,
            "seconds_other": 0.0,
            "tokens_per_second": 857.1,
            "tokens_per_second_rollout": 1500.0,
            "tokens_per_second_actor": 3000.0,
            "deduplication": 6.5,
            "deduplication_actor": 7.5,
            "tflop_per_second": 0.3,
            "tflop_per_second_rollout": 0.25,
            "tflop_per_second_actor": 1.5,
            "utilisation": 0.03,
            "utilisation_rollout": 0.025,
            "utilisation_actor": 0.15 * i,
            "staleness_share_0": 1.0 if i == 1 else 0.25,
            **({"staleness_share_1": 0.0, "staleness_share_2": 0.75} if i == 2 else {}),
            "mismatch_kl": 1e-6,
            "mismatch_kl_turn_0": 1e-6,
            "mismatch_kl_turn_1": 2e-6,
            "mismatch_kl_turn_2": 3e-6 if i == 2 else math.nan,
        }
        for i in (1, 2)
    ),
    {"iteration": 2, "games": 200, "eval_return": -12.0, "eval_return_se": 0.25, "eval_win_rate": 0.5},
]


class Page(html.parser.HTMLParser):
    """The tags that are open, the text, and everything that a browser would fetch."""

    VOID = ("meta", "img", "br")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == [], "a tag that is never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in (*self.VOID, "li"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "li":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.words.append(" ".join(data.split()))


def make_run(path: Path, rows: list[dict[str, float]] = ROWS) -> RunFolder:
    folder = RunFolder(path)
    folder.save_config(Config())
    if rows:
        folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_columns_are_read_against_games_and_skip_what_is_missing() -> None:
    metrics = Metrics([*ROWS, {"iteration": 3, "games": 300, "return": math.nan, "kl": 0.5}])
    assert metrics.column("return") == ([100, 200], [-14.0, -13.0])
    assert metrics.column("eval_return") == ([0, 200], [-16.0, -12.0])
    assert metrics.column("nothing") == ([], [])
    assert (metrics.first("eval_return"), metrics.last("eval_return"), metrics.last("nothing")) == (-16.0, -12.0, None)
    assert metrics.total("processed_tokens") == 6000
    without_games = Metrics([{"iteration": 4, "return": -1.0}])
    assert without_games.column("return") == ([4], [-1.0])
    assert (metrics.x_label, without_games.x_label) == ("games", "iteration")


def test_a_finished_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a run & <b>more")
    folder.games_before.write_text("Questions:\n<script>alert(1)</script> No.\n")
    folder.games_after.write_text("Questions:\nIs it a dog? & Yes.\n")
    summary = {"before_return": -16.0, "best_return": -11.5, "best_win_rate": 0.625}
    folder.summary.write_text(json.dumps(summary))
    assert build_report(folder) == [f"curves: {folder.curves}", f"report: {folder.report}"]
    source = folder.report.read_text()
    page = Page(source)
    assert "archer_fast: a run & <b>more" in page.words, "a name is text, not markup"
    assert "Questions: <script>alert(1)</script> No." in page.words
    assert "Questions: Is it a dog? & Yes." in page.words
    assert "2 iterations, finished" in page.words
    shown = {label: value for value, label in re.findall(r"<div><b>(.*?)</b><span>(.*?)</span></div>", source)}
    assert shown == {
        "return at the start": "-16.00",
        "best return": "-11.50",
        "gain": "+4.50",
        "games won": "62%",
        "games played": "200",
        "tokens/s": "857",
        "utilisation": "3.0%",
        "time of training": "0:07",
    }
    assert page.words[page.words.index("Time by phase") + 1 :][:3] == [
        "rollout: 2.0 s (29 %)",
        "critic: 4.0 s (57 %)",
        "actor: 1.0 s (14 %)",
    ]
    assert page.words[page.words.index("Work by phase") + 1 :][:12] == [
        *("phase", "TFLOP", "TFLOP/s", "utilisation"),
        *("rollout", "0.5", "0.25", "2.5%"),
        *("actor", "1.5", "1.5", "22.5%"),
    ]
    assert page.words[page.words.index("Tokens") + 1 :][:2] == [
        "useful (sampled actions): 1,500 (25 %)",
        "the rest of what was processed: 4,500 (75 %)",
    ]
    assert '"best_return": -11.5' in source.replace("&quot;", '"') and '"gamma": 0.95' in source.replace("&quot;", '"')
    (image,) = page.fetched
    assert image.startswith("data:image/png;base64,"), "nothing is fetched from elsewhere"
    assert base64.b64decode(image.partition(",")[2]) == folder.curves.read_bytes()


def test_a_run_that_is_on_its_way(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ROWS[:-1])
    with folder.metrics.open("a") as file:
        file.write('{"iteration": 3, "retu')  # being written now
    build_report(folder)
    page = Page(folder.report.read_text())
    assert "2 iterations, not finished yet" in page.words
    assert {"best return so far", "gain so far"} <= set(page.words)
    assert page.words.count("not there yet") == 3, "games before and after, summary"


@pytest.mark.parametrize("rows", [[], ROWS[:1]])
def test_a_run_that_has_hardly_begun(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    folder = make_run(tmp_path, rows)
    build_report(folder)
    words = Page(folder.report.read_text()).words
    assert words.count("Nothing yet.") == 2 and "No FLOPs were counted." in words, "no time and no tokens"
    assert ("0 iterations, not finished yet" if rows else "no iteration yet, not finished yet") in words
    assert folder.curves.stat().st_size > 10_000


def test_curves_are_drawn_and_every_panel_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    figures: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    image = imread(io.BytesIO(draw_curves(Metrics(ROWS))), format="png")
    assert image.shape == (2728, 1210, 4)
    red = np.all(np.abs(image[..., :3] - np.array([0xE1, 0x57, 0x59]) / 255) < 0.02, axis=-1)
    assert red.sum() > 200, "the evaluations are seen"
    panels = {panel.get_title(): panel for panel in figures[0].axes}
    assert len(panels) == 16 and all(panel.get_xlabel() == "games" for panel in panels.values())
    lines = {line.get_label(): line for panel in panels.values() for line in panel.get_lines()}
    assert lines["rollouts"].get_xydata().tolist() == [[100, pytest.approx(0.1)], [200, pytest.approx(0.2)]]
    assert lines["processed"].get_ydata().tolist() == [0.003, 0.006]
    by_title = {title: {x.get_label(): [*x.get_ydata()] for x in p.get_lines()} for title, p in panels.items()}
    assert by_title["tokens a second, by phase"]["actor"] == [3000.0, 3000.0]
    assert by_title["TFLOP/s, by phase"] == {"rollout": [0.25, 0.25], "actor": [1.5, 1.5]}
    used = by_title["utilisation: share of the devices' peak FLOP/s, by phase"]
    assert used == {"rollout": [0.025] * 2, "actor": [0.15, 0.3], "the whole iteration": [0.03] * 2}
    assert by_title["KL(sampler || trainer) at equal weights, nats an action"] == {
        "turn 0": [1e-6, 1e-6],
        "turn 1": [2e-6, 2e-6],
        "turn 2 and later": [3e-6],
        "all turns": [1e-6, 1e-6],
    }
    ages = panels["age of the replay's turns, optimizer steps of the actor"].collections
    assert [age.get_label() for age in ages] == ["0", "1", "2 to 3"]
    tops = [float(age.get_paths()[0].vertices[:, 1].max()) for age in ages]
    assert tops == [1.0, 1.0, 1.0] and float(ages[2].get_paths()[0].vertices[:, 1].min()) == 0.25
    low, high = panels["critic: explained variance of its targets"].get_ylim()
    assert (low, high) == pytest.approx((-0.52, 1.02))
    assert not any(text.get_text() == "nothing yet" for panel in panels.values() for text in panel.texts)
    draw_curves(Metrics(ROWS[:1]))
    said = {p.get_title(): [t.get_text() for t in p.texts] for p in figures[1].axes}
    assert said["seconds an iteration, by phase"] == ["nothing yet"] and said["return of a game"] == []
    assert said["utilisation: share of the devices' peak FLOP/s, by phase"] == ["the device's peak is not known"]


def test_without_matplotlib_the_page_comes_without_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as Python itself marks what cannot be imported
    folder = make_run(tmp_path)
    said = build_report(folder)
    assert said == [
        "no curves: matplotlib is not installed (pip install 'archer-fast[report]')",
        f"report: {folder.report}",
    ]
    page = Page(folder.report.read_text())
    assert page.fetched == [] and "No curves: matplotlib was not installed when this page was made." in page.words
    assert not folder.curves.exists()


def test_a_collapse_is_seen_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    spans: list[tuple[float, float]] = []
    monkeypatch.setattr(Axes, "axvspan", lambda self, first, last, **style: spans.append((first, last)))
    collapsed = [0.0, 1.0, 1.0, 0.0, 1.0]
    rows = [{"iteration": i, "games": 100 * i, "return": -15.0, "collapsed": c} for i, c in enumerate(collapsed, 1)]
    folder = make_run(tmp_path, [*ROWS[:1], *rows])
    build_report(folder)
    assert spans == [(100, 200), (200, 300), (400, 500)]
    words = Page(folder.report.read_text()).words
    assert words[words.index("Collapsed") + 1] == "in iterations 2, 3, 5"
    folder.summary.write_text(json.dumps({"collapses": ["collapse in iteration 2: <repeat> 86%"]}))
    build_report(folder)
    assert "collapse in iteration 2: <repeat> 86%" in Page(folder.report.read_text()).words
    build_report(make_run(tmp_path / "healthy"))
    assert "Collapsed" not in Page((tmp_path / "healthy" / "report.html").read_text()).words


def test_a_broken_summary_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    folder.summary.write_text('{"best_return": ')
    with pytest.raises(ValueError, match=r"summary\.json:1:17: broken JSON"):
        build_report(folder)
