"""`archer-fast bench` as a user meets it; what is compiled is in test_compile_report.py."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from archer_fast import checkout, cli, cli_bench
from archer_fast.cli_args import BENCHMARKS
from archer_fast.compile_report import Row


class Said(NamedTuple):
    code: int
    out: str
    err: str


def run_cli(*argv: str) -> Said:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(argv)
        except SystemExit as stop:
            code = 0 if stop.code is None else int(stop.code)
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "130")


def row(capability: int, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "name": "fused[bf16, 128x128]",
        "capability": capability,
        "num_warps": 8,
        "registers": 171,
        "spilled": 0,
        "shared": 131072,
        "tensor_memory": 128 if capability == 100 else 0,
        "tensor_core": "tcgen05" if capability == 100 else "wgmma",
        "needs_tensor_core": True,
    }
    return Row(**{**fields, **changes})


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """What is compiled, in place of the true kernels: mend or break it."""
    rows = [row(90), row(100)]

    def build(variants: Sequence[Any], processes: int) -> Iterator[Row]:
        return iter(rows)

    monkeypatch.setattr(cli_bench, "all_variants", list)
    monkeypatch.setattr(cli_bench, "build_report", build)
    versions = {"triton": "3.9.0", "ptxas": "12.9.86", "ptxas-blackwell": "13.4.59"}
    monkeypatch.setattr(cli_bench, "tool_versions", lambda: versions)
    return rows


VERSIONS = "triton 3.9.0, ptxas 12.9.86, ptxas-blackwell 13.4.59"
HEADER = "| kernel | chip | warps | registers | spilled | shared memory | tensor core | occupancy |"


def test_the_table(rows: list[Row]) -> None:
    code, out, err = run_cli("bench", "kernels", "--compile-report")
    assert (code, err) == (0, "")
    table = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line[0] == "│"]
    assert table == [
        ["fused[bf16, 128x128]", "sm_90", "8", "171", "0", "128.0 of 227 KB", "wgmma", "12%"],
        ["", "sm_100", "8", "171", "0", "128.0 of 227 KB, 128 columns", "tcgen05", "12%"],
    ]
    assert out.splitlines()[-1] == f"1 configurations, 2 compiled, 0 spill, within every limit; {VERSIONS}"


def test_the_page_as_markdown(rows: list[Row]) -> None:
    code, out, _ = run_cli("bench", "kernels", "--compile-report", "--markdown")
    lines = out.splitlines()
    assert code == 0
    assert lines[:3] == [
        "# Compile report of the Triton kernels",
        "",
        "- command: `archer-fast bench kernels --compile-report --markdown`",
    ]
    assert re.fullmatch(r"- commit: [0-9a-f]{7,}(-dirty)?|- commit: -", lines[3])
    assert re.fullmatch(r"- date: 20\d\d-\d\d-\d\d", lines[4])
    assert lines[5:7] == [
        f"- versions: {VERSIONS}",
        "- result: 1 configurations, 2 compiled, 0 spill, within every limit",
    ]
    assert lines[-4:] == [
        HEADER,
        "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: |",
        "| fused[bf16, 128x128] | sm_90 | 8 | 171 | 0 | 128.0 of 227 KB | wgmma | 12% |",
        "| fused[bf16, 128x128] | sm_100 | 8 | 171 | 0 | 128.0 of 227 KB, 128 columns | tcgen05 | 12% |",
    ]
    assert all(len(line) <= 120 for line in lines)


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert checkout.commit(tmp_path) == "-"


@pytest.mark.parametrize("options", [(), ("--markdown",)])
def test_a_broken_limit_is_said_and_the_exit_status_is_1(rows: list[Row], options: tuple[str, ...]) -> None:
    rows.append(row(80, spilled=16, tensor_core=""))
    code, out, _ = run_cli("bench", "kernels", "--compile-report", *options)
    assert code == 1 and "none!" in out
    assert "1 configurations, 3 compiled, 1 spill, 2 limits broken" in out and VERSIONS in out
    assert "sm_80 fused[bf16, 128x128]: registers spill, 16 bytes a thread" in out
    assert "sm_80 fused[bf16, 128x128]: wanted a tensor-core instruction, found none" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["kernel"], "unknown benchmark 'kernel'; did you mean 'kernels'? (benchmarks: kernels, buffer)"),
        (["bufer"], "unknown benchmark 'bufer'; did you mean 'buffer'? (benchmarks: kernels, buffer)"),
        (["everything"], "unknown benchmark 'everything' (benchmarks: kernels, buffer)"),
        (["buffer", "--compile-report"], "compile-report: wanted with kernels, got with buffer"),
        (["kernels", "--markdown"], "markdown: wanted with --compile-report, got without"),
    ],
)
def test_nonsense_gets_one_line(argv: list[str], message: str) -> None:
    assert run_cli("bench", *argv) == (2, "", f"archer-fast: error: {message}\n")


def test_a_misspelt_option_is_met_with_the_right_one() -> None:
    code, _, err = run_cli("bench", "kernels", "--compile-reprt")
    assert code == 2 and "Perhaps you meant" in err and "--compile-report" in err


def test_help_tells_of_every_use() -> None:
    code, out, _ = run_cli("bench", "--help")
    said = " ".join(out.split())
    assert code == 0
    for part in (
        "bench_ops.py",
        "bench_replay.py",
        "--compile-report",
        "needs no GPU",
        "sm_80 (A100), sm_90 (H100) and sm_100 (B200)",
    ):
        assert part in said


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    code, out, err = run_cli("bench", "kernels", "--compile-report")
    assert (code, out) == (2, "") and "compile report: triton is not installed" in err and err.count("\n") == 1


# -- the benchmarks ------------------------------------------------------------------------------------


def test_an_installed_package_says_where_the_benchmarks_live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli_bench, "BENCHMARKS", tmp_path)
    for what, file in (("kernels", "bench_ops.py"), ("buffer", "bench_replay.py")):
        code, out, err = run_cli("bench", what)
        assert (code, out) == (2, "")
        assert f"wanted {tmp_path / file}" in err and "Clone the repository" in err and err.count("\n") == 1


def test_the_path_is_the_repositorys() -> None:
    assert Path(__file__).resolve().parents[1] / "benchmarks" == cli_bench.BENCHMARKS


def test_every_choice_has_its_files() -> None:
    assert tuple(cli_bench._FILES) == BENCHMARKS
    assert all((cli_bench.BENCHMARKS / name).is_file() for names in cli_bench._FILES.values() for name in names)


@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("assert False", 1)])
@pytest.mark.parametrize("what", BENCHMARKS)
def test_the_benchmarks_run_and_their_failure_is_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str, body: str, code: int
) -> None:
    """Its own files run, and nobody else's."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "bench_other.py").write_text("raise AssertionError('not asked for')\n")
    own = cli_bench._FILES[what]
    for others in cli_bench._FILES.values():
        for name in others:
            test = "def test_it(benchmark):\n    benchmark.pedantic(lambda: None, rounds=1)\n"
            (folder / name).write_text(f"{test}    {body}\n" if name == own[-1] else test)
    monkeypatch.setattr(cli_bench, "BENCHMARKS", folder)
    assert run_cli("bench", what).code == code
    out = capfd.readouterr().out
    assert f"{len(own)} passed" in out if code == 0 else "1 failed" in out
    assert ("passed" in out) == (code == 0 or len(own) > 1)


@pytest.mark.parametrize("name", ["pytest", "pytest_benchmark"])
def test_without_its_tools_it_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    for file in ("bench_ops.py", "bench_scans.py"):
        (tmp_path / file).touch()
    monkeypatch.setattr(cli_bench, "BENCHMARKS", tmp_path)
    found = cli_bench.importlib.util.find_spec
    monkeypatch.setattr(cli_bench.importlib.util, "find_spec", lambda other: None if other == name else found(other))
    code, _, err = run_cli("bench", "kernels")
    assert code == 2 and f"bench: {name!r} is not installed; pip install 'archer-fast[test]'" in err
