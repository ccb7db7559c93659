"""ArCHer: a turn-level double critic off-policy, a token-level actor credited by it (arXiv 2402.19446)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from archer_fast.actor import ScoredTree, accumulated_actor_loss
from archer_fast.advantages import centre_by_state, td_target
from archer_fast.backbone import Backbone
from archer_fast.batch import Alternatives, PackedBatch, TreeBatch, plant_tree
from archer_fast.buffer import TrajectoryBuffer
from archer_fast.buffer_records import FeatureRows, TurnRecords
from archer_fast.config import Config
from archer_fast.critic import (
    ActionFeatures,
    GameFeatures,
    StateFeatures,
    TurnCritic,
    read_games,
    read_tree,
)
from archer_fast.device_staging import DeviceStaging
from archer_fast.meters import Meters
from archer_fast.ops import critic_loss
from archer_fast.optim import GuardedStep
from archer_fast.packing import Int64, PackedArrays
from archer_fast.prefetch import Prefetcher
from archer_fast.rollout.embedded import EmbeddedEngine
from archer_fast.token_packer import pack_tokens
from archer_fast.trajectory import Trajectory
from archer_fast.turn_features import FeatureLayout


class ReplayedTurns(NamedTuple):
    """What is read of the buffer for one critic step of n turns."""

    trajectory_ids: Int64  # [n]
    records: TurnRecords
    read: FeatureRows | PackedArrays  # the turns' features, or their whole games for a trunk that trains


class Archer:
    """The learner's state and its two phases: `insert`, then `update_critic`, then `update_actor`."""

    def __init__(
        self, config: Config, actor: Backbone, reference: Backbone, engine: EmbeddedEngine, buffer: TrajectoryBuffer
    ) -> None:
        self.config = config
        self.actor, self.reference, self.engine, self.buffer = actor, reference, engine, buffer
        self.critic = TurnCritic(config.critic, actor, reference, seed=config.seed + 1)
        self.layout, self.trunk_version = FeatureLayout.of(reference), reference.fingerprint()
        wanted = 0 if self.critic.trains_trunk else self.layout.row_bytes
        if buffer.feature_bytes != wanted:
            raise ValueError(f"buffer: wanted feature_bytes = {wanted}, got {buffer.feature_bytes}")
        self.staging = DeviceStaging(actor.device)
        self.reads_ahead = actor.device.type != "cpu"  # there it takes a core from the step it runs beside: NOTES.md
        self.rng = np.random.default_rng([config.seed, 2])  # which turns of a game the actor visits
        c, a, patience = config.critic, config.actor, config.max_skipped_steps
        head_groups = [
            {"params": list(self.critic.heads.parameters()), "lr": c.lr},
            {"params": self.critic.trained_trunk_parameters(), "lr": c.trunk_lr},
        ]
        self.critic_step = GuardedStep("critic", head_groups, c.max_grad_norm, patience)
        actor_group = [{"params": list(actor.parameters()), "lr": a.lr}]
        self.actor_step = GuardedStep("actor", actor_group, a.max_grad_norm, patience)

    def insert(self, trajectories: list[Trajectory], meters: Meters) -> None:
        """Store games in the buffer; the start policy reads them once, for a frozen trunk's features and the KL."""
        first = self.buffer.trajectory_range[1]
        self.buffer.extend(trajectories)
        low, end = self.buffer.trajectory_range
        games = np.arange(max(first, low), end)  # all but those that the push itself evicted
        if games.size == 0:
            return
        sums, num_turns = [], 0
        for batch, features in self._read_start_policy(games):
            logprob = features.action.logprob.sum()
            sums.append(torch.stack([batch.rollout_logprobs.sum(), logprob, batch.action_mask.sum()]))
            num_turns += sum(batch.num_turns)
            meters.count(processed_tokens=batch.num_tokens)
        rollout_logprob, logprob, num_tokens = torch.stack(sums).sum(0)
        meters.add(kl=(rollout_logprob - logprob) / num_turns)
        # Minus the mean log-prob of what was sampled estimates the entropy without a pass of its own.
        meters.add(entropy=-rollout_logprob / num_tokens)

    def complete_features(self) -> int:
        """Read the games in the buffer that lack what a frozen trunk makes of them; how many there were."""
        if self.critic.trains_trunk:
            return 0
        missing = self.buffer.trajectories_without_features(self.trunk_version)
        for begin in range(0, missing.size, 1024):
            for _ in self._read_start_policy(missing[begin : begin + 1024]):
                pass
        return int(missing.size)

    def update_critic(self, meters: Meters, on_step: Callable[[], object] = lambda: None) -> None:
        """`epochs` gradient steps on replayed transitions, the target moved after each."""
        c = self.config.critic
        draws = [self._draw_transitions() for _ in range(c.epochs)]
        fresh = self._fresh_actions(draws, meters) if c.value_target == "resample" else None
        reads = map(self._replay, draws)
        with Prefetcher(reads) if self.reads_ahead else nullcontext(reads) as replayed:
            for epoch, turns in enumerate(replayed):
                loss = self._critic_loss(turns, None if fresh is None else fresh[epoch], meters)
                self.critic_step(loss, meters, turns.trajectory_ids)
                self.critic.update_targets()
                on_step()
        self.critic_step.check(meters)

    def update_actor(self, newest: int, meters: Meters, on_step: Callable[[], object] = lambda: None) -> None:
        """`epochs` policy-gradient steps on fresh alternatives; `newest`: this iteration's number of games.

        They end early once the policy has moved `max_kl_step` from where the iteration began: a critic is only
        to be trusted near the actions it has seen, and the next rollout will show it the new ones.
        """
        a, temperature = self.config.actor, self.config.rollout.temperature
        first_kl: float | None = None
        for _ in range(a.epochs):
            games = self._choose_games(newest)
            batch = self._collate(games)
            forwarded = self.engine.num_forward_tokens
            alternatives = self.engine.sample_alternatives(batch, self._choose_states(batch))
            scored, q = self._score(games, batch, alternatives)
            trees = [s.tree for s in scored]
            sampled, num_branches = self.engine.num_forward_tokens - forwarded, sum(t.num_branches for t in trees)
            passes = 2 if self.critic.trunk is self.reference else 3
            meters.count(
                processed_tokens=sampled + passes * sum(t.input_ids.numel() for t in trees),
                useful_tokens=sum(t.rows.numel() for t in trees),
            )
            moved = torch.stack([s.tree.rollout_logprobs.sum() - s.ref_logprobs.sum() for s in scored]).sum()
            kl = (moved / num_branches).item()
            first_kl = kl if first_kl is None else first_kl
            if abs(kl - first_kl) > a.max_kl_step:
                break
            out = accumulated_actor_loss(
                self.actor,
                scored,
                temperature=temperature,
                kl_coef=a.kl_coef,
                entropy_coef=a.entropy_coef,
                normalise_advantages=a.normalise_advantages,
            )
            spread = torch.cat([s.advantages for s in scored]).std()
            meters.add(actor_loss=out.policy_loss, entropy_fresh=out.entropy, advantage_std=spread, q_fresh=q.mean())
            meters.count(actor_steps=1)
            self.actor_step(out.loss, meters, games)
            on_step()
        self.actor_step.check(meters)

    # -- checkpoints -------------------------------------------------------------------------------

    def _steps(self) -> dict[str, GuardedStep]:
        return {"critic": self.critic_step, "actor": self.actor_step}

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything but the policy, the buffer and `state_numbers` that an exact resume needs."""
        tensors = {f"critic.{k}": v for k, v in self.critic.state_dict().items()}
        for name, step in self._steps().items():
            tensors |= {f"optimizer.{name}.{k}": v for k, v in step.state_tensors().items()}
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state_tensors`; KeyError or RuntimeError names what is missing or misshapen."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        mine = set(self.critic.state_dict())
        saved = under("critic.")
        if mine != saved.keys():
            raise KeyError(f"critic.{sorted(mine ^ saved.keys())[0]}")
        self.critic.load_state_dict(saved, strict=False)
        for name, step in self._steps().items():
            step.load_state_tensors(under(f"optimizer.{name}."))

    def state_numbers(self) -> dict[str, Any]:
        """Counters and random states as plain values."""
        return {
            "rng": self.rng.bit_generator.state,
            "steps": {name: [s.num_steps, s.skipped_in_a_row] for name, s in self._steps().items()},
            "trunk_version": self.trunk_version,
        }

    def load_state_numbers(self, numbers: dict[str, Any]) -> None:
        """Inverse of `state_numbers`; ValueError where they belong to another start policy."""
        if (saved := numbers["trunk_version"]) != self.trunk_version:
            raise ValueError(
                f"trunk_version: features of a trunk {saved:08x}, but the start policy is {self.trunk_version:08x}"
            )
        self.rng.bit_generator.state = numbers["rng"]
        for name, step in self._steps().items():
            step.num_steps, step.skipped_in_a_row = numbers["steps"][name]

    # -- critic ------------------------------------------------------------------------------------

    def _draw_transitions(self) -> np.ndarray:
        """Turn ids of one critic step: uniform over turns, or all turns of whole games for a trained trunk."""
        if not self.critic.trains_trunk:
            return self.buffer.sample_turns(self.config.critic.batch_turns)
        num_games = max(1, round(self.config.critic.batch_turns * len(self.buffer) / self.buffer.num_turns))
        games = np.sort(self.buffer.sample_trajectories(min(num_games, len(self.buffer))))  # as they are collated
        return self._turns_of(games)

    def _replay(self, turn_ids: np.ndarray) -> ReplayedTurns:
        """What a critic step reads of the buffer; made while the step before runs, where `reads_ahead`."""
        records, trajectory_ids = self.buffer.turn_records(turn_ids), self.buffer.trajectory_of(turn_ids)
        read: FeatureRows | PackedArrays
        if self.critic.trains_trunk:
            read = self.buffer.collate(np.unique(trajectory_ids), memory=self.staging.memory)
        else:
            bytes_behind = self.layout.state_bytes
            read = self.buffer.read_features(turn_ids, self.trunk_version, bytes_behind, memory=self.staging.memory)
        return ReplayedTurns(trajectory_ids, records, read)

    def _critic_loss(self, turns: ReplayedTurns, fresh: ActionFeatures | None, meters: Meters) -> Tensor:
        records, device = turns.records, self.actor.device
        if isinstance(turns.read, PackedArrays):
            batch = PackedBatch.from_arrays(turns.read, device)
            state, action, next_state, target_state, target_action = self._read_trained_trunk(batch, meters)
        else:
            turn = torch.from_numpy(records.turn).to(device).long()
            state, action, next_state = self.layout.read(turns.read, turn)
            target_state, target_action = state, action
        self.staging.keep_until_copied(turns)
        rewards = torch.from_numpy(records.rewards).to(device)
        terminated = torch.from_numpy(records.terminated).to(device)
        with torch.no_grad():
            target = self.critic.target_heads
            q_target = td_target(rewards, target.value(next_state), terminated, self.config.critic.gamma)
            v_target = target.q_value(target_state, target_action if fresh is None else fresh)
        q = self.critic.heads.q_value(state, action)
        v = self.critic.heads.value(state)
        out = critic_loss(*q, *v, *q_target, *v_target)
        variance = q_target.var(correction=0)
        meters.add(
            critic_loss=out.loss.detach(),
            q_loss=(out.q1 + out.q2) / 2,
            v_loss=(out.v1 + out.v2) / 2,
            q_mean=out.stats.mean[:2].mean(),
            q_min=out.stats.min[:2].amin(),
            q_max=out.stats.max[:2].amax(),
            v_mean=out.stats.mean[2:].mean(),
            explained_variance=1 - (q.detach() - q_target).var(correction=0) / variance.clamp(min=1e-6),
        )
        return out.loss

    def _read_trained_trunk(
        self, batch: PackedBatch, meters: Meters
    ) -> tuple[StateFeatures, ActionFeatures, StateFeatures, StateFeatures, ActionFeatures]:
        """Features of whole games from a trunk that trains; targets read the target trunk where there is one."""
        temperature = self.config.rollout.temperature
        online = read_games(self.critic.trunk, batch, temperature)
        with torch.no_grad():
            target_trunk = self.critic.target_trunk
            target = online if target_trunk is None else read_games(target_trunk, batch, temperature)
            meters.count(processed_tokens=batch.num_tokens * (1 if target_trunk is None else 2))
            following = target.state.hidden.roll(-1, 0)  # of a game's last turn: not the next state, see below
            final = target.final.hidden[batch.trajectory]
            next_hidden = torch.where(batch.is_last[:, None], final, following)
        next_state = StateFeatures(next_hidden, online.state.turn + 1)
        return online.state, online.action, next_state, target.state, target.action

    @torch.no_grad()
    def _fresh_actions(self, draws: list[np.ndarray], meters: Meters) -> list[ActionFeatures]:
        """a' ~ pi(.|s) for every draw of the coming epochs, in a few large batches: the policy rests meanwhile.

        Their features are those of the trunk that the targets read, as it is now: exact where it is frozen,
        up to an iteration's epochs old where it trains.
        """
        trunk = self.critic.target_trunk or self.critic.trunk
        sizes, forwarded = [d.size for d in draws], self.engine.num_forward_tokens
        wanted = np.concatenate(draws)
        owner = self.buffer.trajectory_of(wanted)
        hidden = torch.empty(wanted.size, self.actor.hidden_size, device=self.actor.device)
        logprob = torch.empty(wanted.size, device=self.actor.device)
        games, inverse, counts = np.unique(owner, return_inverse=True, return_counts=True)
        by_count = np.argsort(counts, kind="stable")
        for chunk in np.array_split(by_count, max(1, -(-games.size // self.config.actor.batch_games))):
            chosen = np.sort(chunk)
            batch = self._collate(games[chosen])
            row_of_game = np.full(games.size, -1)
            row_of_game[chosen] = np.arange(chosen.size)
            places = np.nonzero(row_of_game[inverse] >= 0)[0]
            rows = row_of_game[inverse[places]]
            order = np.argsort(rows, kind="stable")
            places, rows = places[order], rows[order]
            column = np.arange(rows.size) - np.searchsorted(rows, rows)
            first_turn = self.buffer.turn_span(games[chosen])[0]
            turn_in_batch = batch.cu_turns[:-1].cpu().numpy()[rows] + (wanted[places] - first_turn[rows])
            turn_ids = np.full((chosen.size, counts[chosen].max()), -1, np.int64)
            turn_ids[rows, column] = turn_in_batch
            alternatives = self.engine.sample_alternatives(batch, torch.from_numpy(turn_ids).to(self.actor.device))
            for part, own, tree in self._trees(games[chosen], batch, alternatives):
                _, action, _ = read_tree(trunk, own, tree, self.config.rollout.temperature)
                meters.count(processed_tokens=tree.input_ids.numel(), useful_tokens=tree.rows.numel())
                at = torch.from_numpy(places[np.isin(rows, part)]).to(self.actor.device)
                hidden[at], logprob[at] = action.hidden.float(), action.logprob
        meters.count(processed_tokens=self.engine.num_forward_tokens - forwarded)
        return [ActionFeatures(h, lp) for h, lp in zip(hidden.split(sizes), logprob.split(sizes), strict=True)]

    # -- actor -------------------------------------------------------------------------------------

    def _choose_games(self, newest: int) -> np.ndarray:
        first, end = self.buffer.trajectory_range
        num = self.config.actor.batch_games
        if self.config.actor.data == "on_policy":
            pool = np.arange(max(first, end - newest), end)
            return np.sort(self.rng.permutation(pool)[:num])
        return np.sort(self.buffer.sample_trajectories(min(num, end - first)))

    def _choose_states(self, batch: PackedBatch) -> Tensor:
        """[B, S*K] int64: S turns of each game, drawn without replacement, each K times; -1 where a game is short."""
        a = self.config.actor
        turn_ids = np.full((len(batch.lengths), a.states_per_game), -1, np.int64)
        first = 0
        for row, count in enumerate(batch.num_turns):
            chosen = np.sort(self.rng.permutation(count)[: a.states_per_game])
            turn_ids[row, : chosen.size] = first + chosen
            first += count
        return torch.from_numpy(np.repeat(turn_ids, a.alternatives, axis=1)).to(batch.input_ids.device)

    @torch.no_grad()
    def _score(
        self, games: np.ndarray, batch: PackedBatch, alternatives: Alternatives
    ) -> tuple[list[ScoredTree], Tensor]:
        """The actor's trees with advantages by the critic, and min(Q1, Q2) [num_branches of all] of their branches."""
        scored, q_values, temperature = [], [], self.config.rollout.temperature
        for _, own, tree in self._trees(games, batch, alternatives):
            state, action, ref_logprobs = read_tree(self.critic.trunk, own, tree, temperature)
            q = self.critic.heads.q_value(state, action).amin(0)
            if self.critic.trunk is not self.reference:
                ref_logprobs = read_tree(self.reference, own, tree, temperature)[2]
            scored.append(ScoredTree(tree, centre_by_state(q, tree.turn_ids, own.turn.shape[0]), ref_logprobs))
            q_values.append(q)
        return scored, torch.cat(q_values)

    # -- passes over stored games --------------------------------------------------------------------

    def _collate(self, trajectory_ids: np.ndarray) -> PackedBatch:
        arrays = self.buffer.collate(trajectory_ids, memory=self.staging.memory)
        batch = PackedBatch.from_arrays(arrays, self.actor.device)
        self.staging.keep_until_copied(arrays)
        return batch

    def _read_start_policy(self, games: np.ndarray) -> Iterator[tuple[PackedBatch, GameFeatures]]:
        """Its passes over these games. A frozen trunk's features go to the buffer as they come."""
        for part in self._passes(self.buffer.lengths(games).tolist()):
            batch = self._collate(games[part])
            with torch.no_grad():
                features = read_games(self.reference, batch, self.config.rollout.temperature)
            if not self.critic.trains_trunk:
                rows = self.layout.write(features, batch.num_turns)
                self.buffer.set_features(games[part], self.trunk_version, rows)
            yield batch, features

    def _turns_of(self, trajectory_ids: np.ndarray) -> np.ndarray:
        """The ids of all their turns, game after game."""
        first, count = self.buffer.turn_span(trajectory_ids)
        return np.concatenate([np.arange(f, f + n) for f, n in zip(first, count, strict=True)])

    def _passes(self, lengths: list[int]) -> list[np.ndarray]:
        """Which of some games share a pass over the trunk: their places in `lengths`, ascending."""
        return pack_tokens(lengths, max(self.config.model.max_pass_tokens, max(lengths)))

    def _trees(
        self, games: np.ndarray, batch: PackedBatch, alternatives: Alternatives
    ) -> Iterator[tuple[np.ndarray, PackedBatch, TreeBatch]]:
        """The trees of `batch`, which packs `games`, cut into passes: places in `games`, those games, their tree."""
        branches = alternatives.lengths.sum(1).tolist()
        passes = self._passes([n + m for n, m in zip(batch.lengths, branches, strict=True)])
        for part in passes:
            own = batch if len(passes) == 1 else self._collate(games[part])
            at = torch.from_numpy(part).to(batch.cu_turns.device)
            shift = own.cu_turns[:-1].long() - batch.cu_turns[at].long()
            turn_ids = alternatives.turn_ids[at]
            theirs = Alternatives(
                alternatives.action_ids[at],
                alternatives.logprobs[at],
                alternatives.lengths[at],
                torch.where(turn_ids >= 0, turn_ids + shift[:, None], -1),
            )
            yield part, own, plant_tree(own, theirs, self.actor.layout(own.cu_seqlens, own.lengths))
