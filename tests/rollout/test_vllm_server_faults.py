"""Servers that are none, or none of ours: told in one line, without vLLM being installed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_train import tiny_config

from archer_fast.backbone import Backbone
from archer_fast.config import RolloutConfig, VllmConfig
from archer_fast.rollout import vllm_sampler
from archer_fast.rollout.vllm_server import VllmServer
from archer_fast.run_folder import RunFolder
from archer_fast.train import train
from archer_fast.watcher import SilentWatcher


@contextmanager
def answering(status: int, text: str, promised: int | None = None) -> Iterator[str]:
    """Somebody's HTTP server, which says the same to everybody; `promised` bytes, whatever it sends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(promised or len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *what: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def refuse(make_lm: Callable[..., Any], url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        VllmServer(VllmConfig(url=url), Backbone(make_lm(), None), tmp_path)


def test_nobody_answers(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        refuse(
            make_lm, url, rf"^rollout\.engine: the vLLM server at {url} does not answer \(.*refused.*--resume", tmp_path
        )


@pytest.mark.parametrize("status", [403, 404])
def test_a_server_that_was_started_otherwise(make_lm: Callable[..., Any], tmp_path: Path, status: int) -> None:
    with answering(status, '{"detail": "no"}') as url:
        refuse(make_lm, url, rf"refuses /server_info \(it wants vLLM 0\.32 or newer, .*\): {status} .*no", tmp_path)


def test_an_answer_that_breaks_off(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    with answering(200, '{"vllm_config": ', promised=1000) as url:
        refuse(make_lm, url, "does not answer", tmp_path)
    with answering(200, '{"vllm_config": ') as url:
        refuse(make_lm, url, "wanted JSON from /server_info", tmp_path)


def test_a_server_of_another_kind(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    with answering(200, "<html>hello</html>") as url:
        refuse(make_lm, url, r"wanted vLLM's settings from /server_info, got \{\}", tmp_path)


def test_a_server_that_scores_otherwise(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    """vLLM's default: log-probs before the temperature."""
    settings = '{"vllm_config": {"model_config": {"logprobs_mode": "raw_logprobs", "max_model_len": 96}}}'
    with answering(200, settings) as url:
        refuse(make_lm, url, r"wanted a server started with --logprobs-mode processed_logprobs, got 'raw_l", tmp_path)
    with answering(200, settings.replace("raw", "processed")) as url:
        sampler = VllmServer(VllmConfig(url=url), Backbone(make_lm(max_position_embeddings=200), None), tmp_path)
        assert sampler.max_tokens == 96
        sampler.close()


def test_a_run_is_refused_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No warm start of minutes first, and no folder that is no run."""
    out = tmp_path / "run"
    vllm: dict[str, Any] = {"games": 8, "engine": "vllm"}
    with answering(404, "no") as url, pytest.raises(ValueError, match=r"refuses /server_info"):
        config = tiny_config(out, rollout=RolloutConfig(**vllm, vllm=VllmConfig(url=url)))
        train(config, RunFolder(out), SilentWatcher())
    monkeypatch.setattr(vllm_sampler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'archer-fast\[vllm\]'"):
        train(tiny_config(out, rollout=RolloutConfig(**vllm)), RunFolder(out), SilentWatcher())
    assert not (out / "start").exists() and not (out / "metrics.jsonl").exists()
