"""The slot attention's kernel against float64."""

from __future__ import annotations

import pytest
import torch
from slot_cases import HEADS, slot_case, truth

from archer_fast.ops import last_impl, slot_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_token_sees_its_slot_up_to_itself(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = slot_case(*heads).to("cpu", dtype)
    found = slot_attention(*case, impl="triton")
    assert last_impl("slot_attention") == "triton" and found.dtype == dtype
    torch.testing.assert_close(found.double(), truth(case), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_strides_of_a_larger_cache_and_of_a_query_across_heads() -> None:
    case = slot_case(4, 2, 16)
    larger = case._replace(
        keys=torch.cat([case.keys, case.keys], 1)[:, :2],
        values=torch.cat([case.values, case.values], 2)[:, :, :150],
        query=case.query.transpose(0, 1).contiguous().transpose(0, 1),
    )
    torch.testing.assert_close(slot_attention(*larger, impl="triton"), slot_attention(*case, impl="triton"))


def test_no_tokens() -> None:
    case = slot_case(4, 2, 16)
    empty = case._replace(query=case.query[:0], slot_ids=case.slot_ids[:0], position_ids=case.position_ids[:0])
    assert slot_attention(*empty, impl="triton").shape == (0, 4, 16)
