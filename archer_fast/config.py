"""Every setting of a run, as dataclasses that check themselves; the command line is made from them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

# No module of ours is imported here: whoever only asks for settings (`--help`) should not wait for torch.

AttentionImpl = Literal[
    "auto", "flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen", "sdpa", "reference"
]
TrunkMode = Literal["frozen", "shared", "lora", "separate"]
Algorithm = Literal["archer", "ppo", "reinforce", "filtered-bc"]
ValueTarget = Literal["behaviour", "resample", "expectile"]
ActorData = Literal["replay", "on_policy"]
EngineName = Literal["embedded", "vllm"]
ActionSource = Literal["fresh", "logged", "both"]
Advantage = Literal["centred", "q_minus_v", "residual"]
Shard = Literal["none", "trained", "full"]
PolicyLoss = Literal["reinforce", "ppo_clip", "awr"]


def _at_least(config: Any, **bounds: float) -> None:
    for name, low in bounds.items():
        value = getattr(config, name)
        if not value >= low or not math.isfinite(value):
            raise ValueError(f"{name}: wanted at least {low:g}, got {value}")


def _within(config: Any, **bounds: tuple[float, float]) -> None:
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise ValueError(f"{name}: wanted a number from {low:g} to {high:g}, got {value}")


# What a task is played with where nobody says otherwise: 10 objects are the paper's subset.
_USUAL_OPTIONS: dict[str, dict[str, Any]] = {"twenty-questions": {"objects": 10}}


@dataclass(slots=True)
class TaskConfig:
    """What is played."""

    name: str = "twenty-questions"
    """A registered task (see `archer-fast envs`)."""
    options: dict[str, Any] = None  # type: ignore[assignment]  # None becomes what is usual for the task
    """Options of the task, e.g. `--task.options objects=157 max_turns=12`; those not named keep their value."""

    def __post_init__(self) -> None:
        if self.options is None:
            self.options = dict(_USUAL_OPTIONS.get(self.name, {}))


@dataclass(slots=True, frozen=True)
class TinyModel:
    """Sizes of the embedded default model (about 0.4 M parameters: a decode step of 128 games in a few ms)."""

    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 2
    """Decoder blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 1
    """Key-value heads (one: the cache, which bounds decoding speed, is a quarter)."""
    intermediate_size: int = 256
    """Width of the gated MLP."""
    max_positions: int = 512
    """The window, in tokens."""
    vocab_size: int = 2048
    """At most; the task's text decides."""

    def __post_init__(self) -> None:
        sizes = {f.name: 1 for f in dataclasses.fields(self)}
        _at_least(self, **sizes | {"vocab_size": 257})  # every byte, and the stop token
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads: wanted a multiple of num_kv_heads {self.num_kv_heads}, got {self.num_heads}")
        if self.hidden_size % (2 * self.num_heads):  # rotary positions turn a head's numbers in pairs
            raise ValueError(f"hidden_size: wanted a multiple of 2 x {self.num_heads} heads, got {self.hidden_size}")


@dataclass(slots=True)
class LoRAConfig:
    """Adapters that train instead of the weights (arXiv 2106.09685): actor, critic and start policy share one base."""

    rank: int = 0
    """Rank of an adapter's matrices; 0: no adapters, all weights train."""
    alpha: float = 32.0
    """An adapter's product is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that are adapted, e.g. `q_proj v_proj`; none: all of them but the lm_head."""

    def __post_init__(self) -> None:
        _at_least(self, rank=0, alpha=0)


@dataclass(slots=True)
class ModelConfig:
    """The policy that is trained."""

    path: str | None = None
    """A local folder or hub name of any causal LM; None builds and warm-starts the tiny embedded model."""
    tiny: TinyModel = field(default_factory=TinyModel)
    """Sizes of the embedded default model."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters in place of training all weights."""
    stop_token: str | None = None
    """Text of the one token that ends an action; None: the tokenizer's end-of-sequence token."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Weights and activations."""
    attention: AttentionImpl = "auto"
    """Packed attention kernel; `auto` chooses by device and prints its choice: flash_attention_2 where flash-attn is
    installed, else torch's own `varlen`; 3 and 4 only by name; without CUDA or in float32 `sdpa`."""
    max_pass_tokens: int = 32768
    """Tokens of one pass over stored games, forward alone or with backward: more are cut into several passes with the
    same result. Games are never split, so the longest one of a batch is a pass of its own where it is longer."""
    activation_checkpointing: bool = False
    """Keep the input of each decoder block alone and compute the block again in backward (arXiv 1604.06174): far less
    memory a token of a pass with gradients, for a third more FLOPs (half as many again with adapters)."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments, and the float32 master weights of a model that trains in half precision, in the
    host's memory, where the host moves them: 12 bytes a trained weight less on the GPU, each step slower."""
    shard: Shard = "none"
    """What several processes (torchrun) divide among them by torch's `fully_shard` instead of each holding it whole:
    `trained`, weights that train, with their gradients and optimizer state; `full`, the frozen start policy too, which
    with adapters is the base of all. Whole they are while games are played or actions sampled; else block by block."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto takes a GPU where there is one."""
    threads: int | None = None
    """CPU threads of torch; None: one for the embedded model, whose matrices are too small to share (two threads
    beside another busy process were 15 times slower than one), torch's own choice for a model by path."""

    def __post_init__(self) -> None:
        _within(self, max_pass_tokens=(1, 2**31 - 1))
        if self.offload_optimizer and self.shard != "none":
            raise ValueError(
                f"offload_optimizer: wanted false where weights are sharded (shard {self.shard!r}), got true"
            )
        if self.shard == "trained" and self.lora.rank:
            raise ValueError("shard: wanted none or full with adapters, which are whole on every rank, got trained")
        if self.threads is not None:
            _at_least(self, threads=1)

    @property
    def num_threads(self) -> int | None:
        """`threads` with its default filled in; None leaves torch's own choice."""
        return 1 if self.threads is None and self.path is None else self.threads


@dataclass(slots=True)
class WarmStartConfig:
    """Cloning of a scripted player before the first rollout (done once, cached by content)."""

    enabled: bool | None = None
    """None: for the embedded model, not for a model given by path."""
    player: str | None = None
    """The scripted player to clone; None: the task's mediocre one."""
    games: int = 6000
    """Games of the player to learn from."""
    steps: int = 500
    """Optimizer steps."""
    batch_games: int = 24
    """Games an optimizer step."""
    lr: float = 3e-3
    """Peak learning rate (linear warm-up over 5 %, then cosine to a tenth)."""
    observation_weight: float = 1.0
    """Weight of the loss on the environment's tokens: predicting answers is what teaches the trunk the task."""

    def __post_init__(self) -> None:
        _at_least(self, games=1, steps=0, batch_games=1, lr=0, observation_weight=0)


@dataclass(slots=True)
class VllmConfig:
    """vLLM as the engine of rollouts (`rollout.engine vllm`); extra `vllm`."""

    url: str | None = None
    """A server that is already there, e.g. http://node7:8000, started as docs/running_7b.md says; None: in this process
    (extra `vllm`)."""
    exchange: str | None = None
    """Folder that trainer and server both see, where weights are handed over; None: engine/ in the run's folder."""
    kv_cache_gb: float = 4.0
    """GiB of keys and values that it keeps beside the trainer; prefixes of games stay there while there is room. A
    server has settings of its own for this, and for `enforce_eager`."""
    max_model_len: int | None = None
    """Longest game in tokens; None: the model's window, which `kv_cache_gb` must hold at least once."""
    max_num_seqs: int = 256
    """Actions that are sampled at once; more wait."""
    enforce_eager: bool = True
    """False: compile, and capture CUDA graphs, at the start of every run."""

    def __post_init__(self) -> None:
        _at_least(self, max_num_seqs=1)
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: wanted http://HOST:PORT, got {self.url!r}")
        if self.exchange is not None and self.url is None:
            raise ValueError("exchange: wanted None where no url is given, weights stay in this process")
        if not (self.kv_cache_gb > 0 and math.isfinite(self.kv_cache_gb)):
            raise ValueError(f"kv_cache_gb: wanted more than 0, got {self.kv_cache_gb}")
        if self.max_model_len is not None:
            _at_least(self, max_model_len=2)


@dataclass(slots=True)
class RolloutConfig:
    """How games are played."""

    engine: EngineName = "embedded"
    """What samples: `embedded`, on the policy's own weights; `vllm`, with a copy of them that follows every
    update."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """Its settings, where it is the engine."""
    games: int = 32
    """Games an iteration."""
    num_slots: int = 128
    """Games in flight at once."""
    max_new_tokens: int = 12
    """Longest action, stop token included."""
    temperature: float = 1.0
    """Of sampling, and of the log-probs the actor is trained on."""
    max_dropped_share: float = 0.1
    """Stop the run when more than this share of an iteration's games fail in their environment."""
    iterations: int | None = None
    """Iterations that play; the later ones learn from the replay alone, as offline algorithms do. None: all."""
    cuda_graphs: bool = True
    """On a GPU the engine's decode steps are launched as CUDA graphs, which are captured when they are first met; off:
    kernel by kernel. The numbers are the same."""
    best_of: int = 1
    """Actions sampled a state, of which the critic's best is played (CHAI, arXiv 2204.08426); only with `archer`."""

    def __post_init__(self) -> None:
        _at_least(self, games=1, num_slots=1, max_new_tokens=1, best_of=1)
        if self.iterations is not None:
            _at_least(self, iterations=1)
        _within(self, temperature=(1e-3, 100.0), max_dropped_share=(0.0, 1.0))


@dataclass(slots=True)
class BufferConfig:
    """The replay of whole games (a C++ ring; the oldest leave first)."""

    max_trajectories: int = 256
    """Games kept: those of the last iterations, whose actions are still like the policy's."""
    max_tokens: int = 1 << 20
    """Tokens kept (2 bytes each for a vocabulary of up to 65,536, else 4)."""
    max_feature_memory_gb: float = 4.0
    """GiB of a `frozen` critic trunk's features in RAM (a turn has 2 hidden states); more lie in files without names in
    $TMPDIR, or /tmp, mapped into memory and gone when the run ends."""

    def __post_init__(self) -> None:
        _at_least(self, max_trajectories=1, max_tokens=2, max_feature_memory_gb=0)

    @property
    def max_feature_memory(self) -> int:
        """In bytes."""
        return int(self.max_feature_memory_gb * 2**30)


@dataclass(slots=True)
class CriticConfig:
    """The turn-level double critic."""

    trunk: TrunkMode = "frozen"
    """`frozen`: features of the start policy, computed once and cached; `shared`: the critic's gradient
    reaches the actor's backbone (its adapter, where `model.lora.rank` is above 0); `lora`: an adapter of the critic's
    own on the start policy, like `model.lora`; `separate`: a trunk of its own, trained with the heads."""
    value_target: ValueTarget = "behaviour"
    """a' of V's target Qbar(s, a'): the action that was taken (SARSA), or a fresh sample of the policy a draw (the
    paper); `expectile`: the action that was taken, and V an upper expectile of Qbar (IQL, arXiv 2110.06169)."""
    expectile: float = 0.9
    """Of V's loss where `value_target` is `expectile`; .5 is the mean."""
    td_lambda: float = 0.0
    """Q's target mixes r + gamma V(s') with what followed in the game: 0 is TD(0), 1 the Monte-Carlo return. Above 0
    the targets of all turns are made once an iteration; only with a `frozen` trunk."""
    reads_logprob: bool = True
    """Q sees log p(action) under its trunk: the language model's own belief in the action."""
    reads_repeated: bool = True
    """Q sees whether the same action was taken before in this game."""
    reads_turn: bool = True
    """Q and V see the index of the turn."""
    hidden_size: int = 256
    """Width of the heads' two hidden layers."""
    lr: float = 1e-3
    """Learning rate of the heads."""
    trunk_lr: float = 1e-3
    """Learning rate of a `shared`, `lora` or `separate` trunk."""
    gamma: float = 0.95
    """Discount a turn."""
    tau: float = 0.1
    """Polyak step of the target heads after every critic step."""
    epochs: int = 50
    """Critic steps an iteration."""
    batch_turns: int = 256
    """Transitions a critic step."""
    warmup_iterations: int = 4
    """Iterations before the actor first moves."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            hidden_size=1,
            lr=0,
            trunk_lr=0,
            epochs=0,
            batch_turns=1,
            warmup_iterations=0,
            max_grad_norm=0,
        )
        _within(self, gamma=(0.0, 1.0), tau=(0.0, 1.0), expectile=(0.01, 0.99), td_lambda=(0.0, 1.0))
        if self.td_lambda > 0 and self.trunk != "frozen":
            raise ValueError(f"td_lambda: wanted 0 for a trunk that trains ({self.trunk}), got {self.td_lambda}")


@dataclass(slots=True)
class UpdateConfig:
    """How the actor moves, whatever credits it."""

    batch_games: int = 32
    """Games an actor step."""
    epochs: int = 6
    """Actor steps an iteration."""
    lr: float = 2e-4
    """Learning rate."""
    kl_coef: float = 0.05
    """Weight of KL(policy || start): without it the actor drifts to texts the critic never saw."""
    max_kl_step: float = 0.5
    """Nats an action that the policy may move in one iteration; then its actor steps end. Measured on fresh actions by
    KL(policy || start), else on those of the newest games; not at all where older games are learned from."""
    entropy_coef: float = 0.0
    """Weight of the entropy of an action's tokens (a bonus)."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""

    def __post_init__(self) -> None:
        _at_least(self, batch_games=1, epochs=0, lr=0, kl_coef=0, entropy_coef=0, max_kl_step=0, max_grad_norm=0)


@dataclass(slots=True)
class ActorConfig(UpdateConfig):
    """The token-level actor of ArCHer."""

    epochs: int = 8
    """Actor steps an iteration."""
    data: ActorData = "on_policy"
    """`replay`: states of replayed games; `on_policy`: states of this iteration's games."""
    actions: ActionSource = "both"
    """`fresh`: sampled anew at these states; `logged`: the actions that were taken there, all turns of a game; `both`
    in one step, fresh ones `centred` and logged ones by their `residual`."""
    advantage: Advantage = "centred"
    """`centred`: Q minus its mean over the fresh actions of the state; `q_minus_v`: min Q - min V (the paper);
    `residual`: r + gamma V(s') - V(s) of a logged action."""
    gae_lambda: float = 0.0
    """Of `residual`: 0 is that of one turn; above 0 it also counts those of the turns that followed (GAE)."""
    loss: PolicyLoss = "ppo_clip"
    """`reinforce` (the paper); `ppo_clip`: with the ratio to the policy that sampled; `awr`: weights exp(beta A)."""
    alternatives: int = 4
    """K, fresh actions a state; their mean Q is the baseline of `centred`."""
    states_per_game: int = 8
    """States of a game that an actor step visits with fresh actions."""
    pessimistic: bool = True
    """The lesser of two heads, as in the paper; else their mean."""
    normalise_advantages: bool = True
    """Divide a batch's advantages by their root mean square. Where that is larger than the spread of the games' own
    returns at equal turns, what is beyond it is the critic's error, and the step is made smaller by their ratio."""
    token_baseline: bool = False
    """Subtract a value a token, fitted to the advantage, as the paper's token-level baseline does."""
    clip: float = 0.2
    """`ppo_clip`: how far the ratio may leave 1."""
    awr_beta: float = 1.0
    """`awr`: inverse temperature of the weights."""

    def __post_init__(self) -> None:
        UpdateConfig.__post_init__(self)
        _at_least(self, alternatives=1, states_per_game=1, awr_beta=0)
        _within(self, clip=(0.0, 1.0), gae_lambda=(0.0, 1.0))
        if self.advantage == "residual" and self.actions == "fresh":
            raise ValueError("advantage: 'residual' is of logged actions; wanted actions = logged, got fresh")
        if self.advantage == "centred" and self.actions == "logged":
            raise ValueError("advantage: 'centred' compares fresh actions; wanted actions = fresh or both, got logged")
        if self.actions == "both" and self.advantage != "centred":
            raise ValueError(
                f"advantage: wanted centred where actions = both (logged ones get their residual), got {self.advantage}"
            )
        if self.actions != "logged" and self.advantage != "q_minus_v" and self.alternatives < 2:
            raise ValueError(f"alternatives: wanted at least 2 to compare, got {self.alternatives}")


@dataclass(slots=True)
class PPOConfig(UpdateConfig):
    """PPO with a value head of its own on the start policy's hidden states (arXiv 1707.06347)."""

    level: Literal["token", "turn"] = "token"
    """A time step is a token of an action, or a whole turn (token ratios either way)."""
    gamma: float = 0.95
    """Discount a turn; nothing is discounted inside one."""
    gae_lambda: float = 0.95
    """Of generalised advantage estimation, a time step."""
    clip: float = 0.2
    """How far the ratio of a token may leave 1."""
    value_lr: float = 1e-3
    """Learning rate of the value head."""
    value_epochs: int = 10
    """Passes of the value head over an iteration's games."""
    value_batch: int = 512
    """Time steps a step of the value head."""

    def __post_init__(self) -> None:
        UpdateConfig.__post_init__(self)
        _at_least(self, value_lr=0, value_epochs=0, value_batch=1)
        _within(self, gamma=(0.0, 1.0), gae_lambda=(0.0, 1.0), clip=(0.0, 1.0))


@dataclass(slots=True)
class ReinforceConfig(UpdateConfig):
    """Policy gradients from returns alone."""

    epochs: int = 2
    """Actor steps an iteration: more than one pass over its games is no longer on-policy, and nothing corrects it."""
    baseline: Literal["none", "batch", "group"] = "batch"
    """`batch`: the mean return-to-go of the iteration's games at the same turn; `group`: the mean return of the other
    games with the same hidden state (RLOO, arXiv 2402.14740), for whole games."""
    group_size: int = 8
    """Games with the same seed, where `baseline` is `group`."""
    gamma: float = 0.95
    """Discount a turn."""
    normalise_advantages: bool = True
    """Divide an iteration's advantages by their root mean square."""

    def __post_init__(self) -> None:
        UpdateConfig.__post_init__(self)
        _at_least(self, group_size=2)
        _within(self, gamma=(0.0, 1.0))


@dataclass(slots=True)
class FilteredBCConfig(UpdateConfig):
    """Behaviour cloning of the best games."""

    share: float = 0.1
    """Of the replayed games, the best by return, that are cloned; 1 clones all of them."""
    newest: bool = False
    """Choose among this iteration's games alone."""

    def __post_init__(self) -> None:
        UpdateConfig.__post_init__(self)
        _within(self, share=(0.0, 1.0))


@dataclass(slots=True)
class EvalConfig:
    """Evaluation while training and at its end."""

    every: int = 10
    """Iterations between evaluations; 0: only at the start and the end."""
    games: int = 512
    """Sampled games an evaluation."""
    final_games: int = 512
    """Sampled games of the evaluation before and after the run, and greedy ones after it."""
    probe_games: int = 32
    """Sampled games that tell how the policy behaves after an iteration that plays none (`rollout.iterations`)."""

    def __post_init__(self) -> None:
        _at_least(self, every=0, games=1, final_games=1, probe_games=1)


@dataclass(slots=True)
class CollapseConfig:
    """When a policy counts as collapsed, by the mean of the last iterations, and what is done then.

    A behaviour is no collapse while the return is clearly above the start's and near its best.
    """

    action: Literal["warn", "stop", "restore"] = "warn"
    """`warn`: say so; `stop`: save and end the run, which counts as finished; `restore`: give the actor the weights and
    the optimizer state of the best policy by evaluation so far (`best/`), while critic and replay stay."""
    window: int = 5
    """Iterations whose mean is judged; none before there are as many."""
    return_errors: float = 4.0
    """Return: standard errors of the difference that it may lie below the start's."""
    max_invalid: float = 0.5
    """Invalid turns: how far their share may go from the start's (0) to all turns (1)."""
    max_repeat: float = 0.75
    """Repeated turns: how far their share may go from the start's (0) to all turns (1)."""
    min_entropy: float = 0.15
    """Entropy a token, as a share of the start's."""
    max_kl: float = 2.5
    """Nats a token of KL(policy || start)."""
    max_restores: int = 3
    """Restores of a run; a collapse after them stops it."""

    def __post_init__(self) -> None:
        _at_least(self, window=1, return_errors=0, max_kl=0, max_restores=0)
        _within(self, max_invalid=(0.0, 1.0), max_repeat=(0.0, 1.0), min_entropy=(0.0, 1.0))


@dataclass(slots=True)
class StallConfig:
    """What is done when nothing moves: no game ends, no step is taken, no call into an environment, engine or model
    begins."""

    seconds: float = 600.0
    """Of silence after which the run counts as stalled; 0: never."""
    action: Literal["warn", "stop"] = "warn"
    """Either way what was last called is named, and the stacks of all threads go to stalls.txt in the run's folder.
    `warn`: then wait on; `stop`: then end the process with exit status 1, for `--resume` to go on from the last
    checkpoint (the other ranks of a job and its scheduler see it end). Where a call holds Python's lock, nobody can
    name it: the stacks are written, and the process ends, after twice the time."""

    rank_seconds: float = 1800.0
    """How long one of several processes (torchrun) waits for the others before it ends: the leading one's warm start,
    the slowest one's games, a checkpoint. One that has died is noticed at once."""

    def __post_init__(self) -> None:
        _at_least(self, seconds=0, rank_seconds=1)


@dataclass(slots=True)
class Config:
    """A whole run. Saved as config.json in the run's folder; `--config FILE` gives it back."""

    out: str = "runs/default"
    """Folder of the run: config, metrics.jsonl, checkpoints, report.html."""
    iterations: int = 100
    """Rollout, critic and actor phases to run."""
    seed: int = 0
    """Of weights, games and sampling; runs on CPU repeat bit by bit."""
    resume: bool = False
    """Go on from the last checkpoint in `out`."""
    checkpoint_every: int = 10
    """Iterations between checkpoints (the last one and Ctrl-C write one too)."""
    max_skipped_steps: int = 5
    """Optimizer steps in a row with a non-finite loss or gradient before the run stops."""
    algorithm: Algorithm = "archer"
    """Who learns; each has its settings below: `critic` and `actor`, `ppo`, `reinforce`, `filtered_bc`."""
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    filtered_bc: FilteredBCConfig = field(default_factory=FilteredBCConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    stall: StallConfig = field(default_factory=StallConfig)
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers beside metrics.jsonl, each an extra of the package."""

    def __post_init__(self) -> None:
        _at_least(self, iterations=0, seed=0, checkpoint_every=1, max_skipped_steps=1)
        if self.algorithm == "archer" and self.critic.trunk == "lora" and self.model.lora.rank == 0:
            raise ValueError("model.lora.rank: wanted at least 1 where critic.trunk is 'lora', got 0")
        if self.rollout.best_of > 1 and self.algorithm != "archer":
            raise ValueError(f"rollout.best_of: wanted 1 without a turn critic ({self.algorithm})")
        if self.rollout.iterations is not None and self.algorithm == "archer" and self.actor.data == "on_policy":
            raise ValueError("rollout.iterations: wanted None where actor.data is 'on_policy'")
        if self.rollout.iterations is not None and self.algorithm == "filtered-bc" and self.filtered_bc.newest:
            raise ValueError("rollout.iterations: wanted None where filtered_bc.newest is on")
        if self.algorithm in ("ppo", "reinforce") and self.rollout.iterations is not None:
            raise ValueError(f"rollout.iterations: wanted None, {self.algorithm} learns from new games alone")
        if self.rollout.iterations is not None and self.iterations and self.iterations <= self.rollout.iterations:
            raise ValueError(
                f"iterations: wanted more than rollout.iterations = {self.rollout.iterations}, after which the "
                f"learning from the replay begins, got {self.iterations}"
            )
        if self.learns_from_newest and self.rollout.games > self.buffer.max_trajectories:
            raise ValueError(
                f"buffer.max_trajectories: wanted at least rollout.games = {self.rollout.games}, "
                f"got {self.buffer.max_trajectories}"
            )
        if self.group_size > 1 and self.rollout.games % self.group_size:
            raise ValueError(
                f"rollout.games: wanted a multiple of reinforce.group_size {self.group_size}, got {self.rollout.games}"
            )

    @property
    def update(self) -> UpdateConfig:
        """How the chosen algorithm's actor moves."""
        by_algorithm: dict[str, UpdateConfig] = {
            "archer": self.actor,
            "ppo": self.ppo,
            "reinforce": self.reinforce,
            "filtered-bc": self.filtered_bc,
        }
        return by_algorithm[self.algorithm]

    @property
    def gamma(self) -> float:
        """The chosen algorithm's discount a turn."""
        own = {"ppo": self.ppo.gamma, "reinforce": self.reinforce.gamma}
        return own.get(self.algorithm, self.critic.gamma)

    @property
    def learns_from_newest(self) -> bool:
        """The actor learns from the games of its own iteration."""
        newest = {"archer": self.actor.data == "on_policy", "filtered-bc": self.filtered_bc.newest}
        return newest.get(self.algorithm, True)

    @property
    def group_size(self) -> int:
        """Games that share a seed."""
        grouped = self.algorithm == "reinforce" and self.reinforce.baseline == "group"
        return self.reinforce.group_size if grouped else 1

    @property
    def keeps_features(self) -> bool:
        """A frozen critic trunk's features are kept beside the games."""
        return self.algorithm == "archer" and self.critic.trunk == "frozen"


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(cls: type[Any], values: Any, where: str = "config") -> Any:
    """Build `cls` from nested plain values; ValueError names an unknown key and the nearest known one."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: wanted an object of settings, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        made[key] = _convert(hints[key], value, f"{where}.{key}")
    try:
        return cls(**made)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}.{error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type[Any]", hint), value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: wanted one of {', '.join(map(repr, args))}, got {value!r}{hint_text}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: wanted a list, got {value!r}")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: wanted an object, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where}: wanted {hint.__name__}, got {value!r}")
    return value
