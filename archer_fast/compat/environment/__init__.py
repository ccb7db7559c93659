"""Games played in batches, under the original's import path."""

from archer_fast.compat.environment.adventure_env import BatchedAdventureEnv
from archer_fast.compat.environment.env_utils import batch_interact_environment
from archer_fast.compat.environment.guess_my_city import BatchedGuessMyCityEnv
from archer_fast.compat.environment.twenty_questions import BatchedTwentyQuestionsEnv, TwentyQuestionsEnv
from archer_fast.compat.environment.webshop import BatchedWebShopEnv

__all__ = [
    "BatchedAdventureEnv",
    "BatchedGuessMyCityEnv",
    "BatchedTwentyQuestionsEnv",
    "BatchedWebShopEnv",
    "TwentyQuestionsEnv",
    "batch_interact_environment",
]
