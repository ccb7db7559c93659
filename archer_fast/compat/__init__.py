"""ArCHer for code written against the original package `archer`: its numbers, with less of its work.

Two ways in. Change the import:

    from archer_fast.compat.models import ArcherAgent
    from archer_fast.compat.algorithms import offpolicy_train_loop

or leave the code as it is and exchange the slow methods of the installed original, of a fork, or of one object:

    import archer, archer_fast.compat
    archer_fast.compat.accelerate(archer)

Both give the original's numbers for the same samples; docs/compat.md says what is exact, what is mended, what is not.
"""

from archer_fast.compat.patching import Report, accelerate

__all__ = ["Report", "accelerate"]
