"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685; by peft): several policies and trunks on one set of base weights."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from archer_fast.adapter_folder import WEIGHTS, import_peft
from archer_fast.backbone import Backbone
from archer_fast.config import LoRAConfig


class Adapters:
    """The adapters that were put into one model: at most one of them acts at a time, none where the base is asked."""

    def __init__(self, model: nn.Module, linear_layers: list[str]) -> None:
        self.model, self.linear_layers = model, linear_layers
        self._layers: list[Any] = []  # what peft has put in place of linear layers
        self._acting: str | None = None

    def add(self, name: str, lora: LoRAConfig, seed: int) -> tuple[Any, dict[str, nn.Parameter]]:
        """A new adapter, whose B is 0 and which acts now: its settings, and its float32 matrices by layer and matrix.

        Steps of 1e-4 of a weight would be lost in bfloat16.
        """
        targets = list(lora.targets) or self.linear_layers
        if unknown := [target for target in targets if target not in self.linear_layers]:
            near = difflib.get_close_matches(unknown[0], self.linear_layers, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            known = ", ".join(self.linear_layers)
            raise ValueError(
                f"model.lora.targets: wanted linear layers of this model, {known}; got {unknown[0]!r}{hint}"
            )
        peft = import_peft("model.lora.rank: wanted 0")
        config = peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        before = {id(p): p.requires_grad for p in self.model.parameters()}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # of GPT-2's layers: peft sets it right
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what we want
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, self.model, name)
        self.model.eval()  # what was put in came in training mode
        layer = peft.tuners.tuners_utils.BaseTunerLayer
        self._layers = [module for module in self.model.modules() if isinstance(module, layer)]
        self._acting = None
        self.activate(name)
        found: dict[str, nn.Parameter] = {}
        for parameter_name, parameter in self.model.named_parameters():
            parameter.requires_grad_(before.get(id(parameter), True))  # peft freezes all but the newest adapter
            if id(parameter) not in before:
                parameter.data = parameter.data.float()
                found[parameter_name.removesuffix(f".{name}.weight")] = parameter
        return config, found

    def activate(self, name: str | None) -> None:
        """Let this adapter act in the passes to come; None: the base alone.

        Done as peft's `set_adapter` and `enable_adapters` do it, without what they do beside it, which takes many
        milliseconds a switch: they freeze whatever does not act.
        """
        if name == self._acting:
            return
        for layer in self._layers:
            if name is not None:
                layer._active_adapter = [name]
            layer._disable_adapters = name is None
        self._acting = name


class AdaptedBackbone(Backbone):
    """A base that others use too, with an adapter of its own: `parameters`, `state_dict`, `save` are the adapter's.

    name: one of a kind on this base; home: the folder that holds the base, for whoever loads what `save` wrote.
    Errors: ValueError without the extra `lora`, or where `lora.targets` are no linear layers of this model.
    """

    def __init__(
        self, base: Backbone, name: str, lora: LoRAConfig, *, seed: int = 0, home: Path | str | None = None
    ) -> None:
        nn.Module.__init__(self)  # not Backbone's: the base has prepared the model
        object.__setattr__(self, "model", base.model)  # borrowed: not in parameters(), nor in state_dict()
        self.tokenizer, self.attention_impl, self.adapter = base.tokenizer, base.attention_impl, name
        adapters = base.adapters or Adapters(base.model, base.linear_layers())
        assert isinstance(adapters, Adapters)
        self.peft_config, weights = adapters.add(name, lora, seed)
        base.adapters = self.adapters = adapters
        self.peft_config.base_model_name_or_path = str(base.model.name_or_path if home is None else home)
        self._names = list(weights)
        self.weights = nn.ParameterList(weights.values())

    def save(self, folder: Path) -> None:
        """Write the adapter as peft does, and the tokenizer."""
        self.peft_config.save_pretrained(folder)
        weights = {name: parameter.detach().cpu() for name, parameter in self._saved()}
        safetensors.torch.save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Set the adapter to what `save` wrote there. ValueError: what lies there is no adapter of this shape."""
        try:
            weights = safetensors.torch.load_file(folder / WEIGHTS)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder / WEIGHTS}: wanted the weights of an adapter: {error}") from error
        wanted = dict(self._saved())
        for name in sorted(wanted.keys() | weights.keys()):
            ours, theirs = wanted.get(name), weights.get(name)
            if ours is None or theirs is None or ours.shape != theirs.shape:
                shapes = [None if x is None else list(x.shape) for x in (ours, theirs)]
                raise ValueError(f"{folder / WEIGHTS}: {name}: wanted shape {shapes[0]}, got {shapes[1]}")
        for name, parameter in wanted.items():
            parameter.copy_(weights[name])

    def _saved(self) -> Iterator[tuple[str, Tensor]]:
        """The adapter's matrices by the names that they have in a file of peft's."""
        for name, parameter in zip(self._names, self.weights, strict=True):
            yield f"base_model.model.{name}.weight", parameter
