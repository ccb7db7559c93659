"""The best policy of a run by evaluation: kept in best/, and given back to an actor that has collapsed."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch

from archer_fast.backbone import Backbone
from archer_fast.checkpoint import replace_folder
from archer_fast.evaluation import Evaluation
from archer_fast.optim import GuardedStep
from archer_fast.ranks import ALONE, Ranks
from archer_fast.sharding import whole_on_leader

OPTIMIZER = "actor_optimizer.safetensors"  # beside the Hugging Face files


class BestPolicy:
    """`folder` holds the actor as it was at the best evaluation so far.

    keeps_optimizer: the state of the actor's optimizer too, which is twice as large.
    """

    def __init__(
        self, folder: Path, actor: Backbone, step: GuardedStep, *, keeps_optimizer: bool, ranks: Ranks = ALONE
    ) -> None:
        self.ranks = ranks
        self.folder, self.actor, self.step, self.keeps_optimizer = folder, actor, step, keeps_optimizer
        self.found: tuple[int, float, float] | None = None  # iteration, mean return, standard error

    def keep_if_better(self, iteration: int, evaluation: Evaluation) -> None:
        if self.found is None or evaluation.mean_return > self.found[1]:
            self.keep(iteration, evaluation)

    def keep(self, iteration: int, evaluation: Evaluation) -> None:
        """The actor as it is now; `evaluation` is its own."""

        write_policy, state = self.actor.writer(), {}
        if self.keeps_optimizer:
            state = whole_on_leader(self.step.state_tensors(), self.ranks)

        def write(path: Path) -> None:
            write_policy(path)
            if self.keeps_optimizer:
                (path / OPTIMIZER).write_bytes(safetensors.torch.save(state))

        self.found = (iteration, evaluation.mean_return, evaluation.standard_error)
        self.ranks.led(lambda: replace_folder(self.folder, write))

    def give_back(self) -> str:
        """Set the actor and its optimizer to what lies in `folder`; says which."""
        assert self.found is not None
        self.actor.restore(self.folder)
        file = self.folder / OPTIMIZER
        self.step.load_state_tensors(safetensors.torch.load_file(file) if file.exists() else {})
        iteration, mean, error = self.found
        anew = "" if file.exists() else ", its optimizer anew"
        return f"the actor is again that of iteration {iteration} (return {mean:.2f} ± {error:.2f}){anew}"
