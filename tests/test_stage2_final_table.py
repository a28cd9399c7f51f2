"""The table at the end of a run, from what finished runs have left; and pictures that are shuffled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from shared.data.processing import open_processor
from shared.errors import DataError, RecipeError
from shared.finished import baseline_is_finished
from shared.pipeline import make_student, make_teacher, settings_of_teacher
from shared.recipes import Recipe, baseline_of, dump_recipe, load_recipe, recipe_text, settings_of_baseline
from stage2_student.check import check_recipe
from stage2_student.evaluation.final_table import final_table
from stage2_student.evaluation.shuffled import with_other_pictures
from stage2_student.training.survey import Survey, survey

# The table


def results(*, ce: float, kl: float | None, right: float, step: int = 500, **other: Any) -> dict[str, Any]:
    after = {"loss": ce, "ce_loss": ce, "kd_loss": kl, "kl": kl}
    return {
        "run": "x",
        "step": step,
        "before": after | {"ce_loss": 7.1, "kl": 6.2 if kl is not None else None},
        "after": after,
        "answers": {"accuracy": interval(right)},
        "validation": "fingerprint",
        "cache": None,
        "positions_per_s": 1.0,
        "data_wait": 0.0,
        "times_s": {"training": 60.0},
        "export": None,
    } | other


def interval(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.04, "high": mean + 0.04, "count": 300}


def leave(recipe: Recipe, found: dict[str, Any], answers: list[bool] | None = None) -> None:
    """The files of a finished run; question i is about picture i // 4."""
    recipe.run.path.mkdir(parents=True)
    (recipe.run.path / "results.json").write_text(json.dumps(found))
    if answers is not None:
        lines = [
            {
                "model": "student",
                "row": row,
                "question": f"q{row}",
                "image_sha256": str(row // 4),
                "is_short": True,
                "is_right": is_right,
            }
            for row, is_right in enumerate(answers)
        ]
        (recipe.run.path / "evaluation").mkdir()
        pq.write_table(pa.Table.from_pylist(lines), recipe.run.path / "evaluation/validation.parquet")


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Recipe]:
    monkeypatch.chdir(tmp_path)
    return {name: load_recipe(name) for name in ("phantom", "phantom_labels", "phantom_teacher")}


def test_teacher_student_and_baseline_stand_side_by_side(recipes: dict[str, Recipe]) -> None:
    own = [True] * 300 + [False] * 100
    leave(recipes["phantom"], results(ce=0.6, kl=0.08, right=0.75), own)
    leave(recipes["phantom_labels"], results(ce=0.63, kl=0.2, right=0.5), [True] * 200 + [False] * 200)
    shuffled = {"ce": 1.9, "accuracy": interval(0.3)}
    teacher = results(ce=0.55, kl=None, right=0.75, step=1000, shuffled_pictures=shuffled)
    leave(recipes["phantom_teacher"], teacher, own)
    lines = final_table(recipes["phantom"], results(ce=0.6, kl=0.08, right=0.75))
    assert max(map(len, lines)) <= 100
    rows = {line[:29].strip(): line[29:].split() for line in lines[1:7]}
    assert rows["teacher"] == ["1000", "60", "s", "0.550", "0.000", "75.0%", "(71.0-79.0)", "300"]
    assert rows["teacher, shuffled pictures"] == ["-", "-", "1.900", "-", "30.0%", "(26.0-34.0)", "300"]
    assert rows["student before training"] == ["0", "-", "7.100", "6.200", "-", "-"]
    assert rows["student, labels alone"][3:5] == ["0.630", "0.200"]
    assert rows["student, from the cache"][3:5] == ["0.600", "0.080"]
    text = " ".join(lines[7:])
    assert "0.080 nats from the cache, 0.200 by labels alone, 2.5 times that" in text
    assert "against its teacher: +0.0 points (+0.0 to +0.0, 400 questions), within the noise" in text
    assert "against the other student: +25.0 points" in text
    assert not text.rstrip().endswith("within the noise")


def test_losses_of_a_teacher_with_another_tokenizer_are_not_beside_the_student_s(
    recipes: dict[str, Recipe],
) -> None:
    shuffled = {"ce": 1.9, "accuracy": interval(0.3)}
    leave(recipes["phantom_teacher"], results(ce=0.55, kl=None, right=0.75, shuffled_pictures=shuffled))
    other = load_recipe("phantom", overrides=["student.other_vocabulary=true"])
    lines = final_table(other, results(ce=0.6, kl=None, right=0.75))
    rows = {line[:29].strip(): line[29:].split() for line in lines}
    assert rows["teacher"][:5] == ["500", "60", "s", "-", "-"]
    assert rows["teacher, shuffled pictures"][:4] == ["-"] * 4
    assert "  The teacher's losses are of other tokens than the student's, and not beside them." in lines


def test_without_other_runs_there_is_the_student_alone(recipes: dict[str, Recipe]) -> None:
    lines = final_table(recipes["phantom"], results(ce=0.6, kl=0.08, right=0.75))
    assert [line[:25].strip() for line in lines[1:-1]] == [
        "student before training",
        "student, from the cache",
    ]


def test_runs_over_other_examples_are_not_beside_it(recipes: dict[str, Recipe]) -> None:
    for name in ("phantom_labels", "phantom_teacher"):
        leave(recipes[name], results(ce=0.6, kl=0.2, right=0.5, validation="of other rows"))
    lines = final_table(recipes["phantom"], results(ce=0.6, kl=0.08, right=0.75))
    assert not any("labels alone" in line or "teacher," in line for line in lines)


def test_other_numbers_of_steps_are_said(recipes: dict[str, Recipe]) -> None:
    leave(recipes["phantom_labels"], results(ce=0.63, kl=0.2, right=0.5, step=300))
    lines = final_table(recipes["phantom"], results(ce=0.6, kl=0.08, right=0.75))
    assert "  The two students differ in steps: 500 and 300." in lines


def test_settings_in_which_the_two_differ_are_named(recipes: dict[str, Recipe]) -> None:
    """Those that the other was run with, whatever its recipe says today."""
    leave(recipes["phantom_labels"], results(ce=0.63, kl=0.2, right=0.5), [True] * 200 + [False] * 200)
    own = [True] * 300 + [False] * 100
    leave(recipes["phantom"], results(ce=0.6, kl=0.08, right=0.75), own)
    as_run = load_recipe(
        "phantom_labels", overrides=["optimization.learning_rate=1e-4", "run.seed=3", "run.num_workers=0"]
    )
    (as_run.run.path / "recipe.yaml").write_text(recipe_text(as_run))
    lines = final_table(recipes["phantom"], results(ce=0.6, kl=0.08, right=0.75))
    assert "  The two students also differ in optimization.learning_rate, run.seed." in lines
    assert any("against the other student" in line for line in lines)


def test_students_that_are_not_alike_are_not_compared(recipes: dict[str, Recipe]) -> None:
    leave(recipes["phantom_labels"], results(ce=0.63, kl=0.2, right=0.5), [True] * 200 + [False] * 200)
    own = [True] * 300 + [False] * 100
    large = load_recipe("phantom", overrides=["student.model=work/phantom/models/large"])
    leave(large, results(ce=0.6, kl=0.08, right=0.75), own)
    lines = final_table(large, results(ce=0.6, kl=0.08, right=0.75))
    assert "  The two students also differ in student.model." in lines
    assert any(line.strip().startswith("student, labels alone") for line in lines)
    assert not any("other student" in line or "Distance" in line for line in lines)


def naming_what_is_gone() -> Recipe:
    return load_recipe(
        "phantom", overrides=["teacher.trained_by=gone_teacher.yaml", "evaluation.baseline=gone_labels.yaml"]
    )


def test_a_recipe_that_is_gone_costs_a_row_and_not_the_table(recipes: dict[str, Recipe]) -> None:
    leave(recipes["phantom_labels"], results(ce=0.63, kl=0.2, right=0.5))
    lines = final_table(naming_what_is_gone(), results(ce=0.6, kl=0.08, right=0.75))
    assert any(line.strip().startswith("student, from the cache") for line in lines)
    assert [line.split(" (")[0] for line in lines[-2:]] == [
        "note: the table lacks a row: teacher.trained_by",
        "note: the table lacks a row: evaluation.baseline",
    ]
    assert "current folder): recipe gone_labels.yaml: there is no such file" in lines[-1]


def test_a_baseline_that_is_gone_is_told_before_any_work(
    recipes: dict[str, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.pipeline.command", lambda *_: 1)
    with pytest.raises(RecipeError, match=r"evaluation\.baseline .*gone\.yaml: there is no such file"):
        make_student("phantom", ["evaluation.baseline=gone.yaml"], nproc=1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("teacher.model=work/runs/other/export", "its export is work/runs/phantom_teacher/export"),
        ("teacher.tensor=2", r"teacher\.tensor 2: 1 process\(es\) found"),
        ("teacher.trained_by=gone.yaml", r"teacher\.trained_by .*gone\.yaml: there is no such file"),
    ],
)
def test_a_teacher_that_would_fit_nothing_is_not_trained(
    recipes: dict[str, Recipe], monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    monkeypatch.setattr("shared.pipeline.make_student", None)
    with pytest.raises(RecipeError, match=message):
        make_teacher(load_recipe("phantom", overrides=[setting]), [setting], nproc=1)


def test_a_finished_run_needs_no_recipe_but_its_own(recipes: dict[str, Recipe]) -> None:
    assert baseline_is_finished(naming_what_is_gone())


def test_check_looks_at_the_recipes_that_a_recipe_names(recipes: dict[str, Recipe]) -> None:
    report = check_recipe(naming_what_is_gone(), num_ranks=1)
    (problem,) = report.problems
    assert problem.startswith("evaluation.baseline ")
    notes = [value for name, value in report.facts if name.strip() == "note"]
    assert any(note.startswith("teacher.trained_by ") for note in notes)


# Which run a recipe compares with


def test_a_baseline_lies_under_the_same_root_and_is_never_the_run_itself() -> None:
    found = baseline_of(load_recipe("phantom", overrides=['run.root="else where: x"']))
    assert found is not None
    assert found.run.path == Path("else where: x/phantom_labels")
    assert not found.distils
    assert baseline_of(load_recipe("phantom", overrides=["run.name=phantom_labels"])) is None
    assert baseline_of(load_recipe("phantom", overrides=["evaluation.baseline=null"])) is None
    assert all(baseline_of(load_recipe(name)) is None for name in ("phantom_labels", "phantom_teacher"))


def test_any_recipe_may_name_one(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("extends: medpix_sample\nrun: {name: other}\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"extends": "medpix_sample", "evaluation": {"baseline": str(other)}}))
    found = baseline_of(load_recipe(mine))
    assert found is not None
    assert found.run.name == "other"


def test_a_run_on_other_data_is_no_baseline(tmp_path: Path) -> None:
    """A recipe for own data that extends the default inherits what that is compared with."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: phantom\ndata: {source: data/mine}\nrun: {name: mine}\n")
    told: list[str] = []
    assert baseline_of(load_recipe(mine), tell=told.append) is None
    (note,) = told
    assert "baseline phantom_labels is not compared with: its data are work/phantom/data, and this" in note


@pytest.mark.parametrize("source", ["data/mine", "work/phantom/data/", "work/../work/phantom/data"])
def test_a_baseline_has_the_data_that_its_run_is_given(recipes: dict[str, Recipe], source: str) -> None:
    given = [f"data.source={source}"]
    mine = load_recipe("phantom", overrides=given)
    found = baseline_of(mine, given)
    assert found is not None
    assert found.data.source == source
    leave(found, results(ce=0.63, kl=0.2, right=0.5))
    (found.run.path / "recipe.yaml").write_text(recipe_text(found))
    lines = final_table(mine, results(ce=0.6, kl=0.08, right=0.75))  # which does not know the command
    assert any(line.strip().startswith("student, labels alone") for line in lines)
    others = load_recipe("phantom", overrides=["data.source=data/others"])
    assert baseline_of(others, ["data.source=data/others"]) is None, "the one that is there is on other data"
    assert any(
        "is not compared with" in line for line in final_table(others, results(ce=0.6, kl=0.1, right=0.7))
    )


def test_a_baseline_by_labels_alone_takes_no_settings_of_cache_and_teacher(tmp_path: Path) -> None:
    labels, mine = tmp_path / "labels.yaml", tmp_path / "mine.yaml"
    plain = {"teacher": None, "cache": None, "loss": {"kd_ratio": 0.0}, "run": {"name": "labels"}}
    labels.write_text(yaml.safe_dump({"extends": "phantom", "evaluation": {"baseline": None}, **plain}))
    mine.write_text(yaml.safe_dump({"extends": "phantom", "evaluation": {"baseline": str(labels)}}))
    given = ["cache.path=caches/coarse", "cache.policy={tau: 0.5}", "teacher.model=large", "run.seed=3"]
    found = baseline_of(load_recipe(mine, overrides=given), given)
    assert found is not None
    assert (found.cache, found.teacher, found.run.seed) == (None, None, 3)


def test_a_setting_that_the_baseline_cannot_have_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here its loss is for targets that have a tail."""
    labels, mine = tmp_path / "labels.yaml", tmp_path / "mine.yaml"
    policy = {"policy": {"kind": "top_k", "k": 8}}
    own = {"loss": {"tail": "ghost"}, "cache": policy, "run": {"name": "other"}}
    labels.write_text(yaml.safe_dump({"extends": "phantom", "evaluation": {"baseline": None}, **own}))
    mine.write_text(yaml.safe_dump({"extends": "phantom", "evaluation": {"baseline": str(labels)}}))
    monkeypatch.setattr("shared.pipeline.command", lambda *_: 1)
    with pytest.raises(RecipeError, match=r"evaluation\.baseline .*loss\.tail is for top_k and top_p caches"):
        make_student(str(mine), ["cache.policy={kind: threshold}"], nproc=1)


def test_a_baseline_is_trained_as_its_run_but_for_loss_and_name() -> None:
    given = ["loss.kd_ratio=1.0", "run.name=soft", "run.seed=3", "optimization.num_epochs=1", "data.limit=9"]
    given += ["evaluation.max_examples=7", "evaluation.baseline=mine.yaml", "loss={kd_ratio: 1.0}"]
    given += ["rounds.number=3", "write={temperature: 1}", "optimization.schedule_part=[0, 0.25]"]
    kept = settings_of_baseline(load_recipe("phantom"), given)
    assert kept == ["run.seed=3", "optimization.num_epochs=1", "data.limit=9", "evaluation.max_examples=7"]
    one = dump_recipe(load_recipe("phantom", overrides=kept))
    two = dump_recipe(load_recipe("phantom_labels", overrides=kept))
    assert [name for name in one if one[name] != two[name]] == ["loss", "run", "evaluation"]


def test_a_teacher_shares_the_data_but_not_the_mistakes_in_it() -> None:
    given = ["data.limit=8", "bootstrap.phantom.train=8", "bootstrap.phantom.mistaken=0.1", "run.seed=1"]
    assert settings_of_teacher(given) == ["data.limit=8", "bootstrap.phantom.train=8"]
    teacher, student = load_recipe("phantom_teacher"), load_recipe("phantom")
    assert teacher.bootstrap.phantom is not None
    assert student.bootstrap.phantom is not None
    assert teacher.bootstrap.phantom.model_copy(update={"mistaken": 0.2}) == student.bootstrap.phantom
    assert teacher.bootstrap.phantom.mistaken == 0
    assert teacher.data.source != student.data.source


# Shuffled pictures


@pytest.fixture
def surveyed(vqa_folder: Path, student_folder: Path) -> Survey:
    data = load_recipe("phantom", overrides=[f"data.source={vqa_folder}", "data.splits.test=null"]).data
    return survey(data, "train", open_processor(str(student_folder), data), None)


def test_no_case_keeps_a_picture_of_its_own(surveyed: Survey) -> None:
    shuffled = with_other_pictures(surveyed)
    assert (shuffled.rows == surveyed.rows).all()
    for row in surveyed.rows.tolist():
        before, after = surveyed.split[row], shuffled.split[row]
        assert replace(after, images=before.images) == before
        lenders = {one.case for one in surveyed.split if one.images == after.images}
        assert after.images != before.images
        assert not before.case or before.case not in lenders
    again = with_other_pictures(surveyed)
    assert all(again.split[row] == shuffled.split[row] for row in surveyed.rows.tolist())


def test_one_case_alone_cannot_be_shuffled(surveyed: Survey) -> None:
    alone = replace(surveyed, rows=np.array([0]), lengths=surveyed.lengths[:1], pixels=surveyed.pixels[:1])
    with pytest.raises(DataError, match="all 1 questions are about one case"):
        with_other_pictures(alone)
