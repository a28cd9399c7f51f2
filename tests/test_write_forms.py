"""Written answers of rows of every form: the set has its prompts' columns, and its rows are the same prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import encoded_picture
from stage2_runs import make_recipe
from test_write import rows_of, written

from shared.answering import Answered
from shared.capture.planning import survey
from shared.data.collation import Encoded
from shared.data.processing import ExampleProcessor
from shared.data.rows import Example, open_split
from shared.errors import DataError, RecipeError
from shared.runtime import distributed
from shared.writing import loop

TEXT = {"type": "text", "text": "Which plane?"}
LONG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Compare "}, {"type": "image"}, {"type": "image"}]},
    {"role": "assistant", "content": "Both show <image> the liver."},
    {"role": "user", "content": "And which plane?"},
    {"role": "assistant", "content": "axial"},
]
FORMS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "several pictures and none": (
        [
            {"question": "Which plane?", "answer": "axial", "images": ["0.png", "1.png"]},
            {"question": "What is CT?", "answer": "A scan.", "images": []},
        ],
        {},
    ),
    "other columns": (
        [{"bild": "0.png", "frage": "Which plane?", "antwort": "axial", "art": "plane", "ids": None}],
        {
            "columns": {
                "image": "bild",
                "question": "frage",
                "answer": "antwort",
                "kind": "art",
                "answer_ids": "ids",
            }
        },
    ),
    "places in a question": (
        [{"question": "From <image> to <image>\nworse?", "answer": "yes", "images": ["0.png", "1.png"]}],
        {},
    ),
    "a system's turn beside the turns": (
        [{"messages": LONG[-2:], "system": "Be brief."}],
        {},
    ),
    "a named column of pictures": (
        [{"messages": LONG[-2:], "pics": ["0.png"]}],
        {"columns": {"image": "pics"}},
    ),
    "a named column of one picture": (
        [
            {
                "conversations": [
                    {"from": "human", "value": "<image>\nWhich?"},
                    {"from": "gpt", "value": "CT"},
                ],
                "pic": "0.png",
            }
        ],
        {"columns": {"image": "pic"}},
    ),
    "a named column of system's turns": (
        [{"messages": LONG[-2:], "instructions": "Be brief."}],
        {"columns": {"system": "instructions"}},
    ),
    "a system's turn beside a question": (
        [
            {"question": "Which plane?", "answer": "axial", "image": "0.png", "told": "Be brief."},
            {"question": "<image> is of which plane?", "answer": "axial", "image": "0.png", "told": None},
        ],
        {"columns": {"system": "told"}},
    ),
    "pairs": (
        [{"texts": [{"user": "Which plane?", "assistant": "axial"}], "images": ["0.png"]}],
        {"columns": {"messages": "texts"}},
    ),
    "text alone": (
        [{"question": "What is CT?", "answer": "A scan."}],
        {"columns": {"image": None}},
    ),
    "a list of answers": (
        [{"image": "0.png", "question": "Which plane?", "answers": ["axial", "axial", "coronal"]}],
        {"columns": {"answer": "answers"}, "answers": "majority"},
    ),
    "messages": (
        [
            {"messages": LONG, "images": ["0.png", "1.png"]},
            {
                "messages": [
                    {"role": "user", "content": "What is MR?"},
                    {"role": "assistant", "content": "A scan."},
                ]
            },
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "2.png"}, TEXT]},
                    {"role": "assistant", "content": "axial"},
                ]
            },
        ],
        {},
    ),
    "conversations": (
        [
            {
                "conversations": [
                    {"from": "human", "value": "<image>\nWhich modality is shown in <image>?"},
                    {"from": "gpt", "value": "CT"},
                    {"from": "human", "value": "And which plane?"},
                    {"from": "gpt", "value": "axial"},
                ],
                "image": ["0.png", "1.png"],
            }
        ],
        {"format": "conversations"},
    ),
    "rows of two forms": (
        [
            {"question": "Which plane?", "answer": "axial", "image": "0.png"},
            {
                "conversations": [
                    {"from": "human", "value": "What is CT?"},
                    {"from": "gpt", "value": "A scan."},
                ]
            },
        ],
        {},
    ),
}


@pytest.fixture
def tree(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(tmp_path / "data"), "max_answer_tokens": 64, "splits": {"validation": None}},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "student": {"model": str(student_folder)},
        "loss": {"kd_ratio": 0.0},
        "optimization": {"max_steps": 1},
        "run": {"name": "run"},
        "write": {"path": str(tmp_path / "set"), "max_new_tokens": 4, "num_workers": 0},
    }


def save(tree: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    folder = Path(tree["data"]["source"])
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encoded_picture(number))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def says(monkeypatch: pytest.MonkeyPatch, *answers: Answered) -> None:
    """What the model writes, answer by answer."""
    rest = iter(answers)
    monkeypatch.setattr(
        loop, "answer", lambda model, processor, prompts, **options: [next(rest) for _ in prompts]
    )


@pytest.mark.parametrize("form", list(FORMS))
def test_the_source_alone_changes(
    tree: dict[str, Any], processor: ExampleProcessor, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, data = FORMS[form]
    save(tree, rows)
    ids = processor.tokenizer("coronal \u2013 <image>", add_special_tokens=False)["input_ids"]
    says(monkeypatch, *[Answered(ids, is_whole=False)] * len(rows))
    recipe, folder = written(tree | {"data": tree["data"] | data})
    asked = open_split(recipe.data, "train")
    found = open_split(recipe.data.model_copy(update={"source": str(folder)}), "train")
    assert len(found) == len(asked) == len(rows)
    for prompt, one in zip(asked, found, strict=True):
        assert (one.images, one.turns[:-1], one.form) == (prompt.images, prompt.turns[:-1], prompt.form)
        assert (one.kind, one.case) == (prompt.kind, prompt.case)
        assert (one.answer, one.answer_ids, one.answer_end) == ("coronal \u2013 <image>", tuple(ids), False)
        processor.require_usable(one)
        expected = replace(prompt, turns=one.turns, answer_ids=tuple(ids), answer_end=False)
        assert processor.key(one) == processor.key(expected)
        assert torch.equal(processor.encode(one).input_ids, processor.encode(expected).input_ids)


def test_answers_that_show_nothing_are_left_out_and_told(
    tree: dict[str, Any], processor: ExampleProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tree, [{"question": f"Which {n}?", "answer": "axial", "images": []} for n in range(3)])
    (blank,) = processor.tokenizer("\n", add_special_tokens=False)["input_ids"]
    said = processor.tokenizer("CT", add_special_tokens=False)["input_ids"]
    whole = [Answered([], is_whole=True), Answered([blank], is_whole=True), Answered(said, is_whole=True)]
    says(monkeypatch, *whole)
    _, folder = written(tree)
    assert [row["answer"] for row in rows_of(folder)] == ["CT"]
    told = json.loads((folder / "written.json").read_text())
    assert [one["reason"] for one in told["skipped"]] == ["the answer is empty"] * 2
    assert told["counts"] == {
        "prompts": 3,
        "refused": 0,
        "answers": 1,
        "cut": 0,
        "tokens": len(said),
        "left_out": 2,
        "equal": 0,
    }


def test_an_answer_that_no_reader_takes_is_left_out(
    tree: dict[str, Any], processor: ExampleProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tree, [{"question": f"Which {n}?", "answer": "axial", "images": []} for n in range(2)])
    said = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("at <bbox>", "CT")]
    says(monkeypatch, *[Answered(ids, is_whole=True) for ids in said])
    recipe, folder = written(tree)
    found = open_split(recipe.data.model_copy(update={"source": str(folder)}), "train")
    assert [one.answer for one in found] == ["CT"]
    (skipped,) = json.loads((folder / "written.json").read_text())["skipped"]
    assert "says '<bbox>'" in skipped["reason"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which plane?"}],
            "lists of turns",
        ),
        (
            [{"role": "user", "content": [TEXT, {"type": "text", "text": "Be brief."}]}],
            "several texts in a row",
        ),
    ],
)
def test_a_question_that_one_text_cannot_hold_is_refused_before_the_model_is_asked(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, prompt: list[Any], message: str
) -> None:
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "axial"}]}]
    save(tree, rows)
    says(monkeypatch)
    columns = {"question": "prompt", "answer": "completion", "image": None}
    with pytest.raises(RecipeError, match=message):
        written(tree | {"data": tree["data"] | {"columns": columns}})


def test_a_prompt_refused_once_and_asked_later_is_finished(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that had an answer and cannot be read any more: a disk that comes and goes."""
    save(tree, [{"question": f"Which {n}?", "answer": "axial", "image": f"{n}.png"} for n in range(3)])
    encode, away = ExampleProcessor.encode_prompt, "Which 1?"

    def unless_away(self: ExampleProcessor, example: Example) -> Encoded:
        if away in example.turns[-2].parts:
            raise DataError(f"{example.where}: stale file handle")
        return encode(self, example)

    monkeypatch.setattr(ExampleProcessor, "encode_prompt", unless_away)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Writing, "finish_if_done", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            written(tree, data__max_dropped=1)
    away = "Which 2?"
    _, folder = written(tree, data__max_dropped=1)
    assert [row["source_row"] for row in rows_of(folder)] == [0, 1, 2]
    assert json.loads((folder / "written.json").read_text())["counts"]["refused"] == 0


def test_who_learned_from_written_answers_writes_to_the_same_prompts(
    tree: dict[str, Any], tmp_path: Path, processor: ExampleProcessor
) -> None:
    """Its answers can be laid over the rows in their turn."""
    save(tree, [{"question": f"Which {n}?", "answer": "axial", "images": []} for n in range(2)])
    _, first = written(tree)
    then = tree | {"data": tree["data"] | {"written": [str(first)]}}
    recipe, second = written(then, write__path=str(tmp_path / "second"))
    assert [row["source_key"] for row in rows_of(second)] == [row["source_key"] for row in rows_of(first)]
    data = recipe.data.model_copy(update={"written": (str(second),)})
    with distributed(device="cpu") as world:
        found = survey(recipe.model_copy(update={"data": data}), processor, world, splits=["train"])
    assert sum(len(part.keys) for part in found.keyed) == 2


def test_equal_rows_are_asked_once(tree: dict[str, Any]) -> None:
    save(tree, [{"question": "Which plane?", "answer": "axial", "images": []}] * 3)
    _, folder = written(tree)
    assert [row["source_row"] for row in rows_of(folder)] == [0]


def test_prompts_that_cannot_be_asked_count_against_the_limit(tree: dict[str, Any]) -> None:
    rows = [{"question": f"Which {n}?", "answer": "axial", "image": f"{n}.png"} for n in range(3)]
    save(tree, rows)
    (Path(tree["data"]["source"]) / "1.png").write_bytes(encoded_picture(1)[:60])  # its header is sound
    with pytest.raises(DataError, match=r"row 1.*That makes 1 left out, data.max_dropped allows 0"):
        written(tree)
    _, folder = written(tree, data__max_dropped=1)
    assert [row["source_row"] for row in rows_of(folder)] == [0, 2]
    told = json.loads((folder / "written.json").read_text())
    assert [one["row"] for one in told["skipped"]] == ["train[1]"]


def test_settings_that_cannot_be_written_with(tree: dict[str, Any]) -> None:
    save(tree, [{"question": "Which plane?", "answer": "axial", "images": []}])
    for change, message in [
        ({"data__columns": {"answer_ids": None}}, r"data.columns.answer_ids is null: what a model writes"),
        ({"write__splits": ["validation"]}, r"write.splits validation: the recipe's data have none of them"),
    ]:
        with pytest.raises(RecipeError, match=message):
            written(tree, **change)
    without = {name: section for name, section in tree.items() if name != "teacher"}
    with pytest.raises(RecipeError, match=r"it has no teacher section: there is nobody to write"):
        written(without)
    for change, message in [
        (
            {"write__per_prompt": 2},
            r"per_prompt 2 at temperature 0: the likeliest answer is the same each time",
        ),
        ({"write__temperature": 0.001}, r"temperature 0.001: 0, or at least 0.01, is needed"),
        ({"write__top_p": 0.5}, r"top_p 0.5 at temperature 0"),
        ({"write__splits": ["train", "train"]}, r"splits names a split twice"),
        ({"write__splits": ["train"], "write__steps": [2, 2]}, r"steps \[2, 2\]: none"),
        ({"write__steps": [0, 2]}, r"training rows alone are in steps"),
        ({"write__max_new_tokens": 65}, r"write.max_new_tokens 65 is above data.max_answer_tokens 64"),
    ]:
        with pytest.raises(RecipeError, match=message):
            make_recipe(tree, **change)
