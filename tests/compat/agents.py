"""Agents of the drop-in with tiny models, replays for them, and a record of what an update drew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle, Transition
from tiny_models import make_gpt2, make_roberta

from archer_fast.compat import update as update_module
from archer_fast.compat.algorithms.archer import ArcherTrainer
from archer_fast.compat.data import ReplayBuffer
from archer_fast.compat.models import ArcherAgent

QUESTIONS = ["Is it alive?", "Is it a dog?", "Is it big?\n", "", "Is it a café? 犬", "Does it fly"]


class Accelerator:
    """Just as much of Hugging Face's as one process on a CPU needs."""

    num_processes, is_main_process, mixed_precision = 1, True, "no"
    device = torch.device("cpu")

    def unwrap_model(self, model: Any) -> Any:
        return model

    def prepare(self, *objects: Any) -> Any:
        return objects[0] if len(objects) == 1 else objects

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def wait_for_everyone(self) -> None:
        pass


def make_agent(
    folder: Path, cls: Any = ArcherAgent, *, seed: int = 0, width: int = 32, merge: bool = True, **options: Any
) -> Any:
    """merge: the tokenizer has tokens such as "?\\n": a prompt's tokens need not begin those of a longer one."""
    policy, critic = folder / f"gpt2-{seed}-{width}-{merge}", folder / f"roberta-{seed}-{width}"
    if not policy.exists():
        make_gpt2(policy, seed=seed, width=width, initializer_range=0.2, newline_boost=3.0, merge_newlines=merge)
        make_roberta(critic, seed=seed, width=width, initializer_range=0.2)
    torch.manual_seed(seed)
    options = {"max_new_tokens": 8} | options
    return cls("cpu", Accelerator(), policy_lm=str(policy), critic_lm=str(critic), cache_dir=None, **options)


def games(rng: np.random.Generator, num: int, *, done: bool | None = None, long: bool = False) -> list[Transition]:
    """Transitions of games as the original's envs tell them: the whole dialogue so far is the observation."""
    found = []
    while len(found) < num:
        text = "Questions:\n" * (400 if long and not found else 1)  # above 512 tokens: only its end is read
        for _ in range(int(rng.integers(1, 6))):
            action = str(rng.choice(QUESTIONS))
            after = f"{text}{action} {rng.choice(['Yes.', 'No.'])}\n"
            ended = bool(rng.random() < 0.2) if done is None else done
            found.append(Transition(text, action, float(rng.choice([-1.0, 0.0, 0.7])), after, ended))
            text = after
    return found[:num]


def fill(buffer: ReplayBuffer, transitions: list[Transition]) -> ReplayBuffer:
    for t in transitions:
        buffer.insert(**t._asdict(), mc_return=0.0)
    return buffer


def make_oracle(trainer: ArcherTrainer, batch_size: int) -> Oracle:
    agent = trainer.agent
    names = ("grad_accum_steps", "gamma", "tau", "epochs", "max_grad_norm", "actor_epochs")
    return Oracle(
        agent.model, agent.tokenizer, agent.critic, agent.target_critic, batch_size=batch_size,
        critic_lr=trainer.critic_optimizer.param_groups[0]["lr"], lm_lr=trainer.lm_optimizer.param_groups[0]["lr"],
        template=agent.template, policy_lm=agent.policy_lm, **{name: getattr(trainer, name) for name in names},
    )  # fmt: skip


class Record:
    def __init__(self) -> None:
        self.draws: list[Transition] = []
        self.actions: list[str] = []
        self.gradients: list[dict[str, torch.Tensor]] = []  # of each epoch, before clipping


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    """What updates inside the block draw from the replay, and the actions that are sampled for it, in their order."""
    record, ask_ahead, draw, step = Record(), update_module._ask_ahead, update_module.draw, update_module._step

    def drawn(replay: Any, num: int) -> Any:
        out = draw(replay, num)
        rows = zip(out.observation, out.action, out.reward, out.next_observation, out.done, strict=True)
        record.draws += [Transition(o, a, float(r), n, bool(d)) for o, a, r, n, d in rows]
        return out

    def asked(*arguments: Any) -> Any:
        actions_of = ask_ahead(*arguments)

        def of_draw(i: int) -> list[str]:
            found = actions_of(i)
            record.actions += found
            return found

        return of_draw

    def stepped(trainer: Any, optimizer: Any, network: Any) -> None:
        found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        record.gradients.append(found)
        step(trainer, optimizer, network)

    with monkeypatch.context() as patch:
        patch.setattr(update_module, "_step", stepped)
        patch.setattr(update_module, "draw", drawn)
        patch.setattr(update_module, "_ask_ahead", asked)
        yield record
