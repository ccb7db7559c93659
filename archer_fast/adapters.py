"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685; by peft) in one model, of which at most one acts."""

from __future__ import annotations

import difflib
import warnings
from typing import Any

import torch
from torch import nn

from archer_fast.adapter_folder import import_peft
from archer_fast.config import LoRAConfig


class Adapters:
    """The adapters that were put into one model: at most one of them acts at a time, none where the base is asked."""

    def __init__(self, model: nn.Module, linear_layers: list[str]) -> None:
        self.model, self.linear_layers = model, linear_layers
        self._layers: list[Any] = []  # what peft has put in place of linear layers
        self._acting: str | None = None

    def add(self, name: str, lora: LoRAConfig, seed: int) -> tuple[Any, dict[str, nn.Parameter]]:
        """A new adapter, whose B is 0 and which acts now: its settings, and its float32 matrices by layer and matrix.

        Steps of 1e-4 of a weight would be lost in bfloat16. The model's own weights are frozen (peft sees to it).
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
        before = {id(parameter) for parameter in self.model.parameters()}
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
            if id(parameter) not in before:
                parameter.data = parameter.data.float()
                found[parameter_name.removesuffix(f".{name}.weight")] = parameter
        return config, found

    def activate(self, name: str | None) -> None:
        """Let this adapter act in the passes to come; None: the base alone.

        Done as peft's `set_adapter` and `enable_adapters` do it, without what takes them thirty times as long
        (NOTES.md, 2026-11-26): they freeze whatever does not act.
        """
        if name == self._acting:
            return
        for layer in self._layers:
            if name is not None:
                layer._active_adapter = [name]
            layer._disable_adapters = name is None
        self._acting = name
