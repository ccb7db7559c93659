"""Shapes of 7B models: operations and bytes COUNTED from the algorithms, and the time that a chip needs at least.

Nothing here is measured. A step is one kernel; it reads each operand once and writes its result once (what a product
reads twice is taken to be in the cache), and it lasts as long as the slower of its arithmetic and its traffic. bf16
operands, float32 logits chunks and sums, as the ops keep them; `chunks` is the number of pieces the rows are cut into.
"""

from __future__ import annotations

from typing import NamedTuple

from lm_head_case import Shape

BF16, FP32 = 2, 4


class Chip(NamedTuple):
    name: str
    flops: float  # dense bf16, a second
    bandwidth: float  # bytes a second


CHIPS = (Chip("A100", 312e12, 2.0e12), Chip("H100 SXM", 989e12, 3.35e12))

SHAPES_7B = tuple(Shape(8192, h, v) for h in (4096, 3584) for v in (32_000, 128_256, 152_064))


class Step(NamedTuple):
    name: str
    flops: int
    bytes: int

    def seconds(self, chip: Chip) -> float:
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth)


class Totals(NamedTuple):
    flops: int
    bytes: int
    seconds: tuple[float, ...]  # a chip


def totals(steps: tuple[Step, ...]) -> Totals:
    """Kernels run one after the other: their times add up."""
    return Totals(
        sum(s.flops for s in steps),
        sum(s.bytes for s in steps),
        tuple(sum(s.seconds(chip) for s in steps) for chip in CHIPS),
    )


def policy_loss(shape: Shape, chunks: int) -> tuple[Step, ...]:
    """`linear_policy_loss`, loss and gradients: 3 products."""
    return (_logits(shape, chunks), *_rows_scored(shape), *_gradients(shape, chunks), _scaled(shape))


def per_token(shape: Shape, chunks: int) -> tuple[Step, ...]:
    """An op that returns log-probs and makes the logits again in backward: 4 products."""
    return (
        _logits(shape, chunks),
        *_rows_scored(shape),
        _logits(shape, chunks)._replace(name="logits again"),
        *_gradients(shape, chunks),
    )


def eager(shape: Shape) -> tuple[Step, ...]:
    """log_softmax of whole float32 logits, gather, autograd: 3 products, the logits passing 10 times."""
    n, h, v = shape
    product = 2 * n * h * v
    return (
        Step("logits", product, BF16 * (n * h + v * h + n * v)),
        Step("to float32", 0, (BF16 + FP32) * n * v),
        Step("log_softmax", 0, 2 * FP32 * n * v),
        Step("zeros of gather's backward", 0, FP32 * n * v),
        Step("log_softmax backward", 0, 3 * FP32 * n * v),
        Step("to bf16", 0, (FP32 + BF16) * n * v),
        Step("dHidden", product, BF16 * (n * v + v * h + n * h)),
        Step("dWeight", product, BF16 * (n * v + n * h + v * h)),
    )


def _logits(shape: Shape, chunks: int) -> Step:
    """Every chunk reads the weight."""
    n, h, v = shape
    return Step("logits", 2 * n * h * v, BF16 * (n * h + chunks * v * h) + FP32 * n * v)


def _rows_scored(shape: Shape) -> tuple[Step, ...]:
    """Max, sum, entropy and target of each row in one pass."""
    return (Step("scores", 0, FP32 * shape.tokens * shape.vocab),)


def _gradients(shape: Shape, chunks: int) -> tuple[Step, ...]:
    """dlogits in bf16, then two products; dWeight is added up in float32 (the first chunk does not read it)."""
    n, h, v = shape
    product = 2 * n * h * v
    sums = FP32 * v * h * (2 * chunks - 1)
    return (
        Step("dlogits", 0, (FP32 + BF16) * n * v),
        Step("dHidden", product, BF16 * (n * v + chunks * v * h + n * h)),
        Step("dWeight", product, BF16 * (n * v + n * h) + sums),
        Step("dWeight to bf16", 0, (FP32 + BF16) * v * h),
    )


def _scaled(shape: Shape) -> Step:
    """Backward multiplies the kept gradients by the loss's own."""
    n, h, v = shape
    return Step("gradients scaled", 0, 2 * BF16 * (n * h + v * h))
