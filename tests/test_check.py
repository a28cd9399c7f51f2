"""``teacher-cache check``: what a capture would do and take, every problem at once, without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from samples import encoded_picture

from shared.recipes import Recipe, load_recipe
from shared.recipes.files import validate_tree
from shared.runtime import StopRequest, distributed
from shared.small_models import save_reference_config
from stage1_teacher.capture import capture
from stage1_teacher.check import check_recipe


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, teacher_folder: Path, student_folder: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(tmp_path / "cache")},
        "student": {"model": str(student_folder)},
        "optimization": {"max_steps": 1},
        "run": {"name": "mine"},
    }


def checked(tree: dict[str, Any]) -> Any:
    return check_recipe(validate_tree(Recipe, tree, origin="recipe test"), num_ranks=2)


def test_it_counts_what_a_capture_will_do(tree: dict[str, Any]) -> None:
    report = checked(tree)
    facts = dict(report.facts)
    assert report.problems == []
    assert facts["train"].startswith("12 examples, ")
    assert facts["validation"].startswith("4 examples, ")
    assert "not there yet" in facts["cache"]
    assert "weights" in facts["memory per device"]


def test_weights_are_not_needed(tree: dict[str, Any], tmp_path: Path, teacher_folder: Path) -> None:
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    (teacher / "model.safetensors").unlink()
    tree["teacher"]["model"] = str(teacher)
    assert checked(tree).problems == []


def test_every_problem_is_shown(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["teacher"] |= {"attn_implementation": "nonsense"}
    tree["student"]["model"] = str(tmp_path / "nowhere")
    rows = [{"image_id": "gone.png", "question": "?", "answer": "a"}] * 2
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree["data"]["source"] = str(tmp_path)
    problems = "\n".join(checked(tree).problems)
    for part in ("nonsense", "nowhere", "split train: 2 row(s)", "split validation: 2 row(s)"):
        assert part in problems


def test_rows_that_may_be_dropped_are_no_problem(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(encoded_picture(0))
    rows = [{"image_id": name, "question": "?", "answer": "a"} for name in ("p.png", "gone.png", "p.png")]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"kind": None, "case": None}
    tree["data"] |= {"source": str(tmp_path), "max_dropped": 2, "columns": columns}
    assert checked(tree).problems == []


def test_different_tokenizers_are_refused(tree: dict[str, Any], tmp_path: Path, student_folder: Path) -> None:
    student = shutil.copytree(student_folder, tmp_path / "student")
    template = student / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    tree["student"]["model"] = str(student)
    assert any("template: the teacher's is" in problem for problem in checked(tree).problems)


def test_the_full_teacher_is_described_from_its_configuration(tmp_path: Path) -> None:
    folder = save_reference_config(tmp_path / "9B", "9B")
    settings = [f"teacher.model={folder}", f"student.model={folder}", "data.source=nobody/nothing"]
    facts = dict(check_recipe(load_recipe("qwen3_5_9b_to_4b_medpix", overrides=settings), num_ranks=8).facts)
    assert facts["  head"] == "248,320 ids wide"
    assert facts["parameters"].startswith("9,4")


def test_shards_that_are_gone_are_named(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["cache"] |= {"num_workers": 0, "examples_per_shard": 4}
    with distributed(device="cpu") as world:
        capture(validate_tree(Recipe, tree, origin="recipe test"), world, StopRequest())
    assert checked(tree).problems == []
    gone = sorted((tmp_path / "cache" / "shards").iterdir())[1]
    gone.unlink()
    (problem,) = checked(tree).problems
    assert gone.name in problem
    assert "1 of 4 shard(s)" in problem


def test_a_data_set_without_a_usable_row_is_a_problem_and_no_traceback(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"image_id": "gone.png", "question": "?", "answer": "a"}] * 2
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree["data"] |= {"source": str(tmp_path), "max_dropped": 4, "columns": {"kind": None, "case": None}}
    problems = checked(tree).problems
    assert "split train: no row can be used" in problems[0]
