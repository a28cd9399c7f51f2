"""Campaigns of hard conditions, bounded in time: ``make torture``.

    python -m tests.torture [--minutes=60] [--seed=N] [--only NAME ...] [--case=N]

The seed is printed; with it, a campaign's name and a number, one case is repeated.  The status is 1 when anything was
lost, wrong or hung.
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: a fork of a process whose OpenMP threads have worked hangs
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.forks import settle_thread_pools
from tests.torture.campaigns import NAMES, run_campaigns
from tests.torture.cases import table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="for all campaigns together")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of all cases; by default the time"
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--case", type=int, help="this one alone; its folder stays if it fails")
    arguments = parser.parse_args()
    if arguments.case is not None and len(arguments.only or ()) != 1:
        parser.error("--case needs the one campaign that it is of: --only NAME")
    settle_thread_pools()
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes", flush=True)
    folder = Path(tempfile.gettempdir()) / f"teachonce-torture-{os.getuid()}"
    tallies = run_campaigns(
        arguments.only or NAMES,
        seed=arguments.seed,
        minutes=arguments.minutes,
        folder=folder,
        only=arguments.case,
    )
    print("\n".join(["", *table(tallies)]))
    return int(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
