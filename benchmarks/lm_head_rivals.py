"""Who solves the lm_head's case: our two ops, what torch offers, and the packages of the extra `bench`.

Nobody is handicapped: where an API has a setting that decides its speed, several are listed and the fastest runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lm_head_case import Case, Solution, Work, reinforce
from torch import Tensor

LogprobsFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [n, H], weight [V, H], target_ids [n] -> [n]
Solver = Callable[[Case], tuple[Tensor | None, Tensor]]  # -> loss (None: to be made of the log-probs), log-probs [n]


class Unavailable(Exception):
    """A rival that cannot run here; says why."""


@dataclass(frozen=True)
class Rival:
    name: str
    load: Callable[[], Mapping[str, Solver]]  # by setting; "" where there is nothing to set
    module: str | None = None  # of a package that may not be installed
    package: str | None = None  # the name it is installed by
    works: tuple[Work, ...] = ("score", "frozen", "train")
    is_ours: bool = False

    def solvers(self) -> Mapping[str, Solver]:
        """Errors: Unavailable."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            raise Unavailable("not installed (pip install archer-fast[bench])")
        try:
            return self.load()
        except Exception as error:
            raise Unavailable(f"cannot be imported here: {brief(error)}") from error


def brief(error: Exception) -> str:
    """One line of an exception that fits a table."""
    line = (str(error).strip().splitlines() or [""])[0].replace("|", "/")
    return f"{type(error).__name__}: {line[:120]}"


def solve(solver: Solver, case: Case, work: Work) -> Solution:
    """What is timed, and returned where it is compared."""
    case.weight.requires_grad_(work == "train")
    if work == "score":
        with torch.no_grad():
            return Solution(None, solver(case)[1], None, None)
    loss, logprobs = solver(case)
    if loss is None:
        loss = reinforce(logprobs, case.advantages)
    loss.backward()
    return Solution(loss.detach(), logprobs.detach(), case.hidden.grad, case.weight.grad)


def per_token(logprobs: LogprobsFn) -> Solver:
    """Of an API that scores every row it is given: it is given the gathered ones."""
    return lambda case: (None, logprobs(case.scored_hidden(), case.weight, case.target_ids))


def check_impl(name: str, case: Case) -> None:
    from archer_fast import ops

    wanted = "triton" if case.hidden.is_cuda else "cpu"
    assert ops.last_impl(name) == wanted, (name, wanted, ops.last_impl(name))


def linear_logprobs() -> Mapping[str, Solver]:
    from archer_fast import ops

    def solver(case: Case) -> tuple[None, Tensor]:
        scores = ops.linear_logprobs(case.hidden, case.weight, case.target_ids, rows=case.rows)
        check_impl("linear_logprobs", case)
        return None, scores.logprobs

    return {"": solver}


def linear_policy_loss() -> Mapping[str, Solver]:
    from archer_fast import ops

    def solver(case: Case) -> tuple[Tensor, Tensor]:
        made = ops.linear_policy_loss(case.hidden, case.weight, case.target_ids, case.advantages, rows=case.rows)
        check_impl("linear_policy_loss", case)
        return made.loss, made.logprobs

    return {"": solver}


def eager() -> Mapping[str, Solver]:
    def logprobs(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        return (hidden @ weight.T).log_softmax(1).gather(1, target_ids[:, None]).squeeze(1)

    return {"": per_token(logprobs)}


def softmax_then_log() -> Mapping[str, Solver]:
    def logprobs(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        return (hidden @ weight.T).softmax(1).gather(1, target_ids[:, None]).squeeze(1).log()

    return {"": per_token(logprobs)}


def torch_linear_cross_entropy() -> Mapping[str, Solver]:
    def with_options(options: torch.nn.LinearCrossEntropyOptions | None) -> Solver:
        return per_token(lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none", options=options))

    chunked = {
        f"{n} rows a chunk": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=n, chunking_method=None)
        for n in (128, 256, 512)
    }
    settings = {"whole logits": None, "auto chunks": torch.nn.LinearCrossEntropyOptions(), **chunked}
    return {name: with_options(options) for name, options in settings.items()}


def liger() -> Mapping[str, Solver]:
    """Off CUDA it takes its fallback in plain torch, 512 rows at a time, which nothing sets."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return {"": per_token(lambda h, w, t: -LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, t))}


def cut_cross_entropy() -> Mapping[str, Solver]:
    """Its kernel `cce` needs CUDA; `torch_compile` is the implementation for everything else."""
    from cut_cross_entropy import linear_cross_entropy

    def with_impl(impl: str) -> Solver:
        return per_token(lambda h, w, t: -linear_cross_entropy(h, w, t, reduction="none", impl=impl))

    impls = ("torch_compile", "cce") if torch.get_default_device().type == "cuda" else ("torch_compile",)
    return {impl: with_impl(impl) for impl in impls}


def trl_chunked() -> Mapping[str, Solver]:
    """outputs=() asks for log-probs alone; 32768 columns is TRL's own choice."""
    from trl.trainer.utils import _ChunkedLogProbFunction

    def with_columns(columns: int) -> Solver:
        return per_token(lambda h, w, t: _ChunkedLogProbFunction.apply(h, w, None, t, 1.0, columns, None, 1.0, ())[0])

    return {f"{columns} columns a tile": with_columns(columns) for columns in (1024, 4096, 32768)}


RIVALS = (
    Rival("ops.linear_policy_loss", linear_policy_loss, works=("frozen", "train"), is_ours=True),
    Rival("ops.linear_logprobs", linear_logprobs, is_ours=True),
    Rival("torch eager: log_softmax, gather", eager),
    Rival("original ArCHer: softmax, gather, log", softmax_then_log),
    Rival("torch linear_cross_entropy", torch_linear_cross_entropy),
    Rival("liger-kernel scaled cross entropy", liger, "liger_kernel", "liger-kernel"),
    Rival("cut-cross-entropy", cut_cross_entropy, "cut_cross_entropy", "cut-cross-entropy"),
    Rival("TRL _ChunkedLogProbFunction", trl_chunked, "trl", "trl"),
)
