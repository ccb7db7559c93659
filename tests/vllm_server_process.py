"""A vLLM server of our own, as docs/running_7b.md starts it, but small and on the CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

START_SECONDS = 240


class ServerProcess:
    """`with ServerProcess(folder, log) as server:` has it answer at `server.url`; `kill` and `start` as often as one
    likes."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = "-m vllm.entrypoints.openai.api_server --host 127.0.0.1 --dtype float32 --skip-tokenizer-init"
        command += " --logprobs-mode processed_logprobs --enable-scale-out --enforce-eager --block-size 32"
        command += f" --kv-cache-memory-bytes {1 << 28} --max-num-seqs 64 --port {self.port}"
        untied = '{"tie_word_embeddings": false}'
        self.command = [sys.executable, *command.split(), "--model", str(model), "--hf-overrides", untied, *options]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self.process.poll() is None, f"the server ended: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"the server does not answer: {self.log.read_text()[-3000:]}"
            time.sleep(0.5)

    def kill(self) -> None:
        """With all of its processes, as a node goes down."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None:
            self.process.terminate()  # it gives its shared memory back, which a killed one does not
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
