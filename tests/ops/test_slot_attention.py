"""Attention of single tokens over the cache of their slot."""

from __future__ import annotations

import re

import pytest
import torch
from slot_cases import HEADS, SlotCase, slot_case, truth

from archer_fast.ops import last_impl, slot_attention


@pytest.mark.parametrize("heads", HEADS)
def test_the_plain_twin_is_float64_s(heads: tuple[int, int, int]) -> None:
    case = slot_case(*heads)
    found = slot_attention(*case)
    assert last_impl("slot_attention") == "reference"
    torch.testing.assert_close(found.double(), truth(case), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [*HEADS, (28, 4, 128), (32, 8, 128), (12, 12, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_is_float64_s(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = slot_case(*heads, capacity=300).to("cuda", dtype)
    found = slot_attention(*case)
    assert last_impl("slot_attention") == "triton"
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.double().cpu(), truth(case), rtol=tolerance, atol=tolerance)


def bad(case: SlotCase, **changed: object) -> dict[str, object]:
    return case._asdict() | changed


CASE = slot_case(4, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(CASE, query=CASE.query[0]), "query: wanted [T, h, d], got (4, 16)"),
        (bad(CASE, query=CASE.query.double()), "query: wanted float32, bfloat16 or float16, got torch.float64"),
        (bad(CASE, keys=CASE.keys[:, :, :, :8]), "keys: wanted [slots, g, capacity, 16]"),
        (bad(CASE, values=CASE.values[:, :, :9]), "values: wanted [slots, g, capacity, 16]"),
        (bad(CASE, values=CASE.values.half()), "values: wanted torch.float32 on cpu, got torch.float16 on cpu"),
        (bad(CASE, keys=CASE.keys.transpose(1, 2).contiguous().transpose(1, 2)), "keys: wanted positions that follow"),
        (bad(CASE, slot_ids=CASE.slot_ids.int()), "slot_ids: wanted [5] int64 on cpu, got torch.int32 (5,)"),
        (bad(CASE, position_ids=CASE.position_ids[:2]), "position_ids: wanted [5] int64 on cpu, got torch.int64 (2,)"),
        (bad(CASE, impl="cpu"), "impl: wanted reference or triton, got 'cpu'"),
        (bad(CASE, impl="cuda"), "impl: wanted one of"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        slot_attention(**arguments)
