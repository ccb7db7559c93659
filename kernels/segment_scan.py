"""y_t = b_t + a_t y_{t+1} inside every segment of a flat array: chunks on their own, their carries, the rest.

A chunk is BLOCK tokens, whatever segments lie in it. `segment_ends_kernel` marks the last token of each segment;
`segment_scan_fwd_kernel` scans each chunk as if nothing came after it and sums it up in three numbers;
`segment_carry_kernel`, one program, scans those; `segment_fixup_kernel` adds what comes from the right to the tokens
that are still open, those after the chunk's last segment end. Where segments are short that is next to nothing, so
a token costs 13 bytes (a, b, mark, y); in one long segment 25.

At a segment's last token y is b, chosen and never multiplied: what stands in a there, or further right, may be NaN.
"""

import triton
import triton.language as tl


@triton.jit
def _combine(right_ended, right_a, right_b, left_ended, left_a, left_b):
    """Two neighbouring stretches as one. A scan in reverse hands over what it has seen, the right one, first."""
    b = tl.where(left_ended != 0, left_b, left_b + left_a * right_b)
    return left_ended | right_ended, left_a * right_a, b


@triton.jit
def segment_ends_kernel(cu, ends, num_offsets, BLOCK: tl.constexpr):
    """cu [num_offsets] int32; ends [T] int8, zeros: 1 is written at the last token of every segment."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offset = tl.load(cu + k, mask=k < num_offsets, other=0)
    tl.store(ends + offset.to(tl.int64) - 1, tl.full([BLOCK], 1, tl.int8), mask=offset > 0)


@triton.jit
def segment_scan_fwd_kernel(a, b, ends, out, chunk_a, chunk_b, chunk_open, num_tokens, BLOCK: tl.constexpr):
    """a, b, out [T] float32, ends [T] int8 -> out without carries, and of each chunk (one program):

    chunk_a: the product of a; chunk_b: y at its first token; chunk_open: the first token (0..BLOCK, in the chunk)
    that no end in the chunk cuts off from the right, so 0 where the chunk holds no end. Past T everything has ended.
    """
    chunk = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    t = chunk.to(tl.int64) * BLOCK + i
    live = t < num_tokens
    a_t = tl.load(a + t, mask=live, other=0.0)
    b_t = tl.load(b + t, mask=live, other=0.0)
    ended = tl.load(ends + t, mask=live, other=1).to(tl.int32)
    _, a_scan, y = tl.associative_scan((ended, a_t, b_t), 0, _combine, reverse=True)
    tl.store(out + t, y, mask=live)
    # Stored by the lane that holds it: a reduction would cross the warps once more.
    first = tl.zeros([BLOCK], tl.int32) + chunk
    tl.store(chunk_a + first, a_scan, mask=i == 0)
    tl.store(chunk_b + first, y, mask=i == 0)
    tl.store(chunk_open + chunk, tl.max(tl.where(ended != 0, i + 1, 0), 0))


@triton.jit
def segment_carry_kernel(chunk_a, chunk_b, chunk_open, chunk_y, num_chunks, BLOCK: tl.constexpr):
    """chunk_a, chunk_b, chunk_open [C] -> chunk_y [C] float32: the final y of each chunk's first token; one program."""
    i = tl.arange(0, BLOCK)
    num_tiles = tl.cdiv(num_chunks, BLOCK)
    carry = 0.0
    for tile in range(num_tiles):
        c = (num_tiles - 1 - tile) * BLOCK + i
        live = c < num_chunks
        a_c = tl.load(chunk_a + c, mask=live, other=1.0)
        b_c = tl.load(chunk_b + c, mask=live, other=0.0)
        ended = (tl.load(chunk_open + c, mask=live, other=0) > 0).to(tl.int32)
        ended, a_c, b_c = tl.associative_scan((ended, a_c, b_c), 0, _combine, reverse=True)
        y = tl.where(ended != 0, b_c, b_c + a_c * carry)
        tl.store(chunk_y + c, y, mask=live)
        carry = tl.sum(tl.where(i == 0, y, 0.0), 0)


@triton.jit
def segment_fixup_kernel(a, chunk_open, chunk_y, out, BLOCK: tl.constexpr):
    """out_t += (product of a from t to the chunk's end) * y of the next chunk's first token, at the open tokens.

    Not launched for the last chunk, which ends with a segment.
    """
    chunk = tl.program_id(0)
    first_open = tl.load(chunk_open + chunk)
    if first_open < BLOCK:
        carry = tl.load(chunk_y + chunk + 1)
        i = tl.arange(0, BLOCK)
        t = chunk.to(tl.int64) * BLOCK + i
        is_open = i >= first_open
        a_t = tl.load(a + t, mask=is_open, other=1.0)
        y = tl.load(out + t, mask=is_open, other=0.0)
        product = tl.cumprod(a_t, 0, reverse=True)
        tl.store(out + t, y + product * carry, mask=is_open)
