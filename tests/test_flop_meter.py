"""FLOPs counted by what passed through, beside torch's counter, phase by phase of real iterations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_plan import CASES, GAMES, MODELS, VOCAB, WORK, config_of, games, make_real
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from archer_fast.actor import TURN_BINS
from archer_fast.algorithms.learner import Learner
from archer_fast.backbone import Backbone, build_causal_lm
from archer_fast.config import ActorConfig, CriticConfig, LoRAConfig, ModelConfig, PPOConfig
from archer_fast.critic import PairedMLP
from archer_fast.flop_meter import FlopMeter
from archer_fast.meters import Meters
from archer_fast.model_costs import TrunkFlops, trunk_flops
from archer_fast.pass_counts import Counts, PassCounts
from archer_fast.rollout.embedded import EmbeddedEngine

pytestmark = pytest.mark.usefixtures("one_thread")

# What torch's counter does not know by itself: its own attention on a CPU, and our ops on the vocabulary.
def _attention(query: Any, key: Any, *_: Any, is_causal: bool = False, products: int = 2, **__: Any) -> int:
    b, h, n, d = query
    assert key[2] == n
    return 2 * products * b * h * d * (n * (n + 1) // 2)


def _attention_backward(grad: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    return _attention(query, key, products=5)


def _scored(hidden: Any, weight: Any, target_ids: Any, *_: Any, **__: Any) -> int:
    return 2 * target_ids[0] * weight[0] * weight[1]


def _policy_loss(hidden: Any, weight: Any, target_ids: Any, *rest: Any, **__: Any) -> int:
    return _scored(hidden, weight, target_ids) * (1 + sum(rest[-2][:2]))


UNKNOWN = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.archer_fast.linear_logprobs: _scored,
    torch.ops.archer_fast.linear_policy_loss: _policy_loss,
}


def meter_of(learner: Learner) -> FlopMeter:
    return FlopMeter(
        learner.reference, (learner.actor, learner.reference, *learner.modules().values()), learner.config.model.lora
    )


def play(engine: EmbeddedEngine) -> None:
    """Games of the workload's size in all slots."""
    engine.reset()
    rng = np.random.default_rng(0)
    for _ in range(WORK.turns):
        for slot in range(GAMES):
            engine.observe(slot, rng.integers(1, VOCAB, WORK.observation_tokens).tolist())
        while not engine.step():
            pass


@pytest.mark.parametrize("case", CASES)
def test_every_phase_is_within_a_tenth_of_torchs_counter(case: str) -> None:
    learner, _ = make_real(*CASES[case])
    meter = meter_of(learner)

    def measured(act: Callable[[], object]) -> tuple[float, int]:
        before = meter.total()
        with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
            act()
        return meter.total() - before, counter.get_total_flops()

    meters = Meters()
    found = {
        "rollout": measured(lambda: play(learner.engine)),
        "insert": measured(lambda: learner.insert(games()[: learner.config.rollout.games], meters)),
        "critic": measured(lambda: learner.update_critic(meters)),
        "actor": measured(lambda: learner.update_actor(meters)),
    }
    print(case, {k: (f"{v[0]/1e6:.1f}", f"{v[1]/1e6:.1f}", round(v[0]/max(v[1],1),4)) for k,v in found.items()})
    for phase, (ours, torchs) in found.items():
        assert ours == pytest.approx(torchs, rel=0.1), phase
