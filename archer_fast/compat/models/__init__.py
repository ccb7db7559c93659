"""ArcherAgent and CHAIAgent under the original's import path."""

from archer_fast.compat.models.archer_agent import ArcherAgent
from archer_fast.compat.models.chai_agent import CHAIAgent

__all__ = ["ArcherAgent", "CHAIAgent"]
