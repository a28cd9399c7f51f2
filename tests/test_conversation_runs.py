"""A data set of rows in all forms, from its files to a trained student: captured, trained, asked, shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from samples import encoded_picture
from stage2_runs import make_recipe, on_ranks, run_alone, run_ranks, step_records, validation_records
from test_capture import files
from test_conversations import of_one_type

from shared.cache import CacheReader
from shared.cache.verify import verify
from shared.data.processing import open_processor
from shared.data.rows import Example, open_split
from shared.recipes import Recipe
from shared.runtime import distributed
from shared.stopping import StopRequest
from stage1_teacher.__main__ import commands as teacher_commands
from stage1_teacher.capture import capture
from stage2_student.__main__ import commands as student_commands
from stage2_student.check import check_recipe
from stage2_student.evaluation.shuffled import with_other_pictures
from stage2_student.training.survey import survey

PICTURES = [encoded_picture(n, size=(48 + 24 * (n % 3), 48)) for n in range(4)]


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def all_forms() -> list[dict[str, Any]]:
    """Question and answer, messages of each kind, LLaVA's; none, one and two pictures; one to three answers."""
    image, text = {"type": "image"}, {"type": "text", "text": "Do they differ?"}
    return [
        {"image": "0.png", "question": "Which plane is this?", "answer": "axial"},
        {"question": "What is CT?", "answer": "X-rays."},
        {"images": ["1.png", "2.png"], "question": "Same case?", "answer": "No."},
        {
            "images": ["0.png", "3.png"],
            "messages": [message("user", [image, image, text]), message("assistant", "Yes.")],
        },
        {
            "messages": [
                message("system", "Be brief."),
                message("user", [{"type": "image", "image": "1.png"}, {"type": "text", "text": "Modality?"}]),
                message("assistant", "MR <|im_end|>"),
                message("user", "And the plane?"),
                message("assistant", "axial, I think"),
            ]
        },
        {"messages": [message("user", "Say <think>."), message("assistant", "<think>")]},
        {
            "image": "2.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich modality is shown?"},
                {"from": "gpt", "value": "CT"},
                {"from": "human", "value": "Which plane?"},
                {"from": "gpt", "value": "coronal"},
                {"from": "human", "value": "Thanks."},
                {"from": "gpt", "value": "You are welcome."},
            ],
        },
        {"conversations": [{"from": "human", "value": "What is MR?"}, {"from": "gpt", "value": "Magnets."}]},
    ]


def as_messages(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """The same examples, all in one form, with their pictures as bytes."""
    rows = []
    for example in examples:
        turns = [
            message(
                turn.role,
                [
                    {"type": "image", "text": None} if part is None else {"type": "text", "text": part}
                    for part in turn.parts
                ],
            )
            for turn in example.turns
        ]
        rows.append({"messages": turns, "images": list(example.images)})
    return rows


@pytest.fixture(scope="module")
def tree(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> dict[str, Any]:
    source = tmp_path_factory.mktemp("mixed")
    for number, picture in enumerate(PICTURES):
        (source / f"{number}.png").write_bytes(picture)
    rows = all_forms()
    (source / "train.json").write_text(json.dumps(rows))
    (source / "validation.json").write_text(json.dumps(rows[3:7]))
    return {
        "data": {"source": str(source), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(source.parent / "mixed-cache"), "num_workers": 0},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "optimization": {"global_batch_size": 4, "microbatch_size": 4, "max_steps": 4, "learning_rate": 1e-2},
        "run": {"name": "mixed", "root": str(source.parent / "mixed-runs"), "num_workers": 0},
        "evaluation": {"max_examples": 4, "max_new_tokens": 4, "batch_size": 4},
    }


def captured(recipe: Recipe) -> Path:
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0
    assert recipe.cache is not None
    return Path(recipe.cache.path)


@pytest.fixture(scope="module")
def mixed(tree: dict[str, Any]) -> Recipe:
    recipe = make_recipe(tree)
    captured(recipe)
    run_alone(recipe)
    return recipe


def test_every_answer_of_every_row_is_in_the_cache(mixed: Recipe, tree: dict[str, Any]) -> None:
    reader = CacheReader(tree["cache"]["path"])
    assert reader.manifest.totals.examples == 8
    assert reader.manifest.totals.skipped == 0
    assert reader.manifest.identity.prompt is not None
    assert reader.manifest.identity.prompt.train_on == "all"
    assert step_records(mixed)[-1]["loss"] < step_records(mixed)[0]["loss"]


def test_a_cache_of_several_answers_or_of_one_of_just_the_bound_is_sound(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """The bound is of each answer, and an answer of just that many tokens has its end of turn beside them."""
    tokenizer = open_processor(tree["teacher"]["model"], make_recipe(tree).data).tokenizer
    bound = len(tokenizer.encode("axial", add_special_tokens=False))
    rows = [all_forms()[0], all_forms()[6]]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    for name in ("0.png", "2.png"):
        (tmp_path / name).write_bytes(PICTURES[int(name[0])])
    recipe = make_recipe(
        tree,
        data__source=str(tmp_path),
        data__max_answer_tokens=bound,
        data__splits={"train": "train", "validation": None, "test": None},
        cache__path=str(tmp_path / "cache"),
    )
    one, several = sorted(CacheReader(str(captured(recipe))).shard(0).num_positions.tolist())
    assert several > one == bound + 1
    assert verify(str(tmp_path / "cache")).faults == ()


def test_the_same_rows_in_one_form_make_the_same_cache_and_the_same_run(
    mixed: Recipe, tree: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("train", "validation"):
        examples = list(open_split(mixed.data, name))  # type: ignore[arg-type]
        pq.write_table(
            pa.Table.from_pylist(list(map(of_one_type, as_messages(examples)))), tmp_path / f"{name}.parquet"
        )
    again = make_recipe(
        tree,
        data__source=str(tmp_path),
        cache__path=str(tmp_path / "cache"),
        run__root=str(tmp_path / "runs"),
        evaluation__max_examples=0,
    )
    ours, theirs = files(captured(again)), files(Path(tree["cache"]["path"]))
    assert {n: b for n, b in ours.items() if n != "manifest.json"} == {
        n: b for n, b in theirs.items() if n != "manifest.json"
    }
    run_alone(again)
    assert step_records(again) == step_records(mixed)
    assert validation_records(again) == validation_records(mixed)


def test_microbatches_with_and_without_pictures_give_the_same_losses(
    mixed: Recipe, tree: dict[str, Any]
) -> None:
    alone = make_recipe(tree, optimization__microbatch_size=1, run__name="alone", evaluation__max_examples=0)
    run_alone(alone)
    for mine, other in zip(step_records(alone), step_records(mixed), strict=True):
        mine.pop("event"), other.pop("event")
        assert mine == pytest.approx(other, rel=2e-4)


def test_check_tells_the_forms(mixed: Recipe) -> None:
    facts = [value for name, value in check_recipe(mixed, num_ranks=1).facts if name == "  form"]
    assert facts == [
        "question_answer 3, messages 3, conversations 2; 1 to 3 answers a row; 3 row(s) without pictures; "
        "2 row(s) with several",
        "messages 3, conversations 1; 1 to 3 answers a row; 1 row(s) without pictures; 1 row(s) with several",
    ]


def test_the_last_turn_is_asked_and_reports_show_all_turns_and_pictures(
    mixed: Recipe, tree: dict[str, Any], tmp_path: Path
) -> None:
    asked = pq.read_table(mixed.run.path / "evaluation" / "validation.parquet").to_pylist()
    own = [line for line in asked if line["model"] == "student"]
    assert [line["question"] for line in own] == [
        "Do they differ?",
        "And the plane?",
        "Say <think>.",
        "Thanks.",
    ]
    assert own[-1]["reference"] == "You are welcome."
    runner = CliRunner()
    page = tmp_path / "run.html"
    assert (
        runner.invoke(
            student_commands, ["report", str(mixed.run.path), str(page)], standalone_mode=False
        ).exit_code
        == 0
    )
    text = page.read_text()
    for said in ("Be brief.", "MR &lt;|im_end|&gt;", "[picture 1] Which modality is shown?", "coronal"):
        assert said in text
    assert text.count("data:image/jpeg") == 2 + 1 + 0 + 1
    page = tmp_path / "cache.html"
    assert runner.invoke(teacher_commands, ["report", tree["cache"]["path"], str(page)]).exit_code == 0
    assert "[picture 1] [picture 2] Do they differ?" in page.read_text()


def test_learning_the_last_answer_alone_needs_other_targets_and_says_so(
    mixed: Recipe, tree: dict[str, Any]
) -> None:
    last = make_recipe(tree, data__train_on="last", run__name="last")
    (problem,) = [one for one in check_recipe(last, num_ranks=1).problems if "not in it" in one]
    assert 'prompt.train_on: "all" in the cache, "last" asked for' in problem


def test_shuffled_pictures_are_of_other_rows_and_as_many(mixed: Recipe) -> None:
    processor = open_processor(mixed.student.model, mixed.data)
    surveyed = survey(mixed.data, "train", processor, None)
    shuffled = with_other_pictures(surveyed)
    for row in range(len(surveyed.split)):
        before, after = surveyed.split[row], shuffled.split[row]
        assert after.turns == before.turns
        assert len(after.images) == len(before.images)
        assert not before.images or after.images != before.images


def test_two_ranks_train_on_it_as_one_does(mixed: Recipe, tree: dict[str, Any]) -> None:
    """Some steps give one rank rows of text alone."""
    two = make_recipe(tree, optimization__microbatch_size=2, run__name="two", evaluation__max_examples=0)
    assert run_ranks(two, 2) == [0, 0]
    for mine, other in zip(step_records(two), step_records(mixed), strict=True):
        mine.pop("event"), other.pop("event")
        assert mine == pytest.approx(other, rel=2e-4)


def test_two_ranks_capture_the_same_bytes(mixed: Recipe, tree: dict[str, Any], tmp_path: Path) -> None:
    again = make_recipe(tree, cache__path=str(tmp_path / "cache"), cache__examples_per_shard=2)
    alone = make_recipe(tree, cache__path=str(tmp_path / "alone"), cache__examples_per_shard=2)
    assert on_ranks(2, lambda world: capture(again, world, StopRequest())) == [0, 0]
    assert files(tmp_path / "cache") == files(captured(alone))
