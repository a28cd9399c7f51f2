"""Scores of a run: which answers are kept, which ones ``compare`` shows, and what a table says they rest on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from stage2_runs import make_recipe, on_ranks, written_run

from shared.errors import DataError, TrainingError
from shared.runtime import World
from stage2_student.evaluation.answers import Answer
from stage2_student.evaluation.compare import legend, results, table
from stage2_student.evaluation.evaluate import evaluate
from stage2_student.evaluation.evaluated import STUDENT, TEACHER, Evaluated
from stage2_student.evaluation.model_losses import ModelLosses
from stage2_student.evaluation.run_records import asked_alike, read_run, read_runs
from stage2_student.evaluation.scores import keep, read_all, read_scores


def answers(number: int, *, right: int = 1, cut: int = 0) -> tuple[Answer, ...]:
    """To so many questions, of which some are right, and some cut."""
    return tuple(
        Answer(
            split="validation",
            row=row,
            kind="",
            case="",
            image_sha256=f"{row}",
            question=f"What is {row}?",
            reference="a",
            answer="a" if row < right else "b",
            is_short=True,
            is_right=row < right,
            is_cut=row < cut,
            token_f1=float(row < right),
            rouge_l=float(row < right),
        )
        for row in range(number)
    )


def student(number: int, *, step: int | None = 4, **options: int) -> Evaluated:
    return Evaluated(STUDENT, "export", answers(number, **options), step=step)


def teacher(number: int, **options: int) -> Evaluated:
    return Evaluated(TEACHER, "teacher", answers(number, **options))


def files(folder: Path) -> dict[str, list[tuple[str, int]]]:
    return {
        path.stem: [(one["model"], one["num_examples"]) for one in read_scores(path)]
        for path in sorted(folder.glob("*.parquet"))
    }


@pytest.fixture
def tree(tmp_path: Path, distillation_tree: dict[str, Any]) -> dict[str, Any]:
    return distillation_tree | {"run": {"name": "run", "root": str(tmp_path / "runs")}}


def test_fewer_questions_never_replace_more(tmp_path: Path) -> None:
    assert keep([student(9)], tmp_path, "validation").stem == "validation"
    whole = (tmp_path / "validation.parquet").read_bytes()
    assert keep([student(3)], tmp_path, "validation").stem == "validation-3"
    assert (tmp_path / "validation.parquet").read_bytes() == whole
    assert files(tmp_path) == {"validation": [(STUDENT, 9)], "validation-3": [(STUDENT, 3)]}


def test_more_questions_take_the_place_and_the_fewer_are_kept(tmp_path: Path) -> None:
    keep([student(3), teacher(3)], tmp_path, "validation")
    keep([student(9)], tmp_path, "validation")
    assert files(tmp_path) == {"validation": [(STUDENT, 9)], "validation-3": [(STUDENT, 3), (TEACHER, 3)]}
    assert [one.num_examples for one in read_all(tmp_path, "validation")] == [9, 3]


def test_the_same_questions_keep_the_references_that_were_asked_before(tmp_path: Path) -> None:
    keep([student(3, right=1), teacher(3)], tmp_path, "validation")
    keep([student(3, right=2)], tmp_path, "validation")
    assert files(tmp_path) == {"validation": [(STUDENT, 3), (TEACHER, 3)]}
    found = pq.read_table(tmp_path / "validation.parquet").to_pylist()
    assert [line["model"] for line in found] == [STUDENT] * 3 + [TEACHER] * 3
    assert [line["is_right"] for line in found] == [True, True, False, True, False, False]


def test_an_earlier_student_s_answers_are_kept_but_no_more_shown(tmp_path: Path) -> None:
    keep([student(9, step=4)], tmp_path, "validation")
    keep([student(3, step=8)], tmp_path, "validation")
    assert files(tmp_path) == {"validation": [(STUDENT, 3)], "validation-step-000004-9": [(STUDENT, 9)]}
    assert [one.num_examples for one in read_all(tmp_path, "validation")] == [3]


def test_nor_are_those_to_fewer_questions_lost_to_a_later_student(tmp_path: Path) -> None:
    for step in (4, 8):
        for number in (3, 9):
            keep([student(number, step=step)], tmp_path, "validation")
    assert sorted(files(tmp_path)) == [
        "validation",
        "validation-3",
        "validation-step-000004-3",
        "validation-step-000004-9",
    ]


def test_splits_do_not_meet(tmp_path: Path) -> None:
    keep([student(3)], tmp_path, "validation")
    keep([student(2)], tmp_path, "test")
    assert [one.num_examples for one in read_all(tmp_path, "test")] == [2]


def test_scores_of_old_runs_are_read(tmp_path: Path) -> None:
    keep([student(3)], tmp_path, "validation")
    path = tmp_path / "validation.json"
    old = json.loads(path.read_text())
    for name in ("questions", "num_cut", "step", "digest"):
        del old[0][name]
    path.write_text(json.dumps(old))
    (one,) = read_all(tmp_path, "validation")
    assert one.num_examples == 3


def test_runs_are_shown_with_the_questions_that_all_were_asked(tree: dict[str, Any]) -> None:
    paths = [written_run(make_recipe(tree, run__name=name)) for name in ("one", "two")]
    for number in (9, 3):
        keep([student(number)], paths[0] / "evaluation", "validation")
    keep([student(3, right=2), teacher(3, right=3)], paths[1] / "evaluation", "validation")
    runs = read_runs(paths)
    assert [run.scores["num_examples"] for run in runs] == [3, 3]
    head, rows = results(runs)
    shown = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["questions"] for row in shown] == ["3, validation"] * 3
    assert [row["right"] for row in shown] == ["33.3% of 3", "66.7% of 3", "100.0% of 3"]
    assert shown[2]["run"].startswith("teacher ")
    assert "one has 9" in "\n".join(legend(runs))
    assert read_run(paths[0]).scores["num_examples"] == 9  # alone, it is shown with all it has


def test_where_runs_were_asked_other_questions_it_is_said(tree: dict[str, Any]) -> None:
    runs = [read_run(written_run(make_recipe(tree, run__name=name))) for name in ("one", "two", "none")]
    for run, number in zip(runs[:2], (9, 3), strict=True):
        keep([student(number)], run.path / "evaluation", "validation")
    found = asked_alike([read_run(run.path) for run in runs])
    assert [run.scores.get("num_examples") for run in found] == [9, 3, None]
    assert "not asked the same questions" in "\n".join(legend(found))


def test_cut_answers_have_a_column_where_there_are_any(tree: dict[str, Any]) -> None:
    path = written_run(make_recipe(tree))
    keep([student(9)], path / "evaluation", "validation")
    assert "cut" not in results([read_run(path)])[0]
    keep([student(9, cut=2)], path / "evaluation", "validation")
    head, (row, *_) = results([read_run(path)])
    assert row[head.index("cut")] == "2"
    assert len({line.count("|") for line in table([read_run(path)])}) == 1


def test_the_teacher_has_a_row_with_what_the_log_knows(tree: dict[str, Any]) -> None:
    path = written_run(make_recipe(tree))
    validation = {"event": "validation", "step": 2, "ce_loss": 2.0, "kl": 0.5, "teacher_ce_loss": 1.25}
    with open(path / "metrics.jsonl", "a") as log:
        log.write(json.dumps(validation) + "\n")
    head, (_, row) = results([read_run(path)])
    assert row[head.index("CE")] == "1.2500"


@pytest.mark.parametrize("who", ["one rank", "all ranks"])
def test_a_reference_that_fails_on_one_rank_alone_ends_all(
    who: str, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for it in a collective; where all fail, all go on without it."""

    def losses(_: object, source: Any, world: World, **__: object) -> ModelLosses:
        if source.model == "teacher" and (world.rank == 1 or who == "all ranks"):
            raise DataError("no memory for it")
        dist.all_reduce(torch.ones(1))
        return ModelLosses(ce=1.0)

    module = "stage2_student.evaluation.evaluate"
    monkeypatch.setattr(f"{module}.losses_of", losses)
    monkeypatch.setattr(f"{module}.answers_of", lambda *_, **__: [])
    # Ranks of a busy machine may be late by seconds; the one that fails alone waits for the others in vain.
    monkeypatch.setattr(f"{module}.PATIENCE_S", 1.0 if who == "one rank" else 60.0)
    monkeypatch.setattr(f"{module}.Evaluated", lambda name, *_, **__: name)
    sources: Any = {name: SimpleNamespace(model=name) for name in ("student", "teacher", "untrained")}
    begin = time.monotonic()
    ended = on_ranks(
        2,
        lambda world: list(evaluate(make_recipe(tree), sources, world, split="validation")),
        errors=True,
    )
    if who == "all ranks":
        assert ended == [["student", "untrained"]] * 2
    else:
        assert isinstance(ended[0], TrainingError)
        assert "no memory for it" in str(ended[1])
        assert time.monotonic() - begin < 60
