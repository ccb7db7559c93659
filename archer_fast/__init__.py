"""Fast ArCHer: hierarchical off-policy reinforcement learning for multi-turn language agents.

Importing this package does nothing; import the module you need, e.g. `archer_fast.buffer`.
"""

__version__ = "0.1.0"
