"""The algorithms, one file each, over `learner.Learner`."""

from __future__ import annotations

from archer_fast.algorithms.archer import Archer
from archer_fast.algorithms.filtered_bc import FilteredBC
from archer_fast.algorithms.learner import Learner
from archer_fast.algorithms.ppo import PPO
from archer_fast.algorithms.reinforce import Reinforce
from archer_fast.backbone import Backbone
from archer_fast.buffer import TrajectoryBuffer
from archer_fast.config import Config
from archer_fast.ranks import ALONE, Ranks
from archer_fast.rollout.policy_engine import PolicyEngine

LEARNERS: dict[str, type[Learner]] = {
    "archer": Archer,
    "ppo": PPO,
    "reinforce": Reinforce,
    "filtered-bc": FilteredBC,
}


def make_learner(
    config: Config,
    actor: Backbone,
    reference: Backbone,
    engine: PolicyEngine,
    buffer: TrajectoryBuffer,
    ranks: Ranks = ALONE,
) -> Learner:
    """The learner that `config.algorithm` names, of whole models, which are sharded here where `config` says so."""
    learner = LEARNERS[config.algorithm](config, actor, reference, engine, buffer, ranks)
    if config.model.shard == "full":
        reference.shard(ranks)  # once everything that begins as its copy is made, adapters are put into it
    return learner
