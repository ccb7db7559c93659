"""Attention of single tokens, each over the keys and values of its own slot: one program a token and key-value head."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["scale", "key_slot_stride", "value_slot_stride", "key_head_stride", "value_head_stride"],
)
def slot_attention_kernel(
    query,  # [T, h, d], contiguous
    keys,  # [slots, g, capacity, d], positions and numbers of a head contiguous
    values,  # likewise
    slot_ids,  # [T] int64
    position_ids,  # [T] int64
    out,  # [T, h, d], contiguous
    scale,
    key_slot_stride,
    key_head_stride,
    value_slot_stride,
    value_head_stride,
    NUM_KV_HEADS: tl.constexpr,  # g
    GROUP: tl.constexpr,  # h / g: query heads that share a key-value head
    HEAD_SIZE: tl.constexpr,  # d
    GROUP_ROWS: tl.constexpr,  # GROUP rounded up to what a product wants
    BLOCK_D: tl.constexpr,  # HEAD_SIZE likewise
    BLOCK_L: tl.constexpr,  # keys a step
    INTERPRET: tl.constexpr,  # Triton's interpreter multiplies bfloat16 wrongly
):
    """Token t of slot s at position p sees the keys 0 .. p of s. No shape but T is known on the host."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slot_ids + token)
    end = tl.load(position_ids + token) + 1
    rows = tl.arange(0, GROUP_ROWS)
    columns = tl.arange(0, BLOCK_D)
    of_query = (token * NUM_KV_HEADS + head) * GROUP * HEAD_SIZE + rows[:, None] * HEAD_SIZE + columns[None]
    inside = (rows[:, None] < GROUP) & (columns[None] < HEAD_SIZE)
    q = tl.load(query + of_query, mask=inside, other=0.0)
    if INTERPRET:
        q = q.to(tl.float32)
    keys += slot * key_slot_stride + head * key_head_stride
    values += slot * value_slot_stride + head * value_head_stride
    top = tl.full([GROUP_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    mixed = tl.zeros([GROUP_ROWS, BLOCK_D], tl.float32)
    for start in range(0, end, BLOCK_L):
        places = start + tl.arange(0, BLOCK_L)
        seen = places < end
        of_block = places[:, None] * HEAD_SIZE + columns[None]
        is_number = seen[:, None] & (columns[None] < HEAD_SIZE)
        k = tl.load(keys + of_block, mask=is_number, other=0.0)
        v = tl.load(values + of_block, mask=is_number, other=0.0)
        if INTERPRET:
            k = k.to(tl.float32)
        # float32 means float32: the tensor cores' shorter one would tell.
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))  # finite: the first block holds position 0
        weights = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        weights = weights.to(v.dtype)
        if INTERPRET:
            weights = weights.to(tl.float32)
            v = v.to(tl.float32)
        mixed = mixed * shrink[:, None] + tl.dot(weights, v, input_precision="ieee")
        top = new_top
    tl.store(out + of_query, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)
