"""Rows in every form become the same conversations, and what cannot be one is refused with its row and turn."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import encoded_picture

from shared.data.conversations import Turn, majority, question_answer
from shared.data.pictures import MAX_DATA_URL
from shared.data.rows import Example, VqaSplit, open_split
from shared.data.sources import DatasetRows, open_rows
from shared.errors import DataError
from shared.recipes import ColumnsConfig, DataConfig
from shared.reports.conversations import spoken
from shared.split_check import look_at

PICTURES = [encoded_picture(n) for n in range(3)]
DATA_URL = "data:image/png;base64," + base64.b64encode(PICTURES[0]).decode()
BASE64_LINES = base64.encodebytes(PICTURES[0]).decode()
QUESTION, ANSWER = "Which plane?", "axial"
ANSWERED = {"role": "assistant", "content": ANSWER}
QWEN_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
SINGLE = Example.single(PICTURES[0], QUESTION, ANSWER)


def split_of(folder: Path, rows: list[dict[str, Any]], *, kind: str = "jsonl", **data: Any) -> VqaSplit:
    """JSONL, or Parquet, where a key that one part of the list has is null in all others."""
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(PICTURES):
        (folder / f"{number}.png").write_bytes(picture)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(list(map(of_one_type, rows))), folder / "train.parquet")
    else:
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return open_split(DataConfig(source=str(folder), **data), "train")


def of_one_type(row: dict[str, Any]) -> dict[str, Any]:
    """A table's column cannot hold both texts and lists of parts."""
    contents = [turn["content"] for turn in row.get("messages", [])]
    if any(isinstance(one, list) for one in contents) and any(isinstance(one, str) for one in contents):
        turns = [
            turn
            | {"content": [text(turn["content"])] if isinstance(turn["content"], str) else turn["content"]}
            for turn in row["messages"]
        ]
        return row | {"messages": turns}
    return row


def user(*parts: str | None) -> Turn:
    return Turn("user", parts)


def said(*parts: str) -> Turn:
    return Turn("assistant", parts)


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def asked(*content: Any) -> list[dict[str, Any]]:
    return [message("user", list(content)), message("assistant", ANSWER)]


SINGLES: list[dict[str, Any]] = [
    {"image": "0.png", "question": QUESTION, "answer": ANSWER},
    {"images": ["0.png"], "question": QUESTION, "answer": ANSWER},
    {"image": DATA_URL, "question": QUESTION, "answer": ANSWER},
    {"messages": asked({"type": "image", "image": "0.png"}, text(QUESTION))},
    {"messages": asked({"type": "image", "path": "0.png"}, text(QUESTION))},
    {"messages": asked({"type": "image", "url": DATA_URL}, text(QUESTION))},
    {"messages": asked({"type": "image", "base64": DATA_URL.partition(",")[2]}, text(QUESTION))},
    {
        "messages": asked(
            {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}}, text(QUESTION)
        )
    },
    {"messages": asked({"type": "image", "bytes": BASE64_LINES}, text(QUESTION))},
    {"messages": asked({"type": "image", "url": f"data:image/png;base64,{BASE64_LINES}"}, text(QUESTION))},
    {"image": {"bytes": BASE64_LINES, "path": None}, "question": QUESTION, "answer": ANSWER},
    {"messages": asked({"type": "image_url", "image_url": "0.png"}, text(QUESTION))},
    {"messages": asked({"type": "image"}, text(QUESTION)), "images": ["0.png"]},
    {"messages": asked({"type": "image"}, text(QUESTION)), "image": "0.png"},
    {"messages": [message("user", QUESTION), message("assistant", ANSWER)], "images": ["0.png"]},
    {
        "messages": [message("user", f"<image>\n{QUESTION}"), message("assistant", [text(ANSWER)])],
        "image": "0.png",
    }
    | {"messages": [message("user", f"<image>\n{QUESTION}"), message("assistant", ANSWER)]},
    {
        "conversations": [
            {"from": "human", "value": f"<image>\n{QUESTION}"},
            {"from": "gpt", "value": f"{ANSWER}\n"},
        ],
        "image": "0.png",
    },
    {
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}],
        "image": "0.png",
    },
    {"image": DATA_URL.partition(",")[2], "question": QUESTION, "answer": ANSWER},
    {"messages": asked({"type": "image", "image": BASE64_LINES}, text(QUESTION))},
    {
        "conversations": [
            {"from": "user", "value": f"<image> {QUESTION} "},
            {"from": "assistant", "value": ANSWER},
        ],
        "images": ["0.png"],
    },
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("row", SINGLES, ids=range(len(SINGLES)))
def test_one_question_is_the_same_example_in_every_form(
    tmp_path: Path, row: dict[str, Any], kind: str
) -> None:
    example = split_of(tmp_path, [row], kind=kind)[0]
    assert example == SINGLE
    assert (example.question, example.answer) == (QUESTION, ANSWER)


def test_an_answer_that_is_a_number_is_the_same_in_every_form(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": QUESTION, "answer": 3, "image": "0.png"},
        {"messages": [message("user", QUESTION), message("assistant", 3)], "images": ["0.png"]},
        {
            "conversations": [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": 3},
            ],
            "image": "0.png",
        },
    ]
    for row in rows:
        assert split_of(tmp_path, [row])[0] == Example.single(PICTURES[0], QUESTION, "3")


def test_bytes_and_structs_in_lists_are_pictures_too(tmp_path: Path) -> None:
    held = {"bytes": PICTURES[0], "path": None}
    rows = [
        {"images": [held], "messages": asked({"type": "image"}, text(QUESTION))},
        {"images": [{"bytes": None, "path": "0.png"}], "messages": asked({"type": "image"}, text(QUESTION))},
    ]
    assert split_of(tmp_path, rows, kind="parquet")[0] == SINGLE
    assert split_of(tmp_path, rows, kind="parquet")[1].images == SINGLE.images


LONG: list[dict[str, Any]] = [
    {
        "messages": [
            message("system", "Be brief."),
            message("user", [{"type": "image"}, text("Look at "), {"type": "image"}, text(" and tell.")]),
            message("assistant", [text("One "), text("way.")]),
            message("user", "More?"),
            message("assistant", "No."),
        ],
        "images": ["0.png", "1.png"],
    },
    {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>Look at <image> and tell."},
            {"from": "gpt", "value": "One way."},
            {"from": "human", "value": "More?"},
            {"from": "gpt", "value": "No."},
        ],
        "images": ["0.png", "1.png"],
    },
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_conversation_has_its_turns_and_pictures_in_order(tmp_path: Path, kind: str) -> None:
    for number, row in enumerate(LONG):
        example = split_of(tmp_path, [row], kind=kind)[0]
        first = (None, "Look at ", None, " and tell.")
        assert example.images == tuple(PICTURES[:2])
        expected = (
            Turn("system", ("Be brief.",)),
            user(*first),
            said("One way."),
            user("More?"),
            said("No."),
        )
        assert example.turns == expected, number
        assert (example.question, example.answer) == ("More?", "No.")
        assert example.form == ("messages", "conversations")[number]


def test_rows_of_all_forms_and_numbers_of_pictures_lie_in_one_file(tmp_path: Path) -> None:
    rows = [
        *SINGLES,
        *LONG,
        {"question": "What is CT?", "answer": "X-rays."},
        {"question": "What is CT?", "answer": "X-rays.", "images": []},
        {"question": "Same?", "answer": "No.", "images": ["1.png", "2.png"]},
        {"conversations": [{"from": "human", "value": "What is CT?"}, {"from": "gpt", "value": "X-rays."}]},
        {"messages": [message("user", "What is CT?"), message("assistant", "X-rays.")], "images": None},
    ]
    split = split_of(tmp_path, rows)
    assert split.forms == ("question_answer", "messages", "conversations")
    found = list(split)
    assert found[: len(SINGLES)] == [
        Example(SINGLE.images, SINGLE.turns, index=n) for n in range(len(SINGLES))
    ]
    alone, listed, several, llava, plain = found[-5:]
    assert (
        alone.turns
        == listed.turns
        == llava.turns
        == plain.turns
        == question_answer("What is CT?", "X-rays.", 0)
    )
    assert alone.images == listed.images == llava.images == plain.images == ()
    assert several.images == tuple(PICTURES[1:])
    assert several.turns == (user(None, None, "Same?"), said("No."))


# --- what is refused ------------------------------------------------------------------------------------

GOOD = [message("user", "q"), message("assistant", "a")]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "all of .*are missing|the conversation is missing"),
    ({"messages": "text"}, "the conversation is a str; needed is a list of turns"),
    ({"messages": []}, "no assistant's turn in 0"),
    ({"messages": ["a"]}, "turn 1: a str; needed is an object"),
    ({"messages": [{}]}, r"turn 1: no role \(keys: \)"),
    ({"messages": [{"content": "x"}]}, r"turn 1: no role \(keys: content\)"),
    ({"messages": [message("robot", "x")]}, "turn 1: the role is 'robot'; known are system, developer, user"),
    ({"messages": [message(7, "x")]}, "turn 1: the role is 7"),
    ({"messages": [message("user", None), GOOD[1]]}, "turn 1: the content is missing"),
    ({"messages": [message("user", 5), GOOD[1]]}, "turn 1: the content is a int"),
    ({"messages": [message("user", ""), GOOD[1]]}, "turn 1: the text is empty"),
    ({"messages": [message("user", []), GOOD[1]]}, "turn 1: the text is empty"),
    ({"messages": [GOOD[0], message("assistant", " \u200b")]}, "turn 2: the text has no visible character"),
    ({"messages": [message("user", [None]), GOOD[1]]}, "turn 1: a part is a NoneType"),
    ({"messages": [message("user", [{"type": "text"}]), GOOD[1]]}, "turn 1: the text of a part is missing"),
    ({"messages": [message("user", [text(3)]), GOOD[1]]}, "turn 1: the text of a part is a int"),  # type: ignore[arg-type]
    ({"messages": [message("user", [{"type": "video", "video": "x"}]), GOOD[1]]}, "a part of type 'video'"),
    ({"messages": [message("user", "bad \ud800"), GOOD[1]]}, "turn 1: the text is not valid Unicode"),
    ({"messages": [GOOD[0]]}, "no assistant's turn in 1"),
    ({"messages": [*GOOD, GOOD[0]]}, "the last turn is the user's"),
    ({"messages": [GOOD[1]]}, "no user's turn"),
    ({"messages": [GOOD[0], {**GOOD[1], "tool_calls": [{"id": 1}]}]}, "turn 2: it has 'tool_calls'"),
    ({"messages": [GOOD[0], {**GOOD[1], "reasoning_content": "hm"}]}, "turn 2: it has 'reasoning_content'"),
    ({"messages": [GOOD[0], {**GOOD[1], "mask": 0}, *GOOD]}, "turn 2: it has 'mask', which is not used"),
    ({"messages": [GOOD[0], {**GOOD[1], "weight": 0}]}, "turn 2: its weight is 0"),
    (
        {"messages": [GOOD[0], message("assistant", [{"type": "image"}, text("a")])], "images": ["0.png"]},
        "turn 2: an assistant's turn shows a picture",
    ),
    ({"messages": asked({"type": "image"}, text("q"))}, r"0 picture\(s\) beside the turns, and 1 place"),
    (
        {"messages": asked({"type": "image"}, text("q")), "images": ["0.png", "1.png"]},
        r"2 picture\(s\) beside the turns, and 1 place",
    ),
    (
        {"messages": [message("user", "<image> and <image>"), GOOD[1]], "images": ["0.png"]},
        r"1 picture\(s\) beside the turns, and 2 place",
    ),
    (
        {
            "conversations": [{"from": "human", "value": [text("q")]}, {"from": "gpt", "value": "a"}],
            "image": "0.png",
        },
        r"1 picture\(s\) beside the turns, and 0 place",
    ),
    (
        {
            "conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}],
            "image": ["0.png", "1.png"],
        },
        r"2 picture\(s\) beside the turns, and 1 place",
    ),
    (
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]},
        r"0 picture\(s\) beside the turns, and 1 place",
    ),
    ({"conversations": [{"from": "tool", "value": "q"}]}, "turn 1: the role is 'tool'"),
    (
        {
            "messages": asked(
                {"type": "image", "image": "0.png"}, {"type": "image", "image": "9.png"}, text("q")
            )
        },
        "row 1, picture 2: the picture .*9.png cannot be read",
    ),
    (
        {"messages": asked({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}, text("q"))},
        "the picture is a URL, https://x.org/a.png; .*download the picture first",
    ),
    ({"messages": asked({"type": "image", "image": 7}, text("q"))}, "the picture is a int"),
    ({"messages": asked({"type": "image", "image": {"a": 1}}, text("q"))}, "the picture is a dict"),
    (
        {"messages": asked({"type": "image", "url": "data:image/png,abc"}, text("q"))},
        "a data: URL must be base64",
    ),
    ({"messages": asked({"type": "image", "url": "data:;base64,@@"}, text("q"))}, "data: URL is not base64"),
    (
        {"messages": GOOD, "question": "q", "answer": "a"},
        "it fits question_answer and messages .*Set data.format",
    ),
]


@pytest.mark.parametrize(("row", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_no_conversation_is_refused_with_its_row(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    others: list[dict[str, Any]] = [
        {"messages": GOOD},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"question": "q", "answer": "a"},
    ]
    split = split_of(tmp_path, [others[0], row, *others[1:]])
    with pytest.raises(DataError, match=message) as caught:
        split[1]
    assert str(caught.value).startswith(f"{tmp_path}, split train, row 1")
    assert len(str(caught.value)) < 600
    assert [split[n].answer for n in (0, 2, 3)] == ["a"] * 3


@pytest.mark.parametrize(
    ("user_turn", "message"),
    [
        (message("user", "<image>\nhi"), "0 picture.*1 place"),  # the picture's column has another name
        (message("user", "What?") | {"images": ["0.png"]}, "'images'"),
        (message("user", [{"text": "What?", "image": "0.png"}]), "both a text and a picture"),
        (message("user", [{"type": "text", "text": "What?", "image": "0.png"}]), "both a text and a picture"),
        (
            message("user", [{"type": "image", "image_path": "0.png"}, text("q")]),
            "its picture in 'image_path'",
        ),
        (
            message("user", [{"type": "image", "source": {"data": "aGk="}}, text("q")]),
            "its picture in 'source'",
        ),
        (
            message("user", [{"type": "image", "image": "0.png", "url": "1.png"}]),
            "a picture in image and url",
        ),
        (message("user", [{"type": "image_url", "image_url": {"url": ""}}]), r"missing \(an empty text\)"),
    ],
)
def test_no_picture_is_lost_on_the_way(tmp_path: Path, user_turn: dict[str, Any], message: str) -> None:
    row = {"messages": [user_turn, {"role": "assistant", "content": "yes"}]}
    with pytest.raises(DataError, match=f"row 0.*{message}"):
        split_of(tmp_path, [row])[0]


def test_parts_that_name_a_picture_get_that_one(tmp_path: Path) -> None:
    def row(*indexes: int) -> dict[str, Any]:
        parts = [{"type": "image", "index": index} for index in indexes]
        turns = [message("user", [*parts, text("Compare.")]), message("assistant", "a")]
        return {"messages": turns, "images": ["0.png", "1.png"]}

    split = split_of(tmp_path, [row(1, 0), row(0, 0)])
    assert split[0].images == (PICTURES[1], PICTURES[0])
    with pytest.raises(DataError, match=r"row 1.*\[0, 0\]"):
        split[1]


def _naming(*indexes: Any) -> dict[str, Any]:
    parts = [{"type": "image", "index": index} for index in indexes]
    return {"messages": asked(*parts, text("Compare.")), "images": ["0.png", "1.png"]}


def test_a_picture_is_named_by_a_whole_number_whatever_its_type(tmp_path: Path) -> None:
    """A table of pandas writes whole numbers as 1.0 where some parts have none, and NaN for those."""
    split = split_of(
        tmp_path, [_naming(1.0, 0.0), _naming(math.nan, math.nan), _naming("1", "0"), _naming(0.5, 1)]
    )
    assert split[0].images == (PICTURES[1], PICTURES[0])
    assert split[1].images == (PICTURES[0], PICTURES[1])
    with pytest.raises(DataError, match=r"row 2, turn 1: a part's index is '1'; needed is a whole number"):
        split[2]
    with pytest.raises(DataError, match=r"row 3, turn 1: a part's index is 0\.5"):
        split[3]


def test_a_blank_part_between_texts_is_kept(tmp_path: Path) -> None:
    parts = [text("A"), text("\n"), text("B")]
    row = {"messages": [message("user", [*parts, text(" ")]), message("assistant", parts)]}
    example = split_of(tmp_path, [row])[0]
    assert example.answer == "A\nB"
    assert example.turns[0].parts == ("A", "\n", "B")


@pytest.mark.parametrize("blank", ["", " \n", [], [{"type": "text", "text": ""}]])
def test_a_blank_system_turn_is_none(tmp_path: Path, blank: Any) -> None:
    row = {"messages": [message("system", blank), message("user", "q"), message("assistant", "a")]}
    assert split_of(tmp_path, [row])[0].turns == question_answer("q", "a", 0)


def test_a_set_without_pictures_is_told_how_to_say_so(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a"}
    with pytest.raises(
        DataError, match=r"data\.columns\.image: column 'image_id' .* null where rows are of text alone"
    ):
        split_of(tmp_path, [row])
    assert split_of(tmp_path, [row], columns=ColumnsConfig(image=None))[0].images == ()
    assert split_of(tmp_path, [row], text_only=True)[0].images == ()


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(PICTURES[1])
    url = (tmp_path / "a b.png").as_uri()
    assert url.startswith("file:///")
    assert "%20" in url
    split = split_of(tmp_path, [{"messages": asked({"type": "image", "image": url}, text("q"))}])
    assert split[0].images == (PICTURES[1],)


def test_a_data_url_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.data.pictures.MAX_DATA_URL", 100)
    split = split_of(tmp_path, [{"messages": asked({"type": "image", "url": DATA_URL}, text("q"))}])
    with pytest.raises(DataError, match=r"a data: URL of [\d,]+ characters; at most 100 are read"):
        split[0]
    assert MAX_DATA_URL >= 2**20


def test_pictures_in_two_columns_of_a_row_are_refused(tmp_path: Path) -> None:
    row = {"image": "0.png", "images": ["1.png"], "question": "q", "answer": "a"}
    with pytest.raises(
        DataError, match=r"row 0: pictures in the columns images and image. Set data\.columns\.image"
    ):
        split_of(tmp_path, [row])[0]
    assert split_of(tmp_path, [row], columns=ColumnsConfig(image="image"))[0].images == (PICTURES[0],)


@pytest.mark.parametrize(
    ("filled", "missing"),
    [
        ("0.png", None),
        ({"bytes": None, "path": "0.png"}, {"bytes": None, "path": None}),
        (["0.png"], [None]),
        (["0.png"], [""]),
    ],
)
def test_a_missing_picture_is_an_error_unless_rows_may_be_text(
    tmp_path: Path, filled: Any, missing: Any
) -> None:
    rows = [
        {"image": filled, "question": "q", "answer": "a"},
        {"image": missing, "question": "q", "answer": "a"},
    ]
    for kind in ("jsonl", "parquet"):
        with pytest.raises(
            DataError, match=r"row 1: the picture is missing \(null\).*data\.text_only to true"
        ):
            split_of(tmp_path / kind, rows, kind=kind)[1]
        split = split_of(tmp_path / kind, rows, kind=kind, text_only=True)
        assert [len(one.images) for one in split] == [1, 0]
    split = split_of(tmp_path, rows, columns=ColumnsConfig(image=None))
    assert [len(one.images) for one in split] == [0, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"the picture is missing: no image among question, answer\. .*data\.text_only"),
        ({"imgae": "1.png"}, r"no picture is used, but 'imgae' seems to hold one\. Set data\.columns\.image"),
        ({"picture": DATA_URL}, "no picture is used, but 'picture' seems to hold one"),
        ({"files": [{"path": "scans/1.TIFF"}]}, "no picture is used, but 'files' seems to hold one"),
    ],
)
def test_a_picture_under_another_name_is_not_lost(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    rows = [{"image": "0.png", "question": "q", "answer": "a"}, {"question": "q", "answer": "a"} | row]
    with pytest.raises(DataError, match=f"row 1: {message}"):
        split_of(tmp_path, rows)[1]
    if row:
        with pytest.raises(DataError, match=f"row 1: {message}"):
            split_of(tmp_path, rows, text_only=True)[1]
    named = ColumnsConfig(image="image")
    assert split_of(tmp_path, rows, text_only=True, columns=named)[1].images == ()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_of_pictures_that_no_conversation_uses_is_refused(tmp_path: Path, kind: str) -> None:
    rows = [{"messages": GOOD, "img": "0.png"}, {"messages": GOOD, "img": None}]
    with pytest.raises(DataError, match=r"'img' seems to hold pictures\. Set data\.columns\.image to it"):
        split_of(tmp_path, rows, kind=kind)
    assert split_of(tmp_path, rows, kind=kind, columns=ColumnsConfig(image="img"))[0].images == SINGLE.images
    assert split_of(tmp_path, rows, kind=kind, columns=ColumnsConfig(image=None))[0].images == ()


@pytest.mark.parametrize("form", [{"messages": GOOD}, {"question": "q", "answer": "a"}])
@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        *((kind, cell) for kind in ("jsonl", "parquet") for cell in ("0.png", DATA_URL)),
        *(("parquet", cell) for cell in (PICTURES[0], {"bytes": PICTURES[0], "path": None})),
    ],
)
def test_a_picture_in_a_later_row_of_an_unused_column_is_not_lost(
    tmp_path: Path, form: dict[str, Any], cell: Any, kind: str
) -> None:
    """Whatever the column is called; tables read it for rows without a picture alone."""
    rows = [form | {"ct": None}, form | {"ct": cell}]
    split = split_of(tmp_path, rows, kind=kind, text_only=True)
    assert split[0].images == ()
    with pytest.raises(DataError, match="row 1: no picture is used, but 'ct' seems to hold one"):
        split[1]
    assert split_of(tmp_path, rows, kind=kind, columns=ColumnsConfig(image="ct"), text_only=True)[1].images


def test_bytes_that_are_no_picture_are_none(tmp_path: Path) -> None:
    rows = [{"messages": GOOD, "vector": b"\x01\x02" * 40}]
    assert split_of(tmp_path, rows, kind="parquet")[0].images == ()


def test_a_picture_that_one_conversation_alone_has_elsewhere_is_not_lost(tmp_path: Path) -> None:
    split = split_of(tmp_path, [{"messages": GOOD}, {"messages": GOOD, "scan": "0.png"}])
    assert split[0].images == ()
    with pytest.raises(DataError, match="row 1: no picture is used, but 'scan' seems to hold one"):
        split[1]


def test_an_empty_cell_beside_a_picture_is_none(tmp_path: Path) -> None:
    single = {"question": QUESTION, "answer": ANSWER}
    rows = [single | {"images": [], "image": "0.png"}, single | {"images": ["0.png"], "image": ""}]
    split = split_of(tmp_path, [*rows, single | {"images": None, "image": ""}])
    assert [split[n].images for n in (0, 1)] == [SINGLE.images] * 2
    with pytest.raises(DataError, match=r"row 2: the picture is missing .*data\.text_only"):
        split[2]


def test_of_several_empty_columns_of_pictures_one_counts(tmp_path: Path) -> None:
    empty: dict[str, Any] = {"images": [], "image": []}
    rows = [{"messages": GOOD} | empty, {"messages": GOOD, "image_id": 7} | empty]
    assert [one.images for one in split_of(tmp_path, rows)] == [(), ()]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_videos_and_sounds_are_refused_and_other_columns_told(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": GOOD, "videos": [], "tools": "[]"},
        {"messages": GOOD, "videos": ["1.mp4"], "tools": "[]"},
    ]
    split = split_of(tmp_path, rows, kind=kind)
    assert split[0].answer == "a"
    assert split.unused == ("tools",)
    with pytest.raises(
        DataError, match="row 1: it has something in 'videos'; pictures and texts alone are used"
    ):
        split[1]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_number_is_no_picture(tmp_path: Path, kind: str) -> None:
    """Sets made from COCO name their pictures by numbers, in MedPix's column of pictures."""
    row = {"image_id": 17, "question": QUESTION, "answer": ANSWER}
    assert split_of(tmp_path, [row | {"image": "0.png"}], kind=kind)[0] == SINGLE
    with pytest.raises(DataError, match=r"the picture is a int.*column image_id: set data\.columns\.image"):
        split_of(tmp_path, [row], kind=kind)[0]
    named = row | {"image_id": "COCO_17", "image": "0.png"}
    with pytest.raises(
        DataError, match=r"COCO_17 cannot be read.*The row has image too.*data\.columns\.image"
    ):
        split_of(tmp_path, [named], kind=kind)[0]
    assert split_of(tmp_path, [named], kind=kind, columns=ColumnsConfig(image="image"))[0] == SINGLE


@pytest.mark.parametrize(
    "turns",
    [
        [message("user", f"<image>\n{QUESTION}"), message("assistant", [text(ANSWER)])],
        [message("user", QUESTION), message("assistant", [text(ANSWER)])],
        [message("system", []), message("user", QUESTION), message("assistant", ANSWER)],
    ],
)
def test_texts_and_lists_of_parts_mix(tmp_path: Path, turns: list[dict[str, Any]]) -> None:
    assert split_of(tmp_path, [{"messages": turns, "image": "0.png"}])[0] == SINGLE


def test_a_placeholder_in_a_part_is_said_to_be_none(tmp_path: Path) -> None:
    row = {"messages": asked(text(f"<image>{QUESTION}")), "image": "0.png"}
    with pytest.raises(DataError, match=r"1 picture.*0 place.*A <image> in a part of type text"):
        split_of(tmp_path, [row])[0]


def test_the_question_is_the_last_user_s(tmp_path: Path) -> None:
    turns = [message("user", "What?"), message("assistant", "One."), message("assistant", "Two.")]
    example = split_of(tmp_path, [{"messages": turns}])[0]
    assert (example.question, example.answer) == ("What?", "Two.")
    assert spoken(example) == {"question": "What?", "2. assistant": "One."}


@pytest.mark.parametrize(
    "mask",
    [
        *({"weight": 0}, {"loss": False}, {"train": False}, {"loss_weight": 0}, {"loss_scale": 0.0}),
        *({"weight": 0.5}, {"train": "no"}, {"weight": "0"}, {"loss": [1, 0]}, {"trainable": False}),
        *({"ignore": True}, {"ignore": "true"}, {"label": False}, {"label": -100}),
    ],
)
def test_a_turn_that_is_not_to_be_learned_as_it_is_is_refused(tmp_path: Path, mask: dict[str, Any]) -> None:
    (name,) = mask
    with pytest.raises(DataError, match=f"turn 2: its {name} is .*data.train_on"):
        split_of(tmp_path, [{"messages": [GOOD[0], GOOD[1] | mask]}])[0]


@pytest.mark.parametrize(
    "key",
    [
        *({"weight": 1}, {"weight": "1.0"}, {"loss": None}, {"train": True}, {"train": "yes"}, {"label": 1}),
        *({"label": "plane"}, {"ignore": 0}, {"ignore": ""}, {"weight": float("nan")}),
    ],
)
def test_a_turn_that_is_said_to_be_learned_is_learned(tmp_path: Path, key: dict[str, Any]) -> None:
    asked = GOOD[0] | {"train": False, "weight": 0}  # as no question is learned
    assert split_of(tmp_path, [{"messages": [asked, GOOD[1] | key]}])[0].answer == "a"


def test_what_a_pair_of_question_and_answer_says_besides_is_not_lost(tmp_path: Path) -> None:
    pair = {"user": "q", "assistant": "a", "source": "VQAv2"}
    assert split_of(tmp_path, [{"messages": [pair]}])[0].answer == "a"
    for more in ({"weight": 0}, {"mask": 1}, {"image": "0.png"}):
        with pytest.raises(DataError, match=f"turn [12]: it.* {next(iter(more))}|turn 1: it has"):
            split_of(tmp_path, [{"messages": [pair | more]}])[0]


@pytest.mark.parametrize("near", ["conversation", "message"])
def test_a_column_of_nearly_the_name_is_suggested(tmp_path: Path, near: str) -> None:
    with pytest.raises(DataError, match=rf"data\.columns\.{near}s: .*; did you mean '{near}'"):
        split_of(tmp_path, [{near: GOOD, "image": "0.png"}])


def test_the_format_decides_where_two_fit(tmp_path: Path) -> None:
    row = {
        "messages": GOOD,
        "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
    }
    for form, answer in (("messages", "a"), ("conversations", "A")):
        assert split_of(tmp_path, [row], format=form)[0].answer == answer
    with pytest.raises(DataError, match=r"data\.columns\.question: column 'question' is not there"):
        split_of(tmp_path, [row], format="question_answer")


def test_columns_that_the_recipe_names_say_the_form(tmp_path: Path) -> None:
    row = {"messages": GOOD, "q": "Q", "answer": "A", "image": "0.png"}
    assert split_of(tmp_path, [row], columns=ColumnsConfig(question="q"))[0].question == "Q"
    with pytest.raises(DataError, match=r"column 'chat' is not there; found .*messages"):
        split_of(tmp_path, [row], columns=ColumnsConfig(messages="chat"))
    chat = [{"chat": GOOD}]
    assert split_of(tmp_path, chat, columns=ColumnsConfig(messages="chat"))[0].form == "messages"


def test_lists_of_structs_may_lie_column_by_column(tmp_path: Path) -> None:
    """As older files of the library datasets hold them."""
    columns = {"from": ["human", "gpt"], "value": ["q", "a"]}
    assert split_of(tmp_path, [{"conversations": columns}], kind="parquet")[0].turns == question_answer(
        "q", "a", 0
    )


# --- answers of several people ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["no", "Yes", "yes", "yes "], ("Yes", 1)),
        ([{"answer": "2", "answer_id": 1}, {"answer": "3"}, {"answer": "3"}], ("3", 1)),
        ({"answer": ["a", "b"], "answer_id": [1, 2]}, ("a", 1)),
        (["", None, "b"], ("b", 2)),
        ([1, 1, 2], ("1", 1)),
    ],
)
def test_most_of_the_answers_decide(answers: Any, expected: tuple[str, int]) -> None:
    assert majority(answers, where="here") == expected


@pytest.mark.parametrize("answers", [None, "yes", 3, [], ["", " "], [["a"]], [{"text": "a"}]])
def test_lists_without_answers_are_refused(answers: Any) -> None:
    with pytest.raises(DataError, match=r"^here: the (answer|list)"):
        majority(answers, where="here")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_vqa_rows_with_ten_answers(tmp_path: Path, kind: str) -> None:
    answers = [{"answer": "net" if n in (1, 4) else "racket", "answer_id": n} for n in range(10)]
    row = {"image": "0.png", "question": "What is it?", "answers": answers}
    data = {"columns": ColumnsConfig(answer="answers")}
    with pytest.raises(
        DataError, match=r"row 0: the answer is a list; needed is one text, or data\.answers majority"
    ):
        split_of(tmp_path, [row], kind=kind, **data)[0]
    example = split_of(tmp_path, [row], kind=kind, answers="majority", **data)[0]
    assert (example.answer, example.num_outvoted) == ("racket", 2)


def test_answers_that_lost_the_vote_are_counted(tmp_path: Path) -> None:
    rows = [{"question": "q", "answers": ["a", "b", "b"]}, {"question": "r", "answers": ["c", "c"]}]
    columns = ColumnsConfig(answer="answers", image=None)
    split = split_of(tmp_path, rows, answers="majority", columns=columns)
    found = look_at(split.settings, "train", None)
    assert (found.num_usable, found.num_outvoted, dict(found.num_pictures)) == (2, 1, {0: 2})


# --- anything at all --------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "type", "text", "image", "url", "bytes", "path"]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(value=ANYTHING, pictures=st.lists(ANYTHING, max_size=3))
def test_rubbish_is_a_data_error(value: Any, pictures: list[Any]) -> None:
    from shared.data.conversations import READERS

    for read in READERS.values():
        for given_value in (
            value,
            [value],
            [{"role": "user", "content": value}, {"role": "assistant", "content": "a"}],
        ):
            try:
                found = read(given_value, pictures, where="here")
            except DataError:
                continue
            assert found.turns[-1].role == "assistant"
            assert sum(turn.num_pictures for turn in found.turns) == len(found.pictures)


def test_a_list_of_a_million_turns_is_refused_at_once(tmp_path: Path) -> None:
    from shared.data.conversations import read_messages

    with pytest.raises(DataError, match="1,000,000 turns; at most"):
        read_messages([message("user", "q")] * 1_000_000, [], where="here")


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"messages": [message("user", "Picture 1: <img>0.png</img>\nWhat?"), ANSWERED]}, "<img>0.png</img>"),
        (
            {"messages": [message("user", "Compare <|image_1|>"), ANSWERED], "images": ["0.png"]},
            "<|image_1|>",
        ),
        ({"conversations": [{"from": "human", "value": "<image 1> or 2"}, ANSWERED]}, "<image 1>"),
        ({"messages": [message("user", "<image_00>What?"), ANSWERED], "images": ["0.png"]}, "<image_00>"),
        ({"question": "<image 1> shows?", "answer": "a", "image": "0.png"}, "<image 1>"),
        *(
            ({"question": f"{place}\nWhat?", "answer": "a", "image": "0.png"}, place)
            for place in (
                *("<|image|>", "<|image_pad|>", "[IMG]", "<start_of_image>", "<IMG_CONTEXT>", "<ImageHere>"),
                *("<image_placeholder>", "<|video_pad|>", "<|audio|>", "<video>", "<audio>"),
            )
        ),
        (
            {"messages": [message("user", "<image>\n<video>\nWhat?"), ANSWERED], "images": ["0.png"]},
            "<video>",
        ),
        ({"messages": [message("user", f"{QWEN_PLACE}What?"), ANSWERED], "images": ["0.png"]}, QWEN_PLACE),
        (
            {"messages": [message("user", "<image>Find <ref-object>"), ANSWERED], "images": ["0.png"]},
            "<ref-object>",
        ),
        (
            {
                "messages": [message("user", "<image>Find"), message("assistant", "<bbox>")],
                "images": ["0.png"],
            },
            "<bbox>",
        ),
    ],
)
def test_places_that_another_tool_fills_are_refused(tmp_path: Path, row: dict[str, Any], found: str) -> None:
    with pytest.raises(DataError, match=f"row 0.*{re.escape(found)}.*another tool.*Write <image>"):
        split_of(tmp_path, [row])[0]


def test_an_answer_may_speak_of_places(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "see <image 1>", "image": "0.png"}]
    assert split_of(tmp_path, rows)[0].answer == "see <image 1>"


@pytest.mark.parametrize(
    "question",
    ["How is <video> used?", "<video>\n<source src=a></video>\nWhy?", "[IMG]http://x.org/a.png[/IMG] is?"],
)
def test_html_and_addresses_in_brackets_are_texts(tmp_path: Path, question: str) -> None:
    row = {"question": question, "answer": "a", "image": "0.png"}
    assert split_of(tmp_path, [row])[0].question == question


def test_a_place_in_a_part_of_type_text_is_refused(tmp_path: Path) -> None:
    rows = [{"messages": asked({"type": "image"}, text("<image>\nWhich?")), "images": ["0.png"]}]
    with pytest.raises(DataError, match="turn 1: a part of type text says <image>"):
        split_of(tmp_path, rows)[0]


def test_a_question_says_where_its_pictures_stand(tmp_path: Path) -> None:
    row = {"images": ["0.png", "1.png"], "question": "<image>then<image>\nWorse?", "answer": "yes"}
    (read,) = split_of(tmp_path, [row])
    assert read.turns == (user(None, "then", None, "\nWorse?"), said("yes"))
    assert read.images == (PICTURES[0], PICTURES[1])
    with pytest.raises(DataError, match=r"2 picture\(s\) beside the turns, and 1 place"):
        split_of(tmp_path, [row | {"question": "<image>Worse?"}])[0]


def test_a_text_in_a_picture_s_part_is_not_lost(tmp_path: Path) -> None:
    rows = [{"messages": asked({"type": "image", "image": "0.png", "text": "Figure 1"}, text(QUESTION))}]
    with pytest.raises(DataError, match="turn 1: a part holds both a text and a picture"):
        split_of(tmp_path, rows)[0]


def test_parts_of_a_typed_table_have_nulls_for_what_others_have(tmp_path: Path) -> None:
    parts = [
        {"type": "text", "text": QUESTION, "image_url": {"url": None}},
        {"type": "image_url", "text": None, "image_url": {"url": "0.png"}},
    ]
    assert split_of(tmp_path, [{"messages": asked(*parts[::-1])}], kind="parquet")[0].turns == SINGLE.turns


def test_pairs_of_user_and_assistant_are_two_turns(tmp_path: Path) -> None:
    pairs = [{"user": "Which?", "assistant": "axial", "source": "s"}, {"user": "Sure?", "assistant": "yes"}]
    rows = [{"texts": pairs, "images": ["0.png"]}]
    split = split_of(tmp_path, rows, columns=ColumnsConfig(messages="texts"))
    assert split[0].turns == (user(None, "Which?"), said("axial"), user("Sure?"), said("yes"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_prompt_and_completion_may_be_lists_of_turns(tmp_path: Path, kind: str) -> None:
    row = {
        "prompt": [message("system", "Short."), message("user", QUESTION)],
        "completion": [message("assistant", ANSWER)],
        "images": ["0.png"],
    }
    columns = ColumnsConfig(question="prompt", answer="completion")
    (read,) = split_of(tmp_path, [row], kind=kind, columns=columns)
    assert read.turns == (Turn("system", ("Short.",)), *SINGLE.turns)
    assert read.images == SINGLE.images


def test_a_system_turn_may_stand_beside_the_turns(tmp_path: Path) -> None:
    system = Turn("system", ("In French.",))
    told = message("system", "In French.")
    rows: list[dict[str, Any]] = [
        {"messages": GOOD, "system": " In French. "},
        {"messages": [told, *GOOD], "system": "In French."},
        {"messages": GOOD, "system": " "},
        {"messages": GOOD, "system": None},
        {"messages": [message("system", "In Latin."), *GOOD], "system": "In French."},
        {"question": "q", "answer": "a", "system": "cardiovascular"},
    ]
    split = split_of(tmp_path, rows, columns=ColumnsConfig(image=None))
    assert [split[n].turns[0] == system for n in range(4)] == [True, True, False, False]
    with pytest.raises(DataError, match=r"row 4: a system's turn beside the turns.*data\.columns\.system"):
        split[4]
    assert split[5].turns[0].role == "user"


@pytest.mark.parametrize("place", ["<image>", "<|image_pad|>"])
def test_a_system_turn_beside_the_turns_shows_no_picture(tmp_path: Path, place: str) -> None:
    """It would be learned as a text, and the row's picture stand elsewhere."""
    turns: list[dict[str, Any]] = [
        {"messages": GOOD, "told": f"See {place}.", "image": "0.png"},
        {"question": "q", "answer": "a", "told": f"See {place}.", "image": "0.png"},
    ]
    for row in turns:
        split = split_of(tmp_path, [row], columns=ColumnsConfig(system="told"))
        with pytest.raises(DataError, match=f"row 0: .*{re.escape(place)}"):
            split[0]


def test_a_named_column_of_system_s_turns_counts_beside_questions_and_answers(tmp_path: Path) -> None:
    row = {"images": ["0.png"], "answer": ANSWER}
    rows: list[dict[str, Any]] = [
        row | {"question": QUESTION, "told": " In French. "},
        row | {"question": f"<image>{QUESTION}", "told": "In French."},
        row | {"question": QUESTION, "told": None},
    ]
    split = split_of(tmp_path, rows, columns=ColumnsConfig(system="told"))
    spoken = (Turn("system", ("In French.",)), *SINGLE.turns)
    assert [one.turns for one in split] == [spoken, spoken, SINGLE.turns]
    assert split.unused == ()


def test_a_column_of_the_default_name_says_nothing_beside_questions(tmp_path: Path) -> None:
    """In MedPix, ``system`` is the organ system; ``check`` lists the column."""
    split = split_of(
        tmp_path, [{"question": QUESTION, "answer": ANSWER, "images": ["0.png"], "system": "heart"}]
    )
    assert split[0].turns == SINGLE.turns
    assert split.unused == ("system",)


def test_a_system_turn_may_stand_beside_prompt_and_completion(tmp_path: Path) -> None:
    row = {"prompt": GOOD[:1], "completion": GOOD[1:], "system": "In French."}
    split = split_of(
        tmp_path, [row], columns=ColumnsConfig(question="prompt", answer="completion", image=None)
    )
    assert split[0].turns[0] == Turn("system", ("In French.",))
    assert split.unused == ()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_parts_of_a_prompt_in_other_columns_are_not_lost(tmp_path: Path, kind: str) -> None:
    columns = ColumnsConfig(question="instruction", answer="output", image=None)
    row = {"instruction": "Translate.", "output": "oui"}
    for name, value, message in (
        ("input", "yes", "'input' belongs to the instruction"),
        ("history", [["q", "a"]], "earlier turns in 'history'"),
    ):
        with pytest.raises(DataError, match=f"row 0: .*{message}"):
            split_of(tmp_path / name, [row | {name: value}], kind=kind, columns=columns)[0]
    rows = [row | {"input": "", "history": []}, row | {"input": "", "history": None}]
    assert len(list(split_of(tmp_path / "empty", rows, kind=kind, columns=columns))) == 2
    rows = [{"question": "q", "answer": "a", "history": "smoker", "input": "x"}]
    assert split_of(tmp_path / "others", rows, columns=ColumnsConfig(image=None))[0].question == "q"


def test_a_picture_that_is_no_number_is_missing(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a", "image": float("nan")}]
    assert split_of(tmp_path, rows, text_only=True)[0].images == ()


def test_an_unused_column_of_sounds_is_not_decoded(tmp_path: Path) -> None:
    """Which needs a package that pictures do not need."""
    sound = pa.array([{"bytes": b"RIFF\x24\0\0\0WAVEfmt ", "path": None}])
    stored = pa.table({"messages": pa.array([GOOD]), "speech": sound})
    features = datasets.Features.from_arrow_schema(stored.schema)
    features["speech"] = datasets.Audio()
    datasets.Dataset(stored.cast(features.arrow_schema)).save_to_disk(tmp_path / "train")
    split = open_split(DataConfig(source=str(tmp_path / "train")), "train")
    assert split[0].answer == GOOD[-1]["content"]


def test_columns_of_json_are_read_alike_wherever_they_lie(tmp_path: Path) -> None:
    """Where values of a column are of unlike types, the library ``datasets`` keeps JSON texts."""
    rows = [
        {"messages": asked({"type": "image"}, text(QUESTION)), "images": ["0.png"], "answer": 3},
        {
            "messages": [message("user", "text alone?"), message("assistant", "fine")],
            "images": [],
            "answer": "yes",
        },
    ]
    read = list(split_of(tmp_path / "lines", rows))
    saved = datasets.load_dataset(
        "json",
        data_files=str(tmp_path / "lines" / "train.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "c"),
    )
    assert '"Json"' in json.dumps(saved.features.to_dict())
    for folder in ("parquet", "arrow", "saved"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(PICTURES[0])
    saved.to_parquet(tmp_path / "parquet" / "train.parquet")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "saved")
    shutil.copy(next((tmp_path / "saved" / "train").glob("*.arrow")), tmp_path / "arrow" / "train.arrow")
    for folder in ("parquet", "arrow"):
        assert list(open_split(DataConfig(source=str(tmp_path / folder)), "train")) == read, folder
    on_disk = open_rows(str(tmp_path / "saved"), split="train")
    assert on_disk[0]["messages"] == rows[0]["messages"]
    assert [on_disk[n]["answer"] for n in range(2)] == [3, "yes"]
    assert [DatasetRows(saved, None)[n]["answer"] for n in range(2)] == [3, "yes"]


def test_a_column_of_json_with_another_text_names_its_row(tmp_path: Path) -> None:
    table = pa.table({"question": ["q"], "answer": ["{"]})
    features = {"question": {"dtype": "string", "_type": "Value"}, "answer": {"_type": "Json"}}
    told = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(told), tmp_path / "train.parquet")
    split = open_split(DataConfig(source=str(tmp_path), columns=ColumnsConfig(image=None)), "train")
    with pytest.raises(DataError, match=r"train\.parquet, row 0 of block 0: '\{' is no JSON"):
        split[0]
