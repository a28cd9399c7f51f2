"""Splits open from every kind of source, and rows that cannot be used are refused by name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import encoded_picture
from torch.utils.data import DataLoader

from shared.data.rows import Example, open_split
from shared.data.sources import DatasetRows, open_rows
from shared.data.texts import required_text
from shared.errors import DataError
from shared.recipes import ColumnsConfig, DataConfig, SplitsConfig

PICTURE = encoded_picture(0)
MEDPIX = Path(__file__).parents[2] / "shared" / "medpix-vqa"


def row(**changes: Any) -> dict[str, Any]:
    return {
        "image_id": PICTURE,
        "mode": "alignment",
        "case_id": "MPX1",
        "question": "Which plane?",
        "answer": "axial",
    } | changes


def jsonl(folder: Path, rows: list[dict[str, Any]], name: str = "train.jsonl") -> DataConfig:
    """A folder with rows and the picture ``p.png``."""
    folder.mkdir(exist_ok=True)
    (folder / "p.png").write_bytes(PICTURE)
    lines = [json.dumps({"image_id": "p.png"} | one) for one in rows]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return DataConfig(source=str(folder))


def words(**changes: Any) -> dict[str, Any]:
    return {"question": "Which plane?", "answer": "axial"} | changes


def _parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def _parquet_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "anything.parquet")
    return folder / "anything.parquet"


def _parquet_of_structs(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return _parquet(folder, [one | {"image_id": {"bytes": one["image_id"], "path": "x.png"}} for one in rows])


def _hub_layout(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "data").mkdir()
    for shard, some in enumerate((rows[:1], rows[1:])):
        pq.write_table(pa.Table.from_pylist(some), folder / "data" / f"train-0000{shard}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:1]), folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text("# data")
    return folder


def _folders_of_splits(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for split in ("train", "validation"):
        (folder / split).mkdir()
        _parquet_file(folder / split, rows)
    return folder


def _saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def _saved_splits(folder: Path, rows: list[dict[str, Any]]) -> Path:
    data = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": data, "validation": data}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def _arrow(folder: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    with (
        pa.OSFile(str(folder / "train.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    return folder


def _picture_files(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (folder / "pictures").mkdir()
    for number, one in enumerate(rows):
        (folder / "pictures" / f"{number}.png").write_bytes(one["image_id"])
    return [one | {"image_id": f"pictures/{number}.png"} for number, one in enumerate(rows)]


def _parquet_of_paths(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return _parquet(folder, _picture_files(folder, rows))


def _json_lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    first, *rest = _picture_files(folder, rows)
    absolute = first | {"image_id": str(folder / first["image_id"])}
    lines = [json.dumps(one, ensure_ascii=False) for one in (absolute, *rest)]
    (folder / "train.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "write",
    [
        *(_parquet, _parquet_file, _parquet_of_structs, _parquet_of_paths, _hub_layout, _folders_of_splits),
        *(_saved, _saved_splits, _arrow, _json_lines),
    ],
)
def test_every_source_gives_the_same_examples(
    write: Callable[[Path, list[dict[str, Any]]], Path], tmp_path: Path
) -> None:
    rows = [row(image_id=encoded_picture(n), answer=f"a {n}\n\u00fcber", mode=None) for n in range(3)]
    split = open_split(DataConfig(source=str(write(tmp_path, rows))), "train")
    expected = [
        Example.single(encoded_picture(n), "Which plane?", f"a {n}\n\u00fcber", kind="", case="MPX1", index=n)
        for n in range(3)
    ]
    assert list(split) == expected
    assert len(split) == 3
    again = pickle.loads(pickle.dumps(split))
    assert list(again) == expected
    with pytest.raises(IndexError):
        split[3]


def test_data_loader_workers_read_the_same_rows(vqa_folder: Path, examples: list[Example]) -> None:
    split = open_split(DataConfig(source=str(vqa_folder)), "train")
    assert len(pickle.dumps(split)) < 20_000
    loader = DataLoader(split, batch_size=None, num_workers=2)  # type: ignore[arg-type]
    assert list(loader) == examples


def test_limit_takes_the_first_rows_of_each_split(vqa_folder: Path, examples: list[Example]) -> None:
    data = DataConfig(source=str(vqa_folder), limit=5)
    assert list(open_split(data, "train")) == examples[:5]
    assert len(open_split(data, "validation")) == 4


def test_a_rewritten_file_is_read_again(tmp_path: Path) -> None:
    _parquet(tmp_path, [row(answer="one")])
    assert open_split(DataConfig(source=str(tmp_path)), "train")[0].answer == "one"
    _parquet(tmp_path, [row(answer="two")])
    assert open_split(DataConfig(source=str(tmp_path)), "train")[0].answer == "two"


@given(
    st.text(max_size=6),
    st.text(min_size=1).filter(str.strip),
    st.sampled_from(["", " ", "\n", "\t\u00a0\u3000"]),
)
def test_texts_are_trimmed_at_the_ends_and_nowhere_else(head: str, body: str, blank: str) -> None:
    from shared.data.texts import required_text

    given_text = blank + head + "x\r\n\n  x" + body + "\u2009x" + blank
    kept = required_text(given_text, "answer", where="here")
    assert kept == given_text.strip()
    assert kept in given_text


def test_jsonl_keeps_types_that_a_column_reader_would_guess(tmp_path: Path) -> None:
    """A column of dates is read as timestamps by pyarrow, and mixed types are refused by it."""
    answers = ["2020-01-01", "2020-01-02", 3, 2.5, "007"]
    split = open_split(jsonl(tmp_path, [words(answer=answer) for answer in answers]), "train")
    assert [one.answer for one in split] == ["2020-01-01", "2020-01-02", "3", "2.5", "007"]


def test_numbers_in_typed_columns_are_written_out(tmp_path: Path) -> None:
    assert open_split(DataConfig(source=str(_parquet(tmp_path, [row(answer=12)]))), "train")[0].answer == "12"


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_floats_read_as_their_type_prints_them(tmp_path: Path, kind: pa.DataType) -> None:
    """As its shortest decimal: 0.1 in 32 bits is 0.10000000149011612 in 64."""
    values = [0.1, 2.0, 65504.0, None]
    votes = pa.array([[{"answer": one}] for one in values], pa.list_(pa.struct({"answer": kind})))
    table = pa.table({"question": ["q"] * 4, "answer": pa.array(values, kind), "votes": votes})
    pq.write_table(table, tmp_path / "train.parquet")
    for rows in (open_rows(str(tmp_path), split="train"), DatasetRows(datasets.Dataset(table), None)):
        assert [str(rows[n]["answer"]) for n in range(3)] == ["0.1", "2.0", "65504.0"]
        assert [str(rows[n]["votes"][0]["answer"]) for n in range(3)] == ["0.1", "2.0", "65504.0"]
        assert rows[3]["answer"] is None is rows[3]["votes"][0]["answer"]


@pytest.mark.parametrize(("value", "text"), [("3.50", "3.50"), ("1E+3", "1000"), ("-0.1", "-0.1")])
def test_a_decimal_is_written_as_it_stands(value: str, text: str) -> None:
    """A Parquet column of decimals has them."""
    assert required_text(Decimal(value), "answer", where="row 0") == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "the answer is missing"),
        ({"answer": ""}, "the answer is empty"),
        ({"question": " \n\u00a0"}, "the question is empty"),
        ({"answer": "\u200b\ufeff \u00ad"}, r"the answer has no visible character, only '\\u200b"),
        ({"answer": "\u2800\u3164"}, "the answer has no visible character"),
        ({"question": "\x07"}, "the question has no visible character"),
        ({"question": None}, "the question is missing"),
        ({"answer": ["a", "b"]}, "the answer is a list; needed is one text"),
        ({"answer": {"text": "a"}}, "the answer is a dict"),
        ({"answer": True}, "the answer is a bool"),
        ({"answer": float("nan")}, "the answer is missing"),
        ({"answer": float("-inf")}, "the answer is -inf, no finite number"),
        ({"answer": "bad \ud800"}, "the answer is not valid Unicode"),
        ({"image_id": None}, "the picture is missing"),
        ({"image_id": "nowhere.png"}, "nowhere.png cannot be read"),
        ({"image_id": "."}, "is a folder, not a file"),
        ({"image_id": "a\0b"}, "cannot be read"),
        ({"image_id": 7}, "the picture is a int"),
        ({"image_id": "https://example.org/p.png"}, "the picture is a URL"),
        ({"image_id": {"bytes": None, "path": None}}, "the picture is missing"),
        ({"image_id": {"url": "p.png"}}, "the picture is a dict"),
    ],
)
def test_unusable_rows_are_named_and_the_others_stay_usable(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    split = open_split(jsonl(tmp_path, [words(), words(**change), words()]), "train")
    with pytest.raises(DataError, match=message) as caught:
        split[1]
    assert str(caught.value).startswith(f"{tmp_path}, split train, row 1: ")
    assert split[0].answer == split[2].answer == "axial"


def test_nulls_in_parquet_are_named(tmp_path: Path) -> None:
    split = open_split(DataConfig(source=str(_parquet(tmp_path, [row(), row(answer=None)]))), "train")
    with pytest.raises(DataError, match="row 1: the answer is missing"):
        split[1]


def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path) -> None:
    data = jsonl(tmp_path, [words(), words()])
    with open(tmp_path / "train.jsonl", "a", encoding="utf-8") as stream:
        stream.write('\n\n{"question": \n["a"]\n')
    split = open_split(data, "train")
    with pytest.raises(DataError, match=r"train\.jsonl, line 4: not JSON"):
        split[2]
    with pytest.raises(DataError, match=r"train\.jsonl, line 5: a list"):
        split[3]


def test_kind_and_case_may_be_missing_unless_asked_for(tmp_path: Path) -> None:
    data = jsonl(tmp_path, [words()])
    example = open_split(data, "train")[0]
    assert (example.kind, example.case) == ("", "")
    asked = data.model_copy(update={"columns": ColumnsConfig(kind="type")})
    with pytest.raises(DataError, match=r"data\.columns\.kind: column 'type' is not there"):
        open_split(asked, "train")


def test_any_line_may_bring_a_column(tmp_path: Path) -> None:
    """Colons in texts, columns of other rows, nested keys, and lines written in another style."""
    rows = [
        words(answer='sizes: 3:4, and "mode": 5'),
        words(mode="alignment"),
        words(nested={"question": 1, "inner": 2}),
        words(case_id="MPX1"),
    ]
    data = jsonl(tmp_path, rows)
    with open(tmp_path / "train.jsonl", "a", encoding="utf-8") as stream:
        stream.write('\n{"image_id" : "p.png", "question" : "q", "answer" : "a", "\\u00fc" :1}')
        stream.write('\n{"image_id":"p.png","question":"q","answer":"a","\u00e4":1}')
    split = open_split(data, "train")
    found = ["image_id", "question", "answer", "mode", "nested", "case_id", "\u00fc", "\u00e4"]
    assert split.rows.columns == found
    assert [(one.kind, one.case) for one in split][:4] == [
        ("", ""),
        ("alignment", ""),
        ("", ""),
        ("", "MPX1"),
    ]


@pytest.mark.parametrize("first", ['{"image_id": "p', '["a: b"]', "[" * 100_000])
def test_a_bad_first_line_does_not_refuse_the_split(first: str, tmp_path: Path) -> None:
    data = jsonl(tmp_path, [words(mode="alignment")])
    file = tmp_path / "train.jsonl"
    file.write_text(first + "\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
    split = open_split(data, "train")
    assert split[1].kind == "alignment"
    with pytest.raises(DataError, match="line 1"):
        split[0]


def test_unknown_columns_and_splits_are_listed_with_a_suggestion(vqa_folder: Path) -> None:
    columns = ColumnsConfig(question="qestion")
    with pytest.raises(DataError, match=r"'qestion'.*found answer, case_id, .*did you mean 'question'"):
        open_split(DataConfig(source=str(vqa_folder), columns=columns), "train")
    splits = SplitsConfig(train="trian")
    with pytest.raises(
        DataError, match="'trian' is not there; found train, validation; did you mean 'train'"
    ):
        open_split(DataConfig(source=str(vqa_folder), splits=splits), "train")
    with pytest.raises(DataError, match=r"data\.splits\.test is null"):
        open_split(DataConfig(source=str(vqa_folder)), "test")


def test_a_saved_data_set_lists_its_splits(tmp_path: Path) -> None:
    source = _saved_splits(tmp_path, [row()])
    with pytest.raises(DataError, match="split 'test' is not there; found train, validation"):
        open_split(DataConfig(source=str(source), splits=SplitsConfig(test="test")), "test")


def test_splits_whose_names_begin_alike_are_kept_apart(tmp_path: Path) -> None:
    for name in ("train", "train_small", "validation"):
        pq.write_table(pa.Table.from_pylist([row(answer=name)]), tmp_path / f"{name}-00000-of-00001.parquet")
    for role in ("train", "train_small"):
        split = open_split(DataConfig(source=str(tmp_path), splits=SplitsConfig(train=role)), "train")
        assert [one.answer for one in split] == [role]


def test_a_file_in_a_split_folder_belongs_to_what_its_own_name_says(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("part-0", "validation"):
        pq.write_table(pa.Table.from_pylist([row(answer=name)]), tmp_path / "train" / f"{name}.parquet")
    data = DataConfig(source=str(tmp_path))
    assert [one.answer for one in open_split(data, "train")] == ["part-0"]
    assert [one.answer for one in open_split(data, "validation")] == ["validation"]


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c", "nowhere.jsonl"])
def test_a_missing_path_says_where_it_looked(source: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_split(DataConfig(source=source), "train")


def test_a_hub_name_without_network_says_what_was_tried() -> None:
    with pytest.raises(
        DataError,
        match="nobody/nothing: cannot be opened: it is not on this machine, and HF_HUB_OFFLINE is set",
    ):
        open_split(DataConfig(source="nobody/nothing", revision="main"), "train")


def test_empty_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file; needed \*\.parquet"):
        open_split(DataConfig(source=str(tmp_path)), "train")
    (tmp_path / "train.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="split train: no rows"):
        open_split(DataConfig(source=str(tmp_path)), "train")


def test_a_damaged_parquet_file_is_a_data_error(tmp_path: Path) -> None:
    file = _parquet_file(tmp_path, [row()])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"split 'train' of data.source {file}: cannot be opened"):
        open_split(DataConfig(source=str(file)), "train")


@pytest.mark.skipif(not MEDPIX.exists(), reason="the MedPix sample does not lie beside the checkout")
def test_the_medpix_sample_opens_whole() -> None:
    data = DataConfig(source=str(MEDPIX))
    train = list(open_split(data, "train"))
    assert len(train) == 1200
    assert len(open_split(data, "validation")) == 200
    assert {one.kind for one in train} == {"alignment", "from caption"}
    assert any("\n" in one.answer for one in train)


def test_jsonl_pictures_are_relative_to_their_own_file(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        (folder / "p.png").write_bytes(encoded_picture(number))
        (folder / "part.jsonl").write_text(json.dumps(words(image_id="p.png")))
    split = open_split(DataConfig(source=str(tmp_path)), "train")
    assert [one.images[0] for one in split] == [encoded_picture(0), encoded_picture(1)]


def test_a_split_whose_name_ends_in_digits(tmp_path: Path) -> None:
    for name in ("fold1", "fold2"):
        data = jsonl(tmp_path, [words(answer=name)], name=f"{name}.jsonl")
    folds = data.model_copy(update={"splits": SplitsConfig(train="fold1", validation="fold2")})
    assert [one.answer for one in open_split(folds, "train")] == ["fold1"]
    assert [one.answer for one in open_split(folds, "validation")] == ["fold2"]
