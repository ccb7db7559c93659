"""What is said to vLLM and heard from it, in this process or over HTTP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from archer_fast.backbone import Backbone
from archer_fast.rollout.token_sampler import SamplerError, SamplingRequest

# Of the very distribution that was sampled from, so after the temperature.
LOGPROBS_MODE = "processed_logprobs"
# Log-probs of a prompt's own tokens; vLLM's own continuation of it is not wanted, but must have a token.
SCORING_PARAMS: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}


def sampling_params(request: SamplingRequest) -> dict[str, Any]:
    """Fields of vLLM's SamplingParams. All that change the distribution are named: a server takes those that are not
    from the model's generation_config.json, where top_k, top_p and repetition_penalty hide."""
    return {
        "n": request.num_samples,
        "temperature": request.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": request.seed,
        "max_tokens": request.max_new_tokens,
        "stop_token_ids": [request.stop_token_id],
        "ignore_eos": True,  # the action ends with our token alone
        "logprobs": 0,  # of the token that was sampled
        "detokenize": False,
    }


def version_of(fingerprint: int) -> str:
    """The name that weights have there."""
    return f"{fingerprint:08x}"


def check_sample(who: str, finish_reason: str | None, versions: Iterable[str], wanted: str) -> None:
    """SamplerError where an action was not sampled to its end, or not by the weights `wanted` alone."""
    if finish_reason not in ("stop", "length"):
        raise SamplerError(f"rollout.engine: {who} ended an action with {finish_reason!r}")
    if set(versions) != {wanted}:
        raise SamplerError(
            f"rollout.engine: wanted every token sampled by the trainer's weights, version {wanted}, "
            f"got tokens of {sorted(set(versions))}: somebody else has changed the weights of {who}"
        )


def named_weights(backbone: Backbone) -> Iterator[tuple[str, Tensor]]:
    """As a checkpoint names them; the lm_head on its own where it is tied: vLLM keeps a packed one of its own on CPUs,
    which does not follow a tied embedding, and so it is told that they are not."""
    yield from ((name, weight.detach()) for name, weight in backbone.model.named_parameters())
    if backbone.model.get_input_embeddings().weight is backbone.lm_head_weight:
        yield "lm_head.weight", backbone.lm_head_weight.detach()
