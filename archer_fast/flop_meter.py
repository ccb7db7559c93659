"""The FLOPs that a run has computed: of matrix products, by what has passed through its backbones and value heads."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from archer_fast.adapted_backbone import AdaptedBackbone
from archer_fast.backbone import Backbone
from archer_fast.config import LoRAConfig
from archer_fast.critic import PairedMLP
from archer_fast.model_costs import trunk_flops


class FlopMeter:
    """Sums on the host what the backbones and value heads among `roots` have computed since they were made.

    Counted are forward passes, backward passes where weights train (less with adapters), and blocks that are computed
    again in backward; attention by the keys that a query sees. Not counted: optimizers, and whatever is no product.
    start: a backbone of the model that all of them are.
    Errors: ValueError where no pass runs through the model without data.
    """

    def __init__(self, start: Backbone, roots: Iterable[nn.Module], lora: LoRAConfig) -> None:
        modules = [module for root in roots for module in root.modules()]
        backbones = {id(module): module for module in modules if isinstance(module, Backbone)}
        heads = {id(module): module for module in modules if isinstance(module, PairedMLP)}
        adapted = any(isinstance(backbone, AdaptedBackbone) for backbone in backbones.values())
        whole, of_adapter = trunk_flops(start), trunk_flops(start, lora) if adapted else None
        self._heads = list(heads.values())
        self._trunks = [
            (backbone.counts, of_adapter if of_adapter and isinstance(backbone, AdaptedBackbone) else whole)
            for backbone in backbones.values()
        ]

    def total(self) -> float:
        """FLOPs so far."""
        return sum(flops.of(counts) for counts, flops in self._trunks) + sum(head.flops for head in self._heads)
