"""What a run holds between iterations, and how it starts, stops and goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archer_fast import _C
from archer_fast.adapted_backbone import AdaptedBackbone
from archer_fast.algorithms import make_learner
from archer_fast.algorithms.archer import Archer
from archer_fast.backbone import Backbone, choose_device, load_backbone
from archer_fast.best_policy import BestPolicy
from archer_fast.buffer import TrajectoryBuffer
from archer_fast.checkpoint import (
    Checkpoint,
    CheckpointError,
    copy_folder,
    list_checkpoints,
    load_checkpoint,
    replace_folder,
    restore_folder,
    save_checkpoint,
)
from archer_fast.collapse_response import CollapseResponse
from archer_fast.config import Config, to_dict
from archer_fast.devices import peak_flops
from archer_fast.doubling_bins import shares
from archer_fast.envs import registry
from archer_fast.evaluation import Evaluation, as_greedy, encoder, evaluate_policy, render_game
from archer_fast.flop_meter import FlopMeter
from archer_fast.loggers import Loggers, check_installed
from archer_fast.meters import Meters
from archer_fast.ranks import ALONE, Ranks, local_device
from archer_fast.rollout.best_of import BestOfEngine
from archer_fast.rollout.engines import Engines, check_engine
from archer_fast.rollout.policy_engine import PolicyEngine
from archer_fast.rollout.shared import play_shared
from archer_fast.run_folder import RunFolder, read_json, write_json, write_text
from archer_fast.sharded_checkpoint import load_shards, save_shards
from archer_fast.sharding import is_sharded
from archer_fast.start_policy import start_policy
from archer_fast.trajectory import Trajectory
from archer_fast.turn_features import FeatureLayout
from archer_fast.watcher import Watcher

GAMES_SHOWN = 5


class RunState:
    """The actor, the learner, the games counted so far, and the folder they are kept in."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        watcher: Watcher,
        start: Backbone,
        actor: Backbone,
        stop_token_id: int,
        buffer: TrajectoryBuffer,
        engines: Engines,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.folder, self.watcher, self.ranks = config, folder, watcher, ranks
        self.actor, self.stop_token_id = actor, stop_token_id
        self.actor.requires_grad_(True)
        self.spec = registry.get(config.task.name)
        self.generator = torch.Generator(actor.device).manual_seed(config.seed)
        self.engines = engines
        self.engine = engines.make(
            actor,
            stop_token_id,
            num_slots=config.rollout.num_slots,
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            generator=self.generator,
        )
        self.learner = make_learner(config, actor, start, self.engine, buffer, ranks)
        self.learner.on_pass = watcher.calling
        self.player = self._player(self.engine)
        self.flop_meter = self._make_flop_meter(start)
        self.peak_flops = peak_flops(actor.device, actor.model.dtype)  # of this rank's device
        self.iteration = 0
        self.num_games = 0
        self.best = BestPolicy(
            folder.best,
            actor,
            self.learner.actor_step,
            keeps_optimizer=config.collapse.action == "restore",
            ranks=ranks,
        )
        self.collapse = CollapseResponse(config.collapse, self.best.give_back, watcher.message)
        self.loggers: Loggers | None = None  # of the leading rank

    # -- start and resume --------------------------------------------------------------------------

    @classmethod
    def start(cls, config: Config, folder: RunFolder, watcher: Watcher, ranks: Ranks = ALONE) -> RunState:
        """A new run, or with `config.resume` the one in `folder`, exactly where its last checkpoint left it."""
        check_installed(config.log)
        check_ranks(config, ranks)
        check_engine(config.rollout, ranks.size)
        device = local_device(choose_device(config.model.device))
        found = list_checkpoints(folder.checkpoints) if config.resume else []
        ranks.check_alike("checkpoints in the folder of the run", [path.name for path in found])
        ranks.check_alike("settings", to_dict(config))
        if found:
            run = cls._resume(config, folder, watcher, load_checkpoint(found[-1]), device, ranks)
        else:
            start, stop_token_id = _start_policy(config, folder, device, watcher, ranks)
            start.requires_grad_(False)
            buffer = TrajectoryBuffer(
                config.buffer.max_tokens,
                config.buffer.max_trajectories,
                config.seed,
                vocab_size=start.vocab_size,
                gamma=config.gamma,
                feature_bytes=FeatureLayout.of(start).row_bytes if config.keeps_features else 0,
                max_feature_memory=config.buffer.max_feature_memory,
            )
            actor = _actor(config, folder, start)
            engines = _engines(config, folder, actor)
            run = cls(config, folder, watcher, start, actor, stop_token_id, buffer, engines, ranks)
        resumed = run.iteration if run.iteration else None
        if ranks.leads:
            run.loggers = Loggers(folder.path, config.log, config=to_dict(config), resumed=resumed)
        run._describe()
        if run.iteration == 0:
            run._evaluate_start()
        return run

    @classmethod
    def _resume(
        cls,
        config: Config,
        folder: RunFolder,
        watcher: Watcher,
        checkpoint: Checkpoint,
        device: torch.device,
        ranks: Ranks,
    ) -> RunState:
        ranks.led(lambda: _restore_folders(folder, checkpoint))
        start, stop_token_id = _load(config, folder.start, device)
        start.requires_grad_(False)
        actor = _actor(config, folder, start)
        try:
            actor.restore(checkpoint.policy)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        try:
            buffer = TrajectoryBuffer.load(checkpoint.buffer, max_feature_memory=config.buffer.max_feature_memory)
        except (OSError, ValueError) as error:
            raise CheckpointError(str(error)) from error
        engines = _engines(config, folder, actor)
        try:
            run = cls(config, folder, watcher, start, actor, stop_token_id, buffer, engines, ranks)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.buffer}: {error}") from error
        generator = checkpoint.tensors.pop("generator", None)
        if generator is None:
            raise CheckpointError(f"{checkpoint.path / 'state.safetensors'}: field 'generator' is missing")
        run.generator.set_state(generator)
        tensors = checkpoint.tensors
        if checkpoint.shards.is_dir():
            try:
                tensors = tensors | load_shards(checkpoint.shards, run.learner.like, ranks=ranks)
            except (KeyError, IndexError, ValueError) as error:
                raise CheckpointError(f"{checkpoint.shards}: {error}") from error
        try:
            run.learner.load_state_tensors(tensors)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.path / 'state.safetensors'}: field {error}") from error
        try:
            run.learner.load_state_numbers(checkpoint.number("learner"))
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.path / 'state.json'}: field 'learner': {error}") from error
        run.iteration = checkpoint.number("iteration")
        run.num_games = checkpoint.number("num_games")
        iteration, mean_return, standard_error = checkpoint.number("best")
        run.best.found = (iteration, mean_return, standard_error)
        try:
            run.collapse.load_state(checkpoint.number("collapse"))
        except KeyError as error:
            raise CheckpointError(f"{checkpoint.path / 'state.json'}: field 'collapse': {error}") from error
        watcher.message(f"resumed from {checkpoint.path} after iteration {run.iteration}, {run.num_games} games")
        if num_read := run.learner.complete_features():
            watcher.message(f"{num_read} games had no features of this start policy: they were read again")
        return run

    def _describe(self) -> None:
        """Say what really runs."""
        trained = sum(p.numel() for p in self.actor.parameters())
        parameters = sum(p.numel() for p in self.actor.model.parameters())
        say = self.watcher.message
        say(f"algorithm {self.config.algorithm}")
        say(f"task {self.config.task.name} {json.dumps(self.config.task.options)}, {parameters:,} parameters")
        if rank := self.config.model.lora.rank:
            say(f"adapters of rank {rank} on one base: the actor trains {trained:,} parameters")
        if self.ranks.size > 1:
            say(f"{self.ranks.size} ranks: games, passes and sampling are shared, gradients summed")
        if self.config.model.shard != "none":
            sharded = "all weights are" if self.config.model.shard == "full" else "weights that train are"
            say(f"{sharded} sharded over the ranks, with their gradients and optimizer state")
        say(f"device {self.actor.device}, {torch.get_num_threads()} threads, attention {self.actor.attention_impl}")
        if self.peak_flops is not None:
            say(f"utilisation is of {self.peak_flops / 1e12:,.0f} TFLOP/s a device, by its data sheet")
        say(f"rollouts by the engine {self.config.rollout.engine}")
        if self.config.algorithm == "archer":
            say(
                f"critic trunk {self.config.critic.trunk}, V target {self.config.critic.value_target}, "
                "one packed sequence a game"
            )
        buffer = self.learner.buffer
        features = f"{buffer.feature_bytes} bytes of features a turn"
        say(f"buffer C++ ring ({_C.__name__}), {len(buffer)} games in it, {features}")

    def _make_flop_meter(self, start: Backbone) -> FlopMeter | None:
        """None where the model's passes cannot be counted: it trains all the same."""
        self.watcher.calling("a pass without data")
        try:
            return FlopMeter(start, (self.actor, start, *self.learner.modules().values()), self.config.model.lora)
        except ValueError as error:
            self.watcher.message(f"FLOPs are not counted: {error}")
            return None

    # -- one iteration -----------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """All iterations are done, or a collapse ended the run."""
        return self.iteration >= self.config.iterations or self.collapse.stopped_by is not None

    def play_games(self, meters: Meters) -> list[Trajectory]:
        """This iteration's games, played by the present actor."""
        r = self.config.rollout
        if not self.ranks.leads:  # the leader's random numbers are in the checkpoint; these need none
            self.generator.manual_seed(self.ranks.seed(self.config.seed, self.iteration))
        if r.iterations is not None and self.iteration >= r.iterations:
            return []
        first = self.config.seed * 1_000_000_000 + self.num_games
        seeds = [first + i // self.config.group_size for i in range(r.games)]
        self.watcher.phase("rollout", len(self.ranks.share(seeds)))
        forwarded = self.engine.num_forward_tokens
        with self._gathered():
            self.player.reset()  # keys and values of older weights
            played = play_shared(
                self.ranks,
                self.player,
                lambda: self.spec.make_env(**self.config.task.options),
                encoder(self.actor.tokenizer),
                self.actor.tokenizer.decode,
                seeds,
                policy_version=self.learner.actor_step.num_steps,
                max_dropped_share=r.max_dropped_share,
                on_game=lambda game: self.watcher.advance(),
                on_call=self.watcher.calling,
            )
        self.num_games += r.games
        meters.count(processed_tokens=self.engine.num_forward_tokens - forwarded)
        meters.count_once(
            dropped_games=played.num_dropped,
            window_truncated_games=played.num_truncated_by_window,
            useful_tokens=sum(turn.action_ids.size for game in played.trajectories for turn in game.turns),
        )
        return played.trajectories

    def staleness(self) -> dict[str, float]:
        """How old the replay is, a histogram: `staleness_share_4` is the share of its turns that were sampled 4 to 7
        optimizer steps of the actor ago. Turns whose policy nobody knows are left out."""
        now, by_version = self.learner.actor_step.num_steps, self.learner.buffer.stats().turns_by_version
        turns_by_age = {now - version: turns for version, turns in by_version.items() if version >= 0}
        return {f"staleness_share_{age}": share for age, share in shares(turns_by_age).items()}

    def evaluate_if_due(self) -> dict[str, float]:
        """Every `eval.every` iterations: sampled games; the best policy so far is kept in best/.

        Where an iteration played nothing, some games are played after it for what they tell of the policy.
        """
        every, playing = self.config.eval.every, self.config.rollout.iterations
        offline = playing is not None and self.iteration > playing
        row: dict[str, float] = {}
        if every and self.iteration % every == 0 and self.iteration < self.config.iterations:
            evaluation = self._evaluate(self.config.eval.games)
            self.best.keep_if_better(self.iteration, evaluation)
            row = evaluation.as_metrics("eval_")
        elif offline:
            evaluation = self._evaluate(self.config.eval.probe_games)
        if offline:
            row |= {"probe_return": evaluation.mean_return, "probe_return_se": evaluation.standard_error}
            row |= evaluation.behaviour
        return row

    def check_collapse(self, row: dict[str, float]) -> dict[str, float]:
        """`collapsed` of this row; where it is, `collapse.action` is done."""
        return {"collapsed": float(self.collapse.check({"iteration": self.iteration, **row}))}

    def record(self, row: dict[str, float]) -> None:
        """One row of metrics, to every logger and the watcher."""
        row = {"iteration": self.iteration, "games": self.num_games, **row}
        if self.loggers:
            self.loggers.log(row)
        self.watcher.iteration(self.iteration, self.config.iterations, row)

    def save(self) -> Path:
        """Checkpoint everything an exact resume needs; where it lies."""
        write_policy, tensors = self.actor.writer(), self.learner.state_tensors()
        parts = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
        whole = {name: tensor for name, tensor in tensors.items() if name not in parts}
        if not parts:
            return self.ranks.led(lambda: self._write_checkpoint(write_policy, whole, None))
        # Written by all before the leading rank makes a checkpoint of everything: a run that is killed in between
        # leaves a folder that no checkpoint is, and that the next save makes anew.
        shards = self.folder.checkpoints / ".shards.writing"
        try:
            save_shards(shards, parts, self.ranks)
            return self.ranks.led(lambda: self._write_checkpoint(write_policy, whole, shards))
        finally:
            if self.ranks.leads:  # what a full disk has left
                shutil.rmtree(shards, ignore_errors=True)

    def _write_checkpoint(
        self, write_policy: Callable[[Path], None], tensors: dict[str, Tensor], shards: Path | None
    ) -> Path:
        return save_checkpoint(
            self.folder.checkpoints,
            self.iteration,
            write_policy,
            self.learner.buffer.save,
            {**tensors, "generator": self.generator.get_state()},
            {
                "iteration": self.iteration,
                "num_games": self.num_games,
                "best": self.best.found,
                "learner": self.learner.state_numbers(),
                "collapse": self.collapse.state(),
            },
            best=self.folder.best if self.best.keeps_optimizer else None,
            shards=shards,
        )

    # -- begin and end -----------------------------------------------------------------------------

    def _evaluate_start(self) -> None:
        # By the policy alone, also where a critic will choose (CHAI): it has learned nothing yet.
        before = self._evaluate(self.config.eval.final_games, final=True, alone=True)
        self.best.keep_if_better(0, before)
        self.collapse.detector.start = before.as_metrics("")
        self.ranks.led(lambda: self._show(self.folder.games_before, before))
        self.ranks.led(lambda: write_json(self.folder.path / "before.json", before.as_metrics("")))
        self.record(before.as_metrics("eval_"))

    def finish(self) -> dict[str, Any]:
        """Evaluate the last policy and the best one, keep the better in best/, write summary.json."""
        games = self.config.eval.final_games
        last = self._evaluate(games, final=True)
        write_policy = self.actor.writer()
        self.ranks.led(lambda: replace_folder(self.folder.final, write_policy))
        greedy = self._evaluate(games, greedy=True, final=True)
        self.actor.restore(self.folder.best)
        best = self._evaluate(games, final=True)
        self.actor.restore(self.folder.final)
        if last.mean_return >= best.mean_return:
            best = last
            self.best.keep(self.iteration, last)
        self.ranks.led(lambda: self._show(self.folder.games_after, best))
        assert self.best.found is not None
        summary: dict[str, Any] = {
            "games": self.num_games,
            **{f"before_{k}": v for k, v in read_json(self.folder.path / "before.json").items()},
            **best.as_metrics("best_"),
            "best_iteration": self.best.found[0],
            **last.as_metrics("last_"),
            **{f"last_{name}": value for name, value in as_greedy(greedy).items()},
            **self.collapse.summary(),
            "finished_at": time.time(),
        }
        self.record({**last.as_metrics("eval_"), **as_greedy(greedy)})
        self.ranks.led(lambda: write_json(self.folder.summary, summary))
        return summary

    def _evaluate(
        self,
        games: int,
        *,
        greedy: bool = False,
        final: bool = False,
        alone: bool = False,
    ) -> Evaluation:
        """`final`: on games of their own, not those by which the best policy was chosen; `alone`: no critic chooses."""
        self.watcher.phase("evaluate", games)
        with self._gathered():
            evaluation = evaluate_policy(
                self.actor,
                self.stop_token_id,
                self.config.task,
                self.config.rollout,
                games=games,
                seed=2 * self.config.seed + final,
                greedy=greedy,
                player=(lambda engine: engine) if alone else self._player,
                make_engine=self.engines.make,
                on_game=lambda game: self.watcher.advance(),
                on_call=self.watcher.calling,
                ranks=self.ranks,
            )
        if evaluation.num_games and not greedy:
            evaluation.kl = self.learner.kl_to_start(evaluation.trajectories)
        return evaluation

    def _player(self, engine: PolicyEngine) -> PolicyEngine | BestOfEngine:
        """What plays: the engine, or the critic's choice among its actions."""
        if self.config.rollout.best_of == 1:
            return engine
        assert isinstance(self.learner, Archer)  # Config sees to it
        return BestOfEngine(engine, self.config.rollout.best_of, self.learner.score)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Inside, what plays has its weights whole: the actor, and what a critic that chooses reads."""
        with self.actor.gathered():
            if isinstance(self.learner, Archer) and self.config.rollout.best_of > 1:
                with self.learner.critic.trunk.gathered():
                    yield
            else:
                yield

    def _show(self, path: Path, evaluation: Evaluation) -> None:
        games = [render_game(game, self.actor.tokenizer) for game in evaluation.trajectories[:GAMES_SHOWN]]
        write_text(path, "\n\n".join(games) + "\n")


def _start_policy(
    config: Config, folder: RunFolder, device: torch.device, watcher: Watcher, ranks: Ranks
) -> tuple[Backbone, int]:
    """It is made by the leading rank and kept in start/, where the others find it."""
    made: list[tuple[Backbone, int]] = []

    def make() -> None:
        made.append(start_policy(config, device, watcher))
        replace_folder(folder.start, made[0][0].save)

    ranks.led(make)
    return made[0] if made else _load(config, folder.start, device)


def _restore_folders(folder: RunFolder, checkpoint: Checkpoint) -> None:
    for policy in (folder.start, folder.best, folder.final):
        restore_folder(policy)
    if checkpoint.best.is_dir():  # best/ may be of a later iteration, which is now run again
        copy_folder(checkpoint.best, folder.best)


def _actor(config: Config, folder: RunFolder, start: Backbone) -> Backbone:
    """What trains: an adapter on the start policy, or a copy of it."""
    start.checkpoints_activations = config.model.activation_checkpointing  # and so does whatever is made of it
    if config.model.lora.rank:
        return AdaptedBackbone(start, "actor", config.model.lora, seed=config.seed, home=folder.start.absolute())
    return start.frozen_copy()


def _engines(config: Config, folder: RunFolder, actor: Backbone) -> Engines:
    return Engines(config.rollout, actor, folder.start, folder.path / "engine")


def check_ranks(config: Config, ranks: Ranks) -> None:
    """ValueError where some rank would have no game, or where one process is to share weights."""
    if config.model.shard != "none" and ranks.size == 1:
        raise ValueError(
            f"model.shard: wanted none with one process, got {config.model.shard}; start several with torchrun"
        )
    games = {
        "rollout.games": config.rollout.games,
        "batch_games": config.update.batch_games,
        "buffer.max_trajectories": config.buffer.max_trajectories,
    }
    for name, number in games.items():
        if number < ranks.size:
            raise ValueError(f"{name}: wanted a game a rank at least, {ranks.size}, got {number}")


def _load(config: Config, path: Path, device: torch.device) -> tuple[Backbone, int]:
    dtype: Any = getattr(torch, config.model.dtype)
    return load_backbone(
        str(path), device=device, dtype=dtype, attention=config.model.attention, stop_token=config.model.stop_token
    )
