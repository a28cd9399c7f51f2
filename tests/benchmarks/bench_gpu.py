"""Everything that needs a GPU, in one command: ``make bench-gpu``.

    python -m tests.benchmarks.bench_gpu [--out bench-gpu] [--minutes 25] [--only PART ...] [--tiny]

The parts run one after the other, the most important first, each in a process of its own.  The figures of each are
written to ``full/bench-gpu.json`` when it ends; the same command goes on with the parts that are missing or not
whole.  A part that runs when the minutes are over is ended, and its figures so far stay; they stay, too, where the
command itself is killed.  ``--tiny`` runs all of them on a CPU, with small shapes and in the folder ``tiny``, to see
that they work; their figures say nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
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
from tests.benchmarks.tables import changes, commit, versions

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "triton", "flash-linear-attention", "liger-kernel")
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the settings' older and newer name
NAME, INPUTS = "bench-gpu.json", "inputs"  # figures; the folder of models and rows, which are made once
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

    yield from gpu_models.student(root / INPUTS, device, tiny=tiny)


def capture(root: Path, device: torch.device, tiny: bool) -> Iterator[Figure]:
    from tests.benchmarks import gpu_models

    yield from gpu_models.teacher(root / INPUTS, device, tiny=tiny)


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
        "changes": changes(),
    }


def load(path: Path, here: dict[str, Any]) -> dict[str, Any]:
    """What was measured before, on the same machine by the same code; else nothing, and what was made is removed.

    Models, rows and the cache of another release of a library, or of this code, may not fit together with what is
    made now.
    """
    found: dict[str, Any]
    if path.exists():
        found = json.loads(path.read_text())
        if found["machine"] == here:
            return found
        path.replace(path.with_suffix(".old.json"))
    if (inputs := path.parent / INPUTS).exists():
        shutil.rmtree(inputs)
    found = {"machine": here, "parts": {}}
    save(path, found)
    return found


def save(path: Path, found: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(new, path)


def measure(name: str, out: Path, *, tiny: bool) -> None:
    """One part, in this process; its figures go to a file, each when it is known."""
    device, here = torch.device("cpu" if tiny else "cuda"), machine(tiny=tiny)
    begin = time.monotonic()
    figures: list[dict[str, Any]] = []

    def keep(*, is_whole: bool) -> None:
        of_part = {"date": time.strftime("%Y-%m-%d"), "seconds": time.monotonic() - begin}
        save(out / f"{name}.json", of_part | {"is_whole": is_whole, "figures": figures, "machine": here})

    for figure in PARTS[name](out, device, tiny):
        shown = replace(figure, goal=None) if tiny else figure
        print(shown, flush=True)
        figures.append(asdict(shown))
        keep(is_whole=False)
    keep(is_whole=True)


def environment(*, tiny: bool) -> dict[str, str]:
    """Of a part's process.  Segments that grow leave fewer holes in a GPU's memory, which one model nearly fills."""
    if tiny:
        return os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    if any(name in os.environ for name in ALLOCATOR):
        return dict(os.environ)
    return os.environ | {ALLOCATOR[0]: "expandable_segments:True"}


def run_at_most(command: list[str], limit_s: float, **options: Any) -> bool:
    """Whether it ended by itself in that time, well or not; else it is killed, with all processes that it started."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return False
    finally:  # after Ctrl-C, too, which does not reach another session
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return True


def in_own_process(name: str, out: Path, *, tiny: bool, limit_s: float) -> dict[str, Any] | None:
    """The part's figures, as far as it came; None where there are none, which its own output has explained."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_gpu", "--part", name, "--out", str(out)]
    if not run_at_most(command + ["--tiny"] * tiny, limit_s, cwd=ROOT, env=environment(tiny=tiny)):
        print("  ended: the minutes are over", flush=True)
    return left_by(name, out, machine(tiny=tiny))


def left_by(name: str, out: Path, here: dict[str, Any]) -> dict[str, Any] | None:
    """What is in the part's own file; None where there is none, or of another machine or commit."""
    path = out / f"{name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found if found.pop("machine", None) == here else None


def add(parts: dict[str, Any], name: str, figures: dict[str, Any]) -> None:
    """What is not whole takes no place of more; what was left out has no figures, and is tried again."""
    before = parts.get(name, {"figures": []})
    if len(figures["figures"]) > (0 if figures["is_whole"] else len(before["figures"])):
        parts.pop(name, None)
        parts[name] = figures


def take_in(name: str, figures: dict[str, Any] | None, out: Path, found: dict[str, Any]) -> None:
    """Figures of a part, if there are any, go to those of the others; the part's own file is then removed."""
    if figures is not None:
        add(found["parts"], name, figures)
        save(out / NAME, found)
    (out / f"{name}.json").unlink(missing_ok=True)


def table(found: dict[str, Any]) -> str:
    """All figures, as docs/benchmarks.md has them."""
    here = found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items() if version)
    code = f"commit {(here['commit'] or 'unknown')[:12]}" + " with changes" * (here["changes"] is not None)
    lines = [f"{here['device']}; Python {here['python']}, {packages}; {code}", ""]
    lines += ["| what | measured | to reach |", "|---|---|---|"]
    for name in PARTS:
        if name in found["parts"]:
            lines += [str(Figure(**figure)) for figure in found["parts"][name]["figures"]]
            lines += [f"| `{name}` is not whole | | |"] * (not found["parts"][name]["is_whole"])
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
    begin, path = time.monotonic(), out / NAME
    found = load(path, machine(tiny=chosen.tiny))
    parts, failed = found["parts"], []
    for name in chosen.only:
        take_in(name, left_by(name, out, found["machine"]), out, found)  # by a command that was killed
        if name in parts and parts[name]["is_whole"]:
            continue
        left_s = 60 * chosen.minutes - (time.monotonic() - begin)
        if left_s <= 0:
            print(f"{chosen.minutes:g} minutes are over. The same command goes on with {name}")
            break
        print(f"\n=== {name}", flush=True)
        figures = in_own_process(name, out, tiny=chosen.tiny, limit_s=left_s)
        take_in(name, figures, out, found)
        if figures is None or not figures["is_whole"]:
            failed.append(name)
    print(f"\n{table(found)}\n\n{path}")
    if failed:
        raise SystemExit(f"failed or cut short: {', '.join(failed)}")


if __name__ == "__main__":
    # As Ctrl-C, so that the part's process ends, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    main()
