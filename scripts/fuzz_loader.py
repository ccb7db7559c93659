"""Fuzz target: any folder that is loaded as a saved buffer (tests/mutated_folder.py says what is done to one).

    .venv-fuzz/bin/python scripts/fuzz_loader.py [libFuzzer's options] [CORPUS...]

scripts/fuzz.sh makes .venv-fuzz, which has Atheris, and runs it.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
with atheris.instrument_imports(include=["archer_fast"]):
    from choices import Choices
    from mutated_folder import check, originals, write_mutated


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved = originals(folder)

        def run(data: bytes) -> None:
            choices = Choices(data)
            check(folder / "buffer", write_mutated(choices.of(saved), choices, folder / "buffer"))

        # To merge, libFuzzer starts itself again, in a shell. That a file may not be larger is no finding.
        atheris.Setup([shlex.join([sys.executable, __file__]), "-handle_xfsz=0", *sys.argv[1:]], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
