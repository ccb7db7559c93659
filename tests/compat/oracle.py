"""The original's update as formulas: one transition at a time, float64, nothing batched, nothing padded.

This is what `archer_fast.compat` is compared with, so it is written to be read beside the paper, and shares no code
with what it judges. What the original draws at random is given: the transitions, and the actions a' ~ pi(.|s).

    critic:  mean_b (Q_i(s,a) - (r + gamma (1 - done) Vbar_i(s')))^2  +  mean_b (V_i(s) - Qbar_i(s,a'))^2,   i = 1, 2
    actor:   - mean_b (min(Q1,Q2) - min(V1,V2))(s,a') sum_t log pi(a'_t | s, a'_<t)

An epoch is one step: the gradients of its micro-batches are summed, clipped over all that the agent holds (what the
other network kept of its own last epoch counts, and is scaled too), and given to Adam. After a critic epoch the target
moves by tau. A bar means the target critic, which never has a gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MAX_TOKENS = 512  # of an observation, and of an action, whoever reads it; special tokens are counted
HEADS = ("critic1", "critic2", "v_critic1", "v_critic2")


class Transition(NamedTuple):
    """Transition("Questions:\\n", "Is it a dog?", -1.0, "Questions:\\nIs it a dog? No.\\n", False)"""

    observation: str
    action: str
    reward: float
    next_observation: str
    done: bool


class Values(NamedTuple):
    """What a critic says of an observation and an action: scalars."""

    q1: Tensor
    q2: Tensor
    v1: Tensor
    v2: Tensor


class TokenBaseline(NamedTuple):
    """What `get_log_prob` gives, in place of sums, where tokens have values: three of [B, L], zero where mask is."""

    values: Tensor
    log_probs: Tensor
    mask: Tensor


@dataclass
class Epoch:
    """What led to one step."""

    phase: str  # "critic" or "actor"
    metrics: list[dict[str, float]]  # one a micro-batch
    gradients: dict[str, Tensor]  # of the network being trained: summed, not clipped yet
    norm: float  # of all the agent's gradients, before they are clipped


class CriticCopy(nn.Module):
    """Copies of a DoubleCritic's parts, under their names and in their order; its tokenizer is read, not changed."""

    def __init__(self, critic: Any) -> None:
        super().__init__()
        self.base_lm = float64_copy(critic.base_lm)
        self.critic1, self.critic2, self.v_critic1, self.v_critic2 = (
            float64_copy(getattr(critic, name)) for name in HEADS
        )
        self.base_tokenizer = critic.base_tokenizer

    def forward(self, observation: str, action: str) -> Values:
        """Q reads observation and action, V the observation; each text is encoded alone."""
        state = self.encode(observation)
        both = torch.cat([state, self.encode(action)])
        return Values(
            self.critic1(both).squeeze(),
            self.critic2(both).squeeze(),
            self.v_critic1(state).squeeze(),
            self.v_critic2(state).squeeze(),
        )

    def encode(self, text: str) -> Tensor:
        ids = last_token_ids(self.base_tokenizer, text)
        return self.base_lm(input_ids=torch.tensor([ids])).pooler_output[0]  # [H]


class Adam:
    """m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

    A parameter that has no gradient is left alone, and its t too.
    """

    BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.parameters = list(parameters)
        self.lr = lr
        self.m = [torch.zeros_like(w) for w in self.parameters]
        self.v = [torch.zeros_like(w) for w in self.parameters]
        self.t = [0 for _ in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        for i, w in enumerate(self.parameters):
            if w.grad is None:
                continue
            self.t[i] += 1
            self.m[i] = self.BETA1 * self.m[i] + (1 - self.BETA1) * w.grad
            self.v[i] = self.BETA2 * self.v[i] + (1 - self.BETA2) * w.grad**2
            mean = self.m[i] / (1 - self.BETA1 ** self.t[i])
            square = self.v[i] / (1 - self.BETA2 ** self.t[i])
            w -= self.lr * mean / (square.sqrt() + self.EPS)

    def zero_grad(self) -> None:
        for w in self.parameters:
            w.grad = None


class Oracle:
    """Oracle(agent.model, agent.tokenizer, agent.critic, agent.target_critic, batch_size=8, ...), before any update.

    The agent's parts are copied, gradients are not: it starts as an agent that was never trained. Keywords are those of
    ArcherTrainer with its defaults, of the agent (`template`, `policy_lm`) and of the buffer (`batch_size`).
    `history` holds the epochs of the last `update`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        critic: Any,
        target_critic: Any,
        *,
        critic_lr: float = 1e-3,
        lm_lr: float = 1e-5,
        grad_accum_steps: int = 8,
        gamma: float = 0.9,
        tau: float = 0.1,
        epochs: int = 3,
        max_grad_norm: float = 0.01,
        actor_epochs: int = 3,
        template: str | None = None,
        policy_lm: str = "gpt2",
        batch_size: int = 2,
    ) -> None:
        self.model = float64_copy(model)
        self.tokenizer = tokenizer
        self.critic = CriticCopy(critic)
        self.target_critic = CriticCopy(target_critic)
        self.critic_optimizer = Adam(self.critic.parameters(), critic_lr)
        self.lm_optimizer = Adam(self.model.parameters(), lm_lr)
        self.grad_accum_steps = grad_accum_steps
        self.gamma = gamma
        self.tau = tau
        self.epochs = epochs
        self.max_grad_norm = max_grad_norm
        self.actor_epochs = actor_epochs
        self.template = template
        self.batch_size = batch_size
        self.actor_batch_size = 2 if "mistral" in policy_lm else batch_size
        self.history: list[Epoch] = []

    # What the networks say of one pair.

    def log_prob(self, observation: str, action: str) -> Tensor:
        """sum_t log pi(action_t | observation, action_<t): a scalar; 0 for an action without tokens."""
        return self._token_log_probs(observation, action)[1].sum()

    def critic_values(self, observation: str, action: str) -> Values:
        return self.critic(observation, action)

    def target_values(self, observation: str, action: str) -> Values:
        with torch.no_grad():
            return self.target_critic(observation, action)

    def advantage(self, observation: str, action: str) -> float:
        """min(Q1, Q2) - min(V1, V2) of the online critic."""
        with torch.no_grad():
            q1, q2, v1, v2 = self.critic(observation, action)
        return min(q1.item(), q2.item()) - min(v1.item(), v2.item())

    def get_log_prob(self, observations: Sequence[str], actions: Sequence[str]) -> list[Tensor] | TokenBaseline:
        """`log_prob` of each pair; where the model gives (values [1, T, 1], outputs), three things by token instead.

        A test of an agent with a `get_log_prob` of its own overrides this.
        """
        rows = [self._token_log_probs(*pair) for pair in zip(observations, actions, strict=True)]
        if any(values is None for values, _ in rows):
            return [log_probs.sum() for _, log_probs in rows]
        return TokenBaseline(
            _zeros_after([values for values, _ in rows if values is not None]),
            _zeros_after([log_probs for _, log_probs in rows]),
            _zeros_after([torch.ones_like(log_probs) for _, log_probs in rows]),
        )

    def _token_log_probs(self, observation: str, action: str) -> tuple[Tensor | None, Tensor]:
        """Values (None without a value head) and log-probs of the action's tokens, each [number of tokens].

        Observation and action are tokenised apart, and nothing is put between or after them: no end of text.
        """
        if self.template is not None:
            observation = self.template.replace("{obs}", observation)
        read = last_token_ids(self.tokenizer, observation)
        said = last_token_ids(self.tokenizer, action)
        if not read:
            raise ValueError(
                "observation: wanted a text with tokens, got none: nothing predicts the first of the action"
            )
        outputs = self.model(input_ids=torch.tensor([read + said]))
        values = None
        if isinstance(outputs, tuple):
            values, outputs = outputs
            values = values[0, len(read) - 1 : len(read) - 1 + len(said), 0]
        log_probs = outputs.logits[0].log_softmax(dim=-1)  # [T, vocabulary]
        if not said:
            return values, log_probs[:0, 0]  # a sum of nothing, whose gradient is 0 and not None: Adam's clock goes on
        return values, torch.stack([log_probs[len(read) + t - 1, token] for t, token in enumerate(said)])

    # A micro-batch: metrics come back, gradients are added to what is there.

    def critic_loss(self, transitions: Sequence[Transition], pi_actions: Sequence[str]) -> dict[str, float]:
        now, sampled, then = [], [], []
        for transition, pi_action in zip(transitions, pi_actions, strict=True):
            now.append(self.critic(transition.observation, transition.action))
            sampled.append(self.target_values(transition.observation, pi_action))
            then.append(self.target_values(transition.next_observation, transition.action))  # only V is read

        losses, metrics = [], {}
        for i in (1, 2):
            q = [getattr(values, f"q{i}") for values in now]
            v = [getattr(values, f"v{i}") for values in now]
            target_q = [getattr(values, f"q{i}") for values in sampled]
            bootstrapped = [
                t.reward + self.gamma * (1 - t.done) * getattr(values, f"v{i}")
                for t, values in zip(transitions, then, strict=True)
            ]
            q_loss = _mean_square_error(q, bootstrapped)
            v_loss = _mean_square_error(v, target_q)
            losses += [q_loss, v_loss]
            metrics |= {f"q{i}.loss": q_loss.item(), f"v{i}.loss": v_loss.item()}
            metrics |= _summary(f"q{i}", q) | _summary(f"v{i}", v) | _summary(f"target_q{i}", target_q)
        sum(losses).backward()
        return metrics

    def actor_loss(
        self, observations: Sequence[str], pi_actions: Sequence[str], advantages: Sequence[float]
    ) -> dict[str, float]:
        log_probs = self.get_log_prob(observations, pi_actions)
        if isinstance(log_probs, TokenBaseline):
            return self._baseline_loss(log_probs, advantages)
        terms = [log_prob * advantage for log_prob, advantage in zip(log_probs, advantages, strict=True)]
        loss = -sum(terms) / len(terms)
        loss.backward()
        nothing = [torch.zeros(()) for _ in terms]
        return (
            {"pg.loss": loss.item(), "values.loss": 0.0}
            | _summary("values", nothing)
            | _summary("advantages", [torch.tensor(a, dtype=torch.float64) for a in advantages])
            | _summary("residual_advantages", nothing)
        )

    def _baseline_loss(self, baseline: TokenBaseline, advantages: Sequence[float]) -> dict[str, float]:
        """A value a token, trained towards the turn's advantage, is subtracted from it.

        Means are over all B x L places, those behind a row's end too; so are the summaries.
        """
        num_rows, length = baseline.values.shape
        value_terms, policy_terms, spread, residuals = [], [], [], []
        for values, log_probs, mask, advantage in zip(*baseline, advantages, strict=True):
            for value, log_prob, kept in zip(values, log_probs, mask, strict=True):
                residual = advantage - value.detach()
                value_terms.append(((advantage - value) * kept) ** 2)
                policy_terms.append(residual * log_prob * kept)
                spread.append(torch.tensor(advantage, dtype=torch.float64))
                residuals.append(residual)
        value_loss = sum(value_terms) / (num_rows * length)
        policy_loss = -sum(policy_terms) / num_rows
        (policy_loss + value_loss).backward()
        return (
            {"pg.loss": policy_loss.item(), "values.loss": value_loss.item()}
            | _summary("values", list(baseline.values.flatten()))
            | _summary("advantages", spread)
            | _summary("residual_advantages", residuals)
        )

    # An epoch: one step.

    def critic_epoch(self, transitions: Sequence[Transition], pi_actions: Sequence[str]) -> Epoch:
        """`transitions` in the order drawn, `pi_actions` beside them."""
        self.critic_optimizer.zero_grad()
        metrics = [self.critic_loss(*part) for part in _parts(self.batch_size, transitions, pi_actions)]
        epoch = self._clip("critic", self.critic, metrics)
        self.critic_optimizer.step()
        self.soft_update_target_critic(self.tau)
        return epoch

    def actor_epoch(self, observations: Sequence[str], pi_actions: Sequence[str]) -> Epoch:
        self.lm_optimizer.zero_grad()
        metrics = [
            self.actor_loss(states, actions, [self.advantage(*pair) for pair in zip(states, actions, strict=True)])
            for states, actions in _parts(self.actor_batch_size, observations, pi_actions)
        ]
        epoch = self._clip("actor", self.model, metrics)
        self.lm_optimizer.step()
        return epoch

    def _clip(self, phase: str, trained: nn.Module, metrics: list[dict[str, float]]) -> Epoch:
        """Every gradient of the agent is scaled so that their common norm is max_grad_norm at most."""
        held = [w for network in (self.model, self.critic) for w in network.parameters() if w.grad is not None]
        norm = math.sqrt(sum(w.grad.square().sum().item() for w in held))
        epoch = Epoch(
            phase, metrics, {name: w.grad.clone() for name, w in trained.named_parameters() if w.grad is not None}, norm
        )
        scale = min(1.0, self.max_grad_norm / (norm + 1e-6))
        for w in held:
            w.grad = w.grad * scale
        return epoch

    @torch.no_grad()
    def soft_update_target_critic(self, tau: float) -> None:
        for target, online in zip(self.target_critic.parameters(), self.critic.parameters(), strict=True):
            target.copy_((1 - tau) * target + tau * online)

    # The whole.

    def update(
        self, draws: Sequence[Transition], pi_actions: Sequence[str], no_update_actor: bool = False
    ) -> dict[str, float]:
        """All transitions in the order `sample(1)` gave them, the critic's epochs before the actor's, and the action
        that was sampled for each: (epochs + actor_epochs) x grad_accum_steps x batch_size of both."""
        epochs = self.epochs + (0 if no_update_actor else self.actor_epochs)
        drawn = self.grad_accum_steps * self.batch_size
        if not len(draws) == len(pi_actions) == epochs * drawn:
            raise ValueError(
                f"draws, pi_actions: wanted {epochs} x {drawn} of both, got {len(draws)} and {len(pi_actions)}"
            )
        self.history = []
        for number, (transitions, actions) in enumerate(_parts(drawn, draws, pi_actions)):
            if number < self.epochs:
                self.history.append(self.critic_epoch(transitions, actions))
            else:
                self.history.append(self.actor_epoch([t.observation for t in transitions], actions))
        means = {}
        for phase in ("critic", "actor"):
            batches = [metrics for epoch in self.history if epoch.phase == phase for metrics in epoch.metrics]
            for key in batches[0] if batches else ():
                means[key] = sum(metrics[key] for metrics in batches) / len(batches)
        return means


def last_token_ids(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens with the tokenizer's special ones around them; what is over MAX_TOKENS is cut from the left,
    and the special ones stay."""
    whole = list(tokenizer(text)["input_ids"])
    content = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    num_special = len(whole) - len(content)
    before = next(n for n in range(num_special + 1) if whole[n : n + len(content)] == content)
    after = before + len(content)
    return whole[:before] + content[max(0, len(content) - (MAX_TOKENS - num_special)) :] + whole[after:]


def float64_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("cpu", torch.float64)


def _mean_square_error(said: list[Tensor], wanted: list[Tensor]) -> Tensor:
    return sum((a - b) ** 2 for a, b in zip(said, wanted, strict=True)) / len(said)  # type: ignore[return-value]


def _summary(name: str, scalars: list[Tensor]) -> dict[str, float]:
    """The standard deviation is that of a sample: over n - 1, and nan for one."""
    numbers = [scalar.item() for scalar in scalars]
    mean = sum(numbers) / len(numbers) if numbers else math.nan
    variance = sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1) if len(numbers) > 1 else math.nan
    return {
        f"{name}.mean": mean,
        f"{name}.min": min(numbers, default=math.nan),
        f"{name}.max": max(numbers, default=math.nan),
        f"{name}.std": math.sqrt(variance),
    }


def _parts(size: int, *lists: Sequence[Any]) -> Iterator[tuple[Sequence[Any], ...]]:
    """Consecutive parts of parallel lists; the last may be shorter."""
    for start in range(0, len(lists[0]), size):
        yield tuple(one[start : start + size] for one in lists)


def _zeros_after(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [B, L]
