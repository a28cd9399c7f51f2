"""Whether what a command did is what it may do."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.torture.cases import Outcome, Result
from tests.torture.commands import Ended

CLEAR_STATUSES = {2, 3, 4, 5, 6, 7, 8, 9, 74}  # shared.errors, and click's own for arguments
MAX_MESSAGE = 6000  # characters; nobody reads more
ERROR = re.compile(r"^(error|Error|problem|fault|aborted)\b", re.MULTILINE)


def is_clear_error(ended: Ended) -> bool:
    """One message with a status of its own, without a traceback."""
    return (
        ended.status in CLEAR_STATUSES
        and "Traceback (most recent call last)" not in ended.said
        and ERROR.search(ended.said) is not None
        and len(ended.said) < MAX_MESSAGE
    )


def judge(ended: Ended, what: str, *, is_right: Callable[[], str | None]) -> Result:
    """A command under a fault: refused, right, wrong or hung.

    is_right  called where it says that all is well: what is wrong with its result, None for nothing
    """
    if ended.status is None:
        return Result(Outcome.HUNG, what, ended.said)
    if ended.status == 0 and "Traceback (most recent call last)" not in ended.said:
        wrong = is_right()
        if wrong is None:
            return Result(Outcome.RIGHT, what)
        return Result(Outcome.WRONG, f"{what}: {wrong}", ended.said)
    if is_clear_error(ended):
        return Result(Outcome.REFUSED, what, ended.said)
    return Result(Outcome.WRONG, f"{what}: status {ended.status}", ended.said)
