"""`archer-fast convert-config`: a Hydra yaml of the original ArCHer as a config of ours."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from archer_fast.cli_args import check_task, parse
from archer_fast.config import to_dict
from archer_fast.run_folder import write_json

if TYPE_CHECKING:
    from archer_fast.hydra_config import ConvertedConfig


@dataclass(slots=True)
class ConvertArgs:
    """Make a config of ours from a yaml of the original ArCHer (scripts/config/archer_20q.yaml, say).

    `archer-fast convert-config archer_20q.yaml --out 20q.json`, then `archer-fast train --config 20q.json`, to which
    every option can be added. The yaml's `defaults` are read from the files beside it. The run is ArCHer as published:
    under the yaml's values lies the preset `paper` (`filtered-bc` for the agent online_filteredbc), and a key that no
    file sets has the value that the original gives it. Every key is answered for: what it became and what differs, or
    why it was left out. Secrets are neither copied nor shown.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE.yaml")]
    """The yaml that the original is started with; not default.yaml alone, which names no environment."""
    out: Path = Path("config.json")
    """Where to write the config."""
    overwrite: bool = False
    """Replace a file that is there."""

    def check(self) -> None:
        if self.out.is_dir() or not self.out.absolute().parent.is_dir():
            raise ValueError(f"out: wanted a file in a folder that is there, got {str(self.out)!r}")
        if self.out.exists() and not self.overwrite:
            raise ValueError(
                f"out: {str(self.out)!r} is there already; pass --overwrite to replace it, or another --out"
            )


def convert(argv: Sequence[str], prog: str, command: str) -> None:
    """Write the config, and say what became of every key.

    Errors: ValueError for a yaml that cannot be read or has a value that does not fit; then nothing is written.
    """
    args = parse(ConvertArgs, argv, prog=f"{prog} {command}")
    args.check()
    from archer_fast.hydra_config import convert_config

    converted = convert_config(args.source)
    write_json(args.out, to_dict(converted.config))
    for line in report(converted):
        print(line)
    print(f"\nwritten: {args.out}\nnext:    {prog} train --config {shlex.quote(str(args.out))}")


def report(converted: ConvertedConfig) -> Iterator[str]:
    """What became of every key, for people."""
    first, *under = converted.files
    yield f"{first}" + (f" (over {', '.join(p.name for p in under)})" if under else "")
    yield "\ntaken:"
    for source, settings, note in converted.taken:
        made = ", ".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
        yield f"  {source}" + (f"  ->  {made}" if made else "")
        if note:
            yield f"      {note}"
    if converted.left_out:
        yield "\nleft out:"
        yield from (f"  {key}: {reason}" for key, reason in converted.left_out.items())
    try:
        check_task(converted.config.task)
    except ValueError as error:
        yield f"\nno training yet: {error}; a package of yours can register the task, or give --task.name"
