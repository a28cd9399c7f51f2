"""Answers and scores of a run's student on disk: of each split and each number of questions, none lost to another.

    path = keep(found, run_folder.evaluation, "validation")        # Parquet; the scores are in the .json beside it

evaluation/SPLIT.parquet                of the student that answered last, and of the most questions it was asked
evaluation/SPLIT-60.parquet             of 60 questions, where SPLIT.parquet has more
evaluation/SPLIT-step-000100-60.parquet of an earlier student of the run
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import CheckpointError
from shared.recipes import Split
from shared.regular_files import holds_something, is_another_file, naming, refuse_irregular
from shared.temporaries import remove_left, written_beside
from shared.vouched import DIGEST, digest_of, vouched
from stage2_student.evaluation.evaluated import STUDENT, Evaluated
from stage2_student.runs.files import finite, write_json
from stage2_student.runs.run_folder import MEND_SCORES, scores_in

ASKED = ("model", "row", "question", "image_sha256")  # in every line of predictions


@dataclass(frozen=True)
class Scores:
    """What one file of a run says: the models that answered the same questions.

    questions  equal for files of the same questions, whichever run they belong to
    models     by name: what ``Evaluated.to_json`` made of each
    """

    split: Split
    questions: str
    num_examples: int
    models: dict[str, dict[str, Any]]


def save(found: Sequence[Evaluated], path: Path) -> None:
    """Every prediction as Parquet, one row for each model and question; the scores as JSON beside it.

    path   ends in .parquet, or in .json for scores alone
    """
    if path.suffix == ".json":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, [vouched(finite(one.to_json())) for one in found])
        return
    _write(_lines(found), [one.to_json() for one in found], path)


def in_the_way(path: Path) -> Path | None:
    """Of the files that ``save`` writes, one that is there and holds neither answers nor scores."""
    if is_another_file(path.with_suffix(".json"), _are_scores):
        return path.with_suffix(".json")
    return path if path.suffix == ".parquet" and _is_another_table(path) else None


def _are_scores(told: Any) -> bool:
    return isinstance(told, list) and all(isinstance(one, dict) and "model" in one for one in told)


def _is_another_table(path: Path) -> bool:
    if not holds_something(path):
        return False
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, ValueError):
        return True
    return not (set(ASKED) <= set(schema.names) or DIGEST.encode() in (schema.metadata or {}))


def keep(found: Sequence[Evaluated], folder: Path, name: str) -> Path:
    """Saves a run's own student, and what it was held against, in its place; returns the file.

    name  of the split, or of another set of questions, such as a split's with shuffled pictures

    Answers to more questions are never replaced by those to fewer, nor an earlier student's by a later one's.  Other
    models that answered the same questions before stay beside it.
    """
    student = found[0].to_json()
    _set_earlier_students_aside(folder, name, step=student["step"])
    place = main = folder / f"{name}.parquet"
    for old in _students(main):
        if old["num_examples"] > student["num_examples"]:
            place = folder / f"{name}-{student['num_examples']}.parquet"
        elif old["num_examples"] < student["num_examples"]:
            _move(main, folder / f"{name}-{old['num_examples']}.parquet")
    new = {one.name for one in found}
    others = [
        one
        for one in read_scores(place)
        if one["model"] not in new and one.get("questions") == student["questions"]
    ]
    kept = {one["model"] for one in others}
    lines = [line for line in read_predictions(place) if line["model"] in kept] if kept else []
    _write([*_lines(found), *lines], [*(one.to_json() for one in found), *others], place)
    return place


def _set_earlier_students_aside(folder: Path, name: str, *, step: int | None) -> None:
    for path in [folder / f"{name}.parquet", *folder.glob(f"{name}-[0-9]*.parquet")]:
        for old in _students(path):
            if old.get("step") != step:
                named = f"{name}-step-{old.get('step') or 0:06d}-{old['num_examples']}.parquet"
                _move(path, folder / named)


def read_scores(path: Path) -> list[dict[str, Any]]:
    """What ``to_json`` made of each model, from the JSON beside the predictions; empty where there is none.

    Raises   CheckpointError  when it is damaged
    """
    return scores_in(path.with_suffix(".json"))


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """A line for each model and question.

    Raises   CheckpointError  when the file is damaged
    """
    refuse_irregular(path)
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        lines: list[dict[str, Any]] = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({str(error).splitlines()[0]}). {MEND_SCORES}") from error
    told = (table.schema.metadata or {}).get(DIGEST.encode())  # of an earlier release there is none
    if told is not None and told != _digest(lines):
        raise CheckpointError(f"{path}: damaged (its digest differs from what it says). {MEND_SCORES}")
    missing = [name for name in ASKED if lines and name not in lines[0]]
    if missing:
        raise CheckpointError(f"{path}: it lacks {', '.join(missing)}. {MEND_SCORES}")
    return lines


def read_all(folder: Path, split: Split) -> tuple[Scores, ...]:
    """What is there of the student that answered last, the most questions first."""
    main = folder / f"{split}.parquet"
    steps = {student.get("step") for student in _students(main)}
    found = []
    for path in [main, *sorted(folder.glob(f"{split}-*.parquet"))]:
        models = {one["model"]: one for one in read_scores(path)}
        if STUDENT in models and models[STUDENT].get("step") in steps:
            number = models[STUDENT]["num_examples"]
            questions = models[STUDENT].get("questions") or f"{split} {number}"  # of old runs
            found.append(Scores(split, questions, number, models))
    return tuple(sorted(found, key=lambda one: -one.num_examples))


def _students(path: Path) -> list[dict[str, Any]]:
    return [one for one in read_scores(path) if one["model"] == STUDENT]


def _lines(found: Sequence[Evaluated]) -> list[dict[str, Any]]:
    return [{"model": one.name, **asdict(answer)} for one in found for answer in one.answers]


def _write(lines: list[dict[str, Any]], scores: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left(path)
    table = pa.Table.from_pylist(lines, metadata={DIGEST: _digest(lines)})
    with naming(path), written_beside(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)
    write_json(path.with_suffix(".json"), [vouched(finite(one)) for one in scores])


def _digest(lines: list[dict[str, Any]]) -> bytes:
    return digest_of({"lines": lines}).encode()


def _move(path: Path, new: Path) -> None:
    for suffix in (".parquet", ".json"):
        with suppress(FileNotFoundError):  # not there, or moved by another evaluation
            path.with_suffix(suffix).replace(new.with_suffix(suffix))
