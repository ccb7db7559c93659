"""The plan of an iteration beside what the parts of a real one take; its sums, advice and page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archer_fast.adapted_backbone import AdaptedBackbone
from archer_fast.algorithms import make_learner
from archer_fast.algorithms.learner import Learner
from archer_fast.backbone import Backbone, build_causal_lm
from archer_fast.buffer import TrajectoryBuffer
from archer_fast.cli import main
from archer_fast.config import (
    ActorConfig,
    BufferConfig,
    Config,
    CriticConfig,
    FilteredBCConfig,
    LoRAConfig,
    ModelConfig,
    PPOConfig,
    RolloutConfig,
)
from archer_fast.devices import DEVICES, Device
from archer_fast.meters import Meters
from archer_fast.model_costs import LiveMemory, ModelCosts, PassCosts, count
from archer_fast.plan import Plan, game_shape, make_plan
from archer_fast.rollout.embedded import EmbeddedEngine
from archer_fast.trajectory import Trajectory, Turn
from archer_fast.turn_features import FeatureLayout
from archer_fast.workload import Workload

pytestmark = pytest.mark.usefixtures("one_thread")

WORK = Workload(turns=6, observation_tokens=10, action_tokens=5)
VOCAB, GAMES = 64, 16
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    "gpt2": {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 256},
}
for sizes in MODELS.values():
    sizes |= {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}


def config_of(**changes: Any) -> Config:
    settings: dict[str, Any] = {
        "rollout": RolloutConfig(games=GAMES, max_new_tokens=WORK.action_tokens, num_slots=GAMES),
        "buffer": BufferConfig(max_trajectories=GAMES),
        "critic": CriticConfig(epochs=3, batch_turns=24, hidden_size=32, warmup_iterations=0),
        "actor": ActorConfig(epochs=2, batch_games=8, states_per_game=4, alternatives=3, max_kl_step=1e9),
        "model": ModelConfig(path="x"),
    }
    return Config(**(settings | changes))


def games() -> list[Trajectory]:
    rng = np.random.default_rng(0)

    def ids(n: int) -> Any:
        return rng.integers(1, VOCAB, n)

    o, a = WORK.observation_tokens, WORK.action_tokens
    return [
        Trajectory(
            tuple(Turn(ids(o), ids(a), -rng.random(a), float(rng.normal()), 0) for _ in range(WORK.turns)),
            ids(o),
            True,
            False,
            {"seed": game},
        )
        for game in range(GAMES)
    ]


CASES = {
    "default": ("llama", config_of()),
    "gpt2": ("gpt2", config_of()),
    "adapters": ("llama", config_of(model=ModelConfig(path="x", lora=LoRAConfig(rank=4)))),
    "shared trunk": (
        "llama",
        config_of(critic=CriticConfig(trunk="shared", epochs=3, batch_turns=24, warmup_iterations=0)),
    ),
    "separate trunk": (
        "llama",
        config_of(critic=CriticConfig(trunk="separate", epochs=3, batch_turns=24, warmup_iterations=0)),
    ),
    "adapters, separate trunk": (
        "llama",
        config_of(
            critic=CriticConfig(trunk="separate", epochs=3, batch_turns=24, warmup_iterations=0),
            model=ModelConfig(path="x", lora=LoRAConfig(rank=4)),
        ),
    ),
    "resample": (
        "llama",
        config_of(
            critic=CriticConfig(value_target="resample", epochs=3, batch_turns=24, warmup_iterations=0),
            buffer=BufferConfig(max_trajectories=8),
            rollout=RolloutConfig(games=8, max_new_tokens=5, num_slots=8),
        ),
    ),
    "logged": (
        "llama",
        config_of(actor=ActorConfig(epochs=2, batch_games=8, actions="logged", advantage="residual", max_kl_step=1e9)),
    ),
    "small passes": ("llama", config_of(model=ModelConfig(path="x", max_pass_tokens=330))),
    "checkpointing": ("llama", config_of(model=ModelConfig(path="x", activation_checkpointing=True))),
    "adapters and checkpointing": (
        "gpt2",
        config_of(model=ModelConfig(path="x", activation_checkpointing=True, lora=LoRAConfig(rank=4))),
    ),
    "published": (
        "llama",
        config_of(
            critic=CriticConfig("separate", value_target="resample", epochs=3, batch_turns=24, warmup_iterations=0),
            actor=ActorConfig(
                epochs=2,
                batch_games=8,
                data="replay",
                actions="fresh",
                advantage="q_minus_v",
                loss="reinforce",
                alternatives=1,
                max_kl_step=1e9,
            ),
        ),
    ),
    "filtered BC": (
        "gpt2",
        config_of(
            algorithm="filtered-bc",
            filtered_bc=FilteredBCConfig(share=0.5, epochs=3, kl_coef=0.1),
            buffer=BufferConfig(max_trajectories=2 * GAMES),
        ),
    ),
    "ppo": ("llama", config_of(algorithm="ppo", ppo=PPOConfig(epochs=4, batch_games=8, max_kl_step=1e9))),
}


def costs_of(architecture: str, config: Config, dtype: torch.dtype, *, fused: bool) -> ModelCosts:
    model = {"model_type": architecture, **MODELS[architecture]}
    checkpointing = config.model.activation_checkpointing
    shape = game_shape(config, WORK)
    return count(model, dtype, config.model.lora, shape, fused=fused, checkpointing=checkpointing)


def make_real(
    architecture: str, config: Config, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Learner, list[torch.Tensor]]:
    """A learner of a random model whose actions never end by themselves, and all weights that it holds."""
    rank = config.model.lora.rank
    torch.manual_seed(0)
    model = build_causal_lm(architecture, **MODELS[architecture])
    cast(torch.nn.Module, model).to(device, dtype)
    start = Backbone(model, None).requires_grad_(False)
    start.checkpoints_activations = config.model.activation_checkpointing
    actor = AdaptedBackbone(start, "actor", config.model.lora) if rank else start.frozen_copy()
    actor.requires_grad_(True)
    generator = torch.Generator(device).manual_seed(0)
    engine = EmbeddedEngine(actor, -1, num_slots=GAMES, max_new_tokens=WORK.action_tokens, generator=generator)
    row_bytes = FeatureLayout.of(start).row_bytes if config.keeps_features else 0
    buffer = TrajectoryBuffer(1 << 16, config.buffer.max_trajectories, 0, feature_bytes=row_bytes, max_feature_memory=0)
    learner = make_learner(config, actor, start, engine, buffer)
    known = [*start.model.parameters(), *actor.parameters()]
    return learner, known + [p for module in learner.modules().values() for p in module.parameters()]


@pytest.mark.parametrize("case", CASES)
def test_phases_of_a_real_iteration_are_within_a_tenth_of_the_plan(case: str) -> None:
    """FLOPs by torch's counter, memory by what the operations allocate; the counter does not see torch's CPU attention
    nor inside our ops, so that the plan's share of those is taken off it."""
    architecture, config = CASES[case]
    costs = costs_of(architecture, config, torch.float32, fused=False)
    plan = {phase.name: phase for phase in make_plan(costs, config, WORK).phases}
    unseen = make_plan(without_attention_and_head(costs), config, WORK)
    flops = {phase.name: phase.flops for phase in unseen.phases}

    learner, known = make_real(architecture, config)
    meters = Meters()

    def measured(act: Callable[[], object]) -> tuple[float, int, float]:
        """Twice, since torch's counter keeps tensors alive."""
        meters.read()
        with LiveMemory(known) as memory:
            act()
        tokens = meters.read().get("processed_tokens", 0.0)
        with FlopCounterMode(display=False) as counter:
            act()
        return counter.get_total_flops(), memory.peak, tokens

    played = games()[: config.rollout.games]
    found = {"insert": measured(lambda: learner.insert(played, meters))}
    if "critic" in plan:
        learner.update_critic(meters)  # which makes the optimizer's moments: they are roles
        found["critic"] = measured(lambda: learner.update_critic(meters))
    else:
        learner.update_critic(meters)
    learner.update_actor(meters)
    found["actor"] = measured(lambda: learner.update_actor(meters))
    for name, (real_flops, real_memory, real_tokens) in found.items():
        assert flops[name] == pytest.approx(real_flops, rel=0.1), (name, "FLOPs")
        assert plan[name].tokens == pytest.approx(real_tokens, rel=0.1), (name, "tokens")
        if plan[name].tokens:  # heads alone take next to nothing
            assert plan[name].memory == pytest.approx(real_memory, rel=0.1), (name, "memory")


@pytest.mark.parametrize(("architecture", "layers"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_memory_of_a_real_rollout_is_within_a_tenth_of_the_plan(architecture: str, layers: str) -> None:
    """Games of the workload's size in all slots, by the engine itself. A copy of one layer's keys and values is not in
    the plan, so this model has as many layers as one of 7B."""
    model = MODELS[architecture] | {layers: 28}
    costs = count(
        {"model_type": architecture, **model}, torch.float32, LoRAConfig(), game_shape(config_of(), WORK), fused=False
    )
    plan = make_plan(costs, config_of(), WORK).phases[0]
    lm = build_causal_lm(architecture, **model).eval()
    engine = EmbeddedEngine(Backbone(lm, None), VOCAB, num_slots=GAMES, max_new_tokens=WORK.action_tokens)
    rng = np.random.default_rng(0)
    with LiveMemory(lm.parameters()) as memory:
        for _ in range(WORK.turns):
            for slot in range(GAMES):
                engine.observe(slot, rng.integers(1, VOCAB, WORK.observation_tokens).tolist())
            while not engine.step():
                pass  # nothing stops an action before its last token
    assert plan.memory == pytest.approx(memory.peak, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["default", "adapters", "checkpointing", "adapters and checkpointing"])
def test_memory_of_a_real_iteration_on_a_gpu(case: str) -> None:
    """By the allocator's own count, in bfloat16 with a variable-length kernel."""
    architecture, config = CASES[case]
    config = replace(config, actor=replace(config.actor, batch_games=GAMES))
    costs = costs_of(architecture, config, torch.bfloat16, fused=True)
    (plan,) = (phase for phase in make_plan(costs, config, WORK).phases if phase.name == "actor")
    learner, _ = make_real(architecture, config, "cuda", torch.bfloat16)
    learner.insert(games(), Meters())
    learner.update_critic(Meters())
    learner.update_actor(Meters())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    learner.update_actor(Meters())
    assert plan.memory == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)


def without_attention_and_head(costs: ModelCosts) -> ModelCosts:
    """What torch's counter sees on a CPU."""

    def blind(of: PassCosts) -> PassCosts:
        return replace(of, flops_of_pair=0)

    return replace(
        costs, reading=blind(costs.reading), training=blind(costs.training), whole=blind(costs.whole), vocab_size=0
    )


# -- sums by hand --------------------------------------------------------------------------------------

# One layer of round numbers: 1 FLOP a token and 0 a pair, a vocabulary of 10 times 5 numbers.
ROUND = ModelCosts(
    num_parameters=1000,
    num_trained=1000,
    hidden_size=5,
    vocab_size=10,
    max_positions=4096,
    itemsize=2,
    trained_itemsize=2,
    kv_bytes=8,
    reading=PassCosts(1.0, 0.0, 3.0),
    training=PassCosts(3.0, 0.0, 7.0),
    whole=PassCosts(3.0, 0.0, 7.0),
    tree=7.0 * 160,
    adapted=False,
)


def test_a_game_is_one_sequence() -> None:
    assert WORK.game_tokens == 6 * 15 + 10 and WORK.game_actions == 30
    before_actions = [10, 25, 40, 55, 70, 85]
    assert WORK.history_tokens == sum(before_actions) / 6
    assert game_shape(config_of(), WORK).pass_tokens == 100 + 4 * 3 * 5
    assert game_shape(config_of(algorithm="ppo"), WORK).pass_tokens == 100
    longer = config_of(actor=ActorConfig(states_per_game=50))
    assert game_shape(longer, WORK).branches == 6 * 4, "a game has no more states than turns"


def test_the_sums_of_one_iteration() -> None:
    plan = make_plan(ROUND, config_of(), WORK)
    rollout, insert, critic, actor = plan.phases
    head = 2 * 5 * 10
    assert rollout.tokens == insert.tokens == 16 * 100
    assert rollout.flops == insert.flops == 1600 + 16 * 30 * head
    assert rollout.bytes == 30 * (2000 + 16 * 8 * 50), "a step of sampling reads the weights, and what the games have"
    assert insert.bytes == 2000
    assert critic.tokens == 0
    # 8 games of 160 tokens: sampled from, read by the start policy, and trained on; 60 + 30 of them meet the head.
    assert actor.tokens == 2 * 3 * 8 * 160
    assert actor.flops == 2 * (8 * 160 * (1 + 1 + 3) + 8 * 90 * head * (3 + 1) + 8 * 60 * head)
    assert actor.bytes == 2 * 2000 * (3 + 1 + 1 + 5), "forward, backward twice, the start policy, prefill, 5 tokens"
    assert rollout.memory == 16 * (8 * 128 + 10 * (2 + 24)), "rows of keys and values grow by doubling"
    assert plan.vocabulary == 4 * 10 * 90 * 8 + 2 * 10 * 5, "logits in one chunk, and the matrix' gradient"
    adapted = make_plan(replace(ROUND, adapted=True), config_of(), WORK)
    assert actor.flops - adapted.phases[-1].flops == 2 * 8 * 90 * head, "the matrix has no gradient"
    assert adapted.vocabulary == plan.vocabulary - 2 * 10 * 5
    tokens = plan.savings[0]
    assert (tokens.ours, tokens.original, tokens.unit) == (100, sum([15, 30, 45, 60, 75, 90]), "tokens")
    copies = plan.savings[2]
    assert (copies.ours, copies.original) == (plan.resident, 2000 * 3 + 12000 * 2), "three models, moments of two"
    assert plan.savings[-1].ours == sum(phase.flops for phase in plan.phases)
    row, following = 52.5, 62.5
    sampled = row + 5 * head
    rollouts, draws, actions = 16 * 6 * sampled, 72 * (3 * row + row + following + sampled), 2 * 8 * 12
    assert plan.savings[-1].original == rollouts + draws + actions * (sampled + row + 3 * row + 3 * row * head)


def test_a_policy_that_never_moves_takes_nothing() -> None:
    actor = make_plan(ROUND, config_of(actor=ActorConfig(epochs=0)), WORK).phases[-1]
    assert (actor.name, actor.tokens, actor.flops, actor.memory) == ("actor", 0, 0, 0)


def test_what_stays_in_memory_by_role() -> None:
    def roles(costs: ModelCosts, **critic: Any) -> dict[str, float]:
        found = make_plan(costs, config_of(critic=CriticConfig(hidden_size=32, **critic)), WORK).roles
        return {role.split(":")[0] + ":" + role.split(":")[1][:8]: size for role, size in found.items()}

    heads = roles(ROUND)["critic: heads, "]
    # Of a weight of 2 bytes two moments and a master in float32.
    trained = {"start policy: referen": 2000, "actor: a copy": 2000, "actor: Adam's ": 12000, "critic: heads, ": heads}
    assert roles(ROUND) == trained
    assert roles(ROUND, trunk="separate") == trained | {"critic: a trunk": 4000, "critic: Adam's ": 12000}
    assert roles(ROUND, trunk="shared") == trained | {"critic: Adam's ": 12000}
    assert roles(replace(ROUND, itemsize=4, trained_itemsize=4))["actor: Adam's "] == 8000
    offloaded = make_plan(ROUND, config_of(model=ModelConfig(path="x", offload_optimizer=True)), WORK).roles
    assert offloaded["actor: Adam's moments and float32 weights"] == 0
    lora = replace(ROUND, num_trained=10, trained_itemsize=4, adapted=True)
    assert roles(lora)["actor: an adap"] == 40 and roles(lora)["actor: Adam's "] == 80


@pytest.mark.parametrize("games", [2, 8])
def test_the_largest_pass_fits_and_a_larger_one_does_not(games: int) -> None:
    """Where a step is one pass, and where its passes have gradients to sum."""

    def plan_of(max_pass_tokens: int) -> Plan:
        actor = ActorConfig(batch_games=games, states_per_game=4, alternatives=3)
        return make_plan(costs, config_of(model=ModelConfig("x", max_pass_tokens=max_pass_tokens), actor=actor), WORK)

    costs = replace(ROUND, tree=1e6, num_trained=1_000_000)  # passes are what takes memory
    for now in (160, 1 << 20):
        for games_that_fit in (1, 2, 3, 8):
            memory = plan_of(160 * games_that_fit).peak + 1
            best = plan_of(now).max_pass_tokens(memory)
            assert plan_of(best).peak <= memory, (now, games_that_fit)
            if games_that_fit + 1 < games:  # a step of one pass has no gradients to sum, and may take less again
                assert best >= 160 * games_that_fit and plan_of(160 * games_that_fit + 160).peak > memory
    assert plan_of(160).max_pass_tokens(plan_of(160).resident) == 0


def test_a_step_has_no_more_games_than_were_played() -> None:
    few = config_of(rollout=RolloutConfig(games=2))
    assert make_plan(ROUND, few, WORK).step_tokens == 2 * 160
    replay = config_of(
        rollout=RolloutConfig(games=2), actor=ActorConfig(data="replay", states_per_game=4, alternatives=3)
    )
    assert make_plan(ROUND, replay, WORK).step_tokens == 16 * 160


def test_time_is_that_of_the_slower_of_the_two() -> None:
    device = Device("d", 1.0, bandwidth=10.0, half_flops=100.0, single_flops=20.0)
    assert device.seconds(1000.0, 50.0, itemsize=2) == 10.0
    assert device.seconds(1000.0, 50.0, itemsize=4) == 50.0
    assert device.seconds(1000.0, 500.0, itemsize=2) == 50.0
    assert {"a100", "h100", "h200"} == DEVICES.keys()


# -- the command ---------------------------------------------------------------------------------------

SMALL_MODEL = ("--model.path", "gpt2", "--model.dtype", "bfloat16")


def test_the_command_says_what_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    main(["plan", *SMALL_MODEL, "--model.max-pass-tokens", "4096", "--workload.turns", "6", "--json", str(file)])
    said = capsys.readouterr().out
    assert "0.12 B parameters in bfloat16, all of them train; H100" in said
    for line in (
        "what stays in memory",
        "actor: Adam's moments and",
        "rollout",
        "s at the roofline",
        "the whole iteration",
    ):
        assert line in said, said
    assert "\nfits: " in said
    found = json.loads(file.read_text())
    assert found["model"]["num_parameters"] == 124_439_808
    assert found["peak"] == sum(found["roles"].values()) + max(p["memory"] for p in found["phases"])
    assert found["seconds"].keys() == {"rollout", "insert", "critic", "actor"}


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            ["--memory-share", "0.08"],
            r"--model\.max-pass-tokens \d+ \(now 32768: .* too large; or --model\.activation-ch",
        ),
        (
            ["--memory-share", "0.038", "--workload.turns", "60", "--actor.batch-games", "1", "--rollout.games", "4"],
            "fewer --actor.states-per-game or --actor.alternatives",
        ),
        (
            ["--rollout.games", "20000", "--rollout.num-slots", "20000", "--buffer.max-trajectories", "20000"],
            "rollout alone takes .*fewer --rollout.num-slots",
        ),
        (
            ["--critic.trunk", "shared", "--critic.batch-turns", "90000"],
            "critic alone takes .*fewer --critic.batch-turns",
        ),
        (["--workload.turns", "1000"], r"sampled at once and take [\d.]+ GB: fewer --actor\.batch-games"),
        (["--memory-share", "0.01"], r"--model\.lora\.rank 16 trains adapters on one base"),
    ],
)
def test_what_does_not_fit_says_which_knob(options: list[str], advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *SMALL_MODEL, *options])
    said = capsys.readouterr().out
    assert stop.value.code == 1 and "does not fit: " in said
    assert re.search(advice, said), said


def test_a_local_folder_is_planned_by_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_causal_lm("llama", **MODELS["llama"])
    model.save_pretrained(tmp_path / "model")
    main(["plan", "--model.path", str(tmp_path / "model"), "--model.lora.rank", "2", "--model.shard", "full"])
    said = capsys.readouterr().out
    assert "M of them in adapters train" in said and "not counted: model.shard" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "model.path: wanted the model to plan for, a folder or a name such as qwen2.5-7b, got none"),
        (["--model.path", "gpt"], "got 'gpt'; did you mean 'gpt2'?"),
        ([*SMALL_MODEL, "--workload.turns", "0"], "workload.turns: wanted at least 1, got 0"),
        ([*SMALL_MODEL, "--memory-share", "2"], "memory-share: wanted above 0 and at most 1, got 2"),
        ([*SMALL_MODEL, "--json", "/nowhere/plan.json"], "json: wanted a file in a folder that is there"),
        ([*SMALL_MODEL, "--model.lora.rank", "2", "--model.lora.targets", "q"], "wanted linear layers of this model"),
        ([*SMALL_MODEL, "--gpu", "v100"], "v100"),
        ([*SMALL_MODEL, "--gpus", "8"], "gpus: wanted 1, a run does not use several yet, got 8"),
    ],
)
def test_bad_input(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *options])
    said = capsys.readouterr()
    assert stop.value.code == 2 and message in " ".join((said.err + said.out).split()), said


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"out": "runs/a"}')
    with pytest.raises(SystemExit):
        main(["plan", "--model.path", str(tmp_path)])
    assert "has no 'model_type'" in capsys.readouterr().err
