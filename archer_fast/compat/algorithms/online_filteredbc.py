"""BCTrainer, as the original names and calls it: an agent's model learns the actions of a replay by heart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from archer_fast.compat.algorithms.bc import plain_bc_loss
from archer_fast.compat.arguments import ignored
from archer_fast.compat.faults import Compat, choose_fixes
from archer_fast.compat.generation import can_pack, fixes_of
from archer_fast.compat.micro_metrics import mean_of
from archer_fast.compat.overrides import is_ours, ours
from archer_fast.compat.policy import Unsupported, policy_of
from archer_fast.compat.token_cache import MAX_LENGTH
from archer_fast.compat.trainer_file import load_trainer, write_trainer
from archer_fast.compat.transitions import Transitions, check_size, draw

_NETWORKS = ("model", "critic", "target_critic")


class BCTrainer:
    """Behaviour cloning of whatever the replay holds, which is filtered before (`offpolicy_train_loop`).

    Mind the order: tokenizer before accelerator, where ArcherTrainer has it the other way.
    fix, compat: which faults of the original are mended (`archer_fast.compat.faults`); None: as the agent has them.
    """

    def __init__(
        self,
        agent: Any,
        tokenizer: Any,
        accelerator: Any,
        lm_lr: float = 1e-5,
        epochs: int = 3,
        max_grad_norm: float = 0.01,
        grad_accum_steps: int = 8,
        *,
        fix: Iterable[str] | None = None,
        compat: Compat | None = None,
        **kwargs: Any,
    ) -> None:
        """Errors: ValueError for an agent without a model, for tokenizer and accelerator in ArcherTrainer's order, and
        for several processes."""
        ignored(type(self).__name__, kwargs)
        if not hasattr(accelerator, "backward"):
            raise ValueError(
                f"accelerator: wanted an Accelerator, got {type(accelerator).__name__}; here the tokenizer comes first"
            )
        if not hasattr(agent, "model"):
            raise ValueError(f"agent: wanted the attributes of ArcherAgent, {type(agent).__name__} lacks model")
        if (processes := getattr(accelerator, "num_processes", 1)) > 1:
            raise ValueError(f"accelerator: wanted one process, got {processes}")
        self.fixes = fixes_of(agent) if fix is None and compat is None else choose_fixes(fix, compat)
        self.tokenizer, self.accelerator = tokenizer, accelerator
        self.epochs, self.max_grad_norm, self.grad_accum_steps = epochs, max_grad_norm, grad_accum_steps
        self.step = 0
        lm_optimizer = torch.optim.Adam(agent.model.parameters(), lr=lm_lr)
        self.agent, self.lm_optimizer = accelerator.prepare(agent, lm_optimizer)

    @ours
    def actor_loss(self, observation: Sequence[str], action: Sequence[str], **kwargs: Any) -> dict[str, Any]:
        """One micro-batch's loss, differentiated. Returns its metrics."""
        loss = plain_bc_loss(self._agent.model, self.tokenizer, observation, action, fix=self.fixes)
        self.accelerator.backward(loss)
        return {"bc.loss": loss.item()}

    def update(self, replay_buffer: Any, no_update_actor: bool = False) -> dict[str, Any]:
        """`epochs` steps, each on grad_accum_steps x batch_size draws of the replay, micro-batches summed.

        Returns {"bc.loss": mean over micro-batches}, {} with no_update_actor. An `actor_loss` of a subclass is called a
        micro-batch at a time; ours is computed in packed passes where the agent's model allows it.
        Errors: ValueError for a replay with fewer transitions than its batch_size.
        """
        self.step += 1
        if no_update_actor:
            return {}
        check_size(replay_buffer)
        rows = []
        for _ in range(self.epochs):
            drawn = draw(replay_buffer, self.grad_accum_steps * replay_buffer.batch_size)
            size = 1 if "llama" in getattr(self._agent, "policy_lm", "") else replay_buffer.batch_size
            self.lm_optimizer.zero_grad()
            loss = self._packed_epoch(drawn, size)
            if loss is not None:
                rows.append({"bc.loss": loss})
            else:
                losses = [self.actor_loss(**drawn.part(part)) for part in drawn.micro_batches(size)]
                rows.append(mean_of(losses))
            self._step(drawn.num // size)
        return mean_of(rows)

    def save(self, path: str | Path) -> None:
        """Write the original's trainer.pt, without the critic's optimizer, which is not trained here."""
        agent = self._agent
        unwrapped = {name: self.accelerator.unwrap_model(getattr(agent, name)) for name in self._networks}
        states = {f"{name}_state_dict": network.state_dict() for name, network in unwrapped.items()}
        write_trainer(path, states | {"lm_optimizer_state_dict": self.lm_optimizer.state_dict()})

    def load(self, path: str | Path) -> Any:
        """Read a trainer.pt, of ArcherTrainer or ours; returns the agent. Nothing is loaded unless all of it fits."""
        targets = {f"{name}_state_dict": getattr(self._agent, name) for name in self._networks}
        load_trainer(path, targets | {"lm_optimizer_state_dict": self.lm_optimizer})
        return self.agent

    @property
    def _agent(self) -> Any:
        return self.accelerator.unwrap_model(self.agent)

    @property
    def _networks(self) -> list[str]:
        return [name for name in _NETWORKS if hasattr(self._agent, name)]

    def _packed_epoch(self, drawn: Transitions, size: int) -> float | None:
        """The mean loss of the micro-batches, gradients added up; None where packed passes are not the same or not
        possible."""
        agent = self._agent
        if not (is_ours(self, "actor_loss") and "padding" in self.fixes and can_pack(agent, "score")):
            return None
        if self.tokenizer is not getattr(agent, "tokenizer", None):
            return None
        policy = policy_of(agent)
        if any(len(ids) >= MAX_LENGTH for ids in policy.texts.tokens([*drawn.observation, *drawn.action])):
            return None  # the packed policy reads the last tokens alone, this loss all of them
        weights = torch.full((drawn.num,), 1 / size, device=next(agent.model.parameters()).device)
        try:
            logprobs = policy.policy_gradient(
                agent, drawn.observation, drawn.action, weights, self.accelerator.backward
            )
        except Unsupported:
            return None
        return -float(logprobs.mean())

    def _step(self, num_micro_batches: int) -> None:
        agent = self._agent
        if "sum" in self.fixes:
            for p in agent.model.parameters():
                if p.grad is not None:
                    p.grad.div_(num_micro_batches)
        clipped = agent.model if "clip" in self.fixes else self.agent
        self.accelerator.clip_grad_norm_(clipped.parameters(), self.max_grad_norm)
        self.lm_optimizer.step()
