"""The critic of `mode="shared"`: this project's Q and V heads on the policy's own frozen trunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from archer_fast.compat.overrides import is_ours, ours
from archer_fast.compat.policy import Unsupported, policy_of
from archer_fast.compat.text_features import TextFeatures
from archer_fast.config import CriticConfig
from archer_fast.critic import ValueHeads

Mode = Literal["exact", "shared"]


class SharedCritic(nn.Module):
    """Called as the original's DoubleCritic is. NOT the same numbers: other features, other heads.

    Its trunk is the policy as it was when the critic was made (`text_features.FrozenTrunk`); state_dict holds the heads
    and the trunk's checksum.
    """

    trunk_fingerprint: Tensor  # int64

    def __init__(self, features: TextFeatures) -> None:
        super().__init__()
        self.features = features
        # torch's seed, not its generator: a resumed run draws what it would have drawn, and a target equals its critic.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        self.heads = ValueHeads(features.hidden_size, CriticConfig(), generator).to(features.device)
        self.register_buffer("trunk_fingerprint", torch.tensor(features.trunk.fingerprint()))
        self.register_load_state_dict_pre_hook(_check_loaded)  # type: ignore[no-untyped-call]

    @ours
    def forward(
        self, observation: Sequence[str], action: Sequence[str], detach_model: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q1, q2, v1, v2, each [n, 1]; detach_model changes nothing: the trunk never gets a gradient."""
        state, said = self.features.pairs(list(observation), list(action))
        (q1, q2), (v1, v2) = self.heads.q_value(state, said), self.heads.value(state)
        return q1[:, None], q2[:, None], v1[:, None], v2[:, None]

    def get_q(
        self, observation: Sequence[str], action: Sequence[str], detach_model: bool = False
    ) -> tuple[Tensor, Tensor]:
        """q1, q2, each [n, 1]."""
        q1, q2, _, _ = self(observation, action)
        return q1, q2

    def get_v(self, observation: Sequence[str], detach_model: bool = False) -> tuple[Tensor, Tensor]:
        """v1, v2, each [n, 1]."""
        v1, v2 = self.heads.value(self.features.states(list(observation)))
        return v1[:, None], v2[:, None]

    def check_state(self, where: str, state: Mapping[str, Any]) -> None:
        """ValueError for the state of another kind of critic, or of one on another trunk."""
        if any(name.startswith("base_lm.") for name in state):
            raise ValueError(
                f'{where}: wanted the heads of mode="shared", got a critic with an encoder of its own (mode="exact")'
            )
        saved = state.get("trunk_fingerprint")
        if saved is not None and int(saved) != int(self.trunk_fingerprint):
            raise ValueError(
                f"{where}: its heads were trained on another start policy than the one that policy_lm names; "
                "nothing was loaded"
            )


def _check_loaded(critic: SharedCritic, state: Mapping[str, Any], prefix: str, *others: Any) -> None:
    critic.check_state(
        "state_dict", {k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)}
    )


def _is_the_original_s(critic: Any) -> bool:
    """Whether its forward is that of a class with the original's name."""
    definer = next((c for c in type(critic).__mro__ if "forward" in vars(c)), None)
    # Its own `forward` is one that `accelerate` exchanged, or that Hugging Face's Accelerator wrapped.
    own = "forward" in vars(critic) and not is_ours(critic, "forward") and "_original_forward" not in vars(critic)
    return definer is not None and definer.__name__ == "DoubleCritic" and not own


def is_shared(agent: Any) -> bool:
    """Whether the agent's critic is a `SharedCritic`."""
    return isinstance(agent.accelerator.unwrap_model(agent.critic), SharedCritic)


def check_mode(mode: str) -> None:
    """ValueError for an unknown mode."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode: wanted 'exact' or 'shared', got {mode!r}")


def warn_of_rate(critic_lr: float) -> None:
    """Say so where a rate was meant for an encoder."""
    if critic_lr < 1e-4:
        print(f'archer_fast: critic_lr={critic_lr:g} suits an encoder; the heads of "shared" want about 1e-3')


def choose_mode(agent: Any, mode: Mode | None) -> Mode:
    """`mode`; what the agent is where that is None.

    Errors: ValueError for an unknown mode, or "exact" for an agent that is shared.
    """
    if mode is not None:
        check_mode(mode)
    if mode == "exact" and is_shared(agent):
        raise ValueError("mode: wanted 'shared', which the agent is, got 'exact'")
    return mode or ("shared" if is_shared(agent) else "exact")


def share_trunk(agent: Any) -> None:
    """Give the agent a `SharedCritic` and its target in place of the DoubleCritics that it has, if any.

    Errors: ValueError for a critic class of the user's own, and where packed passes cannot read the agent's model.
    """
    for name in ("critic", "target_critic"):
        critic = getattr(agent, name, None)
        if critic is not None and not _is_the_original_s(agent.accelerator.unwrap_model(critic)):
            raise ValueError(
                f'mode="shared": wanted the original\'s DoubleCritic as agent.{name}, to replace it, got one with a '
                f"forward of its own ({type(critic).__qualname__})"
            )
    try:
        policy_of(agent).check(agent)
    except Unsupported as reason:
        raise ValueError(f'mode="shared": {reason}') from reason
    features = TextFeatures(agent)
    agent.critic, agent.target_critic = SharedCritic(features), SharedCritic(features).requires_grad_(False)
    print(
        'archer_fast: mode="shared": the critic\'s encoder is replaced by the frozen start policy; '
        "its numbers are not the original's"
    )
