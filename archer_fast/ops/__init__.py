"""Fused operations with one public name each; `reference` holds their plain torch specification."""

from archer_fast.ops.linear_logprobs import LinearLogprobs, linear_logprobs

__all__ = ["LinearLogprobs", "linear_logprobs"]
