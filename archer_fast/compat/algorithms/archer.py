"""ArcherTrainer, as the original names and calls it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from archer_fast.compat.actor_phase import actor_loss_plain
from archer_fast.compat.arguments import ignored
from archer_fast.compat.critic_phase import critic_loss_plain
from archer_fast.compat.faults import Compat, choose_fixes
from archer_fast.compat.generation import fixes_of
from archer_fast.compat.models.shared_critic import Mode, choose_mode, is_shared, share_trunk, warn_of_rate
from archer_fast.compat.overrides import ours
from archer_fast.compat.trainer_file import load_trainer, write_trainer
from archer_fast.compat.update import update


class ArcherTrainer:
    """The turn-level critic and the token-level actor of one agent (Zhou et al. 2024, arXiv 2402.19446).

    mode: "exact" gives the original's numbers for the same samples. "shared" does NOT: the critic's encoder is replaced
    by heads on the policy as it is now (`models.shared_critic`), which train many times faster. None: as the agent is.
    critic_lr: of "shared", of the heads alone, 1e-3 and not the 2e-5 of an encoder.
    fix, compat: which faults of the original are mended (`archer_fast.compat.faults`); None: as the agent has them.
    """

    def __init__(
        self,
        agent: Any,
        accelerator: Any,
        tokenizer: Any,
        critic_lr: float = 1e-3,
        lm_lr: float = 1e-5,
        grad_accum_steps: int = 8,
        gamma: float = 0.9,
        tau: float = 0.1,
        epochs: int = 3,
        max_grad_norm: float = 0.01,
        actor_epochs: int = 3,
        *,
        mode: Mode | None = None,
        fix: Iterable[str] | None = None,
        compat: Compat | None = None,
        **kwargs: Any,
    ) -> None:
        """Errors: ValueError naming what the agent lacks, for several processes, or a mode that is not the agent's."""
        ignored("ArcherTrainer", kwargs)
        check_agent(agent)
        if (processes := getattr(accelerator, "num_processes", 1)) > 1:
            raise ValueError(f"accelerator: wanted one process, got {processes}")
        self.fixes = fixes_of(agent) if fix is None and compat is None else choose_fixes(fix, compat)
        if choose_mode(agent, mode) == "shared":
            if not is_shared(agent):
                share_trunk(agent)
            warn_of_rate(critic_lr)
        self.agent, self.accelerator, self.tokenizer = agent, accelerator, tokenizer
        self.grad_accum_steps, self.gamma, self.tau = grad_accum_steps, gamma, tau
        self.epochs, self.actor_epochs, self.max_grad_norm = epochs, actor_epochs, max_grad_norm
        self.step = 0
        self.criterion = torch.nn.MSELoss()  # forks call it
        critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=critic_lr)
        lm_optimizer = torch.optim.Adam(agent.model.parameters(), lr=lm_lr)
        self.critic_optimizer, self.lm_optimizer = accelerator.prepare(critic_optimizer, lm_optimizer)

    @ours
    def critic_loss(
        self,
        observation: Sequence[str],
        action: Sequence[str],
        reward: Any,
        next_observation: Sequence[str],
        done: Any,
        mc_return: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One micro-batch's loss, differentiated; a' is sampled here. Returns its metrics."""
        batch = {
            "observation": observation, "action": action, "reward": reward, "next_observation": next_observation,
            "done": done, "mc_return": mc_return,
        }  # fmt: skip
        with torch.no_grad():
            pi_action = self.agent.get_action(list(observation))
        return critic_loss_plain(self, batch, pi_action)

    @ours
    def actor_loss(
        self, observation: Sequence[str], pi_action: Sequence[str], advantage: Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        """One micro-batch's policy gradient, differentiated; advantage [n]. Returns its metrics."""
        return actor_loss_plain(self, observation, pi_action, advantage)

    @ours
    def update(self, replay_buffer: Any, no_update_actor: bool = False) -> dict[str, Any]:
        """One iteration: `epochs` critic steps, then `actor_epochs` actor steps. Returns the original's metrics.

        Errors: ValueError for a replay with fewer transitions than its batch_size.
        """
        return update(self, replay_buffer, no_update_actor)

    def save(self, path: str) -> None:
        """Write the original's trainer.pt."""
        write_trainer(path, {name: part.state_dict() for name, part in self._parts().items()})

    def load(self, path: str) -> Any:
        """Read a trainer.pt, of the original or ours; returns the agent. Nothing is loaded unless all of it fits."""
        load_trainer(path, self._parts())
        return self.agent

    def _parts(self) -> dict[str, Any]:
        unwrap = self.accelerator.unwrap_model
        return {
            "model_state_dict": unwrap(self.agent.model),
            "critic_state_dict": unwrap(self.agent.critic),
            "target_critic_state_dict": unwrap(self.agent.target_critic),
            "critic_optimizer_state_dict": self.critic_optimizer,
            "lm_optimizer_state_dict": self.lm_optimizer,
        }


def check_agent(agent: Any) -> None:
    """ValueError naming what the original's trainer would ask of the agent and not find."""
    wanted = (
        "accelerator",
        "model",
        "critic",
        "target_critic",
        "policy_lm",
        "get_action",
        "get_log_prob",
        "soft_update_target_critic",
    )
    missing = [name for name in (*wanted, "parameters") if not hasattr(agent, name)]
    if missing:
        raise ValueError(
            f"agent: wanted the attributes of ArcherAgent, {type(agent).__name__} lacks {', '.join(missing)}"
        )
