"""Rows that say an answer's token ids: labels and keys come from them, and what is no answer is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import encoded_picture
from stage2_runs import make_recipe

from shared.data.conversations import Turn
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import Example, VqaSplit, open_split
from shared.errors import DataError
from shared.recipes import DataConfig
from shared.split_check import look_at
from shared.surveying import survey_keys
from stage1_teacher.check import check_recipe as check_capture
from stage2_student.check import check_recipe as check_run

ANSWER = "MR of the brain"


@pytest.fixture
def letters(processor: ExampleProcessor) -> tuple[int, ...]:
    """The answer cut into single letters, as no tokenizer would cut it."""
    ids = [processor.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in ANSWER]
    return tuple(one for (one,) in ids)


@pytest.fixture
def written(letters: tuple[int, ...]) -> Example:
    return Example.single(encoded_picture(0), "Which modality?", ANSWER, answer_ids=letters)


def rows_in(folder: Path, rows: list[dict[str, Any]], *, kind: str = "jsonl", **data: Any) -> VqaSplit:
    (folder / "0.png").write_bytes(encoded_picture(0))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    else:
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_split(DataConfig(source=str(folder), **data), "train")


def single(**rest: Any) -> dict[str, Any]:
    return {"image": "0.png", "question": "Which modality?", "answer": ANSWER} | rest


# --- labels and keys -------------------------------------------------------------------------------------


def test_labels_are_the_ids_and_the_end_of_the_turn(processor: ExampleProcessor, written: Example) -> None:
    one = processor.encode(written)
    assert one.answer_ids.tolist() == [*(written.answer_ids or ()), processor.end_of_turn]
    assert one.input_ids[-one.num_positions :].tolist() == one.answer_ids.tolist()
    assert processor.count(written).num_positions == one.num_positions == len(ANSWER) + 1
    cut = processor.encode(replace(written, answer_ids=None))
    assert cut.num_positions < one.num_positions
    prompt = len(one.input_ids) - one.num_positions
    assert one.input_ids[:prompt].tolist() == cut.input_ids[: len(cut.input_ids) - cut.num_positions].tolist()


@pytest.mark.parametrize("has_ids", [True, False])
def test_an_answer_that_was_cut_has_no_end_of_turn(
    processor: ExampleProcessor, written: Example, has_ids: bool
) -> None:
    whole = written if has_ids else replace(written, answer_ids=None)
    cut = replace(whole, answer_end=False)
    one = processor.encode(cut)
    assert one.answer_ids.tolist() == processor.encode(whole).answer_ids.tolist()[:-1]
    assert processor.count(cut).num_positions == one.num_positions
    assert not one.truncated  # nothing of what was given is left out
    assert processor.key(cut) != processor.key(whole)


def test_more_ids_than_are_learned_are_cut_and_counted(
    student_folder: Path, data_config: DataConfig, written: Example
) -> None:
    short = open_processor(str(student_folder), data_config.model_copy(update={"max_answer_tokens": 4}))
    one = short.encode(written)
    assert one.answer_ids.tolist() == list(written.answer_ids or ())[:4]
    assert one.truncated
    assert short.count(written).num_cut == 1


def test_keys_come_from_the_ids(processor: ExampleProcessor, written: Example) -> None:
    plain = replace(written, answer_ids=None)
    own = tuple(processor.encode(plain).answer_ids.tolist()[:-1])
    keys = {processor.key(one) for one in (written, replace(written, answer_ids=own), plain)}
    assert len(keys) == 3
    assert processor.key(replace(written, written_by="a model")) == processor.key(written)
    assert processor.key(replace(plain, answer_end=True)) == processor.key(plain)


def test_without_ids_keys_are_what_they_were(processor: ExampleProcessor) -> None:
    """As releases before had them, under this fingerprint of tokenizer and template."""
    processor.prompt_fingerprint, before = "fixed", processor.prompt_fingerprint
    try:
        one = Example.single(b"picture", "Which plane?", "axial")
        said = (Turn("user", ("And now?",)), Turn("assistant", ("coronal",)))
        keys = [processor.key(one).hex(), processor.key(replace(one, turns=(*one.turns, *said))).hex()]
    finally:
        processor.prompt_fingerprint = before
    assert keys == ["9037890073d3b725c47778cd13215d14", "de4c513819d70de0da8a94785263d16c"]


def test_ids_are_of_the_last_answer_of_a_conversation(
    processor: ExampleProcessor, written: Example, letters: tuple[int, ...]
) -> None:
    earlier = (Turn("user", (None, "Which plane?")), Turn("assistant", ("axial",)))
    example = replace(written, turns=(*earlier, Turn("user", ("And what?",)), Turn("assistant", (ANSWER,))))
    one = processor.encode(example)
    plain = processor.encode(replace(example, answer_ids=None))
    assert one.answer_ids.tolist()[-len(letters) - 1 :] == [*letters, processor.end_of_turn]
    num_earlier = one.num_positions - len(letters) - 1
    assert num_earlier > 0
    assert one.answer_ids.tolist()[:num_earlier] == plain.answer_ids.tolist()[:num_earlier]
    others = (replace(example, answer_ids=letters[:-1]), replace(example, answer_end=False))
    assert len({processor.key(x) for x in (example, *others, replace(example, answer_ids=None))}) == 4


# --- rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_carry_ids_in_any_file(tmp_path: Path, kind: str, letters: tuple[int, ...]) -> None:
    rows = [
        single(answer_ids=list(letters), answer_end=True, written_by="a model"),
        single(answer_ids=list(letters), answer_end=False, written_by=None),
        single(answer_ids=None, answer_end=None, written_by=None),
    ]
    whole, cut, plain = rows_in(tmp_path, rows, kind=kind)
    assert (whole.answer_ids, whole.answer_end, whole.written_by) == (letters, True, "a model")
    assert (cut.answer_ids, cut.answer_end, cut.written_by) == (letters, False, "")
    assert (plain.answer_ids, plain.answer_end) == (None, True)


def test_rows_of_conversations_carry_them_beside_the_turns(tmp_path: Path, letters: tuple[int, ...]) -> None:
    turns = [{"role": "user", "content": "Which modality?"}, {"role": "assistant", "content": ANSWER}]
    row = {"messages": turns, "images": ["0.png"], "answer_ids": list(letters), "answer_end": False}
    (one,) = rows_in(tmp_path, [row])
    assert (one.answer_ids, one.answer_end) == (letters, False)
    inside = {"messages": [turns[0], turns[1] | {"answer_ids": [1]}], "images": ["0.png"]}
    with pytest.raises(
        DataError, match=r"turn 2: it has 'answer_ids'. A row may say that of its last answer"
    ):
        rows_in(tmp_path, [inside])[0]


def test_other_columns_and_none(tmp_path: Path, letters: tuple[int, ...]) -> None:
    row = single(ids=list(letters), answer_ids="not mine")
    (named,) = rows_in(tmp_path, [row], columns={"answer_ids": "ids"})
    assert named.answer_ids == letters
    (text,) = rows_in(tmp_path, [row], columns={"answer_ids": None})
    assert text.answer_ids is None
    with pytest.raises(DataError, match=r"data.columns.answer_end: column 'whole' is not there"):
        rows_in(tmp_path, [row], columns={"answer_end": "whole"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer_ids": []}, "row 0: answer_ids is empty; needed is at least one token id"),
        ({"answer_ids": "17 4"}, "answer_ids is a str; needed is a list of token ids"),
        ({"answer_ids": 17}, "answer_ids is a int; needed is a list of token ids"),
        ({"answer_ids": {"ids": [1]}}, "answer_ids is a dict; needed is a list"),
        ({"answer_ids": [17, 4.5]}, "answer_ids holds 4.5 at place 1; needed are whole numbers"),
        ({"answer_ids": [True]}, "answer_ids holds True at place 0; needed are whole numbers"),
        ({"answer_ids": [17, None]}, "answer_ids holds None at place 1"),
        ({"answer_ids": [[17]]}, "at place 0; needed are whole numbers"),
        ({"answer_end": "no"}, "answer_end is 'no'; needed is true"),
        ({"answer_end": 0}, "answer_end is 0; needed is true"),
    ],
)
def test_what_is_no_list_of_ids_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_in(tmp_path, [single(**row)])[0]


def test_ids_beside_a_list_of_answers_are_refused(tmp_path: Path) -> None:
    row = single(answer=[ANSWER, ANSWER], answer_ids=[1])
    with pytest.raises(DataError, match="answer_ids beside a list of answers"):
        rows_in(tmp_path, [row], answers="majority")[0]


# --- ids that are no answer ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 10_000, 2**40])
def test_ids_of_another_vocabulary_are_refused(
    processor: ExampleProcessor, written: Example, bad: int
) -> None:
    broken = replace(written, answer_ids=(*(written.answer_ids or ()), bad))
    refused(
        processor, broken, rf"answer_ids holds {bad} at place {len(ANSWER)}, which is none of this tokenizer"
    )


@pytest.mark.parametrize("marker", ["<|image_pad|>", "<|vision_start|>", "<|im_start|>", "<|endoftext|>"])
def test_control_tokens_and_placeholders_are_refused(
    processor: ExampleProcessor, written: Example, marker: str
) -> None:
    number = processor.tokenizer.get_vocab()[marker]
    broken = replace(written, answer_ids=(number, *(written.answer_ids or ())))
    refused(processor, broken, "at place 0, .*, a control token or a picture's placeholder")


def test_the_end_of_the_turn_is_no_part_of_an_answer(processor: ExampleProcessor, written: Example) -> None:
    broken = replace(written, answer_ids=(*(written.answer_ids or ()), processor.end_of_turn))
    refused(processor, broken, "which ends the turn. Leave it out: answer_end says")


def test_ids_must_say_what_the_text_says(processor: ExampleProcessor, written: Example) -> None:
    broken = replace(written, answer_ids=(written.answer_ids or ())[:-1])
    refused(processor, broken, "answer_ids say 'MR of the brai', the answer's text is 'MR of the brain'")


def test_blanks_at_the_ends_and_a_cut_letter_are_no_difference(processor: ExampleProcessor) -> None:
    ids = processor.tokenizer(" CT \u2013\n", add_special_tokens=False)["input_ids"]
    one = Example.single(encoded_picture(0), "Which modality?", "CT \u2013", answer_ids=tuple(ids))
    assert processor.encode(one).answer_ids.tolist()[:-1] == ids
    dash = processor.tokenizer("\u2013", add_special_tokens=False)["input_ids"]
    part = dash[:-1] if len(dash) > 1 else dash
    text = processor.tokenizer.decode(part)
    cut = Example.single(encoded_picture(0), "Which?", text, answer_ids=tuple(part), answer_end=False)
    assert processor.encode(cut).answer_ids.tolist() == part


def refused(processor: ExampleProcessor, example: Example, message: str) -> None:
    """By everything that looks at a row."""
    for look in (processor.encode, processor.count, processor.require_usable):
        with pytest.raises(DataError, match=message):
            look(example)


def test_such_rows_are_counted_wherever_rows_are_looked_at(
    tmp_path: Path, processor: ExampleProcessor, letters: tuple[int, ...]
) -> None:
    rows = [
        single(answer_ids=list(letters)),
        single(answer_ids=[processor.end_of_turn]),
        single(answer="<|vision_start|>a<|vision_start|>"),
    ]
    data = rows_in(tmp_path, rows).settings
    looked, keyed = look_at(data, "train", processor), survey_keys(data, "train", processor)
    assert looked.num_usable == len(keyed.keys) == 2
    assert looked.spelled == {"<|vision_start|>": 1}
    assert looked.reasons == [reason for _, reason in keyed.unreadable]
    assert "row 1: answer_ids holds" in looked.reasons[0]
    assert (looked.num_with_ids, looked.num_unended) == (1, 0)


def test_check_tells_of_them(
    tmp_path: Path, teacher_folder: Path, student_folder: Path, letters: tuple[int, ...]
) -> None:
    marked = "<|vision_start|>a"
    rows = [single(answer_ids=list(letters), answer_end=False), single(answer=marked)]
    source = rows_in(tmp_path, rows).source
    tree = {
        "data": {"source": source, "splits": {"validation": None}, "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(tmp_path / "cache")},
        "student": {"model": str(student_folder)},
        "optimization": {"max_steps": 1},
        "run": {"name": "run", "root": str(tmp_path)},
        "write": {"path": str(tmp_path / "set"), "temperature": 0.7, "per_prompt": 3},
    }
    for check in (check_capture, check_run):
        report = check(make_recipe(tree), num_ranks=1)
        assert report.problems == []
        facts = dict(report.facts)
        assert facts["  token ids"] == "of 1 answers, as their writer has them"
        assert facts["  not ended"] == "1 answers: no end of the turn is learned"
        assert any("(rows of each: '<|vision_start|>' 1)" in told for _, told in report.facts)
        told = facts.get("answers", "")
    assert told == ""  # a student's check is not about the teacher's answers
    facts = dict(check_capture(make_recipe(tree), num_ranks=1).facts)
    assert facts["answers"].startswith("3 sampled at 0.7 to each prompt of train, validation, into ")
