"""JSON in all its files, names that look like patterns, and pictures wherever a table holds them."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard
from samples import encoded_picture

from shared.cache.storage import open_folder
from shared.data.copies import Stamp, copies_folder, kept_copy
from shared.data.features import as_described
from shared.data.json_rows import JsonRows
from shared.data.rows import open_split
from shared.data.sources import DatasetRows, open_rows
from shared.errors import DataError, FileError
from shared.recipes import DataConfig, load_recipe

ROWS = [{"question": f"q {n} \u00fc", "answer": "x" * (n % 7 + 1), "n": n} for n in range(50)]


@pytest.fixture(autouse=True)
def _copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHONCE_COPIES", str(tmp_path / "copies"))


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def written(folder: Path, suffix: str, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"train{suffix}"
    if suffix.endswith(".gz"):
        data = gzip.compress(data)
    elif suffix.endswith(".zst"):
        half = len(data) // 2
        data = b"".join(zstandard.compress(part) for part in (data[:half], data[half:]))  # two frames
    file.write_bytes(data)
    return file


def as_list(rows: list[Any], **options: Any) -> bytes:
    return json.dumps(rows, **options).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_lines_are_the_same_rows_however_they_are_packed(tmp_path: Path, suffix: str) -> None:
    file = written(tmp_path / "data", suffix, lines(ROWS))
    rows = JsonRows([file])
    assert [rows[index] for index in range(len(rows))] == ROWS
    assert rows.folder_of(3) == file.parent
    assert copies_folder().exists() == (suffix != ".jsonl")


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": False}])
@pytest.mark.parametrize("head", [b"", b"\xef\xbb\xbf", b" \r\n\t "])
def test_a_list_of_objects_is_read_element_by_element(
    tmp_path: Path, options: dict[str, Any], head: bytes
) -> None:
    rows = JsonRows([written(tmp_path / "data", ".json", head + as_list(ROWS, **options) + b"\n")])
    assert [rows[index] for index in range(len(rows))] == ROWS


def test_a_json_file_of_lines_is_read_as_lines(tmp_path: Path) -> None:
    rows = JsonRows([written(tmp_path / "data", ".json", lines(ROWS))])
    assert [rows[index] for index in range(len(rows))] == ROWS


def test_a_list_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the parts, objects that reach over several of them included."""
    monkeypatch.setattr("shared.data.json_rows._CHUNK", 3)
    big = [{"text": '[{,}]\\"' * 50, "n": 1.5e3}, *ROWS[:5], {}]
    rows = JsonRows([written(tmp_path / "data", ".json", as_list(big))])
    assert [rows[index] for index in range(len(rows))] == big


def test_the_rows_of_a_list_open_as_a_split(tmp_path: Path) -> None:
    file = written(tmp_path / "data", ".json", as_list([{"image": "p.png", "question": "q", "answer": "a"}]))
    (file.parent / "p.png").write_bytes(encoded_picture(0))
    split = open_split(DataConfig(source=str(file.parent)), "train")
    assert (split[0].images, split[0].question) == ((encoded_picture(0),), "q")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[", "found the end of the file|not JSON"),
        (b'[{"a": 1}', "found the end of the file, needed ','"),
        (b'[{"a": 1} {"a": 2}]', "found '{', needed ','"),
        (b'[{"a": 1}, ]', "element 2: not JSON"),
        (b'[{"a": 1},{"a": tru]', "element 2: not JSON"),
        (b'[{"a": 1}] []', "something follows the list"),
        (b'[{"a": "\xff"}]', "not UTF-8"),
        (b"[" * 100_000, "element 1: not JSON"),
    ],
)
def test_a_damaged_list_says_where(tmp_path: Path, data: bytes, message: str) -> None:
    file = written(tmp_path / "data", ".json", data)
    with pytest.raises(DataError, match=message) as caught:
        JsonRows([file])
    assert str(file) in str(caught.value)
    assert not list(copies_folder().glob("*.jsonl"))
    assert not list(copies_folder().glob("*.part"))


@pytest.mark.parametrize("inner", [None, 2])
def test_rows_under_a_name_are_told_from_lines(tmp_path: Path, inner: int | None) -> None:
    """Some inner lines may look like rows of their own."""
    listed = ",\n".join(json.dumps(row, indent=inner) for row in ROWS)
    data = '{\n"info": {"n": 1},\n"data": [\n' + listed + "\n]}"
    with pytest.raises(DataError, match=r"an object that goes over several lines\..*list under 'data' alone"):
        JsonRows([written(tmp_path / "data", ".json", data.encode())])
    with pytest.raises(DataError, match=r"goes over several lines\. Needed is one object a line"):
        JsonRows([written(tmp_path / "data", ".json", json.dumps({"question": "q"}, indent=2).encode())])


def test_a_damaged_first_line_of_a_json_file_of_lines_is_refused_alone(tmp_path: Path) -> None:
    rows = JsonRows([written(tmp_path / "data", ".json", b'{"question": "q\n' + lines(ROWS))])
    assert rows[1] == ROWS[0]
    with pytest.raises(DataError, match="line 1: not JSON"):
        rows[0]


def test_a_list_that_is_called_lines_is_told_how_to_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"line 1: .*Needed is one object a line, or in a \.json file one list"
    ):
        JsonRows([written(tmp_path / "data", ".jsonl", as_list(ROWS))])


def test_splits_may_be_of_different_kinds(tmp_path: Path) -> None:
    row, folder = {"question": "q", "answer": "a"}, tmp_path / "data"  # copies lie beside it
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps(row))
    (folder / "validation.json").write_text(json.dumps([row, row]))
    data = DataConfig(source=str(folder), text_only=True)
    assert (len(open_split(data, "train")), len(open_split(data, "validation"))) == (1, 2)
    other = data.model_copy(update={"splits": data.splits.model_copy(update={"train": "0001"})})
    (folder / "0002.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="split '0001' is not there; found 0002, train, validation"):
        open_split(other, "train")


def test_several_configurations_are_not_mixed(tmp_path: Path) -> None:
    """As a multilingual set lies in its folder when it was fetched from the Hub."""
    for name in ("de", "en"):
        (tmp_path / name).mkdir()
        row = {"question": name, "answer": "a"}
        (tmp_path / name / "train-00000-of-00001.jsonl").write_text(json.dumps(row))
    data = DataConfig(source=str(tmp_path), text_only=True)
    assert len(open_split(data, "train")) == 2
    card = (
        "---\nlicense: mit\nconfigs:\n- config_name: de\n  data_files: de/*\n- config_name: 'en'\n---\n# Set"
    )
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(
        DataError, match=r"names the configurations de, en, .* lie in de, en\. Give the folder"
    ):
        open_split(data, "train")
    alone = DataConfig(source=str(tmp_path / "de"), text_only=True)
    assert [one.question for one in open_split(alone, "train")] == ["de"]
    with pytest.raises(DataError, match=r"data\.config de: .* is no data set of the Hub"):
        open_split(data.model_copy(update={"config": "de"}), "train")


def test_a_configuration_of_a_hub_set_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a set that was fetched before, as the library keeps it."""
    card = ["---", "configs:"]
    for name in ("de", "en"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "train.jsonl").write_text(json.dumps({"question": name, "answer": "a"}))
        card += [f"- config_name: {name}", f"  data_files: {name}/*"]
    (tmp_path / "set" / "README.md").write_text("\n".join([*card, "---"]))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("de", "en"):
        datasets.load_dataset(str(tmp_path / "set"), name, split="train")
    (tmp_path / "cache" / "set").rename(tmp_path / "cache" / "owner___set")
    for name in ("de", "en"):
        split = open_split(DataConfig(source="owner/set", config=name, text_only=True), "train")
        assert [one.question for one in split] == [name]


def test_an_element_that_is_no_object_is_refused_by_its_number(tmp_path: Path) -> None:
    rows = JsonRows([written(tmp_path / "data", ".json", b'[{"a": 1}, [2], 17, null, "x"]')])
    assert rows[0] == {"a": 1}
    for index, kind in enumerate(("list", "int", "NoneType", "str"), start=1):
        with pytest.raises(DataError, match=f"element {index + 1}: a {kind}; each must be one JSON object"):
            rows[index]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b[: len(b) // 2], lambda b: b"no" + b[2:]])
def test_a_packed_file_that_was_cut_is_not_a_shorter_one(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]
) -> None:
    file = written(tmp_path / "data", suffix, lines(ROWS))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match="cannot be unpacked"):
        JsonRows([file])
    assert not list(copies_folder().glob("*.jsonl"))


def test_a_file_that_was_replaced_is_unpacked_again(tmp_path: Path) -> None:
    file = written(tmp_path / "data", ".jsonl.gz", lines(ROWS))
    JsonRows([file])
    file.unlink()
    file = written(tmp_path / "data", ".jsonl.gz", lines(ROWS[:3]))
    assert len(JsonRows([file])) == 3


def replaced(file: Path, rows: list[Any]) -> None:
    """Another file under that name, as on another machine's disk."""
    new = written(file.parent / "new", ".json", as_list(rows))
    os.replace(new, file)


def days_ago(path: Path, days: float) -> None:
    then = time.time() - 86_400 * days
    os.utime(path, (then, then))


def test_a_copy_that_somebody_reads_is_not_taken_away(tmp_path: Path) -> None:
    """Two machines with a file of their own under one path, and one home folder."""
    file = written(tmp_path / "data", ".json", as_list(ROWS))
    first = JsonRows([file])
    replaced(file, ROWS[:3])
    assert len(JsonRows([file])) == 3
    assert first[17] == ROWS[17]


def test_a_copy_goes_when_nobody_has_used_it_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.data.copies.MARK_S", 0.0)
    file = written(tmp_path / "data", ".json", as_list(ROWS))
    first = JsonRows([file])
    (copy,) = copies_folder().glob("*.jsonl")
    days_ago(copy, 2)
    assert first[17] == ROWS[17]  # that is a use
    replaced(file, ROWS[:3])
    JsonRows([file])
    assert copy.exists()
    days_ago(copy, 2)
    replaced(file, ROWS[:4])
    JsonRows([file])
    assert not copy.exists()
    assert len(list(copies_folder().glob("*.jsonl"))) == 2


def test_a_copy_that_is_gone_is_made_again_of_the_same_file_alone(tmp_path: Path) -> None:
    file = written(tmp_path / "data", ".json", as_list(ROWS))
    rows = JsonRows([file])
    (copy,) = copies_folder().glob("*.jsonl")
    copy.unlink()
    assert rows[17] == ROWS[17]
    copy.unlink()
    replaced(file, ROWS[:3])
    with pytest.raises(
        FileError, match=r"train\.json: the file has changed since it was opened\. Start again"
    ):
        rows[17]


def test_lines_whose_file_is_gone_or_another_one_are_no_fault_of_a_row(tmp_path: Path) -> None:
    file = written(tmp_path / "data", ".jsonl", lines(ROWS))
    rows = JsonRows([file])
    file.write_bytes(lines(ROWS)[3:])
    with pytest.raises(FileError, match=r"train\.jsonl: the file has changed since it was opened"):
        rows[17]
    file.unlink()
    with pytest.raises(
        FileError, match=r"train\.jsonl: cannot be read any more \(No such file or directory\)"
    ):
        rows[17]


def copy_of(file: Path, write: Callable[[Path], None]) -> Path:
    return kept_copy(file, Stamp.of(file), ".jsonl", write=write, remedy="Make room")


def test_who_has_no_lock_leaves_the_part_of_who_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "data", ".jsonl", lines(ROWS))

    def write(part: Path) -> None:
        part.write_bytes(b"whole")
        with monkeypatch.context() as other:
            other.setattr("fcntl.flock", lambda *_: os.close(-1))  # which fails
            with pytest.raises(FileError, match="no copy"):
                copy_of(file, lambda part: None)

    assert copy_of(file, write).read_bytes() == b"whole"


def test_who_fails_leaves_the_part_of_who_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one begins as soon as the lock is free."""
    file, parts = written(tmp_path / "data", ".jsonl", lines(ROWS)), []

    class Lock(io.FileIO):
        def close(self) -> None:
            super().close()
            parts[0].write_bytes(b"of the next one")

    def fail(part: Path) -> None:
        parts.append(part)
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shared.data.copies.open", Lock, raising=False)
    with pytest.raises(FileError, match="No space left on device"):
        copy_of(file, fail)
    assert parts[0].read_bytes() == b"of the next one"


def test_a_copy_that_cannot_be_written_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TEACHONCE_COPIES", str(tmp_path / "file" / "copies"))
    with pytest.raises(FileError, match="set TEACHONCE_COPIES to another folder"):
        JsonRows([written(tmp_path / "data", ".jsonl.gz", lines(ROWS))])


def test_files_of_lines_may_be_packed_differently(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    written(folder, ".jsonl.zst", lines([{"image": "p.png", "question": "q", "answer": "packed"}]))
    (folder / "validation.jsonl").write_bytes(lines([{"image": "p.png", "question": "q", "answer": "plain"}]))
    (folder / "p.png").write_bytes(encoded_picture(0))
    data = DataConfig(source=str(folder))
    assert [open_split(data, split)[0].answer for split in ("train", "validation")] == ["packed", "plain"]


# --- names ----------------------------------------------------------------------------------------------

ODD = "a[b]*?::c {x} \u00fc"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved"])
def test_a_folder_s_name_is_no_pattern(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / ODD
    rows = [{"image": encoded_picture(n), "question": "q", "answer": f"a {n}"} for n in range(3)]
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "plain"))
        shutil.move(tmp_path / "plain", folder)
    elif kind == "parquet":
        folder.mkdir()
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
        shutil.move(tmp_path / "train.parquet", folder)
    else:
        texts = [{**row, "image": "p.png"} for row in rows]
        written(folder, f".{kind}", lines(texts) if kind == "jsonl" else as_list(texts))
        (folder / "p.png").write_bytes(encoded_picture(0))
    split = open_split(DataConfig(source=str(folder)), "train")
    assert [one.answer for one in split] == ["a 0", "a 1", "a 2"]


def test_a_cache_s_name_is_no_pattern(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path / ODD))
    folder.publish("x.json", b"1")
    assert (tmp_path / ODD / "x.json").read_bytes() == b"1"
    assert folder.read("x.json") == b"1"


def test_the_home_folder_is_meant_in_every_path_of_a_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(
        "phantom",
        overrides=[
            "data.source=~/a",
            "teacher.model=~/b",
            "teacher.trained_by=~/r.yaml",
            "cache.path=~/c",
            "student.model=~/d",
            "run.root=~/e",
            "evaluation.baseline=~/f.yaml",
        ],
    )
    assert recipe.teacher is not None
    assert recipe.cache is not None
    found = [
        *(recipe.data.source, recipe.teacher.model, recipe.teacher.trained_by, recipe.cache.path),
        *(recipe.student.model, recipe.run.root, recipe.evaluation.baseline),
    ]
    assert all(str(path).startswith(f"{tmp_path}/") for path in found)


# --- tables ---------------------------------------------------------------------------------------------


def test_pictures_stay_encoded_wherever_a_dataset_holds_them(tmp_path: Path) -> None:
    """As from the Hub, where the library gives decoded pictures for the asking; nothing is written for it."""
    picture = datasets.Image()
    features = datasets.Features(
        {
            "images": datasets.List(picture),
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": [{"type": datasets.Value("string"), "image": picture}],
                }
            ),
            "kind": datasets.ClassLabel(names=["ct", "mr"]),
        }
    )
    held = {"bytes": encoded_picture(0), "path": None}
    row = {
        "images": [held, held],
        "messages": [{"role": "user", "content": [{"type": "image", "image": held}]}],
        "kind": 1,
    }
    datasets.Dataset.from_list([row], features=features).save_to_disk(str(tmp_path / "set"))
    dataset = datasets.load_from_disk(str(tmp_path / "set"))
    before = sorted((tmp_path / "set").iterdir())
    for columns in (["images"], ["images", "messages", "kind"]):
        found = DatasetRows(dataset, None).select(columns)[0]
        assert list(found) == columns
    assert sorted((tmp_path / "set").iterdir()) == before
    assert [one["bytes"] for one in found["images"]] == [encoded_picture(0)] * 2
    assert found["messages"][0]["content"][0]["image"]["bytes"] == encoded_picture(0)
    assert found["kind"] == "mr"


@pytest.mark.parametrize("kind", ["parquet", "saved", "hub"])
def test_class_numbers_are_names_wherever_they_are(tmp_path: Path, kind: str) -> None:
    label = datasets.ClassLabel(names=["ct", "mr"])
    features = datasets.Features(
        {
            "answer": label,
            "answers": datasets.List(label),
            "votes": [{"answer": label, "who": datasets.Value("int32")}],
        }
    )
    rows = [
        {"answer": 1, "answers": [1, 0, -1], "votes": [{"answer": 1, "who": 1}]},
        {"answer": None, "answers": [], "votes": []},
    ]
    dataset = datasets.Dataset.from_list(rows, features=features)
    if kind == "parquet":
        dataset.to_parquet(str(tmp_path / "train.parquet"))
    elif kind == "saved":
        dataset.save_to_disk(str(tmp_path / "saved"))
    names = ["answer", "answers", "votes"]
    source = {"parquet": tmp_path, "saved": tmp_path / "saved"}.get(kind)
    found = DatasetRows(dataset, None) if source is None else open_rows(str(source), split="train")
    assert found.select(names)[0] == {
        "answer": "mr",
        "answers": ["mr", "ct", None],
        "votes": [{"answer": "mr", "who": 1}],
    }
    assert found.select(names)[1] == {"answer": None, "answers": [], "votes": []}


def test_classes_and_json_of_a_list_that_is_held_column_by_column() -> None:
    """As older releases of the library have written lists of structs."""
    parts = {"answer": {"_type": "ClassLabel", "names": ["ct", "mr"]}, "why": {"_type": "Json"}}
    described = {"_type": "Sequence", "feature": parts}
    found = as_described({"answer": [1, 0, -1], "why": ['"x"', "[1]", None]}, described)
    assert found == {"answer": ["mr", "ct", None], "why": ["x", [1], None]}


def test_a_zstd_bomb_is_unpacked_in_small_parts(tmp_path: Path) -> None:
    from shared.data.json_rows import _of_zstd

    packed = zstandard.compress(bytes(256 * 2**20))
    parts = list(map(len, _of_zstd(io.BytesIO(packed), tmp_path)))
    assert sum(parts) == 256 * 2**20
    assert max(parts) <= 64 * 2**20


LINE = json.dumps({"image": "0.png", "question": "Which plane?", "answer": "axial"}) + "\n"


def test_links_to_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    elsewhere, source = tmp_path / "elsewhere", tmp_path / "data"
    for folder in (elsewhere, source / "train"):
        folder.mkdir(parents=True)
    (elsewhere / "more.jsonl").write_text(LINE)
    (source / "train" / "part.jsonl").write_text(LINE)
    (source / "train" / "linked").symlink_to(elsewhere)
    (source / "train" / "circle").symlink_to(source)
    (source / "loop").symlink_to(source / "loop")
    assert len(open_rows(str(source), split="train")) == 2


def test_folders_without_end_are_refused(tmp_path: Path) -> None:
    """Each level links twice to the next."""
    for level in range(20):
        (tmp_path / f"{level}").mkdir()
        for name in ("a", "b"):
            (tmp_path / f"{level}" / name).symlink_to(tmp_path / f"{level + 1}")
    (tmp_path / "20").mkdir()
    (tmp_path / "20" / "train.jsonl").write_text(LINE)
    with pytest.raises(DataError, match="more than 1,000 links to folders; name the one with the data"):
        open_rows(str(tmp_path / "0"), split="train")


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root everything can be read; so the system's refusal is made here."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "train.jsonl").write_text(LINE)
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"Permission denied: .*closed"):
        open_rows(str(tmp_path), split="train")


def test_a_copy_that_fails_is_no_fault_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TEACHONCE_COPIES", str(tmp_path / "file" / "copies"))
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(LINE.encode()))
    with pytest.raises(FileError, match=r"no copy of .*set TEACHONCE_COPIES to another folder"):
        open_rows(str(tmp_path / "train.jsonl.gz"), split="train")


def test_half_of_a_surrogate_pair_never_leaves_a_row(tmp_path: Path) -> None:
    row = {"image": "0.png", "question": "Which plane?", "answer": "axial"}
    rows = [row | {"mode": "\ud800"}, row | {"image": "\ud800.png"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (tmp_path / "0.png").write_bytes(encoded_picture(0))
    split = open_split(DataConfig(source=str(tmp_path), columns={"image": "image"}), "train")
    with pytest.raises(DataError, match="the kind is not valid Unicode"):
        split[0]
    with pytest.raises(DataError, match="cannot be read") as raised:
        split[1]
    assert str(raised.value).encode()  # as a reason in a manifest
