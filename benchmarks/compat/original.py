"""The rival: ArCHer's update written as the original package is, in our own words and without its sleeps.

float32, right-padded batches of strings, tokenised at every read; one Hugging Face `generate` a micro-batch, which
nothing but the end of text stops; observation and action encoded apart, a dummy action for V of the next observation
too; whole logits, their softmax, then its logarithm at the action's tokens; transitions drawn one at a time and put
through a DataLoader; anomaly detection around the critic's epochs; a soft update parameter by parameter.

It does nothing that the original does not: no deep copies of strings, no progress bars, no printing, no `sleep(15)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

MAX_TOKENS = 512


@dataclass
class Work:
    """What was done, padding counted as what it costs: tokens."""

    generate_calls: int = 0
    policy_passes: int = 0  # forward passes, those of `generate` too
    policy_tokens: int = 0
    encoder_passes: int = 0
    encoder_sequences: int = 0
    encoder_tokens: int = 0
    encoder_padding: int = 0  # of these

    @property
    def tokens(self) -> int:
        return self.policy_tokens + self.encoder_tokens

    def clear(self) -> None:
        for counted in fields(self):
            setattr(self, counted.name, 0)

    def watch_policy(self, model: nn.Module) -> None:
        def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.policy_passes += 1
            self.policy_tokens += _input_ids(args, kwargs).numel()

        model.register_forward_pre_hook(count, with_kwargs=True)

    def watch_encoder(self, model: nn.Module) -> None:
        def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            ids = _input_ids(args, kwargs)
            self.encoder_passes += 1
            self.encoder_sequences += len(ids)
            self.encoder_tokens += ids.numel()

        model.register_forward_pre_hook(count, with_kwargs=True)


def _input_ids(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    return kwargs["input_ids"] if "input_ids" in kwargs else args[0]


class PlainAccelerator:
    """Stands in for Hugging Face's Accelerator where it is not installed: one process, one device."""

    is_main_process, num_processes = True, 1

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def prepare(self, *objects: Any) -> Any:
        return objects if len(objects) > 1 else objects[0]

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterator[nn.Parameter], max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def wait_for_everyone(self) -> None:
        pass


class PlainBuffer:
    """Transitions in NumPy arrays, strings as objects; drawn with replacement by numpy.random."""

    def __init__(self, batch_size: int = 2, capacity: int = 10000) -> None:
        self.batch_size = batch_size
        self.max_size = capacity
        self.size = 0
        self.columns: dict[str, np.ndarray] = {
            **{name: np.full(capacity, "", object) for name in ("observation", "action", "next_observation")},
            **{name: np.empty(capacity, np.float64) for name in ("reward", "mc_return")},
            "done": np.empty(capacity, np.bool_),
        }

    def __len__(self) -> int:
        return self.size

    def insert(self, **transition: Any) -> None:
        for name, column in self.columns.items():
            column[self.size % self.max_size] = transition[name]
        self.size += 1

    def sample(self, batch_size: int | None = None) -> dict[str, np.ndarray]:
        count = self.batch_size if batch_size is None else batch_size
        places = np.random.randint(0, self.size, size=(count,)) % self.max_size  # noqa: NPY002, as it does
        return {name: column[places] for name, column in self.columns.items()}


class PlainCritic(nn.Module):
    """Encodes both texts apart; Q heads read the two poolers' outputs, V heads the observation's."""

    def __init__(
        self,
        device: str | torch.device,
        accelerator: Any,
        critic_lm: Any,
        in_dim: int = 768,
        out_dim: int = 1,
        work: Work | None = None,
    ) -> None:
        super().__init__()
        self.device, self.accelerator = device, accelerator
        self.work = work or Work()
        self.base_lm = AutoModel.from_pretrained(critic_lm, dtype=torch.float32).to(device)
        self.base_tokenizer = AutoTokenizer.from_pretrained(critic_lm)
        self.base_tokenizer.truncation_side = "left"
        self.critic1, self.critic2 = (_head(2 * in_dim, in_dim, out_dim).to(device) for _ in range(2))
        self.v_critic1, self.v_critic2 = (_head(in_dim, in_dim, out_dim).to(device) for _ in range(2))
        self.work.watch_encoder(self.base_lm)

    def forward(self, observation: Sequence[str], action: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        state = self._encode(observation)
        both = torch.cat([state, self._encode(action)], dim=1)  # [B, 2H]
        return self.critic1(both), self.critic2(both), self.v_critic1(state), self.v_critic2(state)  # [B, 1] each

    def _encode(self, texts: Sequence[str]) -> Tensor:
        read = _tokenise(self.base_tokenizer, texts)
        self.work.encoder_padding += int((read["attention_mask"] == 0).sum())
        return self.base_lm(**read.to(self.device)).pooler_output  # [B, H]


def _head(width_in: int, width: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width_in, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width_out)
    )


def _tokenise(tokenizer: Any, texts: Sequence[str]) -> Any:
    return tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS)


class PlainAgent(nn.Module):
    """The policy, the critic, its target. `policy_lm` and `critic_lm` are folders, or names on the hub."""

    def __init__(
        self,
        device: str | torch.device,
        accelerator: Any,
        policy_lm: Any = "gpt2",
        critic_lm: Any = "roberta-base",
        template: str | None = None,
        do_sample: bool = True,
        temperature: float = 1.0,
        max_new_tokens: int = 32,
        eos_str: str | None = "\n",
        in_dim: int = 768,
    ) -> None:
        super().__init__()
        self.device, self.accelerator = device, accelerator
        self.work = Work()
        self.model = AutoModelForCausalLM.from_pretrained(policy_lm, dtype=torch.float32).to(device)
        self.critic = PlainCritic(device, accelerator, critic_lm, in_dim, work=self.work)
        self.target_critic = PlainCritic(device, accelerator, critic_lm, in_dim, work=self.work)
        self.soft_update_target_critic(1)
        self.tokenizer = AutoTokenizer.from_pretrained(policy_lm)
        self.tokenizer.truncation_side = "left"
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.policy_lm, self.template = str(policy_lm), template
        self.do_sample, self.temperature = do_sample, temperature
        self.max_new_tokens, self.eos_str = max_new_tokens, eos_str
        self.work.watch_policy(self.model)

    def prepare(self) -> None:
        self.model, self.critic, self.target_critic = self.accelerator.prepare(
            self.model, self.critic, self.target_critic
        )

    def _read(self, observation: Sequence[str]) -> Any:
        if self.template is not None:
            observation = [self.template.replace("{obs}", text) for text in observation]
        return _tokenise(self.tokenizer, observation).to(self.device)

    def get_action(self, observation: Sequence[str]) -> list[str]:
        read = self._read(observation)
        self.work.generate_calls += 1
        written = self.accelerator.unwrap_model(self.model).generate(
            **read,
            max_new_tokens=self.max_new_tokens,
            do_sample=self.do_sample,
            temperature=self.temperature,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        new_tokens = written.cpu()[:, read["input_ids"].shape[1] :]
        actions = self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        for _ in range(3):
            actions = [action.removeprefix("\n") for action in actions]
        if self.eos_str is None:
            return actions
        return [action.split(self.eos_str)[0] for action in actions]

    def get_log_prob(self, observation: Sequence[str], action: Sequence[str]) -> Tensor:
        read, said = self._read(observation), _tokenise(self.tokenizer, action).to(self.device)
        outputs = self.model(
            input_ids=torch.cat([read["input_ids"], said["input_ids"]], dim=1),
            attention_mask=torch.cat([read["attention_mask"], said["attention_mask"]], dim=1),
        )
        probabilities = outputs.logits.softmax(dim=-1)  # [B, T, V]
        predicting = probabilities[:, read["input_ids"].shape[1] - 1 : -1]
        chosen = torch.take_along_dim(predicting, said["input_ids"].unsqueeze(2), dim=2).squeeze(2)
        return (chosen.log() * said["attention_mask"]).sum(dim=1)  # [B]

    def soft_update_target_critic(self, tau: float) -> None:
        for target, online in zip(self.target_critic.parameters(), self.critic.parameters(), strict=True):
            target.data.copy_(target.data * (1.0 - tau) + online.data * tau)


class PlainTrainer:
    """The update; arguments in the original's order and with its defaults."""

    def __init__(
        self,
        agent: PlainAgent,
        accelerator: Any,
        tokenizer: Any,
        critic_lr: float = 1e-3,
        lm_lr: float = 1e-5,
        grad_accum_steps: int = 8,
        gamma: float = 0.9,
        tau: float = 0.1,
        epochs: int = 3,
        max_grad_norm: float = 0.01,
        actor_epochs: int = 3,
    ) -> None:
        self.agent, self.accelerator, self.tokenizer = agent, accelerator, tokenizer
        self.grad_accum_steps, self.max_grad_norm = grad_accum_steps, max_grad_norm
        self.gamma, self.tau = gamma, tau
        self.epochs, self.actor_epochs = epochs, actor_epochs
        self.criterion = nn.MSELoss()
        self.critic_optimizer, self.lm_optimizer = accelerator.prepare(
            torch.optim.Adam(agent.critic.parameters(), lr=critic_lr),
            torch.optim.Adam(agent.model.parameters(), lr=lm_lr),
        )

    def critic_loss(
        self,
        observation: Sequence[str],
        action: Sequence[str],
        reward: Tensor,
        next_observation: Sequence[str],
        done: Tensor,
        **unused: Any,
    ) -> dict[str, Tensor]:
        reward, done = self._as_model(reward), self._as_model(done)
        q1, q2, v1, v2 = (values.flatten() for values in self.agent.critic(observation, action))
        with torch.no_grad():
            pi_action = self.agent.get_action(observation)
            target_q1, target_q2, _, _ = (x.flatten() for x in self.agent.target_critic(observation, pi_action))
            _, _, next_v1, next_v2 = (x.flatten() for x in self.agent.target_critic(next_observation, action))
            target_v1 = reward + (1 - done) * next_v1 * self.gamma
            target_v2 = reward + (1 - done) * next_v2 * self.gamma
        losses = {
            "q1.loss": self.criterion(q1, target_v1),
            "q2.loss": self.criterion(q2, target_v2),
            "v1.loss": self.criterion(v1, target_q1),
            "v2.loss": self.criterion(v2, target_q2),
        }
        self.accelerator.backward(losses["q1.loss"] + losses["q2.loss"] + losses["v1.loss"] + losses["v2.loss"])
        metrics = {name: loss.detach().cpu() for name, loss in losses.items()}
        said = {"q1": q1, "q2": q2, "v1": v1, "v2": v2, "target_q1": target_q1, "target_q2": target_q2}
        for name, values in said.items():
            metrics |= _summary(name, values)
        return metrics

    def actor_loss(
        self, observation: Sequence[str], pi_action: Sequence[str], advantage: Tensor, **unused: Any
    ) -> dict[str, Any]:
        log_prob = self.agent.get_log_prob(observation, pi_action)
        advantages = self._as_model(advantage)
        loss = -torch.mean(log_prob.flatten() * advantages)
        self.accelerator.backward(loss)
        nothing = torch.zeros_like(advantages)
        return (
            {"pg.loss": loss.detach().cpu().item(), "values.loss": 0.0}
            | _summary("values", nothing)
            | _summary("advantages", advantages)
            | _summary("residual_advantages", nothing)
        )

    def update(self, replay_buffer: PlainBuffer, no_update_actor: bool = False) -> dict[str, Any]:
        metrics = []
        with torch.autograd.set_detect_anomaly(True):
            for _ in range(self.epochs):
                batches = self._draw(replay_buffer, replay_buffer.batch_size)
                self.critic_optimizer.zero_grad()
                metrics += [self.critic_loss(**batch) for batch in batches]
                self.accelerator.clip_grad_norm_(self.agent.parameters(), self.max_grad_norm)
                self.critic_optimizer.step()
                self.agent.soft_update_target_critic(self.tau)
        means = _means(metrics)
        if no_update_actor:
            return means

        metrics = []
        rows = 2 if "mistral" in self.agent.policy_lm else replay_buffer.batch_size
        for _ in range(self.actor_epochs):
            batches = self._draw(replay_buffer, rows)
            self.lm_optimizer.zero_grad()
            for batch in batches:
                with torch.no_grad():
                    pi_action = self.agent.get_action(batch["observation"])
                    q1, q2, v1, v2 = self.agent.critic(batch["observation"], pi_action)
                    advantage = torch.minimum(q1, q2) - torch.minimum(v1, v2)
                metrics.append(self.actor_loss(**batch, pi_action=pi_action, advantage=advantage))
            self.accelerator.clip_grad_norm_(self.agent.parameters(), self.max_grad_norm)
            self.lm_optimizer.step()
        return means | _means(metrics)

    def _draw(self, replay_buffer: PlainBuffer, rows: int) -> Any:
        """An epoch's transitions, drawn one by one, as a loader of micro-batches."""
        drawn = [replay_buffer.sample(1) for _ in range(self.grad_accum_steps * replay_buffer.batch_size)]
        single = [{name: column[0] for name, column in transition.items()} for transition in drawn]
        return self.accelerator.prepare(DataLoader(single, batch_size=rows))  # type: ignore[arg-type]

    def _as_model(self, numbers: Tensor) -> Tensor:
        model = self.accelerator.unwrap_model(self.agent.model)
        return torch.as_tensor(numbers).to(model.device, dtype=model.dtype).flatten()


def _summary(name: str, values: Tensor) -> dict[str, Tensor]:
    values = values.detach().cpu()
    return {
        f"{name}.mean": values.mean(),
        f"{name}.min": values.min(),
        f"{name}.max": values.max(),
        f"{name}.std": values.std(),
    }


def _means(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    if not metrics:
        return {}
    return {name: sum(one[name] for one in metrics) / len(metrics) for name in metrics[0]}
