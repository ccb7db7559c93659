"""What a model in parts is: its gradients, its memory, its optimizer's state; on the ranks of torchrun.

torchrun --standalone --nproc-per-node 2 tests/ranked_shards.py
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from tiny_lm import tiny_lm
from torch import Tensor, nn

from archer_fast.actor import accumulate
from archer_fast.backbone import Backbone
from archer_fast.meters import Meters
from archer_fast.ops import linear_logprobs
from archer_fast.optim import GuardedStep
from archer_fast.ranks import Ranks, joined_ranks
from archer_fast.sharding import is_sharded, local

NO_GAMES = np.empty(0, np.int64)


def loss_of(backbone: Backbone, seed: int) -> Tensor:
    """Of two sequences of random tokens: the lm_head is met whole, as the policy's loss does it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, backbone.vocab_size, (12,), generator=generator)
    layout = backbone.layout(torch.tensor([0, 5, 12], dtype=torch.int32), (5, 7))
    positions = torch.cat([torch.arange(5), torch.arange(7)])
    hidden = backbone(ids, positions, layout)
    return -linear_logprobs(hidden, backbone.lm_head_weight, ids).logprobs.sum()


def parameters(backbone: Backbone) -> list[Tensor]:
    return [p for p in backbone.parameters() if p.requires_grad]


def check_gradients(ranks: Ranks, make: Callable[[], nn.Module], tolerance: float, **settings: bool) -> None:
    """Three passes of the first rank and three of the second are six of one process."""
    alone, parts = Backbone(make(), None), Backbone(make(), None)
    for backbone in (alone, parts):
        backbone.checkpoints_activations = settings.get("checkpoints_activations", False)
    parts.shard(ranks)
    seeds = range(3 * ranks.size)
    loss = accumulate((loss_of(alone, seed) for seed in seeds), parameters(alone))
    loss.backward()
    with parts.streamed():
        shared = accumulate((loss_of(parts, seed) for seed in ranks.share(seeds)), parameters(parts), by_backward=True)
    shared.backward()
    torch.testing.assert_close(ranks.sum(shared.detach()), loss.detach(), rtol=tolerance, atol=tolerance)
    num_compared = 0
    for (name, p), q in zip(alone.named_parameters(), parameters(parts), strict=True):
        assert p.grad is not None and q.grad is not None and is_sharded(q.grad), name
        scale = p.grad.float().abs().max().item()
        found = q.grad.full_tensor().float()  # type: ignore[attr-defined]
        torch.testing.assert_close(found, p.grad.float(), rtol=tolerance, atol=tolerance * scale, msg=name)
        num_compared += 1
    assert num_compared > 10


def live_bytes() -> int:
    """Of all tensors that Python knows, each memory once: weights in parts and whole, gradients, optimizer state."""
    gc.collect()
    found: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is deprecated and looked at all the same
        tensors = [local(x) for x in gc.get_objects() if isinstance(x, Tensor)]
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def check_memory(ranks: Ranks) -> None:
    """Eight large blocks: what a rank holds at rest, in the middle of a pass, and while all are gathered."""
    before = live_bytes()
    sizes = {"hidden_size": 64, "num_hidden_layers": 8, "intermediate_size": 256}
    backbone = Backbone(tiny_lm(seed=1, **sizes), None)
    whole = live_bytes() - before
    blocks = [
        module for name, module in backbone.named_modules() if name.endswith(tuple(f"layers.{i}" for i in range(8)))
    ]
    block = sum(p.numel() * p.element_size() for p in blocks[0].parameters())
    others = whole - 8 * block  # embeddings, lm_head, the final norm
    assert len(blocks) == 8 and others < block

    backbone.shard(ranks)
    gc.collect()
    rest = live_bytes() - before
    assert rest <= 0.55 * whole, (rest, whole)
    assert sum(local(p).numel() for p in backbone.parameters()) <= 0.51 * sum(p.numel() for p in backbone.parameters())
    with backbone.gathered():
        assert live_bytes() - before >= rest + 0.95 * whole, "a phase that samples holds them whole"
    assert live_bytes() - before == rest, "and gives them back"

    step = GuardedStep("actor", [{"params": parameters(backbone), "lr": 1e-3}], 1.0, 5, ranks)
    peaks: list[int] = []
    for module in blocks:
        module.register_forward_hook(lambda *_: peaks.append(live_bytes()))
        module.register_full_backward_hook(lambda *_: peaks.append(live_bytes()))
    with backbone.streamed():
        loss = accumulate((loss_of(backbone, seed) for seed in [ranks.rank]), step.parameters, by_backward=True)
    assert len(peaks) == 16, "forward and backward of each block"
    # Parts of weights and gradients, the others' whole weights and gradient, and of blocks at most: one that computes,
    # one that is gathered ahead, their gradients, and the copies in which they are sent.
    assert max(peaks) - before <= 2 * rest + 3 * others + 5 * block < 2 * whole, (max(peaks) - before, whole, block)
    peaks.clear()
    step(loss, Meters(ranks), NO_GAMES)
    assert not peaks, "the gradients are handed out, no pass is taken again"
    moments = step.state_tensors()
    assert len(moments) == 3 * len(step.parameters)
    held = sum(local(m).numel() for m in moments.values())
    assert held <= 0.51 * 2 * sum(p.numel() for p in step.parameters) + len(step.parameters)
    loss = None  # type: ignore[assignment]
    assert live_bytes() - before <= 0.55 * 4 * whole, "weights, gradients and two moments"


def check_steps_that_are_skipped(ranks: Ranks) -> None:
    """A loss of one rank that is not finite skips the step on all, and no weight is changed."""
    backbone = Backbone(tiny_lm(seed=1), None).shard(ranks)
    step = GuardedStep("actor", [{"params": parameters(backbone), "lr": 0.1}], 1.0, 5, ranks)
    meters = Meters(ranks)
    for factor, moves in ((1.0, True), (math.inf if ranks.rank == 1 else 1.0, False), (1.0, True)):
        before = [local(p).clone() for p in step.parameters]
        with backbone.streamed():
            step(loss_of(backbone, ranks.rank) * factor, meters, NO_GAMES)
        same = [torch.equal(b, local(p)) for b, p in zip(before, step.parameters, strict=True) if b.numel()]
        assert all(same) != moves and any(same) != moves, (factor, same)
    step.check(meters)
    assert meters.read()["skipped_steps"] == 1


def check_a_pass_that_fails(ranks: Ranks) -> None:
    """Its weights are in parts again, and the next pass is like any other."""
    backbone = Backbone(tiny_lm(seed=1), None).shard(ranks)
    with backbone.gathered(), torch.no_grad():
        wanted = loss_of(backbone, 0)
    (final_norm,) = (module for name, module in backbone.named_modules() if name == "model.model.norm")
    for context in (backbone.streamed, backbone.gathered):

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        hook = final_norm.register_forward_hook(fail)
        try:
            with context(), torch.set_grad_enabled(context == backbone.streamed):
                loss_of(backbone, 0)
        except ZeroDivisionError:
            hook.remove()
        assert all(is_sharded(p) for p in backbone.parameters()), "its weights stayed whole"
        with context(), torch.set_grad_enabled(context == backbone.streamed):
            found = loss_of(backbone, 0)
            assert torch.equal(found.detach(), wanted), (found, wanted)


def check_passes_outside(ranks: Ranks) -> None:
    """They would wait for ranks that take none."""
    backbone = Backbone(tiny_lm(), None).shard(ranks)
    for context in (None, backbone.gathered()):
        try:
            if context is None:
                loss_of(backbone, 0)
            else:
                with context:
                    loss_of(backbone, 0)
        except AssertionError as error:
            assert "gathered()" in str(error)
        else:
            raise AssertionError("no error")


def main() -> None:
    torch.set_num_threads(1)
    with joined_ranks(seconds=60) as ranks:
        for architecture in ("llama", "gpt2", "opt", "qwen3"):
            check_gradients(ranks, lambda a=architecture: tiny_lm(a, seed=3), 1e-5)  # type: ignore[misc]
        check_gradients(ranks, lambda: tiny_lm(seed=3, tie_word_embeddings=True), 1e-5)
        check_gradients(ranks, lambda: tiny_lm(seed=3), 1e-5, checkpoints_activations=True)
        check_gradients(ranks, lambda: tiny_lm(seed=3).bfloat16(), 3e-2)
        check_memory(ranks)
        check_steps_that_are_skipped(ranks)
        check_a_pass_that_fails(ranks)
        check_passes_outside(ranks)


if __name__ == "__main__":
    main()
