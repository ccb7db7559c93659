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

from archer_fast.algorithms.learner import Learner
from archer_fast.backbone import Backbone, build_causal_lm
from archer_fast.config import ActorConfig, CriticConfig, LoRAConfig, ModelConfig
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


CHOSEN = {
    **{
        name: CASES[name]
        for name in (
            "default",
            "adapters",
            "shared trunk",
            "adapters, separate trunk",
            "resample",
            "logged",
            "checkpointing",
            "adapters and checkpointing",
            "filtered BC",
            "ppo",
        )
    },
    "critic's adapters, token baseline": (
        "llama",
        config_of(
            critic=CriticConfig(trunk="lora", epochs=3, batch_turns=24, warmup_iterations=0),
            actor=ActorConfig(
                epochs=2, batch_games=8, actions="logged", advantage="q_minus_v", token_baseline=True, max_kl_step=1e9
            ),
            model=ModelConfig(path="x", lora=LoRAConfig(rank=4)),
        ),
    ),
}
# Of these, attention sees branches on padded grids: torch counts a branch's whole game, we what it sees of it.
ON_GRIDS = {
    (case, phase)
    for case, (_, config) in CHOSEN.items()
    for phase in ("critic" if config.critic.value_target == "resample" else "", "actor")
    if config.algorithm == "archer" and (phase == "critic" or config.actor.actions != "logged")
}


@pytest.mark.parametrize("case", CHOSEN)
def test_every_phase_is_what_torchs_counter_finds(case: str) -> None:
    """To the last FLOP, and within a tenth where attention computes what it then masks."""
    learner, _ = make_real(*CHOSEN[case])
    meter, meters = meter_of(learner), Meters()

    def measured(act: Callable[[], object]) -> tuple[float, int]:
        before = meter.total()
        with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
            act()
        return meter.total() - before, counter.get_total_flops()

    found = {
        "rollout": measured(lambda: play(learner.engine)),
        "insert": measured(lambda: learner.insert(games()[: learner.config.rollout.games], meters)),
        "critic": measured(lambda: learner.update_critic(meters)),
        "actor": measured(lambda: learner.update_actor(meters)),
    }
    assert found["insert"][0] > 0 and found["actor"][0] > found["insert"][0]
    for phase, (ours, torchs) in found.items():
        if phase == "rollout" or (case, phase) in ON_GRIDS:
            assert 0.9 * torchs < ours < torchs, phase
        else:
            assert ours == torchs, phase


def test_what_trains_costs_more_than_what_reads() -> None:
    """LoRA spares the gradient of the weights, checkpoints cost another forward; of one block of known size."""
    model = build_causal_lm("gpt2", **MODELS["gpt2"])
    base = Backbone(model, None)
    weights = 4 * 12 * 128 * 128  # of 4 blocks: 4 h^2 of attention and 8 h^2 behind it
    whole = trunk_flops(base)
    pair = 2 * 128 * 4  # one product of a query with a key, all layers
    assert whole.reading == (2 * weights, 2 * pair) and whole.training == (6 * weights, 7 * pair)
    assert (whole.head, whole.head_training) == (2 * 128 * VOCAB, 6 * 128 * VOCAB)
    adapted = trunk_flops(base, LoRAConfig(rank=4))
    numbers = 4 * 4 * (128 + 3 * 128 + 128 + 128 + 128 + 4 * 128 + 4 * 128 + 128)  # rank x (in + out)
    assert adapted.reading == (2 * weights + 2 * numbers, 2 * pair)
    # The embedding does not train: nothing goes back through the first matrix [h, 3h], nor into its A's input.
    assert adapted.training[0] == 4 * weights - 2 * 3 * 128 * 128 + 6 * numbers - 2 * 4 * 128
    assert adapted.head_training == 4 * 128 * VOCAB
    base.checkpoints_activations = True
    again = trunk_flops(base)
    assert again.reading == whole.reading and again.training[1] == 9 * pair
    # Not again the last product of a block, a third of its weights: backward asks for nothing behind it.
    assert again.training[0] == 6 * weights + 2 * weights * 2 // 3


def test_counts_times_costs() -> None:
    flops = TrunkFlops(reading=(10.0, 1.0), training=(30.0, 4.0), head=100.0, head_training=300.0)
    counts = PassCounts(Counts(tokens=5, pairs=9, rows=2), Counts(tokens=3, pairs=6, rows=1))
    assert flops.of(counts) == 5 * 10 + 9 + 2 * 100 + 3 * 30 + 6 * 4 + 300


def test_the_engine_counts_what_each_token_sees() -> None:
    """Games and actions of unlike lengths."""
    learner, _ = make_real("llama", config_of())
    engine, counts = learner.engine, learner.actor.counts
    engine.stop_token_id = 3
    lengths = {}
    for slot in range(5):
        engine.observe(slot, [5] * (2 + 3 * slot))
        lengths[slot] = 2 + 3 * slot
    waiting, steps = set(lengths), 0
    while waiting:
        steps += len(waiting)
        for done in engine.step():
            waiting.remove(done.slot)
            lengths[done.slot] += done.action_ids.size - 1  # its last token is sampled and not passed on
    assert (counts.read.tokens, counts.read.rows) == (sum(lengths.values()), steps)
    assert counts.read.pairs == sum(n * (n + 1) // 2 for n in lengths.values())

    learner.insert(games(), Meters())
    batch = learner.collate(learner.newest[:3])
    before = replace(counts.read)
    turn_ids = torch.tensor([[0, 0, 4, -1], [6, 11, -1, -1], [12, 13, 14, 14]])
    sampled = engine.sample_alternatives(batch, turn_ids)
    assert len(sampled.lengths.unique()) > 2, "rows that are not used, and actions of unlike lengths"
    pairs, tokens = sum(n * (n + 1) // 2 for n in batch.lengths), batch.num_tokens
    for turn, length in zip(turn_ids.flatten().tolist(), sampled.lengths.flatten().tolist(), strict=True):
        if turn >= 0:
            prefix = int(batch.position_ids[batch.state_positions[turn]]) + 1
            pairs += sum(prefix + place + 1 for place in range(length - 1))
            tokens += length - 1
    found = counts.read
    assert (found.tokens - before.tokens, found.pairs - before.pairs) == (tokens, pairs)
    assert found.rows - before.rows == int(sampled.lengths.sum())


def test_heads_count_the_backward_that_they_cause() -> None:
    heads, x = PairedMLP(6, 5), torch.ones(7, 6)
    layers = [2 * 7 * 2 * n for n in (6 * 5, 5 * 5, 5)]
    with torch.no_grad():
        heads(x)
    assert heads.flops == sum(layers)
    heads(x)
    assert heads.flops == sum(layers) * (1 + 3) - layers[0], "nobody asks for the gradient of x"
    heads(x.requires_grad_())
    assert heads.flops == sum(layers) * (1 + 3 + 3) - layers[0]


def test_a_model_that_no_trace_runs_through_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, _ = make_real("llama", config_of())

    def forward(self: nn.Module, *_: Any, **__: Any) -> None:
        raise RuntimeError("aten::nonzero has no meta kernel\nand more")

    monkeypatch.setattr(type(learner.actor.model.base_model), "forward", forward)
    with pytest.raises(ValueError, match=r"no pass runs through this llama: aten::nonzero has no meta kernel$"):
        meter_of(learner)
