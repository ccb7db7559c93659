"""One compilation of a Triton kernel, described without a GPU: what a launch can choose and the report compiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Spelled out at launch and at compilation: Triton's own default (TRITON_DEFAULT_FP_FUSION) changes with its version.
FP_FUSION = True


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel, the types of its arguments, its constants and its launch options.

    Variant(
        name="softmax_update[fp32, 4096, vector 4, softcap]",
        kernel=softmax_update_kernel,
        signature={"logits": "*fp32", "row_stride": "i32", "softcap": "fp32", "BLOCK": "constexpr", ...},
        constexprs={"BLOCK": 4096, "VECTOR": 4, "HAS_SOFTCAP": True},
        num_warps=8,
        num_stages=2,
        capabilities=(80, 90, 100),
        needs_tensor_core=False,
    )

    `signature` names every argument in the kernel's order; the ones in `constexprs` read "constexpr" there.
    """

    name: str
    kernel: Any  # triton.runtime.JITFunction
    signature: Mapping[str, str] = field(hash=False)
    constexprs: Mapping[str, Any] = field(hash=False)
    num_warps: int
    num_stages: int
    capabilities: tuple[int, ...]  # where a launch can choose it: 80 | 90 | 100
    needs_tensor_core: bool  # its machine code must hold tensor-core instructions

    @property
    def options(self) -> dict[str, Any]:
        """Options of `triton.compile`, and keywords of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": FP_FUSION}
