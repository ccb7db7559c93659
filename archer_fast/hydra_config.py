"""A Hydra yaml of the original ArCHer as a `Config`, with all that has no counterpart named."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from archer_fast.config import Config, from_dict, to_dict
from archer_fast.presets import with_preset

# What the original takes where a yaml says nothing: the defaults of offpolicy_train_loop and of its agents.
DEFAULTS: dict[str, Any] = {
    "agent_type": "archer",
    "policy_lm": "gpt2",
    "max_new_tokens": 32,
    "eos_str": "\n",
    "temperature": 1.0,
    "warmup_iter": 20,
    "rollout_size": 50,
    "eval_size": 1,
    "batch_size": 2,
    "capacity": 500_000,
    "iterations": 10,
    "epochs": 3,
    "actor_epochs": 3,
    "grad_accum_steps": 1,
    "critic_lr": 1e-3,
    "lm_lr": 1e-5,
    "gamma": 0.9,
    "tau": 0.1,
    "max_grad_norm": 0.01,
    "use_wandb": False,
    "save_freq": 25,
    "eval_freq": 25,
}
# Its environments, and the turns of their longest games; what we call them follows from the name.
ENVIRONMENTS = {"twenty_questions": 20, "guess_my_city": 20, "adventure": 50, "webshop": 10}
_PAPER = "the preset paper under all that follows"


class Agent(NamedTuple):
    """What an agent_type becomes."""

    preset: str
    settings: dict[str, Any]
    note: str


AGENTS = {
    "archer": Agent("paper", {}, _PAPER),
    "archer_llm": Agent("paper", {}, f"{_PAPER}; the original's prompt for Mistral is not added"),
    "dqn": Agent("paper", {}, f"{_PAPER}; the name is an older one of archer"),
    "chai": Agent(
        "paper",
        {"rollout.best_of": 5, "actor.epochs": 0},
        f"{_PAPER}; the online critic chooses, and V's target is of a plain sample (the original: of the chosen one)",
    ),
    "online_filteredbc": Agent(
        "filtered-bc", {"filtered_bc.share": 0.1}, "the preset filtered-bc under all that follows"
    ),
}
# Its adapters: layers of Llama and Mistral.
LORA: dict[str, Any] = {
    "model.lora.rank": 16,
    "model.lora.alpha": 32.0,
    "model.lora.targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
_NO_SECRETS = "a secret, which no config should hold"
_OLDER = "read by older versions of the original alone"
# Keys of the original that are not converted, and why.
LEFT_OUT: dict[str, str] = {
    "huggingface_token": f"{_NO_SECRETS}; `hf auth login` once, or HF_TOKEN in the environment",
    "wandb_key": f"{_NO_SECRETS}; `wandb login` once, or WANDB_API_KEY in the environment",
    "cache_dir": "HF_HOME in the environment says where Hugging Face keeps models",
    "checkpoint_path": "a .pt file is no model: load its model_state_dict into policy_lm, save_pretrained(FOLDER), and "
    "train with --model.path FOLDER; or clone a scripted player with --warm-start.enabled True",
    "critic_lm": "the critic's trunk is a copy of the policy's own model, trained with the heads",
    "env_load_path": "tasks come with what they need; Twenty Questions is answered from a table of facts",
    "env_idx": "each game draws what is hidden by its seed; options of the task can narrow it",
    "do_sample": "training games are always sampled",
    "use_baseline": "the original's run.py does not read it; --actor.token-baseline is the paper's",
    "dropout": "dropout is always off: log-probs must be those of the sampler",
    "TEMPLATE": "there is no prompt but the task's own text",
    "project_name": "wandb's project is called archer-fast",
    "run_name": "wandb's run is called as the folder of the run",
    "webshop_lower": "options of the task narrow what is played",
    "webshop_upper": "options of the task narrow what is played",
    "hydra": "settings of Hydra itself",
    **dict.fromkeys(("beta", "ppo_epochs", "clip_range", "actor_update_freq", "warmup_size"), _OLDER),
    **dict.fromkeys(("bc_data_cutoff", "bc_num_trajectories", "env_cutoff", "env_offset"), _OLDER),
}
_NO_CRITIC = "filtered BC has no critic"
# The same, where it depends on the agent.
LEFT_OUT_OF: dict[str, dict[str, str]] = {
    "chai": dict.fromkeys(("warmup_iter", "actor_epochs", "lm_lr"), "CHAI's actor never moves"),
    "online_filteredbc": {
        **dict.fromkeys(("critic_lr", "epochs", "gamma", "tau", "critic_lm"), _NO_CRITIC),
        "warmup_iter": "filtered BC learns from its first iteration on",
    },
}


class Taken(NamedTuple):
    """`Taken("capacity = 100000", {"buffer.max_trajectories": 5000}, "the original counts transitions, ...")`."""

    source: str
    """Keys and values of the yaml."""
    settings: dict[str, Any]
    """Ours, by dotted name."""
    note: str = ""
    """What is not the same."""


@dataclass(slots=True, frozen=True)
class ConvertedConfig:
    config: Config
    files: tuple[Path, ...]
    """What was read: the yaml, then its defaults."""
    taken: tuple[Taken, ...]
    left_out: dict[str, str]
    """Every other key that the files have, and why; no values, which may be secret."""


def convert_config(path: Path | str) -> ConvertedConfig:
    """Read a yaml with its `defaults` and make the `Config` of the same training, by ArCHer's published semantics.

    Errors: ValueError naming the file, and the line or the key at fault.
    """
    path = Path(path)
    given, files = compose(path)
    keys = _Keys(path, given)
    agent = keys.choice("agent_type", AGENTS)
    preset, settings, note = AGENTS[agent]
    taken = [Taken(keys.said("agent_type"), settings, note), *_task(keys), *_model(keys), *_run(keys)]
    taken += [*_update(keys, agent), *_buffer(keys, agent)]
    values = to_dict(with_preset(Config(), preset))
    origin: dict[str, str] = {}
    for source, settings, _ in taken:
        for dotted, value in settings.items():
            *sections, last = dotted.split(".")
            inner = values
            for section in sections:
                inner = inner[section]
            assert last in inner, dotted
            inner[last], origin[dotted] = value, source
    try:
        config: Config = from_dict(Config, values)
    except ValueError as error:
        message = str(error).removeprefix("config.")
        source = origin.get(message.partition(":")[0], "")
        raise ValueError(f"{path}: {source}{': ' if source else ''}{message}") from None
    reasons = {"save_path": "", **LEFT_OUT, **LEFT_OUT_OF.get(agent, {})}
    reasons |= {key: "nothing was asked for" for key in reasons if given.get(key, 0) in (None, "")}
    left_out = {key: reasons.get(key) or _unknown(key) for key in given if key not in keys.used}
    return ConvertedConfig(config, files, tuple(taken), left_out)


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, [*DEFAULTS, "env_name", "save_path", *LEFT_OUT], n=1)
    return "no key of the original" + (f"; did you mean {near[0]!r}?" if near else "")


# -- what becomes of the keys ------------------------------------------------------------------------


def _task(keys: _Keys) -> list[Taken]:
    name = keys.text("env_name")
    if name is None:
        raise ValueError(
            f"{keys.path}: env_name: wanted the name of an environment ({', '.join(ENVIRONMENTS)}), got none"
        )
    options: dict[str, Any] = {}
    note = ""
    if name == "twenty_questions":
        options = {"objects": None, "max_turns": keys.longest_game, "original_quirks": False}
        note = "a question wins where it is a guess; original_quirks = true goes by its last word, as the original does"
    elif name not in ENVIRONMENTS:
        near = difflib.get_close_matches(name, ENVIRONMENTS, n=1)
        note = "no environment of the original" + (f"; did you mean {near[0]!r}?" if near else "")
    said = keys.said("env_name", *(key for key in ("max_conversation_length",) if key in keys.given))
    return [Taken(said, {"task.name": name.replace("_", "-"), "task.options": options}, note)]


def _model(keys: _Keys) -> list[Taken]:
    stop = "must be one token of the policy's vocabulary; it stays in the dialogue that the policy reads"
    scaled = "log-probs are taken at it too, the original's at 1" if keys.number("temperature") != 1 else ""
    taken = [
        keys.take("policy_lm", keys.required_text, "model.path"),
        keys.take("eos_str", keys.text, "model.stop_token", note=stop),
        keys.take("max_new_tokens", keys.whole, "rollout.max_new_tokens"),
        keys.take("temperature", keys.number, "rollout.temperature", note=scaled),
    ]
    if "use_bfloat16" in keys.given:
        dtype = "bfloat16" if keys.flag("use_bfloat16") else "float32"
        taken.append(Taken(keys.said("use_bfloat16"), {"model.dtype": dtype}))
    if "use_lora" in keys.given:
        settings, note = {"model.lora.rank": 0}, ""
        if keys.flag("use_lora"):
            settings, note = LORA, "without its dropout, so that log-probs are those of the sampler"
        taken.append(Taken(keys.said("use_lora"), settings, note))
    return taken


def _run(keys: _Keys) -> list[Taken]:
    log = ("wandb",) if keys.flag("use_wandb") else ()
    taken = [
        keys.take("iterations", keys.whole, "iterations"),
        keys.take("rollout_size", keys.whole, "rollout.games"),
        keys.take("eval_size", keys.whole, "eval.games", note="sampled; the original's are greedy"),
        keys.take("eval_freq", keys.whole, "eval.every"),
        keys.take("save_freq", keys.whole, "checkpoint_every"),
        Taken(keys.said("use_wandb"), {"log": log}),
    ]
    if keys.given.get("save_path") not in (None, ""):
        taken.append(keys.take("save_path", keys.required_text, "out"))
    return taken


def _update(keys: _Keys, agent: str) -> list[Taken]:
    """A step draws batch_size x grad_accum_steps transitions; the original adds up the means of its micro-batches."""
    size, micro_batches = keys.whole("batch_size", least=1), keys.whole("grad_accum_steps", least=1)
    batch, policy = size * micro_batches, keys.required_text("policy_lm")
    clip = keys.number("max_grad_norm")
    # n x clip(mean, c / n) is clip(sum, c), and Adam's step is the same for a gradient n times as large.
    clips = {"critic.max_grad_norm": clip / micro_batches}
    states = math.gcd(batch, 8)
    steps = {"critic.batch_turns": batch, "actor.batch_games": batch // states, "actor.states_per_game": states}
    note = "a critic step reads whole games of about as many turns, an actor step some turns of a game"
    actor, actor_size = "actor", 2 if "mistral" in policy else size  # of the original's micro-batches
    if agent == "online_filteredbc":
        actor, actor_size = "filtered_bc", 1 if "llama" in policy else size
        steps, clips = {"filtered_bc.batch_games": max(1, round(batch / keys.longest_game))}, {}
        note = f"a step clones whole games: as many as have {batch} turns where they are the longest"
    clips[f"{actor}.max_grad_norm"] = clip * actor_size / batch
    taken = [Taken(keys.said("batch_size", "grad_accum_steps"), steps, note)]
    if actor == "actor":
        taken += [
            keys.take("epochs", keys.whole, "critic.epochs"),
            keys.take("critic_lr", keys.number, "critic.lr", "critic.trunk_lr"),
            keys.take("gamma", keys.number, "critic.gamma"),
            keys.take("tau", keys.number, "critic.tau"),
        ]
    if agent != "chai":
        taken += [
            keys.take("actor_epochs", keys.whole, f"{actor}.epochs"),
            keys.take("lm_lr", keys.number, f"{actor}.lr"),
        ]
        if actor == "actor":
            taken.append(keys.take("warmup_iter", keys.whole, "critic.warmup_iterations"))
    note = "the original clips the sum of its micro-batches' gradients, here it is their mean: as much of it remains"
    return [*taken, Taken(keys.said("max_grad_norm"), clips, note)]


def _buffer(keys: _Keys, agent: str) -> list[Taken]:
    longest = keys.longest_game
    games = max(1, keys.whole("capacity", least=1) // longest)
    note = f"the original counts transitions, here games are counted, of up to {longest} turns"
    if agent == "online_filteredbc":
        games *= 10
        note += "; the best tenth of them fills its capacity (the original takes the best of all that were ever played)"
    tokens = max(1 << 20, games * longest * (keys.whole("max_new_tokens") + 32))
    settings = {"buffer.max_trajectories": games, "buffer.max_tokens": tokens}
    return [Taken(keys.said("capacity"), settings, note)]


# -- reading the values ------------------------------------------------------------------------------


class _Keys:
    """The settings of a yaml over the original's defaults; a value that does not fit is named by its key."""

    def __init__(self, path: Path, given: Mapping[str, Any]) -> None:
        self.path, self.given, self.used = path, given, set[str]()

    @property
    def longest_game(self) -> int:
        """Turns."""
        if "max_conversation_length" in self.given:
            return self.whole("max_conversation_length", least=1)
        return ENVIRONMENTS.get(str(self.text("env_name")), 20)

    def said(self, *names: str) -> str:
        """ "batch_size = 8, grad_accum_steps = 1 (not set: the original's default)" """
        unset = " (not set: the original's default)"
        return ", ".join(f"{key} = {_shown(self._get(key))}{'' if key in self.given else unset}" for key in names)

    def take(self, key: str, read: Callable[[str], Any], *settings: str, note: str = "") -> Taken:
        """`key`, read by one of the methods below, as these settings."""
        return Taken(self.said(key), dict.fromkeys(settings, read(key)), note)

    def choice(self, key: str, known: Mapping[str, Any]) -> str:
        value = self.required_text(key).lower()
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise self._error(key, f"one of {', '.join(known)}", hint)
        return value

    def text(self, key: str) -> str | None:
        value = self._get(key)
        if value is not None and not isinstance(value, str):
            raise self._error(key, "a text")
        if value == "???" or (value is not None and "${" in value):
            raise self._error(key, "a text as it stands", ": only Hydra fills it in")
        return value

    def required_text(self, key: str) -> str:
        value = self.text(key)
        if not value:
            raise self._error(key, "a text")
        return value

    def number(self, key: str) -> float:
        value = self._get(key)
        if isinstance(value, str):  # what PyYAML makes of 2e-5, which has no point
            try:
                return float(value)
            except ValueError:
                raise self._error(key, "a number") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(key, "a number")
        return float(value)

    def whole(self, key: str, least: int = 0) -> int:
        value = self.number(key)
        if not (value.is_integer() and value >= least):
            raise self._error(key, f"a whole number of at least {least}")
        return int(value)

    def flag(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise self._error(key, "true or false")
        return value

    def _get(self, key: str) -> Any:
        self.used.add(key)
        return self.given[key] if key in self.given else DEFAULTS.get(key)

    def _error(self, key: str, wanted: str, hint: str = "") -> ValueError:
        return ValueError(f"{self.path}: {key}: wanted {wanted}, got {_shown(self._get(key))}{hint}")


def _shown(value: Any) -> str:
    """As yaml writes it."""
    if value is None or isinstance(value, bool | list | dict):
        return json.dumps(value, default=str)
    return repr(value) if isinstance(value, str) and not _is_number(value) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# -- yaml --------------------------------------------------------------------------------------------


def compose(path: Path, inside: tuple[Path, ...] = ()) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """The settings of a yaml file as Hydra composes them, and the files read: those that the `defaults` list names,
    which lie beside it, and its own at `_self_` (last where it does not say); later ones override earlier ones.
    """
    if path in inside:
        raise ValueError(f"{inside[-1]}: defaults: {path.stem!r} leads back to itself")
    own = _read(path)
    entries = own.pop("defaults", None) or []
    if not isinstance(entries, list):
        raise ValueError(f"{path}: defaults: wanted a list, got {type(entries).__name__}")
    settings: dict[str, Any] = {}
    files = [path]
    for entry in entries if "_self_" in entries else [*entries, "_self_"]:
        if entry == "_self_":
            settings |= own
        elif isinstance(entry, dict) and all(str(k).removeprefix("override ").startswith("hydra/") for k in entry):
            settings["hydra"] = entry
        elif not isinstance(entry, str) or "/" in entry:
            raise ValueError(f"{path}: defaults: wanted _self_ or the name of a file beside it, got {_shown(entry)}")
        else:
            file = path.parent / (entry if entry.endswith((".yaml", ".yml")) else f"{entry}.yaml")
            if not file.is_file():
                raise ValueError(f"{path}: defaults: {entry!r}: no file {str(file)!r}{_nearest(file)}")
            theirs, more = compose(file, (*inside, path))
            settings |= theirs
            files += more
    return settings, tuple(dict.fromkeys(files))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """`yaml.safe_load` that refuses a key given twice, as Hydra does."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            names.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a yaml file. No message quotes a line: it may hold a secret."""
    if not path.is_file():
        what = "got a folder" if path.is_dir() else f"there is none{_nearest(path)}"
        raise ValueError(f"{path}: wanted a yaml file, {what}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        made = yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted yaml in UTF-8, got byte {error.start} that is none") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{at}: broken yaml: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken yaml ({type(error).__name__})") from None
    if made is None:
        return {}
    if not isinstance(made, dict):
        raise ValueError(f"{path}: wanted keys with values at top level, got a {type(made).__name__}")
    return {str(key): value for key, value in made.items()}


def _nearest(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
