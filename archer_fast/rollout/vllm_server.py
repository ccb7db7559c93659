"""vLLM as a server that somebody started (docs/running_7b.md), on this machine or another that sees the same files."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from http.client import HTTPException
from pathlib import Path
from typing import Any

import safetensors.torch

from archer_fast.adapted_backbone import AdaptedBackbone
from archer_fast.backbone import Backbone
from archer_fast.config import VllmConfig
from archer_fast.rollout.probe import check_scores, probe_ids
from archer_fast.rollout.token_sampler import Answer, Sample, SamplerError, SamplingRequest
from archer_fast.rollout.vllm_protocol import (
    LOGPROBS_MODE,
    SCORING_PARAMS,
    check_sample,
    named_weights,
    sampling_params,
    version_of,
)

_ADAPTER = "policy"
_PATIENCE = 600.0  # seconds that a call may take


class VllmServer:
    """Sends each request in a thread of its own, so that the server batches what arrives together; weights are handed
    over as files. Which requests share a batch is chance, and with it the last bits of log-probs.

    `num_forward_tokens` counts a prompt once a request, less what the server says it found in its prefix cache.
    """

    def __init__(self, config: VllmConfig, backbone: Backbone, exchange: Path) -> None:
        """exchange: a folder that both sides see. Errors: ValueError where no such server answers, or one that was
        started otherwise than this needs."""
        assert config.url is not None
        self.url, self._exchange = config.url.rstrip("/"), exchange.absolute()
        self.max_tokens = min(config.max_model_len or backbone.max_positions, check_server(self.url))
        self.num_forward_tokens = 0
        self._adapted = isinstance(backbone, AdaptedBackbone)
        self._fingerprint: int | None = None  # of the weights that are held
        self._version = ""
        self._threads = ThreadPoolExecutor(config.max_num_seqs, "vllm")
        self._num_requests = 0
        self._waiting: dict[Future[Any], int] = {}

    def load(self, backbone: Backbone) -> None:
        """Take over the weights of `backbone` where they are not those that are held. SamplerError where what is then
        held does not score tokens as `backbone` does."""
        fingerprint = backbone.fingerprint()
        if fingerprint == self._fingerprint:
            return
        self.forget()
        self._fingerprint = None
        self._exchange.mkdir(parents=True, exist_ok=True)
        if isinstance(backbone, AdaptedBackbone):
            backbone.save(self._exchange)
            adapter = {"lora_name": _ADAPTER, "lora_path": str(self._exchange), "load_inplace": True}
            self._call("/v1/load_lora_adapter", adapter)
        else:
            weights = {name: weight.cpu().clone() for name, weight in named_weights(backbone)}
            safetensors.torch.save_file(weights, self._exchange / "model.safetensors", metadata={"format": "pt"})
            path = {"weights_path": str(self._exchange)}
            self._call("/collective_rpc", {"method": "reload_weights", "kwargs": path})
        self._drop_prefixes()  # keys and values of the older weights
        self._version = version_of(fingerprint)
        self._call("/update_weight_version", {"new_version": self._version})
        ids = probe_ids(backbone, self.max_tokens - 1)
        check_scores(f"the vLLM server at {self.url}", backbone, ids, self._score(ids))
        self._fingerprint = fingerprint

    def forget(self) -> None:
        """Cancel every request and drop the keys and values that were kept."""
        if self._waiting:
            for future in self._waiting:
                future.cancel()  # those that were not sent yet
            self._waiting.clear()
            self._call("/abort_requests", {})
        self._drop_prefixes()

    def submit(self, request: SamplingRequest) -> int:
        """Begin; the id that its answer will have."""
        self._num_requests += 1
        future = self._threads.submit(self._generate, request.prompt_ids, sampling_params(request))
        self._waiting[future] = self._num_requests
        return self._num_requests

    def cancel(self, request_id: int) -> None:
        """Nobody wants the answer; the server goes on to its end."""
        for future in [future for future, its in self._waiting.items() if its == request_id]:
            future.cancel()
            del self._waiting[future]

    def poll(self) -> list[Answer]:
        """Wait until something has been finished."""
        if not self._waiting:
            return []
        answers = []
        for future in wait(self._waiting, return_when=FIRST_COMPLETED).done:
            answers.append(Answer(self._waiting.pop(future), self._samples(future.result())))
        return answers

    def close(self) -> None:
        """Send nothing more; the server stays."""
        self._threads.shutdown(cancel_futures=True)

    def _samples(self, reply: dict[str, Any]) -> list[Sample]:
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        samples = []
        for choice in choices:
            versions = [span["version"] for span in choice["weight_versions"] or ()]
            check_sample(f"the vLLM server at {self.url}", choice["finish_reason"], versions, self._version)
            content = choice["logprobs"]["content"]
            assert [at["token_id"] for at in content] == choice["token_ids"]
            samples.append(Sample(choice["token_ids"], [at["logprob"] for at in content]))
        usage = reply["usage"]
        cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        self.num_forward_tokens += usage["prompt_tokens"] - cached + usage["completion_tokens"] - len(choices)
        return samples

    def _score(self, ids: list[int]) -> list[float]:
        reply = self._generate(ids, SCORING_PARAMS)
        self.num_forward_tokens += len(ids)
        return [at[str(token)]["logprob"] for at, token in zip(reply["prompt_logprobs"][1:], ids[1:], strict=True)]

    def _generate(self, token_ids: list[int], params: dict[str, Any]) -> dict[str, Any]:
        body: dict[str, Any] = {"token_ids": token_ids, "sampling_params": params}
        if self._adapted:
            body["model"] = _ADAPTER
        return self._call("/inference/v1/generate", body)

    def _drop_prefixes(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not self._call("/reset_prefix_cache", {})["success"]:  # cancelled requests hold blocks for a moment
            if time.monotonic() > deadline:
                raise SamplerError(f"rollout.engine: the vLLM server at {self.url} does not drop its prefix cache")
            time.sleep(0.05)

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return _call(self.url, path, body)


def check_server(url: str) -> int:
    """Tokens of its longest game. ValueError where no vLLM server answers, or one that was started otherwise than we
    need."""
    try:
        info = _call(url.rstrip("/"), "/server_info?config_format=json")
    except SamplerError as error:
        raise ValueError(str(error)) from error
    try:
        model = info["vllm_config"]["model_config"]
        mode, max_model_len = model["logprobs_mode"], int(model["max_model_len"])
    except (KeyError, TypeError, ValueError) as error:
        wanted = f"rollout.vllm.url: {url}: wanted vLLM's settings from /server_info, got {str(info)[:100]}"
        raise ValueError(wanted) from error
    if mode != LOGPROBS_MODE:
        raise ValueError(
            f"rollout.vllm.url: wanted a server started with --logprobs-mode {LOGPROBS_MODE}, got {mode!r}"
        )
    return max_model_len


def _call(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    # A server among one's own machines: what the environment says of proxies is of the world outside.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    where = f"rollout.engine: the vLLM server at {url}"
    try:
        with opener.open(request, timeout=_PATIENCE) as reply:
            text = reply.read()
    except urllib.error.HTTPError as error:
        said = " ".join(error.read().decode(errors="replace").split())[:300]
        hint = ""
        if error.code in (403, 404):
            hint = " (it wants vLLM 0.32 or newer, VLLM_SERVER_DEV_MODE=1 and --enable-scale-out; for adapters "
            hint += "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1)"
        raise SamplerError(f"{where} refuses {path.partition('?')[0]}{hint}: {error.code} {said}") from error
    except (OSError, HTTPException) as error:  # URLError is an OSError; the other is an answer that breaks off
        raise SamplerError(
            f"{where} does not answer ({error}); start it again, then --resume goes on from the last checkpoint"
        ) from error
    try:
        found = json.loads(text) if text.startswith(b"{") else {}
    except ValueError as error:
        raise SamplerError(f"{where}: wanted JSON from {path}, got {text[:100]!r}") from error
    assert isinstance(found, dict)
    return found
