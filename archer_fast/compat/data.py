"""The original's replay: single transitions of strings, drawn by numpy.random."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from archer_fast.arguments import as_integer, as_real
from archer_fast.compat.arguments import ignored
from archer_fast.compat.faults import Compat, choose_fixes
from archer_fast.compat.overrides import ours

# The columns; as attributes of the buffer they are called by the plural.
_TEXTS = ("observation", "action", "next_observation")
_DTYPES = {"reward": np.dtype(np.float64), "done": np.dtype(np.bool_), "mc_return": np.dtype(np.float64)}
_FIRST_SLOTS = 1024
_MOST = 2**62


class DummyDataset(Dataset[Any]):
    """A sequence, as a torch DataLoader wants it."""

    def __init__(self, buffer: Sequence[Any]) -> None:
        self.buffer = buffer

    def __len__(self) -> int:
        return len(self.buffer)

    def __getitem__(self, idx: int) -> Any:
        return self.buffer[idx]


class ReplayBuffer:
    """The newest `capacity` transitions; draws are uniform over what is held, with replacement.

    Draws come from numpy.random's global state, one integer each: `sample(n)` draws what n calls of `sample(1)` draw.
    fix, compat: with the fault "buffer" kept, the dtypes are those of the first insert (an int first turns .7 into 0),
    and `size` outgrows the capacity, whose younger slots are then drawn up to twice as often as the others.

    observations, actions, next_observations, rewards, dones, mc_returns: a slot each, those behind `size` not filled;
    None before the first insert. They grow with what is held, where the original's are capacity-sized from the start.

    >>> replay = ReplayBuffer(batch_size=2, capacity=3)
    >>> for turn in range(4):
    ...     replay.insert(f"Q{turn}", "a", -1, f"Q{turn + 1}", False, -1.0)
    >>> replay.size, list(replay.observations[:3])
    (3, ['Q3', 'Q1', 'Q2'])
    """

    def __init__(
        self,
        batch_size: int = 2,
        capacity: int = 10000,
        *,
        fix: Iterable[str] | None = None,
        compat: Compat | None = None,
        **kwargs: Any,
    ) -> None:
        ignored(type(self).__name__, kwargs)
        self.batch_size = as_integer("batch_size", batch_size, 1, _MOST)
        self.max_size = as_integer("capacity", capacity, 1, _MOST)
        self.fixes = choose_fixes(fix, compat)
        self.observations: Any = None
        self.actions: Any = None
        self.next_observations: Any = None
        self.rewards: Any = None
        self.dones: Any = None
        self.mc_returns: Any = None
        self._inserted = 0

    @property
    def size(self) -> int:
        """Transitions held; with the fault "buffer" kept, those ever inserted."""
        return self._held if "buffer" in self.fixes else self._inserted

    def __len__(self) -> int:
        return self.size

    @property
    def _held(self) -> int:
        return min(self._inserted, self.max_size)

    @ours
    def sample(self, batch_size: int | None = None) -> dict[str, npt.NDArray[Any]]:
        """`batch_size` transitions, self.batch_size where None: observation, action, next_observation [n] of str,
        reward, mc_return [n] float64, done [n] bool. ValueError where nothing is held."""
        num = self.batch_size if batch_size is None else as_integer("batch_size", batch_size, 0, _MOST)
        if self._inserted == 0:
            raise ValueError("sample: wanted a buffer with at least one transition, got an empty one")
        rows = np.random.randint(0, self.size, size=num) % self.max_size  # noqa: NPY002, the original's source
        return {
            "observation": self.observations[rows],
            "action": self.actions[rows],
            "reward": self.rewards[rows],
            "next_observation": self.next_observations[rows],
            "done": self.dones[rows],
            "mc_return": self.mc_returns[rows],
        }

    def insert(
        self,
        /,
        observation: str,
        action: str,
        reward: Any,
        next_observation: str,
        done: Any,
        mc_return: Any,
        **kwargs: Any,
    ) -> None:
        """Add one transition; the oldest goes where the buffer is full. Further keywords are not stored.

        Errors: TypeError for a text that is no str or a number that is none, ValueError for a number that is not
        finite or a done that is neither true nor false; the buffer is then as before.
        """
        texts = {"observation": observation, "action": action, "next_observation": next_observation}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise TypeError(f"{name}: wanted a str, got {text!r:.80}")
            texts[name] = str(text)  # NumPy's own str is a str to Python, and none to a checkpoint
        numbers = {
            "reward": _number("reward", reward),
            "done": _done(done),
            "mc_return": _number("mc_return", mc_return),
        }
        if "buffer" in self.fixes:
            self._reserve(_DTYPES)
        else:
            numbers = {"reward": np.asarray(reward), "done": np.asarray(done), "mc_return": np.asarray(mc_return)}
            self._reserve({name: value.dtype for name, value in numbers.items()})
        slot = self._inserted % self.max_size
        for name, value in (texts | numbers).items():
            getattr(self, f"{name}s")[slot] = value
        self._inserted += 1

    def _reserve(self, dtypes: Mapping[str, np.dtype[Any]]) -> None:
        """Make room for one more; `dtypes` are those of new columns."""
        old = 0 if self.rewards is None else len(self.rewards)
        if self._inserted < old or old == self.max_size:
            return
        slots = min(self.max_size, max(_FIRST_SLOTS, 2 * old))
        for name in (*_TEXTS, *_DTYPES):
            column = getattr(self, f"{name}s")
            dtype = np.dtype(object) if name in _TEXTS else dtypes[name] if column is None else column.dtype
            grown = np.empty(slots, dtype)
            if column is not None:
                grown[:old] = column
            setattr(self, f"{name}s", grown)

    def state_dict(self) -> dict[str, Any]:
        """All that is held, as `trainer_file.write_replay_buffer` writes it; `size` counts every insert.

        {"observation": array(["Questions:\\n", ...], dtype=object), ..., "reward": array([-1.0, ...]), ...,
         "size": 120, "batch_size": 8, "max_size": 100}
        """
        held = {name: getattr(self, f"{name}s") for name in (*_TEXTS, *_DTYPES)}
        if self._inserted == 0:
            held = {name: np.empty(0, _DTYPES.get(name, object)) for name in held}
        copies = {name: column[: self._held].copy() for name, column in held.items()}
        return copies | {"size": self._inserted, "batch_size": self.batch_size, "max_size": self.max_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold what another buffer held, slot by slot; a smaller capacity than its own keeps the newest.

        `state`: of `state_dict` or `trainer_file.read_replay_buffer`. Batch size, capacity and fixes stay this buffer's
        own. Errors: ValueError or TypeError naming what is wrong; nothing is changed then.
        """
        wanted = ("max_size", "size", *_TEXTS, *_DTYPES)
        if missing := [name for name in wanted if name not in state]:
            raise ValueError(f"state: wanted the keys {', '.join(wanted)}, got none of {', '.join(missing)}")
        capacity = as_integer("max_size", state["max_size"], 1, _MOST)
        inserted = as_integer("size", state["size"], 0, _MOST)
        held = min(inserted, capacity)
        columns = {}
        for name in (*_TEXTS, *_DTYPES):
            if len(state[name]) != held:
                raise ValueError(f"{name}: wanted {held} of them, got {len(state[name])}")
            columns[name] = _texts(name, state[name]) if name in _TEXTS else self._numbers(name, state[name])
        if capacity != self.max_size:
            oldest = inserted % capacity if inserted > capacity else 0
            columns = {name: np.roll(own, -oldest)[-self.max_size :] for name, own in columns.items()}
            inserted = min(held, self.max_size)
        for name, own in columns.items():
            setattr(self, f"{name}s", own if inserted else None)
        self._inserted = inserted

    def _numbers(self, name: str, values: Any) -> npt.NDArray[Any]:
        """[n], as this buffer stores them."""
        array = np.array(values)  # a copy
        if array.ndim != 1 or array.dtype.kind not in "biuf":
            raise TypeError(f"{name}: wanted numbers [n], got {array.dtype} of shape {list(array.shape)}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: wanted finite numbers, got {array[~np.isfinite(array)][0]}")
        if name == "done" and not np.isin(array, (0, 1)).all():
            raise ValueError(f"done: wanted true or false, got {array[~np.isin(array, (0, 1))][0]}")
        return array.astype(_DTYPES[name]) if "buffer" in self.fixes else array


def _number(name: str, value: Any) -> Any:
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    return as_real(name, float(value) if isinstance(value, bool) else value)


def _done(value: Any) -> bool:
    number = _number("done", value)
    if number not in (0.0, 1.0):
        raise ValueError(f"done: wanted true or false, got {value!r:.80}")
    return bool(number)


def _texts(name: str, texts: Sequence[Any]) -> npt.NDArray[Any]:
    """[n] of str."""
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name}: wanted str alone, got {text!r:.80}")
    array = np.empty(len(texts), object)
    array[:] = [str(text) for text in texts]
    return array
