"""Every file that is read again, damaged, and every command that reads it: a clear error or the right result.

A file is damaged in one of a few ways, then a command runs.  Where it says that all is well, what it gives must be
what it gives for the sound file.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.torture.cases import Outcome, Result
from tests.torture.commands import Ended, clear_left_behind, run
from tests.torture.judging import judge
from tests.torture.materials import (
    RUN,
    Materials,
    cache_files,
    difference,
    evaluation_of,
    run_content,
    weights_of,
    without_places,
)

OF_A_LOG = ("differs in log", "differs in log, resultsbefore")  # the first validation, too, is only there
TOLD = re.compile(r"note: .* damaged line\(s\) are left out, records of")
TIMED = re.compile(r"seconds|_s$|^time|^ended$|^began$")  # names of what the clock says

# Damage.


def flip_bit(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def flip_digit(data: bytes, chance: random.Random) -> bytes:
    """Another digit where there is one: what stays readable, and says something else."""
    places = [match.start() for match in re.finditer(rb"[0-9]", data)]
    if not places:
        return flip_bit(data, chance)
    place = chance.choice(places)
    digit = chance.choice([one for one in b"0123456789" if one != data[place]])
    return data[:place] + bytes([digit]) + data[place + 1 :]


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def cut_lines(data: bytes, chance: random.Random) -> bytes:
    """At the end of a line: what is left looks whole."""
    lines = data.splitlines(keepends=True)
    return b"".join(lines[: chance.randrange(len(lines))])


def zero(data: bytes, chance: random.Random) -> bytes:
    """A block, as a file system leaves it after a power cut."""
    size = min(len(data), chance.choice([16, 512, 4096]))
    place = chance.randrange(len(data) - size + 1)
    return data[:place] + bytes(size) + data[place + size :]


def empty(data: bytes, chance: random.Random) -> bytes:
    return b""


def append(data: bytes, chance: random.Random) -> bytes:
    return data + chance.choice([b"{}\n", b"\0" * 5000, chance.randbytes(40)])


IN_PLACE: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip_bit,
    flip_digit,
    cut,
    zero,
    cut_lines,
    flip_bit,
    empty,
    append,
)
MISSING, SWAPPED = "missing", "swapped"
KINDS = (*IN_PLACE, MISSING, SWAPPED)


def spoil(path: Path, kind: Any, chance: random.Random) -> str:
    """Damages a file; the fault in words."""
    if kind == MISSING:
        path.unlink()
        return f"{path.name} is missing"
    if kind == SWAPPED:
        others = [one for one in sorted(path.parent.iterdir()) if one != path and one.is_file()]
        alike = [one for one in others if one.suffix == path.suffix] or others
        if not alike:
            return spoil(path, cut, chance)
        other = chance.choice(alike)
        shutil.copyfile(other, path)
        return f"{path.name} is a copy of {other.name}"
    data = path.read_bytes()
    damaged = (kind if data else append)(data, chance)
    path.write_bytes(damaged)
    return f"{path.name} after {kind.__name__}" + ("" if damaged != data else " (no change)")


# Commands that read a cache.


@dataclass(frozen=True)
class Reading:
    """A command, and what it gives.

    result  of the command that has ended well, comparable
    """

    name: str
    program: str
    arguments: Callable[[Materials, Path], list[str]]
    result: Callable[[Ended, Path], dict[str, Any]]


def _json(ended: Ended, folder: Path) -> dict[str, Any]:
    """Of what was printed, from the first brace on."""
    start = min(place for place in (ended.said.find("{"), ended.said.find("[")) if place >= 0)
    found = json.JSONDecoder().raw_decode(ended.said[start:])[0]
    return {"printed": leaves(without_places(found), folder)}


def leaves(tree: Any, folder: Path, name: str = "") -> dict[str, Any]:
    """A JSON tree as flat names, without what the clock and the folder say."""
    if isinstance(tree, dict):
        inner = tree.items()
    elif isinstance(tree, list):
        inner = ((str(place), value) for place, value in enumerate(tree))  # type: ignore[assignment]
    else:
        return {name: tree.replace(str(folder), "PLACE") if isinstance(tree, str) else tree}
    found: dict[str, Any] = {}
    for key, value in inner:
        if not TIMED.search(key):
            found |= leaves(value, folder, f"{name}.{key}")
    return found


def parquet_rows(folder: Path) -> dict[str, Any]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted(folder.rglob("*.parquet"))}


CACHE_READINGS = (
    Reading("verify", "teacher-cache", lambda _, place: ["verify", str(place / "cache")], lambda *_: {}),
    Reading(
        "train",
        "train-student",
        lambda things, place: ["run", *things.arguments(cache=place / "cache", runs=place / "runs")],
        lambda _, place: run_content(place / "runs" / RUN),
    ),
    Reading(
        "export",
        "teacher-cache",
        lambda _, place: ["export", str(place / "cache"), str(place / "out")],
        lambda _, place: parquet_rows(place / "out"),
    ),
    Reading(
        "capture",
        "teacher-cache",
        lambda things, place: ["capture", *things.arguments(cache=place / "cache")],
        lambda _, place: cache_files(place / "cache"),
    ),
    Reading(
        "inspect",
        "teacher-cache",
        lambda _, place: ["inspect", str(place / "cache"), "--json"],
        lambda ended, place: _json(ended, place),
    ),
    Reading(
        "audit",
        "teacher-cache",
        lambda things, place: [
            "audit",
            str(place / "cache"),
            "--json",
            "--recipe",
            str(things.recipe),
            "--examples",
            "4",
        ],
        _json,
    ),
    Reading(
        "check",
        "train-student",
        lambda things, place: ["check", *things.arguments(cache=place / "cache", runs=place / "runs")],
        lambda *_: {},
    ),
    Reading(
        "report",
        "teacher-cache",
        lambda things, place: [
            "report",
            str(place / "cache"),
            str(place / "cache.html"),
            "--recipe",
            str(things.recipe),
        ],
        lambda *_: {},
    ),
    Reading(
        "merge",
        "teacher-cache",
        lambda _, place: ["merge", str(place / "cache"), str(place / "cache"), str(place / "out")],
        lambda _, place: {
            name: data for name, data in cache_files(place / "out").items() if name.startswith("shards")
        },
    ),
)


def cache_case(things: Materials, number: int, chance: random.Random, folder: Path) -> Result:
    """A committed cache, one of its files damaged."""
    place, sound = folder / "damaged", folder / "sound"
    for one in (place, sound):
        shutil.copytree(things.cache, one / "cache")
    reading = CACHE_READINGS[number % len(CACHE_READINGS)]
    files = [path for path in sorted((place / "cache").rglob("*")) if path.is_file()]
    shards = [path for path in files if path.parent.name == "shards"]
    others = [path for path in files if path.parent.name != "shards"]
    path = chance.choice(shards if chance.random() < 0.4 else others)
    return _judged(things, reading, place, sound, spoil(path, chance.choice(KINDS), chance))


def unfinished_case(things: Materials, number: int, chance: random.Random, folder: Path) -> Result:
    """A capture that was interrupted, its plan or a shard damaged, is gone on with."""
    place, sound = folder / "damaged", folder / "sound"
    for one in (place, sound):
        shutil.copytree(things.cache, one / "cache")
    before = Reading(
        "capture",
        "teacher-cache",
        lambda things, place: ["capture", *things.arguments(cache=place / "cache")],
        lambda _, place: cache_files(place / "cache"),
    )
    _interrupt(things, place / "cache", chance)
    files = [path for path in sorted((place / "cache").rglob("*")) if path.is_file()]
    path = chance.choice([*files, place / "cache" / "plan.arrow"])
    return _judged(things, before, place, sound, "unfinished: " + spoil(path, chance.choice(KINDS), chance))


def _interrupt(things: Materials, cache: Path, chance: random.Random) -> None:
    """As a capture leaves it that was killed between its plan and its commit."""
    from tests.torture.kills import die_at

    arguments = ["capture", *things.arguments(cache=cache)]
    for moment in range(chance.randrange(9, 24), 200, 6):  # what is kept of a survey comes before the plan
        shutil.rmtree(cache, ignore_errors=True)
        run("teacher-cache", arguments, before=partial(die_at, moment))
        if (cache / "plan.arrow").exists():
            return
    raise AssertionError("no moment at which a capture has planned and not committed")


# Commands that read a run.


def _resume(things: Materials, place: Path) -> list[str]:
    return ["run", *things.arguments(cache=things.cache, runs=place / "runs"), "--resume"]


def _compared(_: Ended, place: Path) -> dict[str, Any]:
    return {"compared": leaves(without_places(json.loads((place / "compared.json").read_text())), place)}


def _said(ended: Ended, place: Path) -> dict[str, Any]:
    return {"said": _without_folders(ended.said, place)}


def _weights(name: str) -> Callable[[Ended, Path], dict[str, Any]]:
    return lambda _, place: weights_of(place / name)


def _of_run(place: Path) -> str:
    return str(place / "runs" / RUN)


RUN_READINGS = (
    Reading("resume", "train-student", _resume, lambda _, place: run_content(place / "runs" / RUN)),
    Reading(
        "compare",
        "train-student",
        lambda _, place: ["compare", _of_run(place), "--json", str(place / "compared.json")],
        _compared,
    ),
    Reading(
        "export",
        "train-student",
        lambda _, place: ["export", _of_run(place), "--out", str(place / "out")],
        _weights("out"),
    ),
    Reading(
        "evaluate",
        "train-student",
        lambda _, place: ["evaluate", _of_run(place), "--no-references", "--json"],
        lambda ended, place: _json(ended, place) | evaluation_of(place / "runs" / RUN),
    ),
    Reading(
        "report",
        "train-student",
        lambda _, place: ["report", _of_run(place), str(place / "run.html")],
        lambda _, place: {"page": _without_folders((place / "run.html").read_text(), place)},
    ),
    Reading(
        "run again",
        "train-student",
        lambda things, place: ["run", *things.arguments(cache=things.cache, runs=place / "runs")],
        _said,
    ),
    Reading(
        "best",
        "train-student",
        lambda _, place: ["export", _of_run(place), "--best", "--out", str(place / "out")],
        _weights("out"),
    ),
    Reading(
        "push",
        "train-student",
        lambda _, place: ["push", _of_run(place), "somebody/model", "--dry-run"],
        lambda *_: {},
    ),
)


def _without_folders(text: str, place: Path) -> str:
    text = text.replace(str(place), "PLACE")
    return re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?", "TIME", text)


def run_case(things: Materials, number: int, chance: random.Random, folder: Path) -> Result:
    """A finished run, or one that stopped after its checkpoint of step 4, one of its files damaged."""
    place, sound = folder / "damaged", folder / "sound"
    reading = RUN_READINGS[number % len(RUN_READINGS)]
    stopped = reading.name == "resume" and chance.random() < 0.7
    if reading.name == "resume" and not stopped:  # it says what came out, and reads no log for that
        reading = replace(reading, name="resume of a finished run", result=_said)
    for one in (place, sound):
        copy = one / "runs" / RUN
        shutil.copytree(things.finished_run(1), copy)
        if stopped:
            (copy / "results.json").unlink()
            shutil.rmtree(copy / "checkpoints" / "step-000006")
    files = [path for path in sorted((place / "runs").rglob("*")) if path.is_file()]
    read = [path for path in files if path.parent.name not in ("model", "export")]
    path = chance.choice(read if chance.random() < 0.7 else files)
    may_be_missing = (
        path.name == "results.json" or path.parent.name == "evaluation"
    )  # not finished, not asked
    fault = spoil(path, chance.choice(IN_PLACE if may_be_missing else KINDS), chance)
    return _judged(things, reading, place, sound, f"{path.parent.name}/{fault}{', stopped' * stopped}")


_SOUND: dict[tuple[str, ...], dict[str, Any]] = {}


def _judged(things: Materials, reading: Reading, place: Path, sound: Path, fault: str) -> Result:
    """The command on the damaged folder, held against what it gives on the sound one."""
    ended = run(reading.program, reading.arguments(things, place))
    what = f"{fault}; {reading.program} {reading.name}"

    def is_right() -> str | None:
        if fault.endswith("(no change)"):
            return None
        key = (reading.program, reading.name, str("stopped" in fault))
        if key not in _SOUND:
            expected = run(reading.program, reading.arguments(things, sound))
            assert expected.status == 0, expected.said
            _SOUND[key] = reading.result(expected, sound)
        return difference(reading.result(ended, place), _SOUND[key], what="the result")

    result = judge(ended, what, is_right=is_right)
    if result.what.endswith(OF_A_LOG) and TOLD.search(ended.said):  # what is lost of a log is said
        result = Result(Outcome.REFUSED, what, ended.said)
    left = clear_left_behind()
    return Result(Outcome.HUNG, f"{what}: processes left", ended.said) if left else result
