"""A model whose weights are divided over the ranks, by torch's `fully_shard` (FSDP2).

Each rank holds its part of every weight, of its gradient and of its optimizer state. Weights are made whole for passes
alone, in one of two ways:

`gathered`  all at once, for a phase: what samples or reads without gradients takes as many passes as the data want,
            on every rank another number, and a collective in any of them would wait for ranks that take fewer. One
            gather a phase also costs less than one a sampled token. Beside the cache nothing else is large then.
`streamed`  block by block as a pass meets them, in forward and again in backward, their gradients summed and divided as
            they come: for passes with gradients, where activations want the memory. Every rank takes as many.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from archer_fast.ranks import Ranks

# torch's names for this, DTensor and FSDPModule, are imported where a model is sharded: they take a second.


class ShardedModel:
    """`model` with its weights divided: those of each of `blocks` are gathered together, the others with the model's.

    Embeddings, final norm and lm_head are "the others": they are whole from the first pass inside `streamed` to its
    end, so that the loss meets the lm_head's matrix as it is and a step gathers it once.
    ignored: parameters that stay whole on every rank (adapters).
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], ranks: Ranks, ignored: set[nn.Parameter] | None = None
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        self.ranks = ranks
        self._whole: Literal["gathered", "streamed"] | None = None  # how weights are whole at this moment
        self._has_run = False
        mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.size,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # sums of gradients, whatever the weights are
        parts: list[Any] = []
        for module in [*blocks, model]:
            fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)  # sums, as `Ranks.sum_gradients`: a share's loss is its part already
            module.set_force_sum_reduction_for_comms(True)
            parts.append(module)
        self._parts, self._root = parts, parts[-1]
        self._root.set_reshard_after_backward(False, recurse=False)
        self._reshard_after_forward(True)
        self._root.last_hidden = types.MethodType(_last_hidden, model)
        register_fsdp_forward_method(model, "last_hidden")

    def last_hidden(self, **inputs: Any) -> Tensor:
        """The last hidden states of the model; only inside `gathered` or `streamed`."""
        assert self._whole, "a pass of a sharded model outside gathered() and streamed()"
        assert self._whole == "streamed" or not torch.is_grad_enabled(), "a pass with gradients inside gathered()"
        self._has_run = True
        hidden: Tensor = self._root.last_hidden(**inputs)
        return hidden

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights are whole inside, for any number of passes without gradients; every rank enters."""
        if self._whole:
            assert self._whole == "gathered", self._whole
            yield
            return
        with self.ranks.sending():
            self._reshard_after_forward(False)
            for part in self._parts:
                part.unshard()
        with self._as("gathered"):
            yield

    @contextmanager
    def streamed(self) -> Iterator[None]:
        """Weights are gathered as passes meet them; every rank enters, and takes as many passes inside."""
        if self._whole:
            assert self._whole == "streamed", self._whole
            yield
            return
        self._reshard_after_forward(True)
        with self._as("streamed"), self.ranks.sending_within():
            yield

    @contextmanager
    def _as(self, kind: Literal["gathered", "streamed"]) -> Iterator[None]:
        self._whole = kind
        try:
            yield
        finally:
            self._whole = None
            for part in self._parts:
                part.reshard()
            if self._has_run:  # else torch knows of no state yet
                self._root.reset_iter_state()  # or the order of all passes without backward is kept

    def _reshard_after_forward(self, reshard: bool) -> None:
        for part in self._parts:
            part.set_reshard_after_forward(reshard and part is not self._root, recurse=False)


def _last_hidden(model: Any, **inputs: Any) -> Tensor:
    hidden: Tensor = model.base_model(**inputs).last_hidden_state
    return hidden if hidden._base is None else hidden.clone()  # torch's hooks warn of what is a view (GPT-2)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of it alone (it is a DTensor)."""
    return hasattr(tensor, "to_local")


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory; of what is not sharded the tensor itself."""
    part: Tensor = cast(Any, tensor).to_local() if is_sharded(tensor) else tensor
    return part


@torch.no_grad()
def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds whole, divided as `like` is; itself where that is not."""
    if not is_sharded(like) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def whole_on_leader(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """All tensors whole, on the leading rank's CPU, one after another gathered on the device; empty on the others.

    Every rank calls. What is one tensor under two names is one again.
    """
    found: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}
    with ranks.sending():
        for name, tensor in tensors.items():
            if id(tensor) not in known:
                one = cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor
                known[id(tensor)] = one.detach().cpu() if ranks.leads else torch.empty(0)
            found[name] = known[id(tensor)]
    return found if ranks.leads else {}
