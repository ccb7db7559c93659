"""The drawing of ARCHITECTURE.md, read against the imports: which room may know which.

`python tests/test_layering.py` prints the drawing as ARCHITECTURE.md shows it.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "archer_fast"

# A room is a module, or a package whose files may know one another. room: the rooms it may import.
ARROWS: dict[str, set[str]] = {
    # left of pack: what happened, no torch
    "arguments": set(),
    "trajectory": {"arguments"},
    "staging": set(),
    "prefetch": set(),
    "packing": {"trajectory"},
    "transitions": {"packing", "trajectory"},
    "padding": {"arguments", "packing", "transitions"},
    "token_packer": {"_C", "arguments", "packing"},
    "trajectory_arrays": {"arguments", "trajectory"},
    "open_trajectory": {"_C", "arguments"},
    "sealed_file": set(),
    "folder_lock": set(),
    "segment_file": {"sealed_file"},
    "segment_manifest": {"sealed_file", "segment_file"},
    "feature_file": {"_C", "sealed_file", "segment_file"},
    "kept_files": {"sealed_file", "segment_file", "segment_manifest"},
    "segments": {
        "_C",
        "feature_file",
        "folder_lock",
        "kept_files",
        "sealed_file",
        "segment_file",
        "segment_manifest",
    },
    "buffer_records": {"packing", "staging"},
    "buffer": {
        "_C",
        "arguments",
        "buffer_records",
        "open_trajectory",
        "packing",
        "padding",
        "segments",
        "staging",
        "trajectory",
        "trajectory_arrays",
        "transitions",
    },
    "envs": set(),
    "rollout": set(),
    "rollout.guard": {"envs"},
    "rollout.shared": {"envs", "ranks", "rollout.guard", "rollout.interact", "trajectory"},
    "rollout.interact": {"envs", "rollout.guard", "trajectory"},
    "diagnosis": set(),
    "config": set(),
    "collapse": {"config"},
    "collapse_response": {"collapse", "config"},
    # right of pack: tensors, no environments
    "attention": {"config"},
    "adapter_folder": {"config"},
    "adapters": {"adapter_folder", "config"},
    "pass_counts": set(),
    "ranks": set(),
    "sharding": {"ranks"},
    "backbone": {"adapter_folder", "adapters", "attention", "config", "pass_counts", "ranks", "sharding"},
    "adapted_backbone": {"adapter_folder", "adapters", "backbone", "config", "pass_counts", "sharding"},
    "tiny_model": {"backbone", "config"},
    "batch": {"attention", "packing"},
    "ops": {"_C", "kernels"},
    "advantages": {"ops"},
    "meters": {"ranks"},
    "optim": {"meters", "ranks", "sharding"},
    "doubling_bins": set(),
    "actor": {"attention", "backbone", "batch", "config", "doubling_bins", "ops"},
    "critic": {"adapted_backbone", "backbone", "batch", "config", "ops", "ranks", "sharding"},
    "turn_features": {"backbone", "buffer_records", "critic", "staging"},
    "device_staging": {"staging"},
    "rollout.kv_cache": {"attention", "ops"},
    "rollout.cuda_graphs": {"backbone", "rollout.kv_cache"},
    "rollout.embedded": {"backbone", "batch", "rollout.cuda_graphs", "rollout.interact", "rollout.kv_cache"},
    "rollout.policy_engine": {"backbone", "batch", "rollout.interact"},
    "rollout.best_of": {"batch", "packing", "rollout.interact", "rollout.policy_engine", "trajectory"},
    "rollout.token_sampler": {"backbone"},
    "rollout.probe": {"backbone", "rollout.token_sampler"},
    "rollout.sampler_engine": {"backbone", "batch", "rollout.interact", "rollout.token_sampler"},
    "rollout.vllm_protocol": {"backbone", "rollout.token_sampler"},
    "rollout.vllm_sampler": {
        "adapted_backbone",
        "backbone",
        "config",
        "rollout.probe",
        "rollout.token_sampler",
        "rollout.vllm_protocol",
    },
    "rollout.vllm_server": {
        "adapted_backbone",
        "backbone",
        "config",
        "rollout.probe",
        "rollout.token_sampler",
        "rollout.vllm_protocol",
    },
    "rollout.engines": {
        "backbone",
        "config",
        "rollout.embedded",
        "rollout.policy_engine",
        "rollout.sampler_engine",
        "rollout.token_sampler",
        "rollout.vllm_sampler",
        "rollout.vllm_server",
    },
    "algorithms": {
        "actor",
        "advantages",
        "backbone",
        "batch",
        "buffer",
        "buffer_records",
        "config",
        "critic",
        "device_staging",
        "doubling_bins",
        "meters",
        "ops",
        "optim",
        "packing",
        "prefetch",
        "ranks",
        "rollout.policy_engine",
        "sharding",
        "token_packer",
        "trajectory",
        "turn_features",
    },
    # the two sides meet
    "checkpoint": {"sealed_file"},
    "sharded_checkpoint": {"ranks"},
    "best_policy": {"backbone", "checkpoint", "evaluation", "optim", "ranks", "sharding"},
    "presets": {"config"},
    "run_folder": {"config"},
    "resume": {"config"},
    "loggers": {"run_folder"},
    "evaluation": {
        "backbone",
        "config",
        "envs",
        "ranks",
        "rollout.embedded",
        "rollout.interact",
        "rollout.policy_engine",
        "rollout.shared",
        "trajectory",
    },
    "diagnosis_play": {
        "backbone",
        "batch",
        "config",
        "diagnosis",
        "envs",
        "evaluation",
        "packing",
        "rollout.embedded",
        "rollout.guard",
        "rollout.interact",
        "token_packer",
        "trajectory",
    },
    "diagnosis_score": {"backbone", "batch", "critic", "diagnosis", "diagnosis_play", "packing", "token_packer"},
    "saved_critic": {"backbone", "checkpoint", "config", "critic", "run_folder", "sharded_checkpoint"},
    "warm_start": {"backbone", "batch", "config", "envs", "ops", "packing", "trajectory"},
    "doctor": {
        "adapted_backbone",
        "backbone",
        "batch",
        "config",
        "critic",
        "ops",
        "packing",
        "trajectory",
        "workload",
    },
    "watcher": set(),
    "stall_watch": {"config", "watcher"},
    "start_policy": {"backbone", "checkpoint", "config", "envs", "evaluation", "tiny_model", "warm_start", "watcher"},
    "run_state": {
        "_C",
        "adapted_backbone",
        "algorithms",
        "backbone",
        "best_policy",
        "buffer",
        "checkpoint",
        "collapse_response",
        "config",
        "devices",
        "doubling_bins",
        "envs",
        "evaluation",
        "flop_meter",
        "loggers",
        "meters",
        "ranks",
        "rollout.best_of",
        "rollout.engines",
        "rollout.policy_engine",
        "rollout.shared",
        "run_folder",
        "sharded_checkpoint",
        "sharding",
        "start_policy",
        "trajectory",
        "turn_features",
        "watcher",
    },
    # for code written against the original: it meets both sides
    "compat": {
        "adapter_folder",
        "arguments",
        "backbone",
        "batch",
        "config",
        "critic",
        "envs",
        "ops",
        "packing",
        "rollout.embedded",
        "sealed_file",
    },
    "train": {
        "config",
        "evaluation",
        "flop_meter",
        "meters",
        "optim",
        "ranks",
        "run_folder",
        "run_state",
        "stall_watch",
        "trajectory",
        "watcher",
    },
    "display": set(),
    "run_curves": set(),
    "report": {"display", "loggers", "run_curves", "run_folder"},
    "play": {"backbone", "config", "envs", "evaluation", "rollout.embedded"},
    "compile_report": {"ops"},
    "checkout": set(),
    "public_models": set(),
    "workload": set(),
    "devices": set(),
    "model_costs": {"adapted_backbone", "attention", "backbone", "config", "pass_counts"},
    "flop_meter": {"adapted_backbone", "backbone", "config", "critic", "model_costs"},
    "plan": {"config", "critic", "model_costs", "workload"},
    "hydra_config": {"config", "presets"},
    "compare": {"config", "display", "loggers", "resume", "run_folder"},
    "cli_args": {"config", "envs", "presets", "run_folder", "workload"},
    "cli_policy": {"backbone", "cli_args", "config", "run_folder"},
    "cli_eval": {"cli_args", "cli_policy", "config", "envs", "evaluation"},
    "cli_diagnose": {
        "backbone",
        "cli_args",
        "cli_eval",
        "config",
        "diagnosis",
        "diagnosis_play",
        "diagnosis_score",
        "run_folder",
        "saved_critic",
    },
    "cli_bench": {"checkout", "cli_args", "compile_report"},
    "cli_plan": {"cli_args", "config", "devices", "model_costs", "plan", "public_models", "run_folder", "workload"},
    "cli_doctor": {
        "adapted_backbone",
        "adapter_folder",
        "attention",
        "backbone",
        "cli_args",
        "cli_plan",
        "cli_policy",
        "config",
        "doctor",
        "evaluation",
        "model_costs",
        "plan",
        "run_folder",
        "trajectory",
    },
    "cli_convert": {"cli_args", "config", "hydra_config", "run_folder"},
    "cli_compare": {"checkout", "cli_args", "compare", "folder_lock"},
    "cli": {
        "backbone",
        "cli_args",
        "cli_bench",
        "cli_compare",
        "cli_convert",
        "cli_diagnose",
        "cli_doctor",
        "cli_eval",
        "cli_plan",
        "cli_policy",
        "config",
        "display",
        "envs",
        "loggers",
        "play",
        "presets",
        "ranks",
        "report",
        "resume",
        "run_folder",
        "train",
        "watcher",
    },
    "__main__": {"cli"},
}

NO_TORCH = {
    "trajectory",
    "packing",
    "trajectory_arrays",
    "open_trajectory",
    "token_packer",
    "sealed_file",
    "folder_lock",
    "segment_file",
    "segment_manifest",
    "segments",
    "buffer",
    "envs",
    "rollout",
    "rollout.guard",
    "rollout.interact",
    "diagnosis",
    "collapse",
    "collapse_response",
}
NO_ENVS = {"algorithms", "critic", "actor", "advantages", "ops", "attention", "backbone", "batch"}
# Other people's packages that are known in one place. top-level name: the rooms that may import it.
KNOWN_ONLY_BY = {
    "transformers": {"backbone", "compat"},
    "tokenizers": {"tiny_model"},
    "google_crc32c": {"sealed_file", "segment_manifest"},
    "flash_attn": {"attention"},
    "flash_attn_interface": {"attention"},
    "triton": {"ops", "compile_report"},
    "vllm": {"rollout.vllm_sampler"},
    "peft": {"adapter_folder"},
    "yaml": {"hydra_config"},
}


def drawing() -> str:
    """The arrows as ARCHITECTURE.md shows them, one room a line."""
    width = max(map(len, ARROWS))
    return "\n".join(f"{room:<{width}} -> {', '.join(sorted(known)) or '(none)'}" for room, known in ARROWS.items())


@cache
def modules() -> dict[str, Path]:
    """Every module by its name inside the package ("" is the package itself)."""
    files = [p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts]
    names = [".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in files]
    return {re.sub(r"(^|\.)__init__$", "", name): file for name, file in zip(names, files, strict=True)}


def room_of(module: str) -> str:
    """The most particular room that holds `module`; the module's own name where none does."""
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((room for room in prefixes if room in ARROWS or room in ("_C", "kernels")), module)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that `file` imports, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: wanted absolute imports, got a relative one"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("archer_fast.")
                is_module = inner in modules() or inner in ("_C", "kernels")
                yield node.lineno, f"{node.module}.{alias.name}" if is_module else node.module


def arrows(module: str) -> Iterator[tuple[int, str]]:
    """(line, room) of the package's own rooms that `module` imports."""
    for line, name in imports(modules()[module]):
        if name.startswith("archer_fast."):
            yield line, room_of(name.removeprefix("archer_fast."))


@pytest.mark.parametrize("module", sorted(modules()))
def test_every_import_is_a_drawn_arrow(module: str) -> None:
    if module == "":  # the package itself imports nothing
        assert list(imports(modules()[module])) == []
        return
    room = room_of(module)
    known_rooms = ", ".join(sorted({f'"{known}"' for _, known in arrows(module)}))
    row = f'"{module}": ' + (f"{{{known_rooms}}}," if known_rooms else "set(),")
    assert room in ARROWS, f"archer_fast.{module} is in no room; if its arrows are right, draw it: {row}"
    allowed = ARROWS[room] | {room}
    undrawn = [f"line {line}: {room} -> {known}" for line, known in arrows(module) if known not in allowed]
    assert not undrawn, f"{modules()[module]}: arrows that nobody drew: {undrawn}"


def test_arrows_go_one_way() -> None:
    graphlib.TopologicalSorter(ARROWS).prepare()  # raises CycleError, which names the cycle


def test_every_drawn_room_exists() -> None:
    assert set(ARROWS) - {room_of(module) for module in modules()} == set()


def test_the_architecture_page_draws_the_same() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    lines = {" ".join(line.split()) for line in page.splitlines()}
    missing = [line for line in drawing().splitlines() if " ".join(line.split()) not in lines]
    assert not missing, "ARCHITECTURE.md lacks these lines:\n" + "\n".join(missing)


@pytest.mark.parametrize("module", sorted(m for m in modules() if m))
def test_what_one_room_alone_may_know(module: str) -> None:
    room = room_of(module)
    for line, name in imports(modules()[module]):
        package = name.split(".")[0]
        where = f"{modules()[module]}:{line}"
        allowed = KNOWN_ONLY_BY.get(package, {room})
        assert room in allowed, f"{where}: only {allowed} may import {package}"
        assert not (package == "torch" and room in NO_TORCH), f"{where}: left of pack there is no torch"
        if name.startswith("archer_fast.envs"):
            assert room not in NO_ENVS, f"{where}: right of pack nobody knows of environments"


def test_left_of_pack_runs_without_torch(tmp_path: Path) -> None:
    """Not by any detour: torch cannot be imported there, and nothing asks for it."""
    names = sorted(f"archer_fast.{m}" for m in modules() if m and room_of(m) in NO_TORCH)
    assert {"archer_fast.buffer", "archer_fast.envs.twenty_questions", "archer_fast.rollout.interact"} <= set(names)
    (tmp_path / "torch.py").write_text("raise ImportError('somebody imports torch')\n")
    (tmp_path / "transformers.py").write_text("raise ImportError('somebody imports transformers')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def cpp_includes() -> Iterator[tuple[str, str]]:
    for file in sorted((ROOT / "csrc").rglob("*")):
        if file.suffix in (".cpp", ".h"):
            for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', file.read_text(), re.MULTILINE):
                yield str(file.relative_to(ROOT)), header


def test_only_the_bindings_know_python_and_nobody_knows_torch() -> None:
    found = list(cpp_includes())
    know_python = {file for file, header in found if re.match(r"pybind11/|Python\.h", header)}
    assert know_python and {str(Path(file).parent) for file in know_python} == {"csrc/python"}
    assert [pair for pair in found if re.match(r"torch/|ATen/|c10/", pair[1])] == []


def test_kernels_folder_shadows_nobody() -> None:
    """A `kernels/__init__.py` would shadow Hugging Face's package of that name; see kernels/README.md."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "kernels").readlink() == Path("../kernels")
    assert (PACKAGE / "kernels").resolve() == ROOT / "kernels"


if __name__ == "__main__":
    print(drawing())
