"""Checks of a policy on this machine, each a line: what training takes for granted, measured on the model itself."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from packaging.requirements import Requirement
from torch import Tensor

from archer_fast.adapted_backbone import AdaptedBackbone
from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch
from archer_fast.config import AttentionImpl
from archer_fast.critic import read_games
from archer_fast.ops import last_impl, linear_logprobs
from archer_fast.packing import pack_trajectories
from archer_fast.trajectory import Trajectory
from archer_fast.workload import Workload

State = Literal["ok", "note", "fail"]

# Nats a token that two ways of computing the same log-prob may lie apart, in the mean over tokens: rounding, and no
# more. In bfloat16 a logit of 20 is known to within .06.
MEAN_GAP = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class Finding(NamedTuple):
    """Finding("packed passes", "ok", "4 games at once and one by one: .000001 nats a token apart, 1e-4 allowed")."""

    name: str
    state: State
    text: str


def check_versions(package: str = "archer-fast") -> Iterator[Finding]:
    """Whatever is installed of what the package asks for, extras too, against the versions that it asks for."""
    said = []
    for text in importlib.metadata.requires(package) or []:
        requirement = Requirement(text)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # what is needed and missing would have failed by now; an extra is nobody's duty
        if not requirement.specifier.contains(version, prereleases=True):
            yield Finding("versions", "fail", f"wanted {requirement.name} {requirement.specifier}, got {version}")
        elif requirement.name in ("torch", "transformers", "peft", "flash-attn", "triton"):
            said.append(f"{requirement.name} {version}")
    yield Finding("versions", "ok", ", ".join(dict.fromkeys(said)))


def check_attention(backbone: Backbone, asked: AttentionImpl) -> Finding:
    """Which kernel attention runs on, and why that one; asked: what the backbone was loaded with."""
    impl, dtype = backbone.attention_impl, backbone.lm_head_weight.dtype
    if asked != "auto":
        why = "asked for by name"
    elif impl == "sdpa":
        why = f"a variable-length kernel needs CUDA and half precision, here are {backbone.device.type} and {dtype}"
    else:
        own = impl == "varlen"
        why = "torch's own; the package flash-attn is not installed" if own else "the package flash-attn"
    return Finding("attention", "ok", f"{impl} ({why})")


def check_ops(backbone: Backbone) -> Finding:
    """Which kernels the vocabulary's rows run on: found out by running them."""
    hidden = torch.zeros(2, backbone.hidden_size, device=backbone.device, dtype=backbone.lm_head_weight.dtype)
    targets = torch.zeros(2, dtype=torch.int64, device=backbone.device)
    linear_logprobs(hidden, backbone.lm_head_weight, targets)
    impl = last_impl("linear_logprobs")
    meant = {"triton": "Triton, as on any GPU", "cpu": "C++, as on any CPU"}.get(str(impl), "plain torch: slow")
    return Finding("operations", "note" if impl == "reference" else "ok", f"{impl} ({meant})")


def check_tokenizer(backbone: Backbone, stop_token_id: int) -> Iterator[Finding]:
    """The stop token, and whether every token of the tokenizer has a row in the model."""
    tokenizer = backbone.tokenizer
    size, rows = len(tokenizer), backbone.vocab_size
    if size > rows:
        yield Finding("tokenizer", "fail", f"{size} tokens, but the model has only {rows} rows for them")
    else:
        yield Finding("tokenizer", "ok", f"{size} tokens, the model has {rows} rows")
    if not 0 <= stop_token_id < rows:
        yield Finding("stop token", "fail", f"wanted an id below {rows}, got {stop_token_id}")
        return
    text = tokenizer.decode([stop_token_id])
    again = tokenizer.encode(text, add_special_tokens=False)
    reads = "" if again == [stop_token_id] else f"; its text is read as {again}, which ends nothing"
    yield Finding("stop token", "ok", f"{text!r} = {stop_token_id}{reads}")


def check_games(games: Sequence[Trajectory], stop_token_id: int) -> Finding:
    """Whether actions end as they should: one that never does is cut off at `max_new_tokens`."""
    turns = [turn for game in games for turn in game.turns]
    ended = sum(int(turn.action_ids[-1]) == stop_token_id for turn in turns) / len(turns)
    tokens = sum(turn.action_ids.size for turn in turns) / len(turns)
    text = (
        f"{len(games)} games, {len(turns)} turns of {tokens:.1f} tokens; {ended:.0%} of the actions end by themselves"
    )
    if ended < 0.5:
        return Finding("actions", "note", f"{text}; the others are cut off at rollout.max_new_tokens")
    return Finding("actions", "ok", text)


@torch.no_grad()
def check_packed(backbone: Backbone, games: Sequence[Trajectory]) -> Iterator[Finding]:
    """Games in one packed pass against each alone, and against plain attention."""
    together = _logprobs(backbone, games)
    alone = torch.cat([_logprobs(backbone, [game]) for game in games])
    yield _compared("packed passes", f"{len(games)} games at once and one by one", together, alone, backbone)
    used, backbone.attention_impl = backbone.attention_impl, "reference"
    try:
        plain = _logprobs(backbone, games)
    finally:
        backbone.attention_impl = used
    yield _compared("attention's numbers", f"{used} and one dense softmax a game", together, plain, backbone)


@torch.no_grad()
def check_sampler(backbone: Backbone, games: Sequence[Trajectory], temperature: float) -> Finding:
    """The log-probs that the engine recorded as it sampled against those that the trainer computes of these tokens."""
    sampled = _sampled(games)
    scored = _logprobs(backbone, games, temperature).cpu()
    kl = ((sampled - scored).sum() / sum(game.num_turns for game in games)).item()
    finding = _compared("sampler and trainer", "log-probs of the sampled tokens", sampled, scored, backbone)
    return finding._replace(text=f"{finding.text}; KL {kl:.1e} nats a turn")


@torch.no_grad()
def check_adapter(adapted: AdaptedBackbone, base: Backbone, games: Sequence[Trajectory], temperature: float) -> Finding:
    """Whether an adapter has acted in games that were played with it: what the sampler recorded must be what the
    adapted model says of them, and not what the base alone says."""
    sampled = _sampled(games)
    ours, theirs = (_logprobs(backbone, games, temperature).cpu() for backbone in (adapted, base))
    acted = _compared("adapter", "sampler and adapted model", sampled, ours, base)
    gap = (sampled - theirs).abs().mean().item()
    kl = ((sampled - theirs).sum() / sum(game.num_turns for game in games)).item()
    text = f"{acted.text}; sampler and base {gap:.3g} apart, KL {kl:.3g} nats a turn"
    if torch.equal(ours, theirs):
        return Finding("adapter", "fail", f"{text}: it changes nothing")
    return acted._replace(text=text)


def check_memory(needed: float, free: float, knob: str) -> Finding:
    """What an iteration will need at its peak against what is free; both in bytes."""
    text = f"{needed / 1e9:.2f} GB at the peak of an iteration, {free / 1e9:.2f} GB free"
    return Finding("memory", "ok", text) if needed <= free else Finding("memory", "fail", f"{text}; {knob}")


def _sampled(games: Sequence[Trajectory]) -> Tensor:
    """[A] of the action tokens, as the sampler recorded them."""
    return torch.cat([torch.from_numpy(turn.rollout_logprobs) for game in games for turn in game.turns])


def _logprobs(backbone: Backbone, games: Sequence[Trajectory], temperature: float = 1.0) -> Tensor:
    """[A] of the action tokens, from one packed pass."""
    batch = PackedBatch.from_arrays(pack_trajectories(list(games)), backbone.device)
    return read_games(backbone, batch, temperature).token_logprobs


def _compared(name: str, what: str, ours: Tensor, theirs: Tensor, backbone: Backbone) -> Finding:
    gaps = (ours - theirs).abs()
    mean, most = gaps.mean().item(), gaps.max().item()
    allowed = MEAN_GAP[backbone.lm_head_weight.dtype]
    text = f"{what}: {mean:.1e} nats a token apart (at most {most:.1e}), {allowed:.0e} allowed"
    return Finding(name, "ok" if mean <= allowed else "fail", text)


def mean_game(games: Sequence[Trajectory]) -> Workload:
    """What these games are like, rounded up: what a plan asks for."""
    turns = list(itertools.chain.from_iterable(game.turns for game in games))
    observed = sum(turn.observation_ids.size for turn in turns)
    acted = sum(turn.action_ids.size for turn in turns)
    return Workload(-(-len(turns) // len(games)), -(-observed // len(turns)), -(-acted // len(turns)))
