"""vLLM with adapters on one base and other families, what it leaves of its process, and what it refuses."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_engine import assert_scored_right
from test_vllm_sampler import BOUND, PROBE, SMALL, NoTokenizer, change, make_engine, play, policy, scores
from tiny_lm import tiny_lm

from archer_fast.adapted_backbone import AdaptedBackbone
from archer_fast.backbone import Backbone
from archer_fast.config import LoRAConfig
from archer_fast.rollout.probe import trainer_logprobs
from archer_fast.rollout.vllm_sampler import VllmSampler

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_exchanged_on_one_base(tmp_path: Path, dtype: str) -> None:
    """And the process is left as it was, but for vLLM's own: generators, threads, environment."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    before = dict(os.environ)
    base = policy(tie_word_embeddings=False)
    base.model.to(getattr(torch, dtype))
    base.requires_grad_(False).save(tmp_path)
    adapted = AdaptedBackbone(base, "actor", LoRAConfig(rank=3))
    sampler = VllmSampler(SMALL, adapted, tmp_path)
    try:
        assert torch.equal(torch.random.get_rng_state(), states[0]) and random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
        its_own = "VLLM_DIST_IDENT"
        assert {n: v for n, v in os.environ.items() if n in before} | {its_own: ""} == before | {its_own: ""}
        assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
        torch.set_num_threads(1)
        assert torch.get_num_threads() == 1 and torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"

        bound = BOUND if dtype == "float32" else 0.6  # of the largest difference; the probe judges the mean
        plain = trainer_logprobs(base, PROBE)
        for seed in range(3):
            sampler.load(adapted)
            theirs, ours = scores(sampler), trainer_logprobs(adapted, PROBE)
            print(f"{dtype}: {(theirs - ours).abs().max():.2g} at most, {(theirs - ours).abs().mean():.2g} in the mean")
            assert (theirs - ours).abs().max() < bound
            assert seed == 0 or (theirs - plain).abs().mean() > 0.5, "the adapter acts"
            change(adapted, seed)
        if dtype == "float32":
            games = play(make_engine(sampler, adapted), 9).trajectories  # the engine takes over the last change
            assert_scored_right(adapted, games, 1.0, atol=BOUND)
    finally:
        sampler.close()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "phi3", "gpt2"])
def test_families(tmp_path: Path, family: str) -> None:
    """Tied or not, with biases or without, by the names that each of them gives its weights."""
    sizes: dict[str, int] = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 200}
    sizes |= {} if family == "gpt2" else {"num_key_value_heads": 1}
    sizes |= {"head_dim": 32} if family == "qwen3" else {}
    backbone = Backbone(tiny_lm(family, seed=2, **sizes), NoTokenizer())
    backbone.save(tmp_path)
    sampler = VllmSampler(SMALL, backbone, tmp_path)
    try:
        for seed in range(2):
            sampler.load(backbone)
            assert (scores(sampler) - trainer_logprobs(backbone, PROBE)).abs().max() < BOUND
            change(backbone, seed)
    finally:
        sampler.close()


def test_what_vllm_refuses_is_told_in_one_line(tmp_path: Path) -> None:
    for _ in range(2):  # and does not keep the next one from trying
        with pytest.raises(ValueError, match=r"^rollout\.engine: vLLM refuses '.*nothing': \w+: .+$"):
            VllmSampler(SMALL, policy(), tmp_path / "nothing")
    adapted = AdaptedBackbone(policy(), "actor", LoRAConfig(rank=513))
    with pytest.raises(ValueError, match=r"model\.lora\.rank: wanted at most 512 with vLLM, got 513"):
        VllmSampler(SMALL, adapted, tmp_path)
