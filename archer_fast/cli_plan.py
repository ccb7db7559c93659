"""`archer-fast plan`: says what a run will need, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from archer_fast.cli_args import PlanArgs
from archer_fast.config import Config
from archer_fast.devices import DEVICES, Device
from archer_fast.model_costs import ModelCosts, count
from archer_fast.plan import Plan, game_shape, make_plan
from archer_fast.public_models import public_config
from archer_fast.run_folder import read_json
from archer_fast.workload import Workload


def plan(args: PlanArgs, config: Config) -> None:
    """Print memory by role and phase, FLOPs, bytes, time, and what each choice saves; SystemExit 1 if it cannot fit."""
    if config.model.path is None:
        raise ValueError("model.path: wanted the model to plan for, a folder or a name such as qwen2.5-7b, got none")
    device, workload = DEVICES[args.gpu], args.workload
    memory = device.memory * args.memory_share
    costs = count(
        model_config(config.model.path),
        getattr(torch, config.model.dtype),
        config.model.lora,
        game_shape(config, workload),
        fused=config.model.dtype != "float32",
        checkpointing=config.model.activation_checkpointing,
    )
    made = make_plan(costs, config, workload)
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(made, costs, device), indent=2) + "\n")
    _print(Console(), made, costs, config, workload, device, memory)
    if made.peak > memory:
        raise SystemExit(1)


def model_config(name: str) -> dict[str, Any]:
    """Of a model in a local folder, or of a public one by its short name; ValueError for anything else."""
    file = Path(name) / "config.json"
    if not file.is_file():
        return public_config(name)
    values = read_json(file)
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"model.path: wanted a Hugging Face model, but {str(file)!r} has no 'model_type'")
    return values


def as_json(plan: Plan, costs: ModelCosts, device: Device) -> dict[str, Any]:
    """Every figure, in bytes, FLOPs and seconds."""
    return {
        "device": dataclasses.asdict(device),
        "model": dataclasses.asdict(costs),
        **dataclasses.asdict(plan),
        "peak": plan.peak,
        "seconds": {p.name: device.seconds(p.flops, p.bytes, costs.itemsize) for p in plan.phases},
    }


def _print(
    console: Console, plan: Plan, costs: ModelCosts, config: Config, workload: Workload, device: Device, memory: float
) -> None:
    trained = f"{costs.num_trained / 1e6:,.1f} M of them in adapters train" if costs.adapted else "all of them train"
    console.print(
        f"{config.model.path}: {costs.num_parameters / 1e9:.2f} B parameters in {config.model.dtype}, {trained}; "
        f"{device.name}; {config.rollout.games} games an iteration, {workload.turns} turns of "
        f"{workload.observation_tokens} + {workload.action_tokens} tokens",
        highlight=False,
        soft_wrap=True,
    )
    roles = Table("what stays in memory", "GB", title_justify="left")
    for role, size in plan.roles.items():
        roles.add_row(role, f"{size / 1e9:.2f}")
    roles.add_row("together", f"{plan.resident / 1e9:.2f}", style="bold")
    phases = Table("phase", "tokens", "TFLOP", "GB read", "GB at its peak", "s at the roofline")
    for phase in plan.phases:
        seconds = device.seconds(phase.flops, phase.bytes, costs.itemsize)
        phases.add_row(
            phase.name,
            f"{phase.tokens:,.0f}",
            f"{phase.flops / 1e12:,.1f}",
            f"{phase.bytes / 1e9:,.0f}",
            f"{(plan.resident + phase.memory) / 1e9:.1f}",
            f"{seconds:.2f}",
        )
    savings = Table("our way", "ours", "the original's way", "factor")
    for saving in plan.savings:
        ours, original = (_quantity(value, saving.unit) for value in (saving.ours, saving.original))
        savings.add_row(saving.choice, ours, original, f"{saving.factor:.1f}")
    for table in (roles, phases, savings):
        console.print(table)
    fits = plan.peak <= memory
    verdict = "fits" if fits else "does not fit"
    console.print(
        f"{verdict}: {plan.peak / 1e9:.1f} GB at the peak, {memory / 1e9:.1f} GB to be had",
        highlight=False,
        soft_wrap=True,
    )
    if config.rollout.best_of > 1:
        console.print("not counted: the critic's choice among rollout.best_of actions", highlight=False)
    if config.rollout.engine == "vllm":
        said = "not counted: vLLM's copy of the weights and its keys and values; rollouts are counted as embedded ones"
        console.print(said, highlight=False)
    if config.model.shard != "none":
        console.print("not counted: model.shard, this is what a process takes that holds everything", highlight=False)
    console.print(advice(plan, config, memory), highlight=False, soft_wrap=True, markup=False)


def _quantity(value: float, unit: str) -> str:
    """5040 tokens, 15.8 GB, 11,044 TFLOP."""
    if unit == "bytes":
        return f"{value / 1e9:,.1f} GB"
    return f"{value / 1e12:,.0f} TFLOP" if unit == "FLOPs" else f"{value:,.0f} {unit}"


def advice(plan: Plan, config: Config, memory: float) -> str:
    """The knob that decides whether it fits into `memory` bytes."""
    if plan.resident <= memory < plan.resident + plan.sampling:
        return (
            f"the fresh actions of a step are sampled at once and take {plan.sampling / 1e9:.1f} GB: fewer "
            "--actor.batch-games, --actor.states-per-game or --actor.alternatives, or shorter games"
        )
    tokens = plan.max_pass_tokens(memory)
    if tokens >= plan.game_in_pass:
        now = config.model.max_pass_tokens
        spare = "" if config.model.activation_checkpointing else "; or --model.activation-checkpointing"
        more = "there is room for more" if tokens > now else f"the present value is too large{spare}"
        return f"largest passes: --model.max-pass-tokens {tokens} (now {now}: {more if tokens != now else 'just that'})"
    if tokens > 0:
        return (
            f"one game with its branches has {plan.game_in_pass} tokens and {tokens} would fit: fewer "
            "--actor.states-per-game or --actor.alternatives, or shorter games"
        )
    others = [phase for phase in plan.phases if phase.name != "actor"]
    dearest = max(others, key=lambda phase: phase.memory)
    if plan.resident <= memory < plan.resident + dearest.memory:
        knob = {
            "rollout": "fewer --rollout.num-slots, or shorter games",
            "insert": "fewer --model.max-pass-tokens",
            "critic": "fewer --critic.batch-turns, or --critic.trunk frozen",
        }[dearest.name]
        return f"{dearest.name} alone takes {dearest.memory / 1e9:.1f} GB: {knob}"
    if config.model.lora.rank == 0:
        offload = "" if config.model.offload_optimizer else "; --model.offload-optimizer keeps moments on the host"
        return f"weights, gradients and moments are too much: --model.lora.rank 16 trains adapters on one base{offload}"
    if config.critic.trunk == "separate":
        return "--critic.trunk frozen or lora needs no trunks of the critic's own"
    return "the weights and what is fixed beside them are too much for this GPU: a smaller model, or a larger GPU"
