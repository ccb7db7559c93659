"""An optimizer step that refuses non-finite gradients without asking the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from archer_fast.meters import Meters
from archer_fast.ranks import ALONE, Ranks
from archer_fast.sharding import is_sharded, local, sharded_like

_MASTER = "master"
_BUCKET = 1 << 28  # parameters whose gradients are in float32 at a time: 1 GiB


class NonFiniteLoss(RuntimeError):
    """Too many optimizer steps in a row had a NaN or infinite loss or gradient.

    `trajectory_ids`: the games of the first of those steps, for a dump.
    """

    def __init__(self, message: str, trajectory_ids: npt.NDArray[np.int64]) -> None:
        super().__init__(message)
        self.trajectory_ids = trajectory_ids


class GuardedStep:
    """AdamW with gradient clipping; a step whose loss or gradient norm is not finite leaves the weights alone.

    Parameters in half precision are moved as float32 master weights and rounded after each step (Micikevicius et al.
    2018, arXiv 1710.03740): of a bfloat16 number near .01 a step of 1e-5 is a sixth of the spacing, and lost.
    offload: masters and moments of all parameters lie in the host's memory, and the host steps.

    The decision is made on the device (fused AdamW's `found_inf`), so a step costs no synchronisation;
    `check`, once an iteration, reads what happened. ranks: over which loss and gradients are summed before the step;
    those of sharded parameters come summed from backward, and the norm is that of all shards.
    """

    def __init__(
        self,
        name: str,
        groups: list[dict[str, Any]],
        max_grad_norm: float,
        max_skipped: int,
        ranks: Ranks = ALONE,
        *,
        offload: bool = False,
    ) -> None:
        self.name, self.ranks = name, ranks
        groups = [g for g in groups if g["params"]]
        self.parameters: list[Tensor] = [p for g in groups for p in g["params"]]
        device = torch.device("cpu") if offload else None
        masters = [[_master(p, device) for p in g["params"]] for g in groups]
        self._masters = [m for group in masters for m in group]  # of each parameter; itself where it needs none
        self._has_masters = any(m is not p for m, p in zip(self._masters, self.parameters, strict=True))
        groups = [g | {"params": own} for g, own in zip(groups, masters, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.max_grad_norm = max_grad_norm
        self.max_skipped = max_skipped
        self.num_steps = 0
        self.skipped_in_a_row = 0
        self._flags: list[Tensor] = []
        self._games: list[npt.NDArray[np.int64]] = []

    def __call__(self, loss: Tensor, meters: Meters, trajectory_ids: npt.NDArray[np.int64]) -> None:
        """Backward and step; `trajectory_ids` are the games of this batch, kept for a dump until `check`."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        self.ranks.sum_gradients(p for p in self.parameters if not is_sharded(p))
        norm = self._clip()
        bad = ~(torch.isfinite(norm) & torch.isfinite(self.ranks.sum(loss.detach())))
        self._step(bad.float())
        self.num_steps += 1
        self._flags.append(bad)
        self._games.append(trajectory_ids)
        meters.add(1.0, **{f"{self.name}_grad_norm": torch.where(bad, 0.0, norm)})

    def _step(self, found_inf: Tensor) -> None:
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        waiting = [p.grad for p in self.parameters]
        if self._has_masters:
            for parameter in self.parameters:
                parameter.grad = None
        for bucket in self._buckets():
            for _, master in bucket:
                if self._has_masters and (grad := waiting.pop(0)) is not None:
                    master.grad = grad.to(master.device, master.dtype)
            self.optimizer.found_inf = found_inf.to(bucket[0][1].device)  # type: ignore[attr-defined]
            self.optimizer.step()  # moves what has a gradient
            with torch.no_grad():
                for parameter, master in bucket:
                    if master is not parameter:
                        parameter.copy_(master)
                    if self._has_masters:
                        master.grad = None  # or the next bucket's step would move it again

    def _buckets(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Parameters and their masters, so many at a time that float32 copies of their gradients stay small."""
        bucket, size = [], 0
        for pair in zip(self.parameters, self._masters, strict=True):
            bucket.append(pair)
            size += pair[0].numel()
            if size >= _BUCKET and self._has_masters:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket

    def _clip(self) -> Tensor:
        """Scale the gradients to a norm of at most `max_grad_norm`; the norm [] that they had, alike on every rank."""
        if not any(is_sharded(p) for p in self.parameters):
            return torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        parts = [local(g) for g in gradients if is_sharded(g)]
        whole = [g for g in gradients if not is_sharded(g)]
        norms = [torch.nn.utils.get_total_norm(tensors) for tensors in (parts, whole)]
        of_parts, of_whole = (norm.to(self.parameters[0].device, torch.float32).square() for norm in norms)
        norm = (self.ranks.sum(of_parts) + of_whole).sqrt()
        torch._foreach_mul_(parts + whole, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def check(self, meters: Meters) -> None:
        """Count the steps skipped since the last check; NonFiniteLoss after `max_skipped` in a row."""
        if not self._flags:
            return
        flags = torch.stack(self._flags).tolist()
        games, self._flags, self._games = self._games, [], []
        meters.count_once(skipped_steps=sum(flags))
        for i, bad in enumerate(flags):
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
            if self.skipped_in_a_row >= self.max_skipped:
                raise NonFiniteLoss(
                    f"{self.name}: {self.skipped_in_a_row} optimizer steps in a row had a non-finite loss or "
                    "gradient; their weights were not changed",
                    games[max(0, i - self.skipped_in_a_row + 1)],
                )

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimizer's moments and step counts, and master weights, by parameter index."""
        state = self.optimizer.state_dict()["state"]
        found = {f"{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}
        pairs = enumerate(zip(self.parameters, self._masters, strict=True))
        return found | {f"{i}.{_MASTER}": m.detach() for i, (p, m) in pairs if m is not p}

    def like(self, name: str) -> Tensor:
        """The tensor that one of this name in `state_tensors` is laid out as."""
        return self._masters[int(name.split(".", 1)[0])]

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state_tensors`; masters that are not among them are the parameters as they are now."""
        for i, (parameter, master) in enumerate(zip(self.parameters, self._masters, strict=True)):
            if master is not parameter:
                saved = tensors.get(f"{i}.{_MASTER}")
                master.copy_(parameter if saved is None else sharded_like(saved, master))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            if key != _MASTER:
                state.setdefault(int(index), {})[key] = sharded_like(value, self.like(name)) if value.dim() else value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def _master(parameter: Tensor, device: torch.device | None) -> Tensor:
    """What the optimizer moves in a parameter's place: float32, on `device` where one is named."""
    is_half = parameter.dtype in (torch.bfloat16, torch.float16)
    if not is_half and device in (None, parameter.device):
        return parameter
    dtype = torch.float32 if is_half else parameter.dtype
    return parameter.detach().to(device or parameter.device, dtype, copy=True).requires_grad_()
