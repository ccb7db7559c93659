"""The engines of a run, by what `rollout.engine` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from archer_fast.backbone import Backbone
from archer_fast.config import RolloutConfig
from archer_fast.rollout.embedded import EmbeddedEngine
from archer_fast.rollout.policy_engine import PolicyEngine
from archer_fast.rollout.sampler_engine import SamplerEngine
from archer_fast.rollout.token_sampler import TokenSampler
from archer_fast.rollout.vllm_sampler import VllmSampler, check_installed
from archer_fast.rollout.vllm_server import VllmServer, check_server


class Engines:
    """Makes engines for one policy. With vLLM all of them share one copy of it, so one at a time plays."""

    def __init__(self, config: RolloutConfig, policy: Backbone, folder: Path, exchange: Path) -> None:
        """folder: where the policy, of adapters their base, was saved; exchange: where weights are handed over to a
        server, unless the settings name another place."""
        self.sampler: TokenSampler | None = None
        self._cuda_graphs = config.cuda_graphs
        if config.engine == "vllm" and config.vllm.url is not None:
            self.sampler = VllmServer(config.vllm, policy, Path(config.vllm.exchange or exchange))
        elif config.engine == "vllm":
            self.sampler = VllmSampler(config.vllm, policy, folder)

    def make(self, policy: Backbone, stop_token_id: int, **options: Any) -> PolicyEngine:
        """An engine that acts by `policy`; options: those of `EmbeddedEngine` but for graphs."""
        if self.sampler is None:
            return EmbeddedEngine(policy, stop_token_id, cuda_graphs=self._cuda_graphs, **options)
        return SamplerEngine(self.sampler, policy, stop_token_id, **options)

    def close(self) -> None:
        """Give back what a sampler holds."""
        if self.sampler is not None:
            self.sampler.close()


def check_engine(config: RolloutConfig, num_ranks: int) -> None:
    """ValueError where this engine cannot run here, before anything has been computed."""
    if config.engine == "vllm":
        if num_ranks > 1:
            raise ValueError(f"rollout.engine: wanted 'embedded' for {num_ranks} ranks, got 'vllm'")
        if config.vllm.url is None:
            check_installed()
        else:
            check_server(config.vllm.url)
