"""Rows as public data sets hold them: each is read as it is meant, or refused with what to set.

The rows are drawn, the columns and their types are those of the sets.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Image, List, Value
from samples import encoded_picture

from shared.data.conversations import Turn
from shared.data.rows import Example, VqaSplit, open_split
from shared.errors import DataError
from shared.recipes import DataConfig

PICTURES = [encoded_picture(n) for n in range(3)]
STRUCTS = [{"bytes": picture, "path": f"{n}.png"} for n, picture in enumerate(PICTURES)]
TEXT, NUMBER, PICTURE = Value("string"), Value("int64"), Image()
BASE64 = base64.b64encode(PICTURES[0]).decode()


def table(folder: Path, rows: list[dict[str, Any]], features: dict[str, Any], **data: Any) -> VqaSplit:
    """A Parquet file as the Hub has it; columns that a row lacks are null."""
    columns = {name: [row.get(name) for row in rows] for name in features}
    found = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    found.to_parquet(str(folder / "train-00000-of-00001.parquet"))
    return open_split(DataConfig(source=str(folder), **data), "train")


def listed(folder: Path, rows: list[dict[str, Any]], **data: Any) -> VqaSplit:
    """One list of objects, and the pictures beside it."""
    for number, picture in enumerate(PICTURES):
        (folder / f"{number}.png").write_bytes(picture)
    (folder / "train.json").write_text(json.dumps(rows))
    return open_split(DataConfig(source=str(folder), **data), "train")


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def turns(*texts: str, pictures: int = 0) -> tuple[Turn, ...]:
    first = (*[None] * pictures, texts[0])
    return (
        Turn("user", first),
        *(Turn(("user", "assistant")[number % 2], (text,)) for number, text in enumerate(texts) if number),
    )


# --- read as they are meant -------------------------------------------------------------------------------


def test_llava_rows_whose_texts_leave_the_place_out(tmp_path: Path) -> None:
    """As in PubMedVision, parts of LLaVA-OneVision, and LLaVA-Instruct in Chinese."""
    rows = [
        {"id": "1", "image": ["0.png", "1.png"], "conversations": talk("Which?", "CT", "Plane?", "axial")},
        {"id": "2", "image": "2.png", "conversations": talk("Which?\n<image>", "MR")},
        {"id": "3", "conversations": talk("Hello", "Good day")},
    ]
    one, two, three = listed(tmp_path, rows)
    assert one.turns == turns("Which?", "CT", "Plane?", "axial", pictures=2)
    assert one.images == tuple(PICTURES[:2])
    assert two.turns[0] == Turn("user", ("Which?", None))
    assert (three.turns, three.images) == (turns("Hello", "Good day"), ())


def test_the_cauldron_and_docmatix(tmp_path: Path) -> None:
    features = {"images": List(PICTURE), "texts": [{"user": TEXT, "assistant": TEXT, "source": TEXT}]}
    pairs = [{"user": f"Q{n}", "assistant": f"A{n}", "source": "s"} for n in (1, 2)]
    row = {"images": STRUCTS[:2], "texts": pairs}
    (example,) = table(tmp_path, [row], features, columns={"messages": "texts"})
    assert example.turns == turns("Q1", "A1", "Q2", "A2", pictures=2)


def test_chart_qa_has_its_answer_in_a_list_and_its_kind_in_a_class(tmp_path: Path) -> None:
    features = {
        "image": PICTURE,
        "query": TEXT,
        "label": List(TEXT),
        "human_or_machine": ClassLabel(names=["human", "machine"]),
    }
    row = {"image": STRUCTS[0], "query": "How many?", "label": ["3.50"], "human_or_machine": 1}
    columns = {"question": "query", "answer": "label", "kind": "human_or_machine"}
    (example,) = table(tmp_path, [row], features, columns=columns, answers="majority")
    assert example == Example.single(PICTURES[0], "How many?", "3.50", kind="machine")


def test_rlaif_v_teaches_what_was_chosen(tmp_path: Path) -> None:
    said = [{"content": [{"index": NUMBER, "text": TEXT, "type": TEXT}], "role": TEXT}]
    features = {"images": List(PICTURE), "prompt": said, "chosen": said, "rejected": said}
    asked = [{"type": "image", "text": None, "index": None}, {"type": "text", "text": "q", "index": None}]

    def answer(text: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": [{"type": "text", "text": text, "index": None}]}]

    row = {
        "images": STRUCTS[:1],
        "prompt": [{"role": "user", "content": asked}],
        "chosen": answer("good"),
        "rejected": answer("bad"),
    }
    split = table(tmp_path, [row], features, columns={"question": "prompt", "answer": "chosen"})
    assert split[0] == Example.single(PICTURES[0], "q", "good")


def test_pictures_in_base64_without_more(tmp_path: Path) -> None:
    """As in M3IT and MMBench."""
    rows = [
        {"image_base64_str": [BASE64], "question": "q", "answer": "a"},
        {"image_base64_str": [base64.encodebytes(PICTURES[1]).decode()], "question": "q", "answer": "a"},
    ]
    split = listed(tmp_path, rows, columns={"image": "image_base64_str"})
    assert [one.images for one in split] == [(PICTURES[0],), (PICTURES[1],)]


# --- nothing is lost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "beside",
    [
        {"image_base64": BASE64},
        {"shown": BASE64},
        {"img_b64": [BASE64]},
        {"image_url": "https://example.org/photo"},
        {"link": "https://example.org/a.jpg?width=3"},
        {"imagePath": "scans/117"},
        {"scan": "scans/117.dcm"},
        {"volume": "scans/117.nii.gz"},
        {"shown": "photo.HEIC"},
    ],
)
def test_a_picture_that_no_prompt_would_show_is_found(tmp_path: Path, beside: dict[str, Any]) -> None:
    (name,) = beside
    rows: list[dict[str, Any]] = [{"conversations": talk("Which?", "CT")} | beside]
    with pytest.raises(DataError, match=f"{name!r} seems to hold pictures. Set data.columns.image to it"):
        listed(tmp_path, rows)
    rows = [{"conversations": talk("Which?", "CT"), "image": "0.png"}, *rows]
    with pytest.raises(DataError, match=f"row 1: no picture is used, but {name!r} seems to hold one"):
        listed(tmp_path, rows)[1]


@pytest.mark.parametrize(
    "beside", [{"image_1": 7}, {"image_url": ""}, {"image_path": None}, {"image_size": "s"}]
)
def test_names_alone_are_no_picture(tmp_path: Path, beside: dict[str, Any]) -> None:
    (example,) = listed(tmp_path, [{"conversations": talk("Which?", "CT")} | beside])
    assert example.images == ()


NUMBERED = {"question": TEXT, "answer": TEXT, "image_1": PICTURE, "image_2": PICTURE}


def test_numbered_columns_of_pictures(tmp_path: Path) -> None:
    """As in MMMU and BLINK: the first one alone would be another question."""
    rows = [
        {"question": "q", "answer": "a", "image_1": STRUCTS[0], "image_2": None},
        {"question": "q", "answer": "a", "image_1": STRUCTS[0], "image_2": STRUCTS[1]},
    ]
    with pytest.raises(DataError, match="'image_1' seems to hold pictures"):
        table(tmp_path, rows, NUMBERED)
    split = table(tmp_path, rows, NUMBERED, columns={"image": "image_1"})
    assert split[0] == Example.single(PICTURES[0], "q", "a")
    with pytest.raises(DataError, match=r"row 1: pictures in the columns image_1, image_2, .*a list of them"):
        split[1]


@pytest.mark.parametrize("other", ["image2", "image 2", "image-02"])
def test_a_column_and_its_numbered_one(tmp_path: Path, other: str) -> None:
    rows = [{"question": "q", "answer": "a", "image": "0.png", other: value} for value in ([], "1.png")]
    split = listed(tmp_path, rows)
    assert split[0].images == (PICTURES[0],)
    with pytest.raises(DataError, match=f"columns image, {other}"):
        split[1]


def test_the_same_picture_in_other_sizes_is_one(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "image_512": "0.png", "image_256": "1.png"}
    (example,) = listed(tmp_path, [row], columns={"image": "image_512"})
    assert example.images == (PICTURES[0],)


@pytest.mark.parametrize("more", ["input", "inputs"])
def test_an_instruction_has_its_input_with_it(tmp_path: Path, more: str) -> None:
    row = {"image": "0.png", "instruction": "Answer the question.", more: "Which?", "outputs": "CT"}
    split = listed(tmp_path, [row], columns={"question": "instruction", "answer": "outputs"})
    with pytest.raises(DataError, match=f"'{more}' belongs to the instruction"):
        split[0]


@pytest.mark.parametrize(
    "texts",
    [
        {"conversations": talk("<Image>\nWhich?", "CT")},
        {"messages": [{"role": "user", "content": "<IMAGE> Which?"}, {"role": "assistant", "content": "CT"}]},
        {"question": "< image >Which?", "answer": "CT"},
    ],
)
def test_what_is_nearly_a_place_is_not_learned_as_a_text(tmp_path: Path, texts: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"row 0: .*which is no place of a picture\. Write <image>"):
        listed(tmp_path, [texts | {"image": "0.png"}])[0]


def test_marks_around_a_place_are_texts(tmp_path: Path) -> None:
    """As in Mantis-Instruct."""
    row = {"images": ["0.png"], "conversations": talk("(1: <Image><image></Image>) Which?", "CT")}
    assert listed(tmp_path, [row])[0].turns[0] == Turn("user", ("(1: <Image>", None, "</Image>) Which?"))


# --- what to set ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value"),
    [("img_name", "0.png"), ("file_name", "0.png"), ("Figure_path", "0.png"), ("image_base64", BASE64)],
)
def test_the_column_of_pictures_is_named(tmp_path: Path, column: str, value: str) -> None:
    """As in SLAKE, folders of pictures with metadata, PMC-VQA."""
    rows = [{"question": "q", "answer": "a", "img_id": 1, column: value}]
    with pytest.raises(DataError, match=rf"column 'image_id' is not there; .*[?.] '{column}' seems to hold"):
        listed(tmp_path, rows)
    assert listed(tmp_path, rows, columns={"image": column})[0].images == (PICTURES[0],)


def test_a_split_that_a_set_lacks_is_named_with_what_to_set(tmp_path: Path) -> None:
    """As in VQA-RAD, which has no validation split."""
    features = {"image": PICTURE, "question": TEXT, "answer": TEXT}
    split = table(tmp_path, [{"image": STRUCTS[0], "question": "q", "answer": "a"}], features)
    with pytest.raises(
        DataError, match=r"'validation' is not there; found train\. Set data.splits to the names"
    ):
        open_split(split.settings, "validation")
