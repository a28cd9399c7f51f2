"""What a case is, how it may end, and how campaigns share the time.

tally = run_campaign(campaign, seed=1, deadline_s=time.monotonic() + 60, folder=Path("/tmp/x"))
"""

from __future__ import annotations

import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path


class Outcome(StrEnum):
    REFUSED = "refused"  # with one clear error
    RIGHT = "right"  # equal to the result without the fault
    LOST = "lost"  # finished work is gone, or cannot be gone on with
    WRONG = "wrong"  # another result, a traceback, or a crash
    HUNG = "hung"  # no end within the limit, or processes left behind


FAILURES = (Outcome.LOST, Outcome.WRONG, Outcome.HUNG)


@dataclass(frozen=True)
class Result:
    """How one case ended.

    what   the fault and the command, in words
    said   what the program printed, for failures
    cases  how many faults were tried in it
    """

    outcome: Outcome
    what: str
    said: str = ""
    cases: int = 1


class CannotRunError(Exception):
    """This machine does not let a campaign make its condition."""


@dataclass(frozen=True)
class Campaign:
    """One kind of condition.

    case    makes and judges one case in an empty folder: ``case(number, chance, folder)``
    share   of the time
    least   cases, however little time there is
    """

    name: str
    case: Callable[[int, random.Random, Path], Result]
    share: float
    least: int = 1


@dataclass
class Tally:
    """What came out of a campaign."""

    campaign: str
    counts: Counter[Outcome] = field(default_factory=Counter)
    failures: list[tuple[int, Result]] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0

    @property
    def num_cases(self) -> int:
        return sum(self.counts.values())


def chance_of(campaign: str, seed: int, number: int) -> random.Random:
    """The same for a case, whatever was run before it."""
    return random.Random(f"{campaign} {seed} {number}")


def run_campaign(
    campaign: Campaign,
    *,
    seed: int,
    seconds: float,
    folder: Path,
    only: int | None = None,
    keep: bool = False,
) -> Tally:
    """Cases one after the other until the time is over.

    only  the number of a single case
    keep  the folders of cases that failed
    """
    tally, begin = Tally(campaign.name), time.monotonic()
    number = only or 0
    while only is None or number == only:
        spent = time.monotonic() - begin
        if only is None and number >= campaign.least and spent >= seconds:
            break
        place = folder / f"{campaign.name}-{number}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            result = campaign.case(number, chance_of(campaign.name, seed, number), place)
        except CannotRunError as error:
            tally.skipped = str(error)
            break
        except Exception:  # of the case's own making: it judged nothing
            result = Result(Outcome.WRONG, "the case itself failed", traceback.format_exc())
        tally.counts[result.outcome] += result.cases
        if result.outcome in FAILURES:
            tally.failures.append((number, result))
            tell_failure(campaign.name, seed, number, result)
        if not keep or result.outcome not in FAILURES:
            shutil.rmtree(place, ignore_errors=True)
        number += 1
    tally.seconds = time.monotonic() - begin
    return tally


def tell_failure(campaign: str, seed: int, number: int, result: Result) -> None:
    said = "\n".join(f"    {line}" for line in result.said.strip().splitlines()[-25:])
    print(
        f"{result.outcome.upper()}: {result.what}\n{said}\n"
        f"    again: python -m tests.torture --seed={seed} --only {campaign} --case={number}",
        flush=True,
    )


def table(tallies: Sequence[Tally]) -> list[str]:
    """One line for each campaign, and a sum."""
    names = ["cases", *Outcome]
    lines = [f"{'campaign':<12}" + "".join(f"{name:>9}" for name in names) + f"{'time':>8}"]
    total: Counter[Outcome] = Counter()
    for tally in tallies:
        if tally.skipped:
            lines.append(f"{tally.campaign:<12}  skipped: {tally.skipped}")
        total.update(tally.counts)
        lines.append(_line(tally.campaign, tally.counts, tally.seconds))
    lines.append(_line("all", total, sum(tally.seconds for tally in tallies)))
    return lines


def _line(name: str, counts: Counter[Outcome], seconds: float) -> str:
    numbers = [sum(counts.values()), *(counts[outcome] for outcome in Outcome)]
    return f"{name:<12}" + "".join(f"{number:>9}" for number in numbers) + f"{seconds:>6.0f} s"
