"""Behaviour cloning as the original does it: the likelihood of given actions, and a loop that raises it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from archer_fast.compat.arguments import ignored
from archer_fast.compat.faults import Compat, choose_fixes

LEARNING_RATE = 1e-5  # the original's, which takes no other


def plain_bc_loss(
    model: Any,
    tokenizer: Any,
    observation: Sequence[str],
    action: Sequence[str],
    *,
    fix: Iterable[str] | None = None,
    compat: Compat | None = None,
    **kw: Any,
) -> Tensor:
    """-mean_b( sum_t log p(a_bt | s_b, a_b,<t) ), a scalar to differentiate; 0 for an action without tokens.

    Observation and action are tokenised apart and whole, nothing between or behind them. kw: the rest of a batch, not
    used. Each row counts as if it were alone. With the fault "padding" kept (fix, compat), shorter observations are
    padded up to the longest, before the action: the original's numbers where rows differ in length.
    Errors: ValueError for unequal numbers of rows, an observation without tokens, or a row beyond the model's window.
    """
    observations, actions = _rows("observation", observation), _rows("action", action)
    if not len(observations) == len(actions) > 0:
        raise ValueError(
            f"observation, action: wanted equally many rows, at least one, got {len(observations)} and {len(actions)}"
        )
    if "padding" not in choose_fixes(fix, compat):
        return _loss_behind_padding(model, tokenizer, observations, actions)
    device = next(model.parameters()).device
    read, said = (tokenizer(texts)["input_ids"] for texts in (observations, actions))
    whole = [[*o, *a] for o, a in zip(read, said, strict=True)]
    lengths = np.array([len(row) for row in whole])
    _check_rows(model, observations, read, int(lengths.max()))
    mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None]).to(device)  # [B, L], padding behind the action
    input_ids = torch.zeros(mask.shape, dtype=torch.int64, device=device)
    input_ids[mask] = torch.tensor([token for row in whole for token in row], device=device)
    logits = model(input_ids=input_ids, attention_mask=mask.long()).logits  # [B, L, V]
    counts = [len(row) for row in said]
    rows = torch.from_numpy(np.repeat(np.arange(len(said)), counts)).to(device)  # [T] of each action token
    before = np.concatenate([len(o) - 1 + np.arange(n) for o, n in zip(read, counts, strict=True)])
    target = torch.tensor([token for row in said for token in row], dtype=torch.int64, device=device)
    chosen = logits[rows, torch.from_numpy(before).to(device)]  # [T, V]
    logprobs = chosen.to(torch.promote_types(chosen.dtype, torch.float32)).log_softmax(-1)
    loss: Tensor = -logprobs.gather(1, target[:, None]).sum() / len(said)
    return loss


def train_loop(
    model: Any,
    bc_dataloader: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    iterations: int = 10,
    grad_accum_steps: int = 1,
    *,
    save_path: str | Path | None = None,
    use_tqdm: bool = True,
    fix: Iterable[str] | None = None,
    compat: Compat | None = None,
    **kwargs: Any,
) -> None:
    """`iterations` times over the batches with Adam at 1e-5, a step every `grad_accum_steps` of them, whose gradients
    are summed; what is left behind the last step is dropped.

    bc_dataloader: batches {"observation": list of str, "action": list of str, ...}. save_path: where the result goes,
    as {"model_state_dict": ..., "optimizer_state_dict": ...}; None: nowhere. (The original always writes
    ../twenty_questions_gpt2_model0_full.pt, and moves the model to the CPU to do so.)
    """
    ignored("train_loop", kwargs)
    if grad_accum_steps < 1:
        raise ValueError(f"grad_accum_steps: wanted at least 1, got {grad_accum_steps}")
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    num_batches = 0
    with Progress(console=Console(stderr=True), disable=not use_tqdm) as progress:
        bar = progress.add_task("behaviour cloning", total=None)
        for iteration in range(iterations):
            for batch in bc_dataloader:
                loss = plain_bc_loss(model, tokenizer, fix=fix, compat=compat, **batch)
                loss.backward()
                num_batches += 1
                if num_batches % grad_accum_steps == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                if num_batches % 100 == 0:
                    progress.update(bar, description=f"iteration {iteration + 1}/{iterations}, loss {loss.item():.3f}")
                progress.advance(bar)
    if save_path is not None:
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        torch.save({"model_state_dict": weights, "optimizer_state_dict": optimizer.state_dict()}, save_path)


def _loss_behind_padding(model: Any, tokenizer: Any, observations: list[str], actions: list[str]) -> Tensor:
    """The original's: padding wherever the tokenizer puts it, positions counted through it."""
    device = next(model.parameters()).device
    read, said = (tokenizer(texts, return_tensors="pt", padding=True).to(device) for texts in (observations, actions))
    input_ids, mask = (torch.cat([read[key], said[key]], dim=1) for key in ("input_ids", "attention_mask"))
    logits = model(input_ids=input_ids, attention_mask=mask).logits[:, read["input_ids"].shape[1] - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(2, said["input_ids"][..., None]).squeeze(2)
    loss: Tensor = -(logprobs * said["attention_mask"]).sum(1).mean()
    return loss


def _rows(name: str, texts: Any) -> list[str]:
    rows = [texts] if isinstance(texts, str) else list(texts)
    for text in rows:
        if not isinstance(text, str):
            raise TypeError(f"{name}: wanted str alone, got {text!r:.80}")
    return rows


def _check_rows(model: Any, observations: list[str], ids: list[list[int]], longest: int) -> None:
    for text, own in zip(observations, ids, strict=True):
        if not own:
            raise ValueError(f"observation: wanted text of at least one token, got {text!r}")
    window = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if window is not None and longest > window:
        raise ValueError(f"observation, action: wanted at most {window} tokens together, got {longest}")
