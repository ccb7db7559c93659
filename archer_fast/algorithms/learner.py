"""What every algorithm has: an actor with its optimizer, the start policy, the engine, and the games in the buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archer_fast.actor import TURN_BINS, ActorLoss, ScoredActions, accumulated_actor_loss, count_scored
from archer_fast.backbone import Backbone
from archer_fast.batch import PackedBatch
from archer_fast.buffer import TrajectoryBuffer
from archer_fast.config import Config, PolicyLoss, UpdateConfig
from archer_fast.critic import GameFeatures, read_games
from archer_fast.device_staging import DeviceStaging
from archer_fast.doubling_bins import first_of
from archer_fast.meters import Meters
from archer_fast.optim import GuardedStep
from archer_fast.packing import Int64, pack_trajectories
from archer_fast.ranks import ALONE, Ranks
from archer_fast.rollout.policy_engine import PolicyEngine
from archer_fast.sharding import sharded_like
from archer_fast.token_packer import pack_tokens
from archer_fast.trajectory import Trajectory

OnStep = Callable[[], object]


def ignore(*what: object) -> None:
    """Who is told of steps and passes where nobody listens."""


def row_tokens(position_ids: Tensor, action_positions: Tensor) -> Tensor:
    """Tokens of these actions, each in a row of its own with everything before it: what the original computes."""
    return (position_ids[action_positions] + 1).sum()


class Learner:
    """`insert`, then `update_critic`, then `update_actor`: one iteration of any algorithm.

    A subclass says in `update_actor` which actions are scored and with what; where it has a critic, it names its
    modules and optimizers in `modules` and `steps`, and they are saved and restored.
    """

    needs_logprobs = False  # of the policy that sampled an action: for the ratio of ppo_clip
    critic_epochs = 0  # steps of `update_critic`, for the progress bar
    warmup_iterations = 0  # iterations before the first `update_actor`

    def __init__(
        self,
        config: Config,
        actor: Backbone,
        reference: Backbone,
        engine: PolicyEngine,
        buffer: TrajectoryBuffer,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.config, self.update = config, config.update
        self.actor, self.reference, self.engine, self.buffer = actor, reference, engine, buffer
        self.trunk_version = reference.fingerprint()
        self.newest: Int64 = np.empty(0, np.int64)  # ids of the games that the last `insert` stored
        self.ref_logprobs: dict[int, Tensor] = {}  # theirs: of their action tokens under the start policy
        self.staging = DeviceStaging(actor.device)
        self.on_pass: Callable[[str], object] = ignore  # told of the longer passes before they begin
        self._has_stepped = False  # since the last `insert`
        if config.model.shard != "none" and not config.model.lora.rank:
            actor.shard(ranks)  # before an optimizer is given what it moves
        self.rng = np.random.default_rng([config.seed, 2])  # which games and turns the actor visits
        group = [{"params": list(actor.parameters()), "lr": self.update.lr}]
        self.actor_step = GuardedStep(
            "actor",
            group,
            self.update.max_grad_norm,
            config.max_skipped_steps,
            ranks,
            offload=config.model.offload_optimizer,
        )

    def insert(self, trajectories: list[Trajectory], meters: Meters) -> None:
        """Store games in the buffer; the start policy reads them once, for the KL. The same games on every rank."""
        if self.needs_logprobs and any(turn.policy_version < 0 for game in trajectories for turn in game.turns):
            raise ValueError(
                f"trajectories: {self.config.algorithm} with the loss ppo_clip wants the log-probs of the policy that "
                "sampled each action, got turns of policy_version < 0, whose log-probs nobody knows"
            )
        self._has_stepped = False
        first = self.buffer.trajectory_range[1]
        self.buffer.extend(trajectories)
        low, end = self.buffer.trajectory_range
        games = np.arange(max(first, low), end)  # all but those that the push itself evicted
        known = games.size if self.config.learns_from_newest else len(self.buffer)
        if trajectories and known < self.ranks.size:
            raise ValueError(f"trajectories: wanted a game a rank at least, {self.ranks.size}, got {known}")
        self.newest, self.ref_logprobs = games, {}
        if games.size == 0:
            return
        logprobs: dict[int, Tensor] = {}
        totals = torch.zeros(4, dtype=torch.float64, device=self.actor.device)  # KL, turns, tokens in rows, tokens
        for ids, batch, features in self.read_start_policy(games):
            logprobs |= by_game(features.token_logprobs, ids, batch)
            moved = batch.rollout_logprobs.sum() - features.action.logprob.sum()
            rows = row_tokens(batch.position_ids, batch.action_positions)
            totals[0] += moved
            totals[1] += sum(batch.num_turns)
            totals[2] += rows
            totals[3] += batch.num_tokens
            meters.count(processed_tokens=batch.num_tokens)
        self.ref_logprobs = self.gather_by_game(logprobs)
        kl, num_turns, rows, num_tokens = self.ranks.sum(totals)
        meters.add(kl=kl / num_turns, deduplication=rows / num_tokens)

    @torch.no_grad()
    def kl_to_start(self, trajectories: Sequence[Trajectory]) -> float:
        """KL(policy that sampled || start), nats an action, by games that are not stored."""
        moved = torch.zeros((), dtype=torch.float64, device=self.actor.device)
        with self.reference.gathered():
            for part in self.own_passes([game.num_tokens for game in trajectories]):
                packed = pack_trajectories([trajectories[i] for i in part])
                batch = PackedBatch.from_arrays(packed, self.actor.device)
                logprobs = read_games(self.reference, batch, self.config.rollout.temperature).action.logprob
                moved += batch.rollout_logprobs.sum() - logprobs.sum()
        return self.ranks.sum(moved).item() / sum(game.num_turns for game in trajectories)

    def complete_features(self) -> int:
        """Read the games in the buffer that lack what this algorithm keeps beside them; how many there were."""
        return 0

    def update_critic(self, meters: Meters, on_step: OnStep = ignore) -> None:
        """Learn to value; nothing where an algorithm has no critic."""

    def update_actor(self, meters: Meters, on_step: OnStep = ignore) -> None:
        """Move the actor."""
        raise NotImplementedError

    # -- the actor's step --------------------------------------------------------------------------

    def take_actor_step(
        self,
        passes: Sequence[ScoredActions],
        games: Int64,
        meters: Meters,
        *,
        kind: PolicyLoss = "reinforce",
        **more: float,
    ) -> ActorLoss:
        """One optimizer step on these actions, which stand in these games of the buffer. more: clip, awr_beta.

        passes: this rank's share of the step; what is returned is of the whole, but for `loss`.
        """
        self.on_pass("the actor's step")
        u: UpdateConfig = self.update
        num_actions, num_tokens = self.ranks.sum(torch.tensor(count_scored(passes))).tolist()
        if self.actor.sharding is not None:  # its weights are gathered in every pass, by all
            missing = max(self.ranks.gather(len(passes))) - len(passes)
            passes = [*passes, *(ScoredActions.none(self.actor) for _ in range(missing))]
        with self.actor.streamed():
            out = accumulated_actor_loss(
                self.actor,
                passes,
                kind=kind,
                totals=(num_actions, num_tokens),
                temperature=self.config.rollout.temperature,
                kl_coef=u.kl_coef,
                entropy_coef=u.entropy_coef,
                **more,
            )
        parts = torch.stack([out.policy_loss, out.entropy, out.clip_fraction, out.moved])
        together = self.ranks.sum(torch.cat([parts, out.moved_by_turn.flatten()]))
        policy_loss, entropy, clip_fraction, moved = together[: len(parts)]
        moved_by_turn = together[len(parts) :].view_as(out.moved_by_turn)
        out = ActorLoss(out.loss, policy_loss, entropy, clip_fraction, moved, moved_by_turn)
        meters.add(actor_loss=out.policy_loss, actor_entropy=out.entropy)
        if self.samples_are_own and not self._has_stepped:
            # The weights are those that sampled: what is left is the engine's own.
            meters.add(mismatch_kl=out.moved)
            by_turn = zip(range(TURN_BINS), moved_by_turn.unbind(1), strict=True)
            meters.divide(**{f"mismatch_kl_turn_{first_of(index)}": sums for index, sums in by_turn})
        self._has_stepped = True
        if kind == "ppo_clip":
            meters.add(clip_fraction=out.clip_fraction)
        meters.count_once(actor_steps=1, useful_tokens=num_tokens)
        self.actor_step(out.loss, meters, games)
        return out

    @property
    def samples_are_own(self) -> bool:
        """The first step after an `insert` is on actions that these very weights have sampled."""
        return self.config.learns_from_newest

    # -- games of the buffer -----------------------------------------------------------------------

    def collate(self, trajectory_ids: Int64) -> PackedBatch:
        """These games as one packed batch on the actor's device."""
        arrays = self.buffer.collate(trajectory_ids, memory=self.staging.memory)
        batch = PackedBatch.from_arrays(arrays, self.actor.device)
        self.staging.keep_until_copied(arrays)
        return batch

    def passes(self, lengths: list[int]) -> list[np.ndarray]:
        """Which of some games share a pass over the trunk: their places in `lengths`, ascending."""
        return pack_tokens(lengths, max(self.config.model.max_pass_tokens, max(lengths)))

    def own_passes(self, lengths: list[int]) -> list[np.ndarray]:
        """`passes` of all ranks together, and of these this rank's share: as dear as any other's. Empty where there are
        fewer games than ranks and the others have them."""
        passes, size = self.passes(lengths), self.ranks.size
        if size == 1:
            return passes
        each = -(-len(passes) // size)
        if len(lengths) < each * size:
            return list(self.ranks.share(passes))
        passes = pack_tokens(lengths, max(self.config.model.max_pass_tokens, max(lengths)), size)
        return passes[self.ranks.rank * len(passes) // size :][: len(passes) // size]

    def gather_by_game(self, mine: dict[int, Tensor]) -> dict[int, Tensor]:
        """What the ranks hold by game, together."""
        if self.ranks.size == 1:
            return mine
        found: dict[int, Tensor] = {}
        for theirs in self.ranks.gather({game: values.cpu() for game, values in mine.items()}):
            found |= theirs
        return {game: values.to(self.actor.device) for game, values in found.items()}

    def read_start_policy(self, games: Int64) -> Iterator[tuple[Int64, PackedBatch, GameFeatures]]:
        """This rank's share of its passes over these games: the ids in each, the batch, and what it makes of it."""
        with self.reference.gathered():
            for part in self.own_passes(self.buffer.lengths(games).tolist()):
                self.on_pass("the start policy's reading")
                batch = self.collate(games[part])
                with torch.no_grad():
                    features = read_games(self.reference, batch, self.config.rollout.temperature)
                yield games[part], batch, features

    def turns_of(self, trajectory_ids: Int64) -> np.ndarray:
        """The ids of all their turns, game after game."""
        first, count = self.buffer.turn_span(trajectory_ids)
        return np.concatenate([np.arange(f, f + n) for f, n in zip(first, count, strict=True)])

    # -- checkpoints -------------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        """What is trained beside the actor."""
        return {}

    def steps(self) -> dict[str, GuardedStep]:
        """The optimizers."""
        return {"actor": self.actor_step}

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything but the policy, the buffer and `state_numbers` that an exact resume needs."""
        tensors = {f"{name}.{k}": v for name, module in self.modules().items() for k, v in module.state_dict().items()}
        for name, step in self.steps().items():
            tensors |= {f"optimizer.{name}.{k}": v for k, v in step.state_tensors().items()}
        return tensors

    def like(self, name: str) -> Tensor:
        """A tensor of this learner that is laid out as the one that `state_tensors` has under that name; KeyError."""
        for step_name, step in self.steps().items():
            if name.startswith(prefix := f"optimizer.{step_name}."):
                return step.like(name.removeprefix(prefix))
        module_name, _, key = name.partition(".")
        found: Tensor = self.modules()[module_name].state_dict()[key]
        return found

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state_tensors`; KeyError or RuntimeError names what is missing or misshapen."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        for name, module in self.modules().items():
            mine, saved = module.state_dict(), under(f"{name}.")
            if mine.keys() != saved.keys():
                raise KeyError(f"{name}.{sorted(mine.keys() ^ saved.keys())[0]}")
            module.load_state_dict({k: sharded_like(v, mine[k]) for k, v in saved.items()}, strict=False)
        for name, step in self.steps().items():
            step.load_state_tensors(under(f"optimizer.{name}."))

    def state_numbers(self) -> dict[str, Any]:
        """Counters and random states as plain values."""
        return {
            "rng": self.rng.bit_generator.state,
            "steps": {name: [s.num_steps, s.skipped_in_a_row] for name, s in self.steps().items()},
            "trunk_version": self.trunk_version,
        }

    def load_state_numbers(self, numbers: dict[str, Any]) -> None:
        """Inverse of `state_numbers`; ValueError where they belong to another start policy."""
        if (saved := numbers["trunk_version"]) != self.trunk_version:
            raise ValueError(
                f"trunk_version: features of a trunk {saved:08x}, but the start policy is {self.trunk_version:08x}"
            )
        self.rng.bit_generator.state = numbers["rng"]
        for name, step in self.steps().items():
            step.num_steps, step.skipped_in_a_row = numbers["steps"][name]


def by_game(token_values: Tensor, trajectory_ids: Int64, batch: PackedBatch) -> dict[int, Tensor]:
    """Values [A] of a batch's action tokens, split into its games'."""
    ends = batch.action_mask.cumsum(0)[batch.cu_seqlens[1:].long() - 1].tolist()
    return dict(zip(trajectory_ids.tolist(), token_values.split(np.diff([0, *ends]).tolist()), strict=True))
