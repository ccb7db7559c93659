"""Folders that hold a LoRA adapter as peft writes it, and not the model that it adapts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from archer_fast.config import LoRAConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def import_peft(wanted: str) -> ModuleType:
    """The package; ValueError where the extra `lora` is missing, which begins with what was wanted."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{wanted} without the package peft; install it: pip install 'archer-fast[lora]'") from error
    module: ModuleType = peft
    return module


def base_of(folder: Path) -> str | None:
    """The folder or hub name of the model that the adapter in `folder` adapts; None where no adapter lies there.

    Of a run that was moved it lies in the run's own start/.
    """
    file = folder / CONFIG
    if not file.is_file():
        return None
    name = str(json.loads(file.read_text())["base_model_name_or_path"])
    if not Path(name).is_absolute() or Path(name).exists():
        return name
    here = [
        parent / "start" for parent in folder.absolute().parents[:3]
    ]  # final/, best/, checkpoints/ITERATION/policy/
    return next((str(path) for path in here if path.is_dir()), name)


def merged(model: Any, folder: Path) -> Any:
    """`model`, of transformers, with the adapter in `folder` added to its weights for good.

    Errors: ValueError where peft is missing, or where the adapter is of another model.
    """
    peft = import_peft(f"model: {str(folder)!r} holds an adapter, which nobody reads")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # what peft asks a new transformers
        try:
            return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        except RuntimeError as error:  # a line a tensor
            first = next((line.strip() for line in str(error).splitlines() if "mismatch" in line), error)
            raise ValueError(f"its adapter is of another model than {model.name_or_path!r}: {first}") from error


def lora_of(folder: Path) -> LoRAConfig:
    """Rank, alpha and targets of the adapter in `folder`; ValueError for a file that peft did not write."""
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text())
        targets = tuple(sorted(values["target_modules"]))
        return LoRAConfig(rank=int(values["r"]), alpha=float(values["lora_alpha"]), targets=targets)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: wanted an adapter's settings as peft writes them: {error!r}") from error
