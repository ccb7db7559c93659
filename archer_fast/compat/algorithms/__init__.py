"""The original's training loop under its import path."""

from archer_fast.compat.algorithms.offpolicy_train_loop import offpolicy_train_loop

__all__ = ["offpolicy_train_loop"]
