"""trainer.pt and replay_buffer.pt: the original's layout both ways, nothing half loaded, no foreign code run."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import struct
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from archer_fast.compat.trainer_file import (
    load_trainer,
    read_replay_buffer,
    read_trainer,
    write_replay_buffer,
    write_trainer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FIVE = (
    "model_state_dict",
    "critic_state_dict",
    "target_critic_state_dict",
    "critic_optimizer_state_dict",
    "lm_optimizer_state_dict",
)


# -- trainer.pt --------------------------------------------------------------------------------------


class Critic(nn.Module):
    """The names of the original's DoubleCritic, over a trunk of one layer."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.base_lm = nn.Linear(3, size)
        for name, width in (("critic1", 2 * size), ("critic2", 2 * size), ("v_critic1", size), ("v_critic2", size)):
            layers = nn.Linear(width, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 1)
            setattr(self, name, nn.Sequential(*layers))


class Wrapped(nn.Module):
    """As DistributedDataParallel names things."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Trainer:
    """What a trainer.pt is of, after two steps of Adam."""

    def __init__(self, seed: int, size: int = 4) -> None:
        torch.manual_seed(seed)
        self.model, self.critic, self.target = nn.Linear(3, 5), Critic(size), Critic(size)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=seed / 100)
        self.lm_optimizer = torch.optim.Adam(self.model.parameters(), lr=seed / 1000)
        self.step()
        self.step()

    def step(self) -> None:
        for module, optimizer in ((self.critic, self.critic_optimizer), (self.model, self.lm_optimizer)):
            loss = torch.stack([(p - 1).pow(2).sum() for p in module.parameters()]).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    @property
    def parts(self) -> dict[str, Any]:
        parts = self.model, self.critic, self.target, self.critic_optimizer, self.lm_optimizer
        return dict(zip(FIVE, parts, strict=True))

    @property
    def states(self) -> dict[str, Any]:
        return {key: part.state_dict() for key, part in self.parts.items()}


def assert_equal(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right) and left.dtype == right.dtype
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A trainer.pt as the original writes it."""
    torch.save(Trainer(1).states, tmp_path / "trainer.pt")
    return tmp_path / "trainer.pt"


def test_what_the_original_wrote_is_read_as_it_was(saved: Path) -> None:
    states = read_trainer(saved)
    assert list(states) == list(FIVE)
    assert_equal(states, {key: dict(value) for key, value in Trainer(1).states.items()})
    assert {name.rpartition(".")[0] for name in states["critic_state_dict"]} == {
        "base_lm",
        *(f"{head}.{layer}" for head in ("critic1", "critic2", "v_critic1", "v_critic2") for layer in (0, 2, 4)),
    }


def test_a_loaded_trainer_goes_on_as_the_one_that_was_saved(saved: Path) -> None:
    source, loaded = Trainer(1), Trainer(2)
    load_trainer(saved, loaded.parts)
    assert_equal(source.states, loaded.states)
    assert loaded.critic_optimizer.param_groups[0]["lr"] == 0.01
    source.step()
    loaded.step()
    assert_equal(source.states, loaded.states)


def test_what_we_write_the_original_can_load(tmp_path: Path) -> None:
    path = tmp_path / "trainer.pt"
    write_trainer(path, Trainer(3).states)
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint) == list(FIVE)
    theirs = Trainer(4)
    for key, part in theirs.parts.items():
        part.load_state_dict(checkpoint[key])
    assert_equal(theirs.states, Trainer(3).states)
    assert [p.name for p in tmp_path.iterdir()] == ["trainer.pt"]


def test_names_of_a_wrapped_model_are_read_written_and_loaded_bare(tmp_path: Path) -> None:
    source, loaded, path = Trainer(1), Trainer(2), tmp_path / "trainer.pt"
    states = source.states | {"model_state_dict": Wrapped(Wrapped(source.model)).state_dict()}
    assert list(states["model_state_dict"]) == ["module.module.weight", "module.module.bias"]
    torch.save(states, path)
    assert list(read_trainer(path)["model_state_dict"]) == ["weight", "bias"]
    load_trainer(path, loaded.parts | {"critic_state_dict": Wrapped(loaded.critic)})
    assert_equal(loaded.states, source.states)
    write_trainer(path, states)
    assert_equal(dict(torch.load(path, weights_only=True)["model_state_dict"]), dict(source.model.state_dict()))


def test_a_checkpoint_of_behaviour_cloning_has_the_model_alone(tmp_path: Path) -> None:
    path, model = tmp_path / "bc.pt", nn.Linear(3, 5)
    torch.save({"model_state_dict": Trainer(1).model.state_dict()}, path)
    load_trainer(path, {"model_state_dict": model})
    assert_equal(model.state_dict(), Trainer(1).model.state_dict())
    with pytest.raises(ValueError, match=r"bc.pt: 'critic_state_dict' is missing; there are 'model_state_dict'$"):
        read_trainer(path)


def test_buffers_of_an_older_transformers_are_left_out(tmp_path: Path) -> None:
    path, model, names = (
        tmp_path / "trainer.pt",
        nn.ModuleDict({"attn": nn.Linear(2, 2, bias=False)}),
        ("bias", "masked_bias"),
    )
    old = {f"attn.{name}": torch.ones(3) for name in names} | {"embeddings.position_ids": torch.arange(4)}
    torch.save({"model_state_dict": {**model.state_dict(), **old}}, path)
    load_trainer(path, {"model_state_dict": model})
    with_bias = nn.ModuleDict({"attn": nn.Linear(2, 3)})  # there `attn.bias` is a parameter, which counts
    torch.save({"model_state_dict": with_bias.state_dict() | {"attn.bias": torch.full((3,), 7.0)}}, path)
    load_trainer(path, {"model_state_dict": with_bias})
    assert_equal(dict(with_bias.state_dict())["attn.bias"], torch.full((3,), 7.0))


def _renamed(state: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in state.items()}


def faults() -> Iterator[tuple[str, Any]]:
    """What the error says, and the file."""
    states = {key: dict(value) for key, value in Trainer(1).states.items()}
    critic, optimizer = states["critic_state_dict"], states["lm_optimizer_state_dict"]
    no_bias = {k: v for k, v in critic.items() if k != "critic1.2.bias"}
    yield "wanted a dictionary with model_state_dict, .*, got list", [states]
    yield (
        "'critic_state_dict' is missing; there is 'critic_state'",
        _renamed(states, "critic_state_dict", "critic_state"),
    )
    yield "critic_state_dict: 'critic1.2.bias' is missing; nothing", states | {"critic_state_dict": no_bias}
    yield (
        "critic_state_dict: 'v_critic2.4.bias' is missing; 'v_critic3.4.bias' is unexpected; nothing",
        states | {"critic_state_dict": _renamed(critic, "v_critic2.4.bias", "v_critic3.4.bias")},
    )
    yield (
        r"target_critic_state_dict: 'critic1.0.weight': wanted the shape \[4, 8\], got \[4, 9\]; nothing",
        states | {"target_critic_state_dict": critic | {"critic1.0.weight": torch.zeros(4, 9)}},
    )
    yield (
        r"critic_state_dict: 'base_lm.weight': wanted the shape \[4, 3\], got \[6, 3\]; .* \(and 19 more\)",
        states | {"critic_state_dict": Critic(6).state_dict()},
    )
    yield "model_state_dict: wanted a state dictionary, got NoneType", states | {"model_state_dict": None}
    yield (
        "model_state_dict: 'weight': wanted a tensor under a name, got list",
        states | {"model_state_dict": {"weight": [1]}},
    )
    yield (
        "lm_optimizer_state_dict: wanted an optimizer's state with 'state', got",
        states | {"lm_optimizer_state_dict": {}},
    )
    yield (
        r"lm_optimizer_state_dict: wanted groups of \[2\] parameters, got \[26\]",
        states | {"lm_optimizer_state_dict": states["critic_optimizer_state_dict"]},
    )
    entry = optimizer["state"][1] | {"exp_avg": torch.zeros(6)}
    yield (
        r"lm_optimizer_state_dict: exp_avg of parameter 1: wanted the shape \[5\], got \[6\]; nothing",
        states | {"lm_optimizer_state_dict": optimizer | {"state": {0: optimizer["state"][0], 1: entry}}},
    )
    yield (
        "lm_optimizer_state_dict: parameter 7 is unexpected; nothing",
        states | {"lm_optimizer_state_dict": optimizer | {"state": {7: entry}}},
    )


def test_a_fault_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    path, loaded = tmp_path / "trainer.pt", Trainer(2)
    before = copy.deepcopy(loaded.states)
    for message, content in faults():
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as said:
            load_trainer(path, loaded.parts)
        assert str(said.value).startswith(f"{path}: ")
        assert_equal(loaded.states, before)


def test_a_key_that_the_original_does_not_have_is_told(tmp_path: Path) -> None:
    path = tmp_path / "trainer.pt"
    torch.save(Trainer(1).states | {"step": 3}, path)
    with pytest.warns(UserWarning, match="trainer.pt: not read, as the original has no such keys: step"):
        assert list(read_trainer(path)) == list(FIVE)


def test_what_is_no_trainer_is_not_written(tmp_path: Path) -> None:
    path, model = tmp_path / "trainer.pt", nn.Linear(2, 2)
    for states, message in (
        ({}, "states: wanted at least one state, got none"),
        ({"model_state": model.state_dict()}, "got 'model_state'; did you mean 'model_state_dict'?"),
        ({"model_state_dict": model}, "states: model_state_dict: wanted a state dictionary, got Linear"),
        (
            {"lm_optimizer_state_dict": model.state_dict()},
            "wanted an optimizer's state with 'state', got 'weight', 'bias'",
        ),
    ):
        with pytest.raises(ValueError) as said:
            write_trainer(path, states)  # type: ignore[arg-type]
        assert message in str(said.value)
    assert list(tmp_path.iterdir()) == []


def test_a_number_of_numpy_needs_trust(tmp_path: Path) -> None:
    path, loaded = tmp_path / "trainer.pt", Trainer(2)
    states = Trainer(1).states
    states["lm_optimizer_state_dict"]["param_groups"][0]["lr"] = np.float64(0.25)
    torch.save(states, path)
    with pytest.raises(ValueError, match=r"trainer.pt: holds numpy._core.multiarray.scalar, which is no plain data"):
        load_trainer(path, loaded.parts)
    with pytest.warns(UserWarning, match="trainer.pt: a pickle, read because of trust_pickle"):
        load_trainer(path, loaded.parts, trust_pickle=True)
    assert loaded.lm_optimizer.param_groups[0]["lr"] == 0.25


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(value: Any, file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"trainer.pt: PytorchStreamWriter failed"):
        write_trainer(saved, Trainer(2).states)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    for read in (read_trainer, read_replay_buffer):
        with pytest.raises(FileNotFoundError, match=r"none\.pt"):
            read(tmp_path / "none.pt")
        with pytest.raises(IsADirectoryError):
            read(tmp_path)


def test_damage_is_an_error_that_names_the_file(saved: Path) -> None:
    whole, rng, refused = saved.read_bytes(), random.Random(0), 0
    for trial in range(150):
        damaged = bytearray(whole if trial % 3 else whole[: rng.randrange(len(whole))])
        for _ in range(rng.randrange(1, 9)):
            if damaged:
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        saved.write_bytes(damaged)
        try:
            read_trainer(saved, trust_pickle=False)
        except ValueError as error:
            refused += str(error).startswith(f"{saved}: ")
    assert refused > 100


# -- replay_buffer.pt --------------------------------------------------------------------------------


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """A class laid out as the original's, in a module of its name."""
    made = type("ReplayBuffer", (), {"__module__": "archer.data.utils", "__init__": _init, "insert": _insert})
    make_importable(made, monkeypatch)
    return made


def make_importable(made: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    names = made.__module__.split(".")
    for n in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:n]), types.ModuleType(".".join(names[:n])))
    sys.modules[made.__module__].ReplayBuffer = made  # type: ignore[attr-defined]


PLURAL = ("observations", "actions", "rewards", "next_observations", "dones", "mc_returns")


def _init(self: Any, batch_size: int = 2, capacity: int = 10000) -> None:
    self.max_size, self.size, self.batch_size = capacity, 0, batch_size
    for name in PLURAL:
        setattr(self, name, None)


def _insert(self: Any, *values: Any) -> None:
    """observation, action, reward, next_observation, done, mc_return; the first fixes the dtypes."""
    for name, value in zip(PLURAL, values, strict=True):
        if getattr(self, name) is None:
            kind = object if isinstance(value, str) else np.asarray(value).dtype
            setattr(self, name, np.full(self.max_size, "" if kind is object else 0, dtype=kind))
        getattr(self, name)[self.size % self.max_size] = value
    self.size += 1


def save_as_original(path: Path, buffer: Any, **options: Any) -> None:
    """And then nobody can import its class."""
    torch.save(buffer, path, **options)
    for name in ("archer", "archer.data", "archer.data.utils"):
        sys.modules.pop(name, None)


TURNS = [
    ("Questions:\n", "Is it a dog?", -1.0, "Questions:\nIs it a dog? No.\n", False, -1.95),
    ("Questions:\nIs it a dog? No.\n", "物体は何ですか。\ud800", 0.0, "é" * 300, True, 0.0),
    ("", "", -1.5, "", False, float("nan")),
]


def read_trusting(path: Path) -> dict[str, Any]:
    with pytest.warns(UserWarning, match=f"{path.name}: a pickle, read because of trust_pickle; write_replay_buffer"):
        return read_replay_buffer(path, trust_pickle=True)


def assert_holds(replay: dict[str, Any], turns: list[tuple[Any, ...]], **counts: int) -> None:
    columns = zip(*turns, strict=True) if turns else ((),) * 6
    for name, column in zip((p.removesuffix("s") for p in PLURAL), columns, strict=True):
        np.testing.assert_array_equal(replay[name], np.array(column, dtype=replay[name].dtype))
    assert {name: replay[name] for name in ("size", "batch_size", "max_size")} == counts


@pytest.mark.parametrize("zipped", [True, False])
def test_a_buffer_of_the_original(original: type[Any], zipped: bool, tmp_path: Path) -> None:
    buffer, path = original(8, 100), tmp_path / "replay_buffer.pt"
    for turn in TURNS:
        buffer.insert(*turn)
    save_as_original(path, buffer, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError) as said:
        read_replay_buffer(path)
    assert str(said.value).startswith(
        f"{path}: holds archer.data.utils.ReplayBuffer, which is no plain data. With trust"
    )
    replay = read_trusting(path)
    assert_holds(replay, TURNS, size=3, batch_size=8, max_size=100)
    dtypes = {name: array.dtype for name, array in replay.items() if isinstance(array, np.ndarray)}
    assert [dtypes[name] for name in ("observation", "reward", "done")] == [object, np.float64, np.bool_]
    replay["reward"][0] = 5  # an array of one's own
    assert "archer.data.utils" not in sys.modules


def test_dtypes_of_the_first_insert_and_slots_of_a_full_ring(original: type[Any], tmp_path: Path) -> None:
    buffer, path = original(2, 2), tmp_path / "replay_buffer.pt"
    for number in (0, 0.7, 3):
        buffer.insert(f"o{number}", "a", number, "n", number == 3, number)
    save_as_original(path, buffer)
    replay = read_trusting(path)
    slots = [("o3", "a", 3, "n", True, 3), ("o0.7", "a", 0, "n", False, 0)]  # .7 as an int; slot 0 is overwritten
    assert_holds(replay, slots, size=3, batch_size=2, max_size=2)
    assert replay["reward"].dtype == np.int64


def test_a_buffer_without_a_transition(original: type[Any], tmp_path: Path) -> None:
    path = tmp_path / "replay_buffer.pt"
    save_as_original(path, original(4, 10))
    replay = read_trusting(path)
    assert_holds(replay, [], size=0, batch_size=4, max_size=10)
    write_replay_buffer(path, replay)
    assert_holds(read_replay_buffer(path), [], size=0, batch_size=4, max_size=10)


def test_other_arrays_and_a_fork_that_calls_its_module_otherwise(
    original: type[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original.__module__ = "lab.replay"
    make_importable(original, monkeypatch)
    buffer, path = original(2, 3), tmp_path / "replay_buffer.pt"
    for turn in TURNS[:2]:
        buffer.insert(*turn)
    buffer.rewards = np.array([-1, 0, 0], ">f4")
    buffer.actions = np.array(["Is it a dog?", "no", ""])  # fixed width
    buffer.dones = np.array([0, 1, 0], np.uint8)
    buffer.own = {"what": np.zeros((2, 2), order="F"), "scalar": np.float32(3)}
    save_as_original(path, buffer)
    with pytest.warns(UserWarning, match=r"replay_buffer.pt: not read, as the original has no such fields: own$"):
        replay = read_trusting(path)
    turns = [(*TURNS[0][:4], 0, TURNS[0][5]), (TURNS[1][0], "no", *TURNS[1][2:4], 1, TURNS[1][5])]
    assert_holds(replay, turns, size=2, batch_size=2, max_size=3)
    assert replay["reward"].dtype == np.dtype("=f4") and replay["action"].dtype == object


def test_a_plain_buffer_needs_no_trust(tmp_path: Path) -> None:
    path = tmp_path / "replay_buffer.pt"
    columns = dict(zip((p.removesuffix("s") for p in PLURAL), map(list, zip(*TURNS, strict=True)), strict=True))
    write_replay_buffer(path, columns | {"size": np.int64(7), "batch_size": 8, "max_size": 3})
    assert isinstance(torch.load(path, weights_only=True)["reward"], Tensor)
    replay = read_replay_buffer(path)
    assert_holds(replay, TURNS, size=7, batch_size=8, max_size=3)
    again = tmp_path / "again.pt"
    write_replay_buffer(again, replay | {"reward": replay["reward"].astype(">f8")[::1]})
    assert_holds(read_replay_buffer(again), TURNS, size=7, batch_size=8, max_size=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.pt", "replay_buffer.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, "'reward' is missing"),
        ({"rewards": [1]}, "wanted the fields observation, action, .*, max_size, got rewards too"),
        ({"size": True}, "size: wanted a whole number of at least 0, got True"),
        ({"size": -1}, "size: wanted a whole number of at least 0, got -1"),
        ({"size": 2.0}, "size: wanted a whole number of at least 0, got 2.0"),
        ({"batch_size": 0}, "batch_size: wanted a whole number of at least 1, got 0"),
        ({"max_size": 0}, "max_size: wanted a whole number of at least 1, got 0"),
        ({"done": np.zeros(2, bool)}, r"done: wanted 3 values, got an array of shape \[2\]"),
        ({"reward": np.zeros((3, 1))}, r"reward: wanted 3 values, got an array of shape \[3, 1\]"),
        ({"reward": ["a", "b", "c"]}, "reward: wanted numbers, got <U1"),
        ({"reward": np.zeros(3, complex)}, "reward: wanted numbers, got complex128"),
        ({"action": ["a", None, "c"]}, "action: wanted texts, got NoneType at 1"),
        ({"action": np.zeros(3)}, "action: wanted texts, got float at 0"),
    ],
)
def test_a_field_that_does_not_fit_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    columns = dict(zip((p.removesuffix("s") for p in PLURAL), map(list, zip(*TURNS, strict=True)), strict=True))
    replay = columns | {"size": 3, "batch_size": 8, "max_size": 10} | change
    with pytest.raises(ValueError, match=f"^replay: {message}$"):
        write_replay_buffer(tmp_path / "r.pt", replay)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_something_else(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer.pt: 'observation' is missing"):
        read_replay_buffer(saved)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt: wanted a replay buffer, got list"):
        read_replay_buffer(tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("mine")
    with pytest.raises(ValueError, match=r"text.pt: wanted a whole file of torch.save, got: "):
        read_replay_buffer(tmp_path / "text.pt", trust_pickle=True)


# -- files with code in them -------------------------------------------------------------------------


class Call:
    """Unpickled in the usual way, it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["alone", "attribute", "text", "state"])
def test_code_in_a_pickle_is_refused_with_and_without_trust(
    original: type[Any], place: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof, path = tmp_path / "proof", tmp_path / "replay_buffer.pt"
    evil = Call(os.system, f"touch {proof}")
    buffer = original(2, 3)
    buffer.insert(*TURNS[0])
    content = {"alone": evil, "state": Trainer(1).states | {"model_state_dict": evil}}.get(place, buffer)
    if place == "attribute":
        buffer.batch_size = evil
    if place == "text":
        buffer.observations[2] = evil
    save_as_original(path, content, _use_new_zipfile_serialization=zipped)
    for read in (read_replay_buffer, read_trainer):
        with pytest.raises(
            ValueError, match=r"replay_buffer.pt: holds (posix.system|archer.data.utils.ReplayBuffer), which"
        ):
            read(path)
        with (
            pytest.warns(UserWarning, match="a pickle, read because of trust_pickle"),
            pytest.raises(ValueError, match=r"holds posix.system, neither a ReplayBuffer nor an array: not even trust"),
        ):
            read(path, trust_pickle=True)
    assert not proof.exists()
    make_importable(original, monkeypatch)
    torch.load(path, weights_only=False)  # the file is what it should be: read so, it does run code
    assert proof.exists()


@pytest.mark.parametrize(
    "call",
    [
        Call(eval, "__import__('os').system('true')"),
        Call(getattr, "text", "format"),
        Call(np.load, "x.npy", None, True),
        Call(pickle.loads, b"cos\nsystem\n(S'true'\ntR."),
        Call(__import__, "antigravity"),
    ],
)
def test_other_calls_too(call: Call, tmp_path: Path) -> None:
    torch.save({"observation": call}, tmp_path / "r.pt")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="not even trust_pickle reads it"):
        read_replay_buffer(tmp_path / "r.pt", trust_pickle=True)


def _forged(path: Path, attributes: bytes) -> None:
    """A file of torch.save whose pickle is an object of the original's with a dictionary written by hand."""
    pickled = b"\x80\x02carcher.data.utils\nReplayBuffer\n)\x81}(" + attributes + b"ub."
    torch.save(1, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _dtype(code: str, state: bytes = b"K\x03" + _text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00") -> bytes:
    return b"cnumpy\ndtype\n" + _text(code) + b"\x89\x88\x87R(" + state + b"tb"


def _array(shape: bytes, dtype: bytes, data: bytes) -> bytes:
    new = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85c_codecs\nencode\n"
    new += _text("b") + _text("latin1") + b"\x86R\x87R"
    return new + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb"


def _bytes(data: str) -> bytes:
    return b"c_codecs\nencode\n" + _text(data) + _text("latin1") + b"\x86R"


COUNTED = _text("size") + b"K\x01" + _text("batch_size") + b"K\x01" + _text("max_size") + b"K\x01"


def _columns(**given: bytes) -> bytes:
    texts = _array(b"K\x01\x85", _dtype("O8"), b"]" + _text("a") + b"a")
    numbers = _array(b"K\x01\x85", _dtype("i1"), _bytes("\x05"))
    all_of_them = {
        name: texts if name in ("observations", "actions", "next_observations") else numbers for name in PLURAL
    }
    return b"".join(_text(name) + value for name, value in (all_of_them | given).items()) + COUNTED


@pytest.mark.parametrize(
    "column",
    [
        # 1,000 objects of a list of one: NumPy's own __setstate__ reads past its end.
        _array(b"M\xe8\x03\x85", _dtype("O8"), b"]" + _text("a") + b"a"),
        # eight bytes as a pointer, by a dtype of objects that says it has none
        _array(b"K\x01\x85", _dtype("O8"), _bytes("AAAAAAAA")),
        _array(b"M\xe8\x03\x85", _dtype("f8"), _bytes("AAAAAAAA")),
        _array(b"K\x01\x85", _dtype("V8"), _bytes("AAAAAAAA")),
        _array(b"K\x01\x85", _dtype("i4,O8"), _bytes("AAAAAAAA")),
        _array(b"K\x01\x85", b"K\x05", _bytes("AAAAAAAA")),
        b"cnumpy\nndarray\nK\x01\x85" + _dtype("O8") + _bytes("AAAAAAAA") + b"\x87R",
        b"cnumpy.core.multiarray\nscalar\n" + _dtype("O8") + _bytes("AAAAAAAA") + b"\x86R",
        b"c_codecs\nencode\n" + _text("a") + _text("zip") + b"\x86R",
        b"carcher.data.utils\nReplayBuffer\n)\x81K\x05b",
    ],
)
def test_arrays_that_lie_about_themselves_are_refused(column: bytes, tmp_path: Path) -> None:
    path = tmp_path / "replay_buffer.pt"
    _forged(path, _columns())
    replay = read_trusting(path)  # written so, an honest one is read
    assert (replay["action"].tolist(), replay["reward"].tolist()) == (["a"], [5])
    for name in ("observations", "rewards"):
        _forged(path, _columns(**{name: column}))
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=f"^{path}: "):
            read_replay_buffer(path, trust_pickle=True)


def test_an_array_that_is_never_filled_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "replay_buffer.pt"
    array = _array(b"K\x01\x85", _dtype("i1"), _bytes("\x05"))
    _forged(path, _columns(rewards=array[: array.index(b"(K\x01")]))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="'reward' is missing"):
        read_replay_buffer(path, trust_pickle=True)


def test_what_else_is_allowed_in_this_process_changes_nothing(original: type[Any], tmp_path: Path) -> None:
    path, allowed = tmp_path / "replay_buffer.pt", torch.serialization.get_safe_globals()
    reconstruct = (np._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct")
    buffer = original(2, 3)
    buffer.insert(*TURNS[0])
    theirs = [original, reconstruct, np.ndarray, np.dtype, type(np.dtype(object))]
    with torch.serialization.safe_globals(theirs):
        save_as_original(path, buffer)
        with pytest.raises(ValueError, match="no plain data"):
            read_replay_buffer(path)
        assert_holds(read_trusting(path), TURNS[:1], size=1, batch_size=2, max_size=3)
        assert set(torch.serialization.get_safe_globals()) == {*allowed, *theirs}
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_pickle_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path, whole, rng, refused = tmp_path / "replay_buffer.pt", _columns(), random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        _forged(path, bytes(damaged))
        try:
            read_replay_buffer(path, trust_pickle=True)
        except ValueError as error:
            refused += str(error).startswith(f"{path}: ")
    assert refused > 150
