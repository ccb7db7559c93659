"""A run's folder: its lock, its config, and files that are whole or absent."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from archer_fast.config import ActorConfig, Config, TaskConfig
from archer_fast.run_folder import RunFolder, is_run, read_config, read_json, write_json


def test_makes_the_folder_and_names_its_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    assert folder.path.is_dir()
    files = [folder.config, folder.metrics, folder.checkpoints, folder.start, folder.best, folder.final]
    files += [folder.games_before, folder.games_after, folder.summary, folder.report, folder.curves]
    assert [p.name for p in files] == [
        *("config.json", "metrics.jsonl", "checkpoints", "start", "best", "final"),
        *("games_before.txt", "games_after.txt", "summary.json", "report.html", "curves.png"),
    ]
    assert {p.parent for p in files} == {folder.path}


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(ValueError, match=r"out: wanted a folder, got .*file is in the way"):
            RunFolder(path)


def test_existing_wants_a_run_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wanted the folder of a run, but .*' does not exist"):
        RunFolder.existing(tmp_path / "no")
    assert list(tmp_path.iterdir()) == []
    RunFolder(tmp_path / "first").save_config(Config())
    assert RunFolder.existing(tmp_path / "first").path == tmp_path / "first"
    with pytest.raises(ValueError, match=r"did you mean '.*/first'"):
        RunFolder.existing(tmp_path / "frist")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config.json of a run"):
        RunFolder.existing(tmp_path / "empty")


def test_a_model_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not is_run(tmp_path)
    with pytest.raises(ValueError, match="is none"):
        RunFolder.existing(tmp_path)
    (tmp_path / "config.json").write_text('{"iterations": ')
    assert is_run(tmp_path)  # broken: read_config says where


def test_config_comes_back_as_it_was_but_not_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    config = Config(
        seed=7,
        resume=True,
        task=TaskConfig("guess-number", {"high": 8}),
        actor=ActorConfig(lr=3e-5),
        log=("tensorboard",),
    )
    folder.save_config(config)
    config.resume = False
    assert folder.load_config() == config
    assert read_config(tmp_path) == read_config(folder.config) == config


def test_broken_configs_name_file_and_place(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"iterations": 3,\n "sed": }')
    with pytest.raises(ValueError, match=r"config\.json:2:9: broken JSON"):
        read_config(tmp_path)
    file.write_text('{"iteratons": 3}')
    with pytest.raises(ValueError, match=r"config\.json: .*unknown key 'iteratons'; did you mean 'iterations'"):
        read_config(tmp_path)
    file.write_text('{"actor": {"lr": "fast"}}')
    with pytest.raises(ValueError, match=r"actor\.lr: wanted float, got 'fast'"):
        read_config(tmp_path)
    file.write_bytes(b'{"out": "\xff"}')
    with pytest.raises(ValueError, match="wanted JSON in UTF-8"):
        read_json(file)
    with pytest.raises(ValueError, match=r"no file '.*confg\.json'; did you mean '.*config\.json'"):
        read_config(tmp_path / "confg.json")


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_write_json_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})
    assert json.loads(file.read_text()) == {"x": 1}
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask(), "as open() would make it"

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"x": 2})
    assert json.loads(file.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"], "no temporary file stays behind"


def test_a_started_run_is_refused_and_untouched(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.check_free(resume=False)
    folder.save_config(Config())
    folder.check_free(resume=False)  # it never came to a game: nothing would be lost
    folder.metrics.write_text('{"iteration": 0}\n')
    before = {p: p.read_text() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds a started run .*--resume .*another --out"):
        folder.check_free(resume=False)
    folder.summary.write_text("{}")
    with pytest.raises(ValueError, match="holds a finished run"):
        folder.check_free(resume=False)
    folder.check_free(resume=True)
    folder.summary.unlink()
    assert {p: p.read_text() for p in tmp_path.iterdir()} == before


def test_the_lock_keeps_a_second_run_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    code = f"from archer_fast.run_folder import RunFolder\nwith RunFolder({str(tmp_path)!r}).lock(): print('in')"
    with folder.lock():
        with (
            pytest.raises(ValueError, match=f"another run is writing into .*pid {os.getpid()} on "),
            RunFolder(tmp_path).lock(),
        ):
            pass
        with folder.lock():  # by its holder, once more
            pass
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode == 1
        assert f"pid {os.getpid()}" in other.stderr
        assert other.stdout == ""
    with folder.lock():
        pass


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom archer_fast.run_folder import RunFolder\n"
        f"with RunFolder({str(tmp_path)!r}).lock(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with RunFolder(tmp_path).lock():
        pass


def test_policies_of_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=r"has no policy 'best' yet \(there: none\)"):
        folder.policy("best")
    for name in ("best", "checkpoints/iteration-000002/policy", "checkpoints/iteration-000010/policy"):
        (tmp_path / name).mkdir(parents=True)
    assert folder.policy("best") == tmp_path / "best"
    assert folder.policy("last") == tmp_path / "checkpoints/iteration-000010/policy"
    with pytest.raises(ValueError, match=r"no policy 'final' yet \(there: best, last\)"):
        folder.policy("final")
