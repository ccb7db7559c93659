"""A package laid out and named as the original, of the plain rival's classes; and a fork of it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ORIGINAL = Path(__file__).resolve().parents[2] / "benchmarks/compat/original.py"
_NAMES = {
    "PlainAgent": "ArcherAgent",
    "PlainCritic": "DoubleCritic",
    "PlainTrainer": "ArcherTrainer",
    "PlainBuffer": "ReplayBuffer",
}
_FILES = {
    "__init__": "",
    "models/__init__": "from archer.models.archer_agent import ArcherAgent",
    "models/archer_agent": "from archer.everything import ArcherAgent",
    "models/critic": "from archer.everything import DoubleCritic",
    "algorithms/__init__": "from archer.algorithms.offpolicy_train_loop import offpolicy_train_loop",
    "algorithms/archer/__init__": "from archer.algorithms.archer.trainer import ArcherTrainer",
    "algorithms/archer/trainer": "from archer.everything import ArcherTrainer",
    "algorithms/offpolicy_train_loop": (
        "import time\n\ndef offpolicy_train_loop(env):\n    time.sleep(15)\n    return time.time()"
    ),
    "data/__init__": "from archer.everything import ReplayBuffer",
}
FORK = '''
"""What a lab adds: another get_action, a constructor keyword, another reward."""
from archer.models import ArcherAgent
from archer.algorithms.archer import ArcherTrainer

class LabAgent(ArcherAgent):
    def __init__(self, *args, shout=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.shout, self.asked = shout, []

    def get_action(self, observation):
        self.asked.append(list(observation))
        return ["WHAT?" if self.shout else "What?" for _ in observation]

class LabTrainer(ArcherTrainer):
    def critic_loss(self, observation, action, reward, next_observation, done, **more):
        self.seen = getattr(self, "seen", 0) + 1
        return super().critic_loss(observation, action, reward + 1, next_observation, done, **more)
'''


@contextmanager
def installed(folder: Path, edit: dict[str, str] | None = None) -> Iterator[ModuleType]:
    """`import archer` inside the block, and `import lab`. edit: text of the classes to replace, by what."""
    text = ORIGINAL.read_text()
    for old, new in {**_NAMES, **(edit or {})}.items():
        assert old in text, old
        text = text.replace(old, new)
    files = {f"archer/{name}": body for name, body in _FILES.items()} | {"archer/everything": text, "lab": FORK}
    for name, body in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module("archer")
    finally:
        sys.path.remove(str(folder))
        for name in [n for n in sys.modules if n.split(".")[0] in ("archer", "lab")]:
            del sys.modules[name]
