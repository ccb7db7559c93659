"""Adapters: many roles on one set of base weights, each as if it were alone; runs that train them."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_backbone import FAMILIES, pack, random_sequences
from test_train import Listener, assert_same_run, run, tiny_config
from torch import Tensor

from archer_fast.adapted_backbone import AdaptedBackbone
from archer_fast.adapter_folder import base_of
from archer_fast.backbone import Backbone, load_backbone
from archer_fast.checkpoint import CheckpointError, list_checkpoints
from archer_fast.config import Config, CriticConfig, LoRAConfig, ModelConfig
from archer_fast.critic import TurnCritic
from archer_fast.run_folder import RunFolder
from archer_fast.run_state import RunState
from archer_fast.saved_critic import find_checkpoint, load_saved_critic
from archer_fast.tiny_model import train_tokenizer
from archer_fast.watcher import SilentWatcher

pytestmark = pytest.mark.usefixtures("one_thread_and_one_cache")
MakeLM = Callable[..., transformers.PreTrainedModel]
LORA = LoRAConfig(rank=3, alpha=6)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["Is it alive? Yes.\n", "Is it red? No.\n"], 300)


def moved(adapted: AdaptedBackbone, seed: int = 0) -> AdaptedBackbone:
    """Its matrices set to something, B too, which is 0 at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return adapted


def hidden(backbone: Backbone) -> Tensor:
    return backbone(*pack(random_sequences(37), backbone))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # peft of the day asks transformers of the day
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_base_is_the_model_that_peft_reads_from_its_folder(
    make_lm: MakeLM, tokenizer: Any, tmp_path: Path, family: str
) -> None:
    model = make_lm(family, **FAMILIES[family] | {"vocab_size": len(tokenizer)})
    base = Backbone(model, tokenizer)
    base.save(tmp_path / "base")
    actor = moved(AdaptedBackbone(base, "actor", LORA, home=tmp_path / "base"))
    moved(AdaptedBackbone(base, "another", LORA), seed=1)
    actor.save(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "tokenizer.json"}

    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    alone = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    wanted = torch.cat([alone(input_ids=s[None], use_cache=False).logits[0] for s in random_sequences(37)])
    got = hidden(actor) @ actor.lm_head_weight.T
    torch.testing.assert_close(got.log_softmax(-1), wanted.log_softmax(-1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, hidden(base) @ base.lm_head_weight.T, atol=0.1)

    by_name = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
    for s in random_sequences(37):
        torch.testing.assert_close(by_name(input_ids=s[None]).logits, alone(input_ids=s[None]).logits)
    merged, _ = load_backbone(str(tmp_path / "adapter"), stop_token="\n")
    assert merged.model.__class__ is model.__class__ and not any("lora" in n for n, _ in merged.named_parameters())
    torch.testing.assert_close(hidden(merged), hidden(actor), rtol=1e-4, atol=1e-4)


def test_roles_in_any_order_leak_nothing(make_lm: MakeLM) -> None:
    plain = Backbone(make_lm("qwen2"), None)
    before, fingerprint = hidden(plain), plain.fingerprint()
    base = Backbone(make_lm("qwen2"), None).requires_grad_(False)
    assert torch.equal(hidden(AdaptedBackbone(base, "fresh", LORA)), before), "a fresh adapter changes nothing"
    one = moved(AdaptedBackbone(base, "one", LORA), seed=1)
    two = moved(AdaptedBackbone(base, "two", LORA), seed=2).requires_grad_(False)
    alone = []
    for seed in (1, 2):
        other = Backbone(make_lm("qwen2"), None)
        alone.append(hidden(moved(AdaptedBackbone(other, "x", LORA), seed)))
    for role in (one, base, two, one, two, base, base, one):
        wanted = before if role is base else alone[0] if role is one else alone[1]
        assert torch.equal(hidden(role), wanted)
    assert base.fingerprint() == fingerprint and torch.equal(hidden(base.frozen_copy()), before)

    # Gradients: of what was asked, whichever role came after it.
    loss = hidden(one).square().mean()
    hidden(two), hidden(base)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in one.parameters())
    rest = [p for p in base.model.parameters() if id(p) not in {id(q) for q in one.parameters()}]
    assert all(p.grad is None for p in rest)
    assert all(p.requires_grad for p in one.parameters()) and not any(p.requires_grad for p in two.parameters())
    assert not any(module.training for module in base.model.modules())


def test_parameters_and_state_are_the_adapters_alone(make_lm: MakeLM) -> None:
    base = Backbone(make_lm("llama"), None)
    count = sum(p.numel() for p in base.parameters())
    adapted = AdaptedBackbone(base, "actor", LORA)
    assert sum(p.numel() for p in base.parameters()) == count
    assert not any(p.requires_grad for p in base.parameters()) and all(p.requires_grad for p in adapted.parameters())
    linear = [m for m in Backbone(make_lm("llama"), None).model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(p.numel() for p in adapted.parameters()) == sum(3 * sum(m.weight.shape) for m in linear)
    assert len(adapted.state_dict()) == 2 * len(linear)
    assert all(name.startswith("weights.") for name in adapted.state_dict())
    two = AdaptedBackbone(base, "critic", LoRAConfig(rank=2, targets=("q_proj", "v_proj")))
    assert len(list(two.parameters())) == 2 * 2 * base.num_layers
    assert {p.dtype for p in AdaptedBackbone(Backbone(make_lm().bfloat16(), None), "a", LORA).parameters()} == {
        torch.float32
    }


def test_equal_seeds_give_equal_adapters_and_nobody_elses_draws_change(make_lm: MakeLM) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (AdaptedBackbone(Backbone(make_lm(), None), "a", LORA, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(one.weights[0], same.weights[0]) and not torch.equal(one.weights[0], other.weights[0])


def test_a_critics_adapter_and_its_target(make_lm: MakeLM) -> None:
    reference = Backbone(make_lm(), None).requires_grad_(False)
    actor = moved(AdaptedBackbone(reference, "actor", LORA), seed=4)
    before = hidden(actor)
    critic = TurnCritic(CriticConfig(trunk="lora", hidden_size=8, tau=0.25), actor, reference, seed=1, lora=LORA)
    own, target = critic.own_trunk, critic.target_trunk
    assert isinstance(own, AdaptedBackbone) and isinstance(target, AdaptedBackbone) and critic.trunk is own
    assert own.model is target.model is actor.model is reference.model
    assert torch.equal(hidden(own), hidden(reference)) and torch.equal(hidden(target), hidden(reference))
    assert all(torch.equal(p, q) for p, q in zip(own.parameters(), target.parameters(), strict=True))
    assert {id(p) for p in critic.trained_trunk_parameters()} == {id(p) for p in own.parameters()}
    old = [p.clone() for p in target.parameters()]
    moved(own, seed=7)
    critic.update_targets()
    for was, new, online in zip(old, target.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * was + 0.25 * online)
        assert not new.requires_grad
    assert torch.equal(hidden(actor), before)


# -- runs --------------------------------------------------------------------------------------------


def lora_config(out: Path, **changes: Any) -> Config:
    config = tiny_config(out, **changes)
    config.model.lora = LORA
    config.actor.lr = 1e-2
    return config


@pytest.fixture(scope="module", params=["frozen", "lora", "shared"])
def lora_run(request: pytest.FixtureRequest, one_thread_and_one_cache: None, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "run"
    config = lora_config(folder)
    config.critic.trunk = request.param
    listener = Listener()
    run(config, listener)
    assert any("adapters of rank 3 on one base" in line for line in listener.messages)
    return folder


def test_a_run_moves_its_adapters_and_never_its_base(lora_run: Path, tmp_path: Path) -> None:
    start, _ = load_backbone(str(lora_run / "start"))
    final, _ = load_backbone(str(lora_run / "final"))
    assert start.fingerprint() != final.fingerprint()
    policy = list_checkpoints(lora_run / "checkpoints")[-1] / "policy"
    for folder in (lora_run / "final", lora_run / "best", policy):
        assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    config = RunFolder.existing(shutil.copytree(lora_run, tmp_path / "run")).load_config()
    config.resume, config.iterations = True, 5
    state = RunState.start(config, RunFolder(tmp_path / "run"), SilentWatcher())
    state.loggers.__exit__(None, None, None)
    assert state.learner.reference.fingerprint() == start.fingerprint() == state.learner.trunk_version


def test_a_run_of_adapters_goes_on_bit_by_bit(lora_run: Path, tmp_path: Path) -> None:
    shutil.copytree(lora_run, tmp_path / "run")
    shutil.rmtree(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    (tmp_path / "run" / "summary.json").unlink()
    config = RunFolder.existing(tmp_path / "run").load_config()
    config.out, config.resume = str(tmp_path / "run"), True
    run(config)
    assert_same_run(lora_run, tmp_path / "run")


def test_a_run_that_computes_its_blocks_again_is_the_same(lora_run: Path, tmp_path: Path) -> None:
    """Another adapter has acted between a pass and its backward (the target's, where the critic has one)."""
    config = RunFolder.existing(lora_run).load_config()
    config.out, config.model.activation_checkpointing = str(tmp_path / "run"), True
    run(config)
    assert_same_run(lora_run, tmp_path / "run")


def test_a_run_that_was_moved_finds_its_base(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from archer_fast.cli import main

    shutil.copytree(lora_run, tmp_path / "moved")
    file = tmp_path / "moved" / "final" / "adapter_config.json"
    settings = json.loads(file.read_text())
    assert settings["base_model_name_or_path"] == str(lora_run / "start")
    file.write_text(json.dumps(settings | {"base_model_name_or_path": "/nowhere"}))
    main(["eval", str(tmp_path / "moved"), "--games", "4", "--load.device", "cpu"])
    assert "[return -" in capsys.readouterr().out


def test_a_saved_critic_of_an_adapter_is_read_back(lora_run: Path) -> None:
    config = RunFolder.existing(lora_run).load_config()
    saved = load_saved_critic(find_checkpoint(lora_run), config)
    assert isinstance(saved.critic.trunk, AdaptedBackbone) == (config.critic.trunk == "lora")
    assert (saved.critic.trunk is saved.policy) == (config.critic.trunk == "shared")
    if config.critic.trunk == "lora":
        assert any(p.abs().max() > 0 for p in list(saved.critic.trunk.parameters())[1::2]), "B has moved from 0"


# -- bad input ---------------------------------------------------------------------------------------


def test_layers_that_are_not_there_are_named(make_lm: MakeLM) -> None:
    base = Backbone(make_lm(), None)
    known = "model.lora.targets: wanted linear layers of this model, down_proj, .*, q_proj, .*; "
    with pytest.raises(ValueError, match=known + r"got 'q_porj' \(did you mean 'q_proj'\?\)"):
        AdaptedBackbone(base, "a", LoRAConfig(rank=1, targets=("v_proj", "q_porj")))
    with pytest.raises(ValueError, match="got 'lm_head'"):
        AdaptedBackbone(base, "a", LoRAConfig(rank=1, targets=("lm_head",)))
    assert torch.equal(hidden(base), hidden(Backbone(make_lm(), None))), "nothing was put in"


def test_an_adapter_of_another_shape_is_refused(make_lm: MakeLM, tokenizer: Any, tmp_path: Path) -> None:
    AdaptedBackbone(Backbone(make_lm(), tokenizer), "a", LORA).save(tmp_path)
    kept = AdaptedBackbone(Backbone(make_lm(), tokenizer), "a", LoRAConfig(rank=2))
    before = copy.deepcopy(kept.state_dict())
    with pytest.raises(ValueError, match=r"lora_A.weight: wanted shape \[2, 40\], got \[3, 40\]"):
        kept.restore(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere: wanted an adapter as peft writes it: .*No such file"):
        kept.restore(tmp_path / "nowhere")
    scaled = AdaptedBackbone(Backbone(make_lm(), tokenizer), "a", LoRAConfig(rank=3, alpha=7))
    with pytest.raises(ValueError, match=r"lora_alpha: wanted 7 \(model.lora.alpha\), got 6"):
        scaled.restore(tmp_path)
    assert all(torch.equal(before[k], v) for k, v in kept.state_dict().items())


def test_a_run_goes_on_with_its_own_rank_alone(lora_run: Path, tmp_path: Path) -> None:
    shutil.copytree(lora_run, tmp_path / "run")
    config = RunFolder.existing(tmp_path / "run").load_config()
    config.out, config.resume, config.iterations, config.model.lora = str(tmp_path / "run"), True, 5, LoRAConfig(2)
    with pytest.raises(CheckpointError, match=r"policy.*wanted shape \[2, 48\], got \[3, 48\]"):
        RunState.start(config, RunFolder(config.out), SilentWatcher())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_an_adapter_of_another_base_is_named(make_lm: MakeLM, tokenizer: Any, tmp_path: Path) -> None:
    Backbone(make_lm(hidden_size=32), tokenizer).save(tmp_path / "other")
    AdaptedBackbone(Backbone(make_lm(), tokenizer), "a", LORA, home=tmp_path / "other").save(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"nothing loads from '.*adapter': its adapter is of another model than '.*other': size"
    ):
        load_backbone(str(tmp_path / "adapter"))


def test_a_base_by_a_hub_name_is_not_looked_for_in_a_run(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "adapter").mkdir()
    file = tmp_path / "adapter" / "adapter_config.json"
    for name, found in (("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"), ("/nowhere", str(tmp_path / "start"))):
        file.write_text(json.dumps({"base_model_name_or_path": name}))
        assert base_of(tmp_path / "adapter") == found
    assert base_of(tmp_path / "start") is None


def test_without_peft_the_extra_is_named(make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"model.lora.rank: wanted 0 without the package peft.*archer-fast\[lora\]"):
        AdaptedBackbone(Backbone(make_lm(), None), "a", LORA)


def test_a_critics_adapter_wants_a_rank() -> None:
    with pytest.raises(ValueError, match=r"model.lora.rank: wanted at least 1 where critic.trunk is 'lora', got 0"):
        Config(critic=CriticConfig(trunk="lora"))
    with pytest.raises(ValueError, match="rank: wanted at least 0, got -1"):
        ModelConfig(lora=LoRAConfig(rank=-1))
