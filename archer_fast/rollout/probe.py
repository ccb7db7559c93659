"""Whether a sampler's copy of the weights is the trainer's: the same tokens, scored by both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from archer_fast.backbone import Backbone
from archer_fast.rollout.token_sampler import SamplerError

LENGTH = 32
# Nats a token, mean of the absolute difference. Seen on CPUs with SmolLM2-135M: 4e-5 in float32, .11 in bfloat16 (.04
# on a text; what is no text is where half precision is worst). In bfloat16 this finds a copy that is wrong, not one
# that is a step old: versions tell that, and the metric mismatch_kl.
TOLERANCE = {torch.float32: 1e-3}
HALF_PRECISION_TOLERANCE = 0.5


def probe_ids(backbone: Backbone, max_tokens: int) -> list[int]:
    """Tokens from the whole vocabulary, in no order that a text has; at most `max_tokens`."""
    places = torch.arange(min(LENGTH, max_tokens))
    return ((places * 7919 + 1) % backbone.vocab_size).tolist()


@torch.no_grad()
def trainer_logprobs(backbone: Backbone, ids: Sequence[int]) -> Tensor:
    """[n - 1] float32 on the CPU: log-probs of all tokens but the first, at temperature 1."""
    tokens, n = torch.tensor(ids, device=backbone.device), len(ids)
    layout = backbone.layout(torch.tensor([0, n], dtype=torch.int32, device=backbone.device), (n,))
    hidden = backbone(tokens, torch.arange(n, device=backbone.device), layout)
    logprobs = (hidden[:-1] @ backbone.lm_head_weight.T).float().log_softmax(-1)
    scores: Tensor = logprobs.gather(1, tokens[1:, None]).squeeze(1).cpu()
    return scores


def check_scores(who: str, backbone: Backbone, ids: Sequence[int], theirs: Sequence[float]) -> None:
    """SamplerError where `theirs`, the log-probs of ids[1:], are not those of the trainer."""
    apart = (torch.tensor(theirs) - trainer_logprobs(backbone, ids)).abs().mean().item()
    tolerance = TOLERANCE.get(backbone.lm_head_weight.dtype, HALF_PRECISION_TOLERANCE)
    if not apart <= tolerance:
        kind = backbone.model.config.model_type
        raise SamplerError(
            f"rollout.engine: {who} and the trainer score the same {len(ids) - 1} tokens {apart:.3g} nats a token "
            f"apart, wanted at most {tolerance:g}: its copy of this model ({kind!r}) is not the trainer's; use the "
            "engine 'embedded'"
        )
