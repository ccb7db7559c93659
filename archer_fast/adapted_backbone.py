"""Several policies and trunks on one set of base weights, each with a LoRA adapter of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from archer_fast.adapter_folder import CONFIG, WEIGHTS
from archer_fast.adapters import Adapters
from archer_fast.backbone import Backbone
from archer_fast.config import LoRAConfig
from archer_fast.pass_counts import PassCounts
from archer_fast.sharding import ShardedModel


class AdaptedBackbone(Backbone):
    """A base that others use too, with an adapter of its own: `parameters`, `state_dict`, `save` are the adapter's.

    name: one of a kind on this base; home: the folder that holds the base, for whoever loads what `save` wrote.
    Errors: ValueError without the extra `lora`, or where `lora.targets` are no linear layers of this model.
    """

    _base: Backbone

    def __init__(
        self, base: Backbone, name: str, lora: LoRAConfig, *, seed: int = 0, home: Path | str | None = None
    ) -> None:
        nn.Module.__init__(self)  # not Backbone's: the base has prepared the model
        # Borrowed: not in parameters(), nor in state_dict().
        object.__setattr__(self, "model", base.model)
        object.__setattr__(self, "_base", base)
        self.tokenizer, self.attention_impl, self.adapter = base.tokenizer, base.attention_impl, name
        self.checkpoints_activations = base.checkpoints_activations
        self.counts = PassCounts()
        self.adapters = base.adapters or Adapters(base.model, base.linear_layers())
        self.peft_config, weights = self.adapters.add(name, lora, seed)
        base.adapters = self.adapters
        self.peft_config.base_model_name_or_path = str(base.model.name_or_path if home is None else home)
        self._names = list(weights)
        self.weights = nn.ParameterList(weights.values())

    @property
    def sharding(self) -> ShardedModel | None:
        """The base's; an adapter is whole on every rank."""
        return self._base.sharding

    def writer(self) -> Callable[[Path], None]:
        return self.save

    def save(self, folder: Path) -> None:
        """Write the adapter as peft does, and the tokenizer."""
        self.peft_config.save_pretrained(folder)
        weights = {name: parameter.detach().cpu() for name, parameter in self._saved()}
        safetensors.torch.save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Set the adapter to what `save` wrote there; ValueError where that is none of this shape and scale."""
        try:
            weights = safetensors.torch.load_file(folder / WEIGHTS)
            alpha = json.loads((folder / CONFIG).read_text())["lora_alpha"]
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder}: wanted an adapter as peft writes it: {error!r}") from error
        own = dict(self._saved())
        for name in sorted(own.keys() | weights.keys()):
            ours, theirs = own.get(name), weights.get(name)
            if ours is None or theirs is None or ours.shape != theirs.shape:
                shapes = [None if x is None else list(x.shape) for x in (ours, theirs)]
                raise ValueError(f"{folder / WEIGHTS}: {name}: wanted shape {shapes[0]}, got {shapes[1]}")
        if alpha != self.peft_config.lora_alpha:
            wanted = self.peft_config.lora_alpha
            raise ValueError(f"{folder / CONFIG}: lora_alpha: wanted {wanted:g} (model.lora.alpha), got {alpha}")
        for name, parameter in own.items():
            parameter.copy_(weights[name])

    def _saved(self) -> Iterator[tuple[str, Tensor]]:
        """The adapter's matrices by the names that they have in a file of peft's."""
        for name, parameter in zip(self._names, self.weights, strict=True):
            yield f"base_model.model.{name}.weight", parameter
