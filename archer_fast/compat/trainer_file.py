"""The original's trainer.pt and replay_buffer.pt, read without running what is in them."""

from __future__ import annotations

import difflib
import os
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from archer_fast.sealed_file import sync, temporary_name

MODULES = ("model_state_dict", "critic_state_dict", "target_critic_state_dict")
OPTIMIZERS = ("critic_optimizer_state_dict", "lm_optimizer_state_dict")
TEXTS = ("observation", "action", "next_observation")
NUMBERS = ("reward", "done", "mc_return")
COUNTS = ("size", "batch_size", "max_size")
# Buffers that older versions of transformers saved and newer ones make themselves.
_MADE_ANEW = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|embeddings\.position_ids|rotary_emb\.inv_freq)$")
# How the original's object calls what its dictionaries call by the singular.
_ATTRIBUTES = {name: f"{name}s" for name in (*TEXTS, *NUMBERS)} | {name: name for name in COUNTS}
_CLASS = "archer.data.utils.ReplayBuffer"

State = dict[str, Any]


# -- trainer.pt --------------------------------------------------------------------------------------


def read_trainer(
    path: Path | str, trust_pickle: bool = False, *, keys: Sequence[str] = (*MODULES, *OPTIMIZERS)
) -> dict[str, State]:
    """{"model_state_dict": {"transformer.wte.weight": Tensor, ...}, "lm_optimizer_state_dict": {"state": ...}, ...}

    Every tensor on the CPU, names without the `module.` of a wrapped model. keys: those that must be there, and are
    returned; `("model_state_dict",)` reads a checkpoint of behaviour cloning. trust_pickle: see `read_replay_buffer`.
    Errors: OSError; ValueError naming the file and the key that is missing or of another kind.
    """
    path = Path(path)
    found = _load(path, trust_pickle)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: wanted a dictionary with {', '.join(keys)}, got {type(found).__name__}")
    unknown = [str(key) for key in found if key not in (*MODULES, *OPTIMIZERS)]
    for key in keys:
        if key not in found:
            near = difflib.get_close_matches(key, unknown, n=1)
            hint = f"there is {near[0]!r}" if near else f"there are {', '.join(map(repr, found)) or 'none'}"
            raise ValueError(f"{path}: {key!r} is missing; {hint}")
        _check_state(f"{path}: {key}", found[key], optimizer=key in OPTIMIZERS)
    if unknown:
        warnings.warn(f"{path}: not read, as the original has no such keys: {', '.join(unknown)}", stacklevel=2)
    return {key: found[key] if key in OPTIMIZERS else _bare(found[key]) for key in keys}


def load_trainer(path: Path | str, into: Mapping[str, Any], trust_pickle: bool = False) -> None:
    """Give modules and optimizers what `path` holds: all of them, or, after an error, none.

    into: {"model_state_dict": agent.model, "critic_state_dict": agent.critic, "lm_optimizer_state_dict": optimizer},
    say; modules may be wrapped (`module.`), optimizers too.
    Errors: those of `read_trainer`; ValueError naming the tensor that is missing, unexpected, or of another shape.
    """
    path = Path(path)
    states = read_trainer(path, trust_pickle, keys=tuple(into))
    for key, target in into.items():
        if key in OPTIMIZERS:
            _check_optimizer(f"{path}: {key}", states[key], target)
        else:
            states[key] = _matched(f"{path}: {key}", states[key], target)
    for key, target in into.items():
        (target if key in OPTIMIZERS else _unwrapped(target)).load_state_dict(states[key])


def write_trainer(path: Path | str, states: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what `read_trainer` returns, in the original's layout: whole, or not at all.

    states: some of its five keys. Errors: ValueError for another key or a value that is no state; OSError.
    """
    path = Path(path)
    for key, state in states.items():
        if key not in (*MODULES, *OPTIMIZERS):
            near = difflib.get_close_matches(key, (*MODULES, *OPTIMIZERS), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"states: wanted keys out of {', '.join((*MODULES, *OPTIMIZERS))}, got {key!r}{hint}")
        _check_state(f"states: {key}", state, optimizer=key in OPTIMIZERS)
    if not states:
        raise ValueError("states: wanted at least one state, got none")
    _save(path, {key: state if key in OPTIMIZERS else _bare(state) for key, state in states.items()})


def _check_state(where: str, state: Any, *, optimizer: bool) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"{where}: wanted a state dictionary, got {type(state).__name__}")
    if optimizer:
        for name, kind in (("state", Mapping), ("param_groups", list)):
            if not isinstance(state.get(name), kind):
                raise ValueError(
                    f"{where}: wanted an optimizer's state with {name!r}, got {', '.join(map(repr, state))}"
                )
        return
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(f"{where}: {name!r}: wanted a tensor under a name, got {type(value).__name__}")


def _bare(state: Mapping[str, Any]) -> State:
    """Without the `module.` that a wrapper puts before every name."""
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def _unwrapped(module: nn.Module) -> nn.Module:
    """What a wrapper (DistributedDataParallel, say) holds under `module`."""
    while [name for name, _ in module.named_children()] == ["module"]:
        module = cast(nn.Module, module.module)
    return module


def _matched(where: str, state: State, module: nn.Module) -> State:
    """`state` as `module` loads it, once every name and shape is right, and what the module itself checks."""
    own = _unwrapped(module).state_dict()
    if check := getattr(_unwrapped(module), "check_state", None):
        check(where, state)
    state = {name: value for name, value in state.items() if name in own or not _MADE_ANEW.search(name)}
    faults = [f"{name!r} is missing" for name in own if name not in state]
    faults += [f"{name!r} is unexpected" for name in state if name not in own]
    faults += [
        f"{name!r}: wanted the shape {list(own[name].shape)}, got {list(value.shape)}"
        for name, value in state.items()
        if name in own and isinstance(own[name], Tensor) and own[name].shape != value.shape
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise ValueError(f"{where}: {'; '.join(faults[:3])}{more}; nothing was loaded")
    return state


def _check_optimizer(where: str, state: State, optimizer: Any) -> None:
    saved, own = state["param_groups"], optimizer.param_groups
    sizes = [[len(group["params"]) for group in groups] for groups in (own, saved)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{where}: wanted groups of {sizes[0]} parameters, got {sizes[1]}; nothing was loaded")
    numbered = zip(
        (number for group in saved for number in group["params"]),
        (parameter for group in own for parameter in group["params"]),
        strict=True,
    )
    parameters = dict(numbered)
    for number, entry in state["state"].items():
        if number not in parameters:
            raise ValueError(f"{where}: parameter {number!r} is unexpected; nothing was loaded")
        shape = parameters[number].shape
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != shape:
                raise ValueError(
                    f"{where}: {name} of parameter {number}: wanted the shape {list(shape)}, got {list(value.shape)}; "
                    "nothing was loaded"
                )


# -- replay_buffer.pt --------------------------------------------------------------------------------


def read_replay_buffer(path: Path | str, trust_pickle: bool = False) -> dict[str, Any]:
    """The transitions of a replay: what `write_replay_buffer` wrote, or, with trust_pickle, an object of the original.

        {"observation": array(["Questions:\\n", ...], dtype=object), "action": ..., "next_observation": ...,   # [n]
         "reward": array([-1.0, ...]), "done": array([False, ...]), "mc_return": ...,                          # [n]
         "size": 120, "batch_size": 8, "max_size": 100}    # n = min(size, max_size); the next is put at size % max_size

    trust_pickle: the original saves its ReplayBuffer object as a pickle, which can run any code when it is read in
    the usual way. Even with trust_pickle no code runs here: an object of that class becomes a plain one, NumPy's
    arrays are made from their bytes, and anything else is refused.
    Errors: OSError; ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    found = _load(path, trust_pickle)
    if isinstance(found, _SavedObject):
        singular = {attribute: name for name, attribute in _ATTRIBUTES.items()}
        found = dict.fromkeys(_ATTRIBUTES) | {singular.get(name, name): value for name, value in found.fields.items()}
        if found["observation"] is None and not found["size"]:  # arrays are made by its first insert
            found |= dict.fromkeys(TEXTS, ()) | dict.fromkeys(NUMBERS, np.empty(0))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: wanted a replay buffer, got {type(found).__name__}")
    replay = _checked(str(path), {name: _finished(value) for name, value in found.items()})
    if unknown := [str(name) for name in found if name not in _ATTRIBUTES]:
        warnings.warn(f"{path}: not read, as the original has no such fields: {', '.join(unknown)}", stacklevel=2)
    return replay


def write_replay_buffer(path: Path | str, replay: Mapping[str, Any]) -> None:
    """Write what `read_replay_buffer` returns as plain data: whole, or not at all.

    Errors: ValueError naming the field that does not fit; OSError.
    """
    if unknown := [str(name) for name in replay if name not in _ATTRIBUTES]:
        raise ValueError(f"replay: wanted the fields {', '.join(_ATTRIBUTES)}, got {', '.join(unknown)} too")
    plain = _checked("replay", replay)
    plain |= {name: plain[name].tolist() for name in TEXTS}
    plain |= {name: torch.from_numpy(np.ascontiguousarray(plain[name])) for name in NUMBERS}
    _save(Path(path), plain)


def _checked(where: str, replay: Mapping[str, Any]) -> dict[str, Any]:
    """The filled slots as arrays of their own, every field checked."""
    for name in _ATTRIBUTES:
        if replay.get(name) is None:
            raise ValueError(f"{where}: {name!r} is missing")
    checked: dict[str, Any] = {}
    for name, least in zip(COUNTS, (0, 1, 1), strict=True):
        value = replay[name]
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{where}: {name}: wanted a whole number of at least {least}, got {value!r}")
        checked[name] = int(value)
    num = min(checked["size"], checked["max_size"])
    for name in (*TEXTS, *NUMBERS):
        value = replay[name]
        if name in TEXTS:
            value = value if isinstance(value, np.ndarray) else np.array(list(value), dtype=object)
        values = value.numpy(force=True) if isinstance(value, Tensor) else np.asarray(value)
        if values.ndim != 1 or values.size < num:
            raise ValueError(f"{where}: {name}: wanted {num} values, got an array of shape {list(values.shape)}")
        values = values[:num].astype(object) if name in TEXTS else values[:num].copy()
        if name in NUMBERS and (values.dtype.kind not in "biuf" or values.dtype.itemsize > 8):
            raise ValueError(f"{where}: {name}: wanted numbers, got {values.dtype}")
        for index, text in enumerate(values if name in TEXTS else ()):
            if not isinstance(text, str):
                raise ValueError(f"{where}: {name}: wanted texts, got {type(text).__name__} at {index}")
        checked[name] = values.astype(values.dtype.newbyteorder("="), copy=False)
    return {name: checked[name] for name in _ATTRIBUTES}


# -- files -------------------------------------------------------------------------------------------


def _load(path: Path, trust_pickle: bool) -> Any:
    try:
        return _torch_load(path)
    except _ForeignObject as foreign:
        name = foreign.name
        if not trust_pickle:
            raise ValueError(
                f"{path}: holds {name}, which is no plain data. With trust_pickle=True an object of the original's "
                "ReplayBuffer is read all the same, and nothing else"
            ) from None
    # A fork may call its module otherwise; nothing of that name is imported, so it need not be trusted.
    buffer = name if name.rpartition(".")[2] == "ReplayBuffer" else _CLASS
    warnings.warn(
        f"{path}: a pickle, read because of trust_pickle; write_replay_buffer makes a file of it that needs no trust",
        stacklevel=3,
    )
    try:
        return _torch_load(path, [(_SavedObject, buffer), *_STAND_INS])
    except _ForeignObject as foreign:
        raise ValueError(
            f"{path}: holds {foreign.name}, neither a ReplayBuffer nor an array: not even trust_pickle reads it"
        ) from None


class _ForeignObject(Exception):
    def __init__(self, name: str) -> None:
        self.name = name


def _torch_load(path: Path, stand_ins: Sequence[tuple[Any, str]] = ()) -> Any:
    """By torch's restricted unpickler, to which the names of `stand_ins` mean these, whatever else is allowed here."""
    allowed = torch.serialization.get_safe_globals()
    with path.open("rb") as file:  # here, so that OSError means the file and not its content
        try:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(list(stand_ins))
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damage can raise anything
            foreign = re.search(r"GLOBAL (\S+)", str(error))
            if isinstance(error, pickle.UnpicklingError) and foreign:
                raise _ForeignObject(foreign[1]) from None
            cause = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path}: wanted a whole file of torch.save, got: {cause}") from error
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(allowed)


# Stand-ins for what a pickled buffer names. Not NumPy's own: its __setstate__ believes whatever a state says of lengths
# and of what is a pointer.


class _SavedObject:
    """An object without its class: the attributes that were saved."""

    fields: Mapping[str, Any] = {}  # never changed

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"wanted an object's attributes, got {type(state).__name__}")
        self.fields = state


class _Kind:
    """np.ndarray, where it is named only."""


class _Type:
    """np.dtype("f8", False, True) with the state (3, "<", None, None, None, -1, -1, 0), of which the order counts."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r"b1|[iuf][1248]|O8?|[SU][0-9]{1,6}", code):
            raise ValueError(f"dtype: wanted numbers, texts or objects, got {code!r}")
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(object if self.code[0] == "O" else self.order + self.code)


class _Array:
    """numpy's _reconstruct(np.ndarray, (0,), b"b") with the state (1, shape, dtype, is_fortran, bytes or list)."""

    def __init__(self, kind: type[_Kind], shape: tuple[int, ...], code: bytes) -> None:
        del kind, shape, code  # the state has the true ones

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, data = state
        if kind.dtype == object:
            flat = np.empty(len(data), dtype=object)
            flat[:] = data
        else:
            flat = np.frombuffer(data, kind.dtype) if data else np.empty(0, kind.dtype)
        self.array: np.ndarray[Any, Any] = flat.reshape(shape, order="F" if is_fortran else "C")


def _finished(value: Any) -> Any:
    return getattr(value, "array", None) if isinstance(value, _Array) else value


def _scalar(kind: _Type, data: bytes) -> Any:
    return np.frombuffer(data, kind.dtype)[0]


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1":
        raise ValueError(f"encoding: wanted latin1, got {encoding!r}")
    return text.encode("latin1")


_STAND_INS: list[tuple[Any, str]] = [(_Type, "numpy.dtype"), (_Kind, "numpy.ndarray"), (_latin1, "_codecs.encode")]
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # NumPy 1 and 2
    _STAND_INS += [(_Array, f"{_module}._reconstruct"), (_scalar, f"{_module}.scalar")]


def _save(path: Path, value: Any) -> None:
    """Under a temporary name, synced, then renamed."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # how torch tells of a full disk
            raise OSError(f"{path}: {error}") from error
        raise
    sync(path.parent)
