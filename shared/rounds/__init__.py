"""Rounds: the student writes, the teacher is captured on what it wrote, the student trains on the mixture, and again.

plan     the folders and recipes of each round, made of the user's recipe
loop     the commands of the rounds, one after the other; what is there is not made again
students whose answers and losses are there: of a run that was trained anew they are refused
table    what came out, of all rounds
"""

from shared.rounds.loop import go_through, require_possible
from shared.rounds.plan import Rounds, settings_of_round_0
from shared.rounds.table import table_of

__all__ = ["Rounds", "go_through", "require_possible", "settings_of_round_0", "table_of"]
