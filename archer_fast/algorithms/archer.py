"""ArCHer: a turn-level double critic off-policy, a token-level actor credited by it (arXiv 2402.19446)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from archer_fast.actor import ScoredActions
from archer_fast.advantages import discounted_returns, td_lambda, td_target
from archer_fast.algorithms.credit import (
    TokenBaseline,
    credit_alternatives,
    credit_logged,
    estimate,
    normalised,
    return_spread,
)
from archer_fast.algorithms.learner import Learner, OnStep, ignore, row_tokens
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
    next_states,
    read_games,
    read_tree,
)
from archer_fast.meters import Meters
from archer_fast.ops import critic_loss
from archer_fast.optim import GuardedStep
from archer_fast.packing import Int64, PackedArrays
from archer_fast.prefetch import Prefetcher
from archer_fast.ranks import ALONE, Ranks
from archer_fast.rollout.policy_engine import PolicyEngine
from archer_fast.turn_features import FeatureLayout


class ReplayedTurns(NamedTuple):
    """What is read of the buffer for one critic step of n turns."""

    turn_ids: Int64  # [n]
    records: TurnRecords
    read: FeatureRows | PackedArrays  # the turns' features, or their whole games for a trunk that trains


class Archer(Learner):
    """A turn-level double critic on replayed turns, and an actor credited by it in one of several ways."""

    def __init__(
        self,
        config: Config,
        actor: Backbone,
        reference: Backbone,
        engine: PolicyEngine,
        buffer: TrajectoryBuffer,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(config, actor, reference, engine, buffer, ranks)
        c, patience = config.critic, config.max_skipped_steps
        self.needs_logprobs = config.actor.loss == "ppo_clip" and config.actor.actions != "fresh"
        self.critic_epochs, self.warmup_iterations = c.epochs, c.warmup_iterations
        over = ranks if config.model.shard != "none" else None
        self.critic = TurnCritic(c, actor, reference, config.seed + 1, config.model.lora, shard_over=over)
        self.layout = FeatureLayout.of(reference)
        wanted = 0 if self.critic.trains_trunk else self.layout.row_bytes
        if buffer.feature_bytes != wanted:
            raise ValueError(f"buffer: wanted feature_bytes = {wanted}, got {buffer.feature_bytes}")
        self.reads_ahead = actor.device.type != "cpu"  # there it takes a core from the step it runs beside: NOTES.md
        head_groups = [
            {"params": list(self.critic.heads.parameters()), "lr": c.lr},
            {"params": self.critic.trained_trunk_parameters(), "lr": c.trunk_lr},
        ]
        # Heads alone are trained alike on every rank; a trunk's passes are shared, and their gradients summed.
        shares = ranks if self.critic.trains_trunk else ALONE
        offload = config.model.offload_optimizer
        self.critic_step = GuardedStep("critic", head_groups, c.max_grad_norm, patience, shares, offload=offload)
        self._lambda_returns: tuple[int, Tensor] | None = None
        self.baseline = TokenBaseline(config, reference, ranks) if config.actor.token_baseline else None

    def modules(self) -> dict[str, nn.Module]:
        return {"critic": self.critic} | ({"baseline": self.baseline.value} if self.baseline else {})

    def steps(self) -> dict[str, GuardedStep]:
        own = {"critic": self.critic_step, **super().steps()}
        return own | ({"baseline": self.baseline.step} if self.baseline else {})

    @property
    def samples_are_own(self) -> bool:
        if self.config.actor.actions == "fresh":
            return True
        return self.config.critic.trunk != "shared" and super().samples_are_own  # else the critic has moved the weights

    def complete_features(self) -> int:
        """Read the games in the buffer that lack what a frozen trunk makes of them; how many there were."""
        if self.critic.trains_trunk:
            return 0
        missing = self.buffer.trajectories_without_features(self.trunk_version)
        for begin in range(0, missing.size, 1024):
            for _ in self.read_start_policy(missing[begin : begin + 1024]):
                pass
        return int(missing.size)

    def update_critic(self, meters: Meters, on_step: OnStep = ignore) -> None:
        """`epochs` gradient steps on replayed transitions, the target moved after each."""
        c = self.config.critic
        draws = [self._draw_transitions() for _ in range(c.epochs)]
        fresh = self._fresh_actions(draws, meters) if c.value_target == "resample" else None
        self._lambda_returns = self._make_lambda_returns() if c.td_lambda > 0 else None
        games, sizes = [self.buffer.trajectory_of(drawn) for drawn in draws], [drawn.size for drawn in draws]
        if self.critic.trains_trunk and self.ranks.size > 1:
            mine = [self._own_places(owner) for owner in games]
            draws = [drawn[own] for drawn, own in zip(draws, mine, strict=True)]
            fresh = None if fresh is None else [f.at(own) for f, own in zip(fresh, mine, strict=True)]
        reads = map(self._replay, draws)
        with Prefetcher(reads) if self.reads_ahead else nullcontext(reads) as replayed:
            for epoch, turns in enumerate(replayed):
                share = turns.turn_ids.size / sizes[epoch]
                with self.critic.streamed():  # one pass of each trunk on every rank, which has a game at least
                    loss = self._critic_loss(turns, None if fresh is None else fresh[epoch], share, meters)
                    self.critic_step(loss * share, meters, games[epoch])
                self.critic.update_targets()
                on_step()
        self.critic_step.check(meters)
        if not self.critic.trains_trunk:
            self.ranks.take_first(self.critic.state_dict().values())

    def update_actor(self, meters: Meters, on_step: OnStep = ignore) -> None:
        """`epochs` policy-gradient steps.

        They end early once the policy has moved `max_kl_step` from where the iteration began: a critic is only
        to be trusted near the actions it has seen, and the next rollout will show it the new ones.
        """
        a = self.config.actor
        first_kl: float | None = None
        for _ in range(a.epochs):
            games = self._choose_games()
            if a.actions == "logged":
                passes = self._logged_passes(games, meters)
            else:
                passes, kl = self._fresh_passes(games, meters)
                first_kl = kl if first_kl is None else first_kl
                if abs(kl - first_kl) > a.max_kl_step:
                    break
            passes = self._prepared(passes, games, meters)
            out = self.take_actor_step(passes, games, meters, kind=a.loss, clip=a.clip, awr_beta=a.awr_beta)
            on_step()
            if a.actions == "logged" and a.data == "on_policy" and out.moved.item() > a.max_kl_step:
                break
        for step in self.steps().values():
            step.check(meters)

    @torch.no_grad()
    def score(self, batch: PackedBatch, alternatives: Alternatives) -> Tensor:
        """The critic's Q [B, R] of R actions of each game of `batch`, all of them used: what CHAI chooses by."""
        tree = plant_tree(batch, alternatives, self.actor.layout(batch.cu_seqlens, batch.lengths))
        read = read_tree(self.critic.trunk, batch, tree, self.config.rollout.temperature)
        q = estimate(self.critic.heads.q_value(read.state, read.action), self.config.actor)
        return q.view(alternatives.lengths.shape)

    # -- critic ------------------------------------------------------------------------------------

    def _draw_transitions(self) -> np.ndarray:
        """Turn ids of one critic step: uniform over turns, or all turns of whole games for a trained trunk."""
        if not self.critic.trains_trunk:
            return self.buffer.sample_turns(self.config.critic.batch_turns)
        num_games = round(self.config.critic.batch_turns * len(self.buffer) / self.buffer.num_turns)
        num_games = max(self.ranks.size, num_games)
        games = np.sort(self.buffer.sample_trajectories(min(num_games, len(self.buffer))))  # as they are collated
        return self.turns_of(games)

    def _own_places(self, owner: np.ndarray) -> np.ndarray:
        """Which of some turns are in this rank's share of the games that own them."""
        games = np.unique(owner)
        parts = self.own_passes(self.buffer.lengths(games).tolist())
        return np.nonzero(np.isin(owner, games[np.concatenate(parts)]))[0]

    def _replay(self, turn_ids: np.ndarray) -> ReplayedTurns:
        """What a critic step reads of the buffer; made while the step before runs, where `reads_ahead`."""
        records = self.buffer.turn_records(turn_ids)
        read: FeatureRows | PackedArrays
        if self.critic.trains_trunk:
            games = np.unique(self.buffer.trajectory_of(turn_ids))
            read = self.buffer.collate(games, memory=self.staging.memory)
        else:
            bytes_behind = self.layout.state_bytes
            read = self.buffer.read_features(turn_ids, self.trunk_version, bytes_behind, memory=self.staging.memory)
        return ReplayedTurns(turn_ids, records, read)

    def _critic_loss(self, turns: ReplayedTurns, fresh: ActionFeatures | None, share: float, meters: Meters) -> Tensor:
        records, device, c = turns.records, self.actor.device, self.config.critic
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
            if self._lambda_returns is None:
                q_target = td_target(rewards, target.value(next_state), terminated, c.gamma)
            else:
                first, returns = self._lambda_returns
                q_target = returns[:, torch.from_numpy(turns.turn_ids - first).to(device)]
            v_target = target.q_value(target_state, target_action if fresh is None else fresh)
        q = self.critic.heads.q_value(state, action)
        v = self.critic.heads.value(state)
        kind: Literal["mse", "expectile"] = "expectile" if c.value_target == "expectile" else "mse"
        out = critic_loss(*q, *v, *q_target, *v_target, kind=kind, expectile=c.expectile)
        variance = q_target.var(correction=0)
        meters.add(
            share,
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
            next_state = next_states(target.state, target.final, batch)
        return online.state, online.action, next_state, target.state, target.action

    @torch.no_grad()
    def _make_lambda_returns(self) -> tuple[int, Tensor]:
        """The first live turn's id, and TD(lambda) returns [2, turns] of all live turns by the target's V1 and V2."""
        c, device = self.config.critic, self.actor.device
        turn_ids = self.turns_of(np.arange(*self.buffer.trajectory_range))
        values, behind, rewards, terminated, is_last = [], [], [], [], []
        for ids in np.array_split(turn_ids, -(-turn_ids.size // (1 << 15))):
            records = self.buffer.turn_records(ids)
            rows = self.buffer.read_features(ids, self.trunk_version, self.layout.state_bytes)
            state, _, next_state = self.layout.read(rows, torch.from_numpy(records.turn).to(device).long())
            values.append(self.critic.target_heads.value(state))
            behind.append(self.critic.target_heads.value(next_state))
            rewards.append(records.rewards)
            terminated.append(records.terminated)
            is_last.append(records.is_last)
        ends = np.nonzero(np.concatenate(is_last))[0]
        cu_turns = torch.from_numpy(np.concatenate([[0], ends + 1]).astype(np.int32)).to(device)
        ended = torch.from_numpy(np.concatenate(terminated)[ends]).to(device)
        reward = torch.from_numpy(np.concatenate(rewards)).to(device)
        final = torch.cat(behind, 1)[:, torch.from_numpy(ends).to(device)]
        heads = zip(torch.cat(values, 1), final, strict=True)
        returns = [td_lambda(reward, v, end, ended, cu_turns, c.gamma, c.td_lambda) for v, end in heads]
        return int(turn_ids[0]), torch.stack(returns)

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
        hidden = torch.zeros(wanted.size, self.actor.hidden_size, device=self.actor.device)
        numbers = torch.zeros(2, wanted.size, device=self.actor.device)
        games, inverse, counts = np.unique(owner, return_inverse=True, return_counts=True)
        by_count = np.argsort(counts, kind="stable")
        num_chunks = max(self.ranks.size, -(-games.size // self.config.actor.batch_games))
        with self.actor.gathered(), trunk.gathered():
            for chunk in self.ranks.share(np.array_split(by_count, min(num_chunks, games.size))):
                self.on_pass("sampling of fresh actions")
                chosen = np.sort(chunk)
                batch = self.collate(games[chosen])
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
                    action = read_tree(trunk, own, tree, self.config.rollout.temperature).action
                    meters.count(processed_tokens=tree.input_ids.numel(), useful_tokens=tree.rows.numel())
                    at = torch.from_numpy(places[np.isin(rows, part)]).to(self.actor.device)
                    hidden[at] = action.hidden.float()
                    numbers[:, at] = torch.stack([action.logprob, action.repeated])
        meters.count(processed_tokens=self.engine.num_forward_tokens - forwarded)
        hidden, numbers = self.ranks.sum(hidden), self.ranks.sum(numbers)
        return [ActionFeatures(h, *n) for h, n in zip(hidden.split(sizes), numbers.split(sizes, 1), strict=True)]

    # -- actor -------------------------------------------------------------------------------------

    def _choose_games(self) -> np.ndarray:
        first, end = self.buffer.trajectory_range
        num = self.config.actor.batch_games
        if self.config.actor.data == "on_policy":
            return np.sort(self.rng.permutation(self.newest)[:num])
        return np.sort(self.buffer.sample_trajectories(min(num, end - first)))

    def _choose_states(self, games: np.ndarray, own: np.ndarray) -> Tensor:
        """[B, S*K] int64: S turns of each of the B games at the places `own` in `games`, drawn without replacement and
        each K times, as turns of their batch; -1 where a game is short."""
        a = self.config.actor
        counts = self.buffer.turn_span(games)[1].tolist()
        chosen = [np.sort(self.rng.permutation(count)[: a.states_per_game]) for count in counts]  # alike on every rank
        turn_ids = np.full((own.size, a.states_per_game), -1, np.int64)
        first = 0
        for row, place in enumerate(own):
            turn_ids[row, : chosen[place].size] = first + chosen[place]
            first += counts[place]
        return torch.from_numpy(np.repeat(turn_ids, a.alternatives, axis=1)).to(self.actor.device)

    @torch.no_grad()
    def _fresh_passes(self, games: np.ndarray, meters: Meters) -> tuple[list[ScoredActions], float]:
        """Fresh actions at states of these games, and of `both` the taken ones too, with their advantages; and
        KL(policy || start) of the fresh ones [nats an action]."""
        a, temperature, both = self.config.actor, self.config.rollout.temperature, self.config.actor.actions == "both"
        own_games = np.sort(np.concatenate(self.own_passes(self.buffer.lengths(games).tolist())))
        num_games, states, games = games.size, self._choose_states(games, own_games), games[own_games]
        batch, forwarded = self.collate(games), self.engine.num_forward_tokens
        self.on_pass("sampling of fresh actions")
        with self.actor.gathered():
            alternatives = self.engine.sample_alternatives(batch, states)
        passes, credits, residuals, q_values, moved, rows, num_fresh = [], [], [], [], [], [], 0
        with self.critic.trunk.gathered(), self.reference.gathered():
            for _, own, tree in self._trees(games, batch, alternatives):
                read = start = read_tree(self.critic.trunk, own, tree, temperature, taken=both)
                if self.critic.trunk is not self.reference:
                    start = read_tree(self.reference, own, tree, temperature, taken=both)
                advantages, q = credit_alternatives(self.critic.heads, read.state, read.action, tree.turn_ids, a)
                scored = ScoredActions.of_tree(tree, own, start.token_logprobs, advantages)
                if read.taken is not None and start.taken is not None:
                    residual = credit_logged(self.critic.heads, read.taken, own, a, self.config.gamma)
                    residuals.append(residual)
                    ref_logprobs = start.taken.token_logprobs
                    scored = scored.joined(ScoredActions.of_games(own, tree.layout, ref_logprobs, residual))
                passes.append(scored)
                credits.append(advantages)
                q_values.append(q)
                moved.append((tree.rollout_logprobs - start.token_logprobs).sum())
                num_fresh += tree.num_branches
                rows.append(row_tokens(tree.position_ids, tree.action_positions))
                if both:
                    rows.append(row_tokens(own.position_ids, own.action_positions))
        num_reads = 2 if self.critic.trunk is self.reference else 3
        sampled = self.engine.num_forward_tokens - forwarded
        num_tokens = sum(scored.input_ids.numel() for scored in passes)
        meters.count(processed_tokens=sampled + num_reads * num_tokens)
        share = games.size / num_games
        meters.add(share, deduplication_actor=torch.stack(rows).sum() / num_tokens)
        meters.add(share, q_fresh=torch.cat(q_values).mean(), advantage_std=torch.cat(credits).std(correction=0))
        if residuals:
            meters.add(share, residual_std=torch.cat(residuals).std(correction=0))
        total = torch.stack([torch.stack(moved).sum(), torch.full((), num_fresh, device=self.actor.device)])
        moved_by, num_fresh = self.ranks.sum(total).tolist()
        return passes, moved_by / num_fresh

    def _logged_passes(self, games: np.ndarray, meters: Meters) -> list[ScoredActions]:
        """All turns of these games, with the actions that were taken and their advantages."""
        passes, credits, temperature = [], [], self.config.rollout.temperature
        with self.critic.trunk.gathered(), self.reference.gathered():
            for part in self.own_passes(self.buffer.lengths(games).tolist()):
                batch = self.collate(games[part])
                with torch.no_grad():
                    features = read_games(self.critic.trunk, batch, temperature)
                    ref_logprobs = features.token_logprobs
                    if self.critic.trunk is not self.reference:
                        ref_logprobs = read_games(self.reference, batch, temperature).token_logprobs
                num_reads = 2 if self.critic.trunk is self.reference else 3
                meters.count(processed_tokens=num_reads * batch.num_tokens)
                advantages = credit_logged(self.critic.heads, features, batch, self.config.actor, self.config.gamma)
                layout = self.actor.layout(batch.cu_seqlens, batch.lengths)
                passes.append(ScoredActions.of_games(batch, layout, ref_logprobs, advantages))
                credits.append(advantages)
        meters.add(advantage_std=torch.cat(credits).std(correction=0))
        return passes

    def _prepared(self, passes: list[ScoredActions], games: np.ndarray, meters: Meters) -> list[ScoredActions]:
        """As they go into the loss: less the token baseline, normalised, where these are asked for."""
        if self.baseline is not None:
            with torch.enable_grad():
                passes = self.baseline(passes, games, meters)
        if not self.config.actor.normalise_advantages:
            return passes
        passes, trust = normalised(passes, self._return_spread(games).to(self.actor.device), self.ranks)
        meters.add(advantage_trust=trust)
        return passes

    def _return_spread(self, games: np.ndarray) -> Tensor:
        records = self.buffer.turn_records(self.turns_of(games))
        cu_turns = np.concatenate([[0], np.nonzero(records.is_last)[0] + 1]).astype(np.int32)
        returns = discounted_returns(torch.from_numpy(records.rewards), torch.from_numpy(cu_turns), self.config.gamma)
        return return_spread(returns, torch.from_numpy(records.turn).long())

    # -- passes over stored games --------------------------------------------------------------------

    def read_start_policy(self, games: Int64) -> Iterator[tuple[Int64, PackedBatch, GameFeatures]]:
        """Its passes over these games. A frozen trunk's features go to the buffer as they come, other ranks' at the
        end."""
        made = []
        for ids, batch, features in super().read_start_policy(games):
            if not self.critic.trains_trunk:
                rows = self.layout.write(features, batch.num_turns)
                self.buffer.set_features(ids, self.trunk_version, rows)
                if self.ranks.size > 1:
                    made.append((ids, rows))
            yield ids, batch, features
        for rank, theirs in enumerate(self.ranks.gather(made)):
            for ids, rows in theirs if rank != self.ranks.rank else []:
                self.buffer.set_features(ids, self.trunk_version, rows)

    def _trees(
        self, games: np.ndarray, batch: PackedBatch, alternatives: Alternatives
    ) -> Iterator[tuple[np.ndarray, PackedBatch, TreeBatch]]:
        """The trees of `batch`, which packs `games`, cut into passes: places in `games`, those games, their tree."""
        branches = alternatives.lengths.sum(1).tolist()
        passes = self.passes([n + m for n, m in zip(batch.lengths, branches, strict=True)])
        for part in passes:
            own = batch if len(passes) == 1 else self.collate(games[part])
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
