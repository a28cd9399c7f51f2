"""``teacher-cache check``: what a capture would do and take, every problem at once, without weights."""

from __future__ import annotations

import errno
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_models import with_text_config
from PIL import Image
from safetensors.torch import load_file, save_file
from samples import encoded_picture

from shared.errors import CacheMismatchError, DataError, RecipeError
from shared.models.vlm import load_vlm
from shared.preflight import Report
from shared.recipes import Recipe, load_recipe
from shared.recipes.files import validate_tree
from shared.runtime import distributed
from shared.small_models import save_reference_config
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage1_teacher.check import check_recipe
from stage2_student.check import check_recipe as check_student


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


def checked(tree: dict[str, Any]) -> Report:
    return check_recipe(validate_tree(Recipe, tree, origin="recipe test"), num_ranks=2)


def student_checked(tree: dict[str, Any]) -> Report:
    return check_student(validate_tree(Recipe, tree, origin="recipe test"), num_ranks=2)


def test_it_counts_what_a_capture_will_do(tree: dict[str, Any]) -> None:
    report = checked(tree)
    facts = dict(report.facts)
    assert report.problems == []
    assert facts["train"].startswith("12 examples, ")
    assert facts["validation"].startswith("4 examples, ")
    assert "not there yet" in facts["cache"]
    assert "weights" in facts["memory per device"]


@pytest.mark.parametrize("target", ["gone", "link"])
def test_a_link_to_nothing_is_no_place_for_what_a_stage_writes(
    tree: dict[str, Any], tmp_path: Path, target: str
) -> None:
    (tmp_path / "link").symlink_to(target)
    tree["cache"]["path"] = str(tmp_path / "link")
    assert any("nothing can be written there" in problem for problem in problems_of(tree))
    tree["run"]["root"] = str(tmp_path / "link" / "runs")
    problems = student_checked(tree).problems
    assert any("run.root" in problem and "a link to nothing" in problem for problem in problems)


def test_a_whole_cache_may_be_read_only(
    distillation_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture writes nothing then; one that has something to capture is refused."""

    def refused(*_: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(options["dir"]))

    monkeypatch.setattr("shared.preflight.tempfile.TemporaryFile", refused)
    tree = distillation_tree | {"run": {"name": "mine", "root": str(tmp_path)}}
    report = checked(tree)
    assert report.problems == []
    assert any("nothing can be written there" in value for _, value in report.facts)
    tree["data"] = tree["data"] | {"system_prompt": "Be brief."}
    assert any("nothing can be written there" in problem for problem in problems_of(tree))


def test_a_folder_of_something_else_is_no_cache(tree: dict[str, Any], tmp_path: Path) -> None:
    """The capture would refuse it, when the teacher is loaded."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "recipe.yaml").touch()
    (problem,) = problems_of(tree)
    assert "holds 'recipe.yaml' but no manifest.json; this is no cache" in problem
    (tmp_path / "cache" / "recipe.yaml").rename(tmp_path / "cache" / "plan.arrow")
    assert problems_of(tree) == []


def problems_of(tree: dict[str, Any]) -> list[str]:
    return checked(tree).problems


def write_rows(folder: Path, rows: list[dict[str, Any]], tree: dict[str, Any], **data: Any) -> None:
    """JSONL of both splits, without optional columns."""
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree["data"] |= {"source": str(folder), "columns": {"kind": None, "case": None}, **data}


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


WEIGHTS = {
    "is missing": lambda path: path.unlink(),
    "is empty": lambda path: path.write_bytes(b""),
    "pointer of Git LFS": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"),
    "it was cut or changed": shorten,
    "its header cannot be read": lambda path: path.write_bytes(b"nonsense" * 100),
}


@pytest.mark.parametrize("fault", WEIGHTS)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_weight_files_are_looked_at_and_not_loaded(
    tree: dict[str, Any], tmp_path: Path, student_folder: Path, role: str, fault: str
) -> None:
    """What is wrong is said by ``check``, and in the same words by whoever loads them."""
    model = shutil.copytree(student_folder, tmp_path / "model")
    WEIGHTS[fault](model / "model.safetensors")
    tree[role]["model"] = str(model)
    tree["run"]["root"] = str(tmp_path / "runs")
    report = checked(tree) if role == "teacher" else student_checked(tree | {"loss": {"kd_ratio": 0.0}})
    (problem,) = report.problems
    assert fault in problem
    assert report.status == RecipeError.exit_status
    with pytest.raises(RecipeError) as caught:
        load_vlm(str(model), revision=None, dtype=torch.float32, attn_implementation=None)
    assert str(caught.value) == problem


def test_shards_of_a_model_that_are_missing_are_named(tree: dict[str, Any], tmp_path: Path) -> None:
    model = shutil.copytree(tree["teacher"]["model"], tmp_path / "teacher")
    whole = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(whole)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for file in sorted(set(names.values()))[:2]:
        save_file({name: whole[name] for name in whole if names[name] == file}, model / file)
    tree["teacher"]["model"] = str(model)
    (problem,) = problems_of(tree)
    assert "model-2.safetensors: is missing" in problem


def test_every_problem_is_shown_once_with_the_status_of_the_first_kind(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    tree["teacher"] |= {"attn_implementation": "nonsense"}
    tree["student"]["model"] = str(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    tree["cache"]["path"] = str(tmp_path / "file" / "cache")
    rows = [{"image_id": "gone.png", "question": "?", "answer": "a"}] * 12
    write_rows(tmp_path, rows, tree)
    report = checked(tree)
    problems = "\n".join(report.problems)
    for part in ("nonsense", "nowhere", "24 row(s) cannot be used", "... and 14 more", "file: not a folder"):
        assert problems.count(part) == 1
    assert report.status == RecipeError.exit_status


def test_both_wrong_columns_are_named_once(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["data"]["columns"] = {"image": "picture", "question": "frage"}
    (problem,) = problems_of(tree)
    assert "data.columns.image: column 'picture'" in problem
    assert "data.columns.question: column 'frage'" in problem
    assert checked(tree).status == DataError.exit_status


def test_all_pictures_are_looked_at_and_equal_rows_are_counted(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(encoded_picture(0))
    cut = encoded_picture(1)
    (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
    black = io.BytesIO()
    Image.new("RGB", (48, 40)).save(black, "PNG")
    (tmp_path / "black.png").write_bytes(black.getvalue())
    names = ["p.png"] * 40 + ["cut.png", "black.png"]
    write_rows(tmp_path, [{"image_id": name, "question": "?", "answer": "a"} for name in names], tree)
    report = checked(tree)
    (problem,) = report.problems
    assert "row 40: the picture cannot be decoded" in problem
    told = "\n".join(value for _, value in report.facts)
    assert "39 row(s) of train are equal to an earlier one" in told
    assert "2 row(s) of one split are also in another" in told
    assert "1 picture(s) of train show next to nothing" in told
    assert "all headers read, 42 of 42 decoded" in told


def test_bare_answers_beside_unused_choices_are_told(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(encoded_picture(0))
    row = {"image": "0.png", "question": "Which?", "answer": 1, "choices": ["CT", "MR"]}
    write_rows(tmp_path, [row, row | {"answer": "(B)"}, row | {"answer": "MR"}], tree)
    told = [value for _, value in checked(tree).facts if "choices" in value and "letter" in value]
    assert [one.partition(" of ")[0] for one in told] == ["2 answers", "2 answers"]
    write_rows(tmp_path, [row | {"answer": "MR"}], tree)
    assert not any("letter" in value for _, value in checked(tree).facts)


@pytest.mark.parametrize(
    "choices",
    [
        {"Choice A": "CT", "Choice B": "MR"},
        {"choice_a": "CT", "choice_b": "MR"},
        {"option_A": "CT"},
        {"a": "CT", "b": "MR", "c": "US"},
        {"multi-choice options": ["CT"]},
        {"answer_choices": ["CT"]},
    ],
)
def test_choices_are_found_by_the_names_that_public_sets_use(
    tree: dict[str, Any], tmp_path: Path, choices: dict[str, Any]
) -> None:
    (tmp_path / "0.png").write_bytes(encoded_picture(0))
    row = {"image": "0.png", "question": "Which?", "answer": "B"}
    write_rows(tmp_path, [row | choices], tree)
    assert any("Write the choices into the question" in value for _, value in checked(tree).facts)
    write_rows(tmp_path, [row | {"multiple_choice_answer": "net", "choice_image_0": 1}], tree)
    assert not any("Write the choices" in value for _, value in checked(tree).facts)


@pytest.mark.parametrize("answer", ["['net', 'net', 'racket']", '["net"]'])
def test_answers_that_are_lists_in_a_text_are_told(tree: dict[str, Any], tmp_path: Path, answer: str) -> None:
    (tmp_path / "0.png").write_bytes(encoded_picture(0))
    row = {"image": "0.png", "question": "Which?", "answer": answer}
    write_rows(tmp_path, [row, row | {"answer": "see [1] or ['a'] here"}], tree)
    (told,) = [value for name, value in checked(tree).facts if "of train" in value and "lists" in value]
    assert told.startswith("1 answers of train are texts that read as lists")


def test_pictures_beside_those_that_are_used_are_told(tree: dict[str, Any], tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(encoded_picture(0))
    row = {"left_image": "0.png", "right_image": "1.png", "question": "Same?", "answer": "yes"}
    write_rows(tmp_path, [row], tree)
    tree["data"]["columns"] |= {"image": "left_image"}
    told = [value for _, value in checked(tree).facts if "which no prompt shows" in value]
    assert [one.partition(" too")[0] for one in told] == [
        f"rows of {name} seem to have pictures in right_image" for name in ("train", "validation")
    ]


def test_of_many_pictures_the_share_that_was_decoded_is_told(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.split_check.MAX_DECODED", 5)
    assert dict(checked(tree).facts[::-1])["  pictures"] == "all headers read, 5 of 12 decoded"


def test_prompts_longer_than_the_models_context_are_a_problem(tree: dict[str, Any], tmp_path: Path) -> None:
    short = with_text_config(tree["teacher"]["model"], tmp_path / "teacher", max_position_embeddings=40)
    tree["teacher"]["model"] = short
    problems = problems_of(tree)
    assert [split in problem for problem, split in zip(problems, ("train", "validation"), strict=True)]
    assert "row(s) have more tokens than the context of teacher" in problems[0]
    assert checked(tree).status == DataError.exit_status


def test_a_head_narrower_than_the_tokenizer_is_a_problem(tree: dict[str, Any], tmp_path: Path) -> None:
    narrow = {"vocab_size": 64, "pad_token_id": None, "eos_token_id": None}
    tree["teacher"]["model"] = with_text_config(tree["teacher"]["model"], tmp_path / "teacher", **narrow)
    assert any("its head is 64 wide, its tokenizer has" in problem for problem in problems_of(tree))


def test_mistyped_folders_are_not_taken_for_the_hubs(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("data/mine", "models/large"):
        (tmp_path / folder).mkdir(parents=True)
    tree["data"]["source"] = "data/mien"
    tree["teacher"]["model"] = "models/lagre"
    tree["student"]["model"] = "./models/lareg"
    problems = problems_of(tree)
    assert len(problems) == 3
    assert "data.source data/mien: no such file or folder; did you mean data/mine?" in problems
    assert "model models/lagre: no such file or folder; did you mean models/large?" in problems


def test_a_recipe_that_trains_another_teacher_is_a_problem(tree: dict[str, Any]) -> None:
    tree["teacher"] |= {"model": "work/runs/other/export", "trained_by": "phantom_teacher"}
    assert any("its export is work/runs/phantom_teacher/export" in problem for problem in problems_of(tree))


def test_what_a_capture_would_refuse_is_told(tree: dict[str, Any], teacher_cache: Path) -> None:
    tree["cache"] = {"path": str(teacher_cache), "temperatures": [1.0, 2.0], "seed": 9}
    report = checked(tree)
    (problem,) = report.problems
    assert "targets.seed: 0 in the cache, 9 asked for" in problem
    assert report.status == CacheMismatchError.exit_status


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
    assert "split validation: no row can be used" in problems[1]
