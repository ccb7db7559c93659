"""The processes of one run, as torchrun starts them: who does which share, and what they exchange.

Every rank holds the same games, random numbers on the host, weights and optimizer state. Divided are the games that are
played, the passes over a trunk, and the actions that are sampled; exchanged are the games, what was made of them, and
sums of gradients. So one rank's checkpoint is everybody's, and any number of ranks goes on from it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

Item = TypeVar("Item")
Result = TypeVar("Result")

_CAUSE = "archer_fast/cause"
_OF_BACKENDS = ("gloo", "nccl")  # in the texts of errors that are RuntimeErrors by type and no narrower
_BUCKET = 1 << 24  # numbers that are summed together; a copy of as many is made


class RankFailed(RuntimeError):
    """Another rank has ended, has not answered in time, or could not do what only the leading one does."""


class Ranks:
    """Rank `rank` of `size`. Alone, everything here is the identity and nothing is sent.

    Errors: RankFailed of whatever sends, where another rank is gone.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self.is_waiting = False  # for the others, at this moment
        self._store = store  # torch.distributed's, where a rank that fails says why

    @property
    def leads(self) -> bool:
        """This rank writes the files of the run and speaks for all."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `size`-th item, from the `rank`-th on."""
        return items[self.rank :: self.size]

    def gather(self, mine: Any) -> list[Any]:
        """What every rank holds here, by rank; tensors in it should be on the CPU."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        with self.sending():
            dist.all_gather_object(found, mine)
        return found

    def led(self, act: Callable[[], Result]) -> Result:
        """What the leading rank's call returns, for all; the others wait for it. Where it raises, nobody goes on."""
        if self.size == 1:
            return act()
        value: Any = None
        error: Exception | None = None
        if self.leads:
            try:
                value = act()
            except Exception as raised:
                error = raised
        value, told = self.gather((value, None if error is None else f"{type(error).__name__}: {error}"))[0]
        if error is not None:
            raise error
        if told is not None:
            raise RankFailed(f"rank {self.rank} ends, since rank 0 has: {told}")
        result: Result = value
        return result

    def movable(self, tensors: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        """On the CPU, where there is anybody to send them to."""
        return tensors if self.size == 1 else [[tensor.cpu() for tensor in row] for row in tensors]

    def say(self, text: str) -> None:
        """To the terminal, beside what the leading rank says there."""
        print(f"rank {self.rank}: {text}", file=sys.stderr, flush=True)

    def check_alike(self, name: str, value: Any) -> None:
        """ValueError, on every rank, where they do not hold the same."""
        every = self.gather(value)
        for rank, theirs in enumerate(every):
            if theirs != every[0]:
                raise ValueError(f"{name}: wanted the same on all ranks, got {every[0]} on rank 0, {theirs} on {rank}")

    def seed(self, seed: int, *more: int) -> int:
        """Of this rank's own random numbers: `seed` itself on rank 0, and of the others none alike."""
        if self.leads:
            return seed
        return int(np.random.SeedSequence([1 + len(more), seed, self.rank, *more]).generate_state(1, np.uint64)[0] >> 1)

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return any(self.gather(flag))

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks; the tensor itself is left as it is."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        with self.sending():
            dist.all_reduce(total)
        return total

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Every gradient becomes its sum over the ranks; where only some have one, that of the others counts as 0.

        Of parameters that every rank holds whole; the gradients of sharded ones are summed in backward.
        """
        if self.size == 1:
            return
        parameters = list(parameters)
        number_with = self.sum(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)).tolist()
        gradients = []
        for p, number in zip(parameters, number_with, strict=True):
            if number:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                gradients.append(p.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            with self.sending():
                dist.all_reduce(flat)
            for g, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(summed.view_as(g))

    @torch.no_grad()
    def take_first(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's numbers, for everybody; in place."""
        if self.size > 1:
            with self.sending():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Around what waits for the others alone. Errors: RankFailed, with the cause where one was told."""
        self.is_waiting = True
        try:
            yield
        except RuntimeError as error:  # torch has no narrower one for all backends
            raise self._lost(error) from error
        finally:
            self.is_waiting = False

    @contextmanager
    def sending_within(self) -> Iterator[None]:
        """Around passes in which torch waits for the others now and then: their other errors stay what they are."""
        try:
            yield
        except RankFailed:
            raise
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in _OF_BACKENDS):
                raise
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> RankFailed:
        return RankFailed(f"rank {self.rank} of {self.size} has lost another one: {self._told_cause() or error}")

    def tell_cause(self, error: BaseException) -> None:
        """Leave word for the others of why this rank ends."""
        if self._store is not None and not isinstance(error, RankFailed):
            with contextlib.suppress(RuntimeError):  # the store may be gone
                self._store.set(_CAUSE, f"rank {self.rank}: {type(error).__name__}: {error}")

    def _told_cause(self) -> str | None:
        if self._store is None:
            return None
        with contextlib.suppress(RuntimeError):
            if self._store.check([_CAUSE]):
                told: bytes = self._store.get(_CAUSE)
                return told.decode(errors="replace")
        return None


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order, neighbours of one dtype together up to `_BUCKET` numbers."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET
        if full or (bucket and bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


ALONE = Ranks()


@contextmanager
def joined_ranks(seconds: float = 1800.0) -> Iterator[Ranks]:
    """The ranks that torchrun started, joined for the time of the context; `ALONE` where it did not start this process.

    seconds: how long a rank waits for the others before it gives up.
    Errors: ValueError where the environment's RANK and WORLD_SIZE make no sense; RankFailed where they do not meet.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield ALONE
        return
    rank = _number("RANK", None)
    if not 0 <= rank < size:
        raise ValueError(f"RANK: wanted 0 to {size - 1} (WORLD_SIZE is {size}), got {rank}; start with torchrun")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(seconds=seconds)
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:  # a port in use, a rank that never came
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankFailed(f"rank {rank} of {size} cannot join the others at {place}: {error}") from error
    ranks = Ranks(rank, size, store)
    try:
        yield ranks
    except BaseException as error:
        ranks.tell_cause(error)
        raise  # the group is left as it is: to take it down could wait for whoever is gone
    dist.destroy_process_group()


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{name}: wanted a number in the environment, got {text!r}; start with torchrun") from None


def local_device(device: torch.device) -> torch.device:
    """The GPU of this rank on its machine, where no other was asked for by number."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    index = _number("LOCAL_RANK", 0)
    if index >= torch.cuda.device_count():
        raise ValueError(f"LOCAL_RANK: wanted at most {torch.cuda.device_count() - 1}, as there are GPUs, got {index}")
    torch.cuda.set_device(index)  # what asks for no device by name must not meet that of rank 0
    return torch.device("cuda", index)
