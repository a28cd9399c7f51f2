"""All campaigns, and their shares of the time."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.torture.cases import Campaign, Tally, run_campaign
from tests.torture.commands import adopt_orphans
from tests.torture.damage import cache_case, run_case, unfinished_case
from tests.torture.fuzz import fuzz_case
from tests.torture.hostile import hostile_case
from tests.torture.inputs import input_case
from tests.torture.kills import kill_case
from tests.torture.materials import Materials
from tests.torture.narrow import narrow_case
from tests.torture.remote import remote_case

CASES = {
    "kills": (kill_case, 0.35),
    "caches": (cache_case, 0.15),
    "captures": (unfinished_case, 0.05),
    "runs": (run_case, 0.2),
    "inputs": (input_case, 0.15),
    "hostile": (hostile_case, 0.15),
    "fuzz": (fuzz_case, 0.1),
    "narrow": (narrow_case, 0.1),
    "remote": (remote_case, 0.05),
}
NAMES = tuple(CASES)


def run_campaigns(
    names: Sequence[str], *, seed: int, minutes: float, folder: Path, only: int | None = None
) -> list[Tally]:
    """One after the other, in ``folder``; each begins at its first case."""
    adopt_orphans()
    things = Materials.make(folder / f"materials-{os.getpid()}")
    gc.collect()  # a process group of this process, collected in a fork, would wait for threads that are not there
    chosen = [
        Campaign(name, partial(case, things), share) for name, (case, share) in CASES.items() if name in names
    ]
    whole = sum(campaign.share for campaign in chosen)
    tallies = []
    for campaign in chosen:
        seconds = 60 * minutes * campaign.share / whole
        tallies.append(
            run_campaign(
                campaign, seed=seed, seconds=seconds, folder=folder, only=only, keep=only is not None
            )
        )
    shutil.rmtree(things.folder, ignore_errors=True)
    return tallies
