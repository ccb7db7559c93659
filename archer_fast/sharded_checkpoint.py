"""Tensors that no rank holds whole, in a folder where each rank writes its parts (torch.distributed.checkpoint)."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from archer_fast.ranks import ALONE, Ranks

# torch.distributed.checkpoint is imported where it is used: that takes a second.


def save_shards(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill `folder`, which is made anew, with the parts of all ranks, which all call this with the same names.

    Errors: OSError on every rank where one could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    def make() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    ranks.led(make)
    try:
        with ranks.sending(), _one_process_is_no_mistake():
            save(dict(tensors), storage_writer=FileSystemWriter(folder), no_dist=ranks.size == 1)
    except CheckpointException as error:  # which is no Exception
        raise OSError(f"{folder}: {_first_line(error)}") from error


def load_shards(
    folder: Path, like: Callable[[str], Tensor], *, prefix: str = "", ranks: Ranks = ALONE
) -> dict[str, Tensor]:
    """What `save_shards` of any number of ranks wrote there, each laid out as `like` of its name, in parts or not.

    prefix: of the names that are wanted. Every rank calls.
    Errors: ValueError for a tensor of another shape, or where a file cannot be read; what `like` raises for a name that
    it does not know.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    try:
        names = sorted(name for name in reader.read_metadata().state_dict_metadata if name.startswith(prefix))
        found = {name: torch.empty_like(like(name), requires_grad=False) for name in names}
        with ranks.sending(), _one_process_is_no_mistake():
            load(found, storage_reader=reader, no_dist=ranks.size == 1)
    except (OSError, CheckpointException) as error:
        raise ValueError(f"{folder}: {_first_line(error)}") from error
    return found


@contextmanager
def _one_process_is_no_mistake() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
