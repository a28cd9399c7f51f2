"""All benchmarks that need no GPU and no package of weights, one after the other: ``make bench``.

    python -m tests.benchmarks [--only NAME ...]
    python -m tests.benchmarks --record NAME ...    what these found last becomes what the documents show
    python -m tests.benchmarks --page               the documents' tables, from docs/measured

Every figure is a ratio measured side by side in one run, or a count.  Tables are printed and kept in
work/benchmarks/tables; nothing in docs/ changes until they are recorded.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from tests.benchmarks import pages

FOLDER = Path(__file__).parent
OF_THEIR_OWN = {
    "beyond",
    "gpu",
    "peers",
    "real_weights",
    "steady",
    "tokenizers",
}  # they need a GPU, a package, or hours


def names() -> list[str]:
    return sorted({path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")} - OF_THEIR_OWN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--only", nargs="+", metavar="NAME", help="some of them")
    asked.add_argument("--record", nargs="+", metavar="NAME", help="put what these found last into docs/")
    asked.add_argument("--page", action="store_true", help="write the tables in docs/ from docs/measured")
    arguments = parser.parse_args()
    if arguments.record or arguments.page:
        try:
            for line in pages.record(arguments.record or []):
                print(line)
            pages.write_pages()
        except ValueError as error:
            parser.error(str(error))
        return
    known = names()
    for name in arguments.only or known:
        if name not in known:
            parser.error(f"no benchmark {name!r}; there are: {', '.join(known)}")
    sys.argv[1:] = []  # each has arguments of its own, for use alone
    for name in arguments.only or known:
        print(f"\n=== {name}", flush=True)
        begin = time.monotonic()
        importlib.import_module(f"tests.benchmarks.bench_{name}").main()
        print(f"({time.monotonic() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
