"""`archer-fast doctor`: is a model right on this machine, one line a check."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from archer_fast.adapted_backbone import AdaptedBackbone
from archer_fast.adapter_folder import base_of, lora_of
from archer_fast.attention import VARIABLE_LENGTH
from archer_fast.backbone import Backbone, load_backbone
from archer_fast.cli_args import DoctorArgs
from archer_fast.cli_plan import advice
from archer_fast.cli_policy import Policy, load_policy
from archer_fast.config import Config, ModelConfig, RolloutConfig
from archer_fast.doctor import (
    Finding,
    check_adapter,
    check_attention,
    check_games,
    check_memory,
    check_ops,
    check_packed,
    check_sampler,
    check_tokenizer,
    check_versions,
    mean_game,
)
from archer_fast.evaluation import evaluate_policy
from archer_fast.model_costs import count
from archer_fast.plan import game_shape, make_plan
from archer_fast.run_folder import RunFolder, is_run
from archer_fast.trajectory import Trajectory

_STYLES = {"ok": "green", "note": "yellow", "fail": "bold red"}


def doctor(args: DoctorArgs) -> None:
    """Print each finding as it is made; SystemExit 1 where one is a fault."""
    console = Console()
    faults = 0
    for finding in _findings(args):
        faults += finding.state == "fail"
        line = Text.assemble((f"{finding.state:<5}", _STYLES[finding.state]), f"{finding.name}: {finding.text}")
        console.print(line, soft_wrap=True)
    if faults:
        raise SystemExit(1)


def _findings(args: DoctorArgs) -> Iterator[Finding]:
    yield from check_versions()
    policy = load_policy(args.source, args.which, args.task, args.load)
    backbone = policy.backbone
    yield check_attention(backbone, args.load.attention)
    yield check_ops(backbone)
    yield from check_tokenizer(backbone, policy.stop_token_id)
    games = _play(policy, backbone, args.games)
    yield check_games(games, policy.stop_token_id)
    yield from check_packed(backbone, games)
    yield check_sampler(backbone, games, policy.rollout.temperature)
    config = RunFolder(args.source).load_config() if is_run(args.source) else Config(model=ModelConfig(args.source))
    folder = RunFolder(args.source).policy(args.which) if is_run(args.source) else Path(args.source)
    if base_of(folder) is not None:
        yield _adapter(policy, folder, args.games)
    yield _memory(backbone, config, games)


def _play(policy: Policy, backbone: Backbone, games: int) -> list[Trajectory]:
    slots = min(games, policy.rollout.num_slots)
    rollout = RolloutConfig(
        num_slots=slots, max_new_tokens=policy.rollout.max_new_tokens, temperature=policy.rollout.temperature
    )
    played = evaluate_policy(backbone, policy.stop_token_id, policy.task, rollout, games=games, seed=0)
    return played.trajectories


def _adapter(policy: Policy, folder: Path, games: int) -> Finding:
    """The adapter as training has it, beside its base, not merged as for playing."""
    merged = policy.backbone
    dtype, device = merged.lm_head_weight.dtype, merged.device
    base, _ = load_backbone(str(base_of(folder)), device=device, dtype=dtype, attention=merged.attention_impl)
    adapted = AdaptedBackbone(base, "actor", lora_of(folder))
    adapted.restore(folder)
    return check_adapter(adapted, base, _play(policy, adapted, games), policy.rollout.temperature)


def _memory(backbone: Backbone, config: Config, games: list[Trajectory]) -> Finding:
    """The plan of an iteration with games like these."""
    dtype, device = backbone.lm_head_weight.dtype, backbone.device
    workload = mean_game(games)
    fused = backbone.attention_impl in VARIABLE_LENGTH
    shape = game_shape(config, workload)
    costs = count(
        backbone.model.config.to_dict(),
        dtype,
        config.model.lora,
        shape,
        fused=fused,
        checkpointing=config.model.activation_checkpointing,
    )
    plan = make_plan(costs, config, workload)
    loaded = sum(p.numel() * p.element_size() for p in backbone.parameters())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = _available_memory()
    return check_memory(plan.peak, free + loaded, advice(plan, config, free + loaded))


def _available_memory(file: Path = Path("/proc/meminfo")) -> int:
    """Bytes that a new process may take without swapping, the page cache counted as free (Linux)."""
    (line,) = (line for line in file.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024
