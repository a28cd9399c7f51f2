"""All benchmarks, one after the other: ``make bench``, and ``make bench-gpu`` for those that need a GPU.

    python -m tests.benchmarks [--gpu] [--only NAME ...]

Every figure is a ratio measured side by side in one run, or a count.  What was found is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
GPU_SUFFIX = "_gpu"


def names(*, gpu: bool) -> list[str]:
    found = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    return [name for name in found if name.endswith(GPU_SUFFIX) == gpu]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="those that need an NVIDIA GPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of them")
    arguments = parser.parse_args()
    known = names(gpu=arguments.gpu)
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
