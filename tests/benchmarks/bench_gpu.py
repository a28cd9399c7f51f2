"""Everything that needs a GPU, in one command: ``make bench-gpu``.

    python -m tests.benchmarks.bench_gpu [--out bench-gpu] [--minutes 25] [--only PART ...] [--tiny]

The parts run one after the other, the most important first, each in a process of its own.  The figures of each are
written to ``full/bench-gpu.json`` when it is done; the same command goes on with the parts that are missing.  No part
begins when the minutes are over.  ``--tiny`` runs all of them on a CPU, with small shapes and in the folder ``tiny``,
to see that they work; their figures say nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from tests.benchmarks import gpu_loss
from tests.benchmarks.gpu_figures import MODULE_OF_FLA, Figure
from tests.benchmarks.tables import commit, versions

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "triton", "flash-linear-attention", "liger-kernel")
GPU_MARK = re.compile(r"\bpytest\.mark\.gpu\b")

Part = Callable[[Path, torch.device, bool], Iterator[Figure]]


def files_with_gpu_tests() -> list[str]:
    """Pytest is given no others, each of which may want a package that is not here."""
    return [
        str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if GPU_MARK.search(path.read_text())
    ]


def run_tests(root: Path, device: torch.device, tiny: bool) -> Iterator[Figure]:
    """The tests that need a GPU; on a CPU they are skipped."""
    report = root / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, f"--junitxml={report}", *files_with_gpu_tests()], cwd=ROOT)
    if not report.exists():
        print(
            f"  left out: pytest wrote no report (status {done.returncode}); is the extra `test` installed?"
        )
        return
    suite = ElementTree.parse(report).getroot()[0]
    total, skipped, failures, errors = (
        int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors")
    )
    yield Figure("GPU tests, failed", failures + errors, "", 0)
    yield Figure("GPU tests, passed", total - skipped - failures - errors, "")


def student(root: Path, device: torch.device, tiny: bool) -> Iterator[Figure]:
    from tests.benchmarks import gpu_models  # needs packages that the loss does without

    yield from gpu_models.student(root, device, tiny=tiny)


def capture(root: Path, device: torch.device, tiny: bool) -> Iterator[Figure]:
    from tests.benchmarks import gpu_models

    yield from gpu_models.teacher(root, device, tiny=tiny)


def student_without_fla(root: Path, device: torch.device, tiny: bool) -> Iterator[Figure]:
    """The student's step with the linear attention of Transformers."""
    if device.type == "cuda" and importlib.util.find_spec(MODULE_OF_FLA) is None:
        print("  left out: flash-linear-attention is not installed, so the step above is already without it")
        return
    sys.modules[MODULE_OF_FLA] = None  # type: ignore[assignment]
    yield from student(root, device, tiny)


def of_shapes(shapes: list[gpu_loss.Shape]) -> Part:
    return lambda root, device, tiny: gpu_loss.sweep(shapes, device, tiny=tiny)


PARTS: dict[str, Part] = {
    "loss": of_shapes(gpu_loss.FIRST),
    "tests": run_tests,
    "student": student,
    "capture": capture,
    "peers": lambda root, device, tiny: gpu_loss.compare(device, tiny=tiny),
    "chunks": of_shapes(gpu_loss.CHUNKS),
    "positions": of_shapes(gpu_loss.POSITIONS),
    "vocabularies": of_shapes(gpu_loss.OTHER_VOCABULARIES),
    "student_without_fla": student_without_fla,
}


def machine(*, tiny: bool) -> dict[str, Any]:
    """What the figures depend on.  Figures of another machine are not added to."""
    return {
        "device": "CPU, tiny shapes" if tiny else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "packages": dict.fromkeys(PACKAGES) | versions(PACKAGES),
        "commit": commit(),
    }


def load(path: Path, here: dict[str, Any]) -> dict[str, Any]:
    """What was measured before, on the same machine by the same code; else nothing."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found["machine"] == here:
            return found
        path.replace(path.with_suffix(".old.json"))
    return {"machine": here, "parts": {}}


def save(path: Path, found: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(new, path)


def measure(name: str, out: Path, *, tiny: bool) -> None:
    """One part, in this process; its figures go to a file."""
    device = torch.device("cpu" if tiny else "cuda")
    begin = time.monotonic()
    figures = []
    for figure in PARTS[name](out, device, tiny):
        shown = replace(figure, goal=None) if tiny else figure
        print(shown, flush=True)
        figures.append(asdict(shown))
    save(
        out / f"{name}.json",
        {"date": time.strftime("%Y-%m-%d"), "seconds": time.monotonic() - begin, "figures": figures},
    )


def in_own_process(name: str, out: Path, *, tiny: bool) -> dict[str, Any] | None:
    """The part's figures; None where it failed, which its own output has explained."""
    path = out / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.benchmarks.bench_gpu", "--part", name, "--out", str(out)]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if tiny else {})
    subprocess.run(command + ["--tiny"] * tiny, cwd=ROOT, env=environment)
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return found


def table(found: dict[str, Any]) -> str:
    """All figures, as docs/benchmarks.md has them."""
    here = found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items() if version)
    lines = [
        f"{here['device']}; Python {here['python']}, {packages}; commit {(here['commit'] or 'unknown')[:12]}",
        "",
    ]
    lines += ["| what | measured | to reach |", "|---|---|---|"]
    for name in PARTS:
        if name in found["parts"]:
            lines += [str(Figure(**figure)) for figure in found["parts"][name]["figures"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "work" / "bench-gpu", help="a folder that is kept")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="on a CPU, with small shapes")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    if chosen.part:
        measure(chosen.part, out, tiny=chosen.tiny)
        return
    if not chosen.tiny and not torch.cuda.is_available():
        raise SystemExit("bench_gpu: no NVIDIA GPU here. See that it works on a CPU with --tiny")
    out /= "tiny" if chosen.tiny else "full"  # apart, as models and rows that are there are not made again
    out.mkdir(parents=True, exist_ok=True)
    begin, path = time.monotonic(), out / "bench-gpu.json"
    found = load(path, machine(tiny=chosen.tiny))
    failed = []
    for name in chosen.only:
        if name in found["parts"]:
            continue
        if time.monotonic() - begin > 60 * chosen.minutes:
            print(f"{chosen.minutes:g} minutes are over. The same command goes on with {name}")
            break
        print(f"\n=== {name}", flush=True)
        figures = in_own_process(name, out, tiny=chosen.tiny)
        if figures is None:
            failed.append(name)
            continue
        found["parts"][name] = figures
        save(path, found)
    print(f"\n{table(found)}\n\n{path}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
