"""Parquet and Arrow are read where they lie: nothing stale, nothing missing, nothing cut."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import encoded_picture

from shared.data.copies import copies_folder
from shared.data.json_rows import JsonRows
from shared.data.rows import open_split
from shared.data.tables import MAX_KEPT_BYTES, TableRows
from shared.errors import DataError, FileError
from shared.recipes import DataConfig

PICTURE = encoded_picture(0)


def table(answers: list[str]) -> pa.Table:
    columns = {
        "image_id": [PICTURE] * len(answers),
        "question": ["Which plane?"] * len(answers),
        "answer": answers,
    }
    schema = pa.schema({"image_id": pa.binary(), "question": pa.string(), "answer": pa.string()})
    return pa.table(columns, schema=schema)


def answers_of(source: Path) -> list[str]:
    return [example.answer for example in open_split(DataConfig(source=str(source)), "train")]


def write_parquet(path: Path, answers: list[str], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(answers), path, **options)


def write_stream(path: Path, answers: list[str], *, rows_per_batch: int) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table([]).schema) as writer:
        for begin in range(0, len(answers), rows_per_batch):
            writer.write_table(table(answers[begin : begin + rows_per_batch]))


@pytest.fixture(autouse=True)
def _copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHONCE_COPIES", str(tmp_path / "copies"))


@pytest.fixture(params=[False, True], ids=["in place", "copied"])
def copied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Row groups of any size, or all of them too large to be decoded for each row."""
    if request.param:
        monkeypatch.setattr("shared.data.tables.MAX_GROUP_BYTES", 1)
    return request.param


def test_a_file_replaced_with_its_times_kept_is_read_anew(tmp_path: Path, copied: bool) -> None:
    file = tmp_path / "data" / "train.parquet"
    write_parquet(file, ["axial", "axial"])
    assert answers_of(file.parent) == ["axial", "axial"]
    times = file.stat()
    write_parquet(tmp_path / "new.parquet", ["plain", "plain"])
    os.utime(tmp_path / "new.parquet", ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(tmp_path / "new.parquet", file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert answers_of(file.parent) == ["plain", "plain"]


def test_a_file_written_over_in_place_with_its_times_kept_is_read_anew(tmp_path: Path, copied: bool) -> None:
    file = tmp_path / "data" / "train.parquet"
    write_parquet(file, ["axial"], use_dictionary=False, compression="NONE")
    assert answers_of(file.parent) == ["axial"]
    times, content = file.stat(), file.read_bytes()
    file.write_bytes(content.replace(b"axial", b"plain"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert answers_of(file.parent) == ["plain"]


def test_rows_come_in_order_from_files_of_many_row_groups(tmp_path: Path, copied: bool) -> None:
    expected = [f"answer {number}" for number in range(23)]
    write_parquet(tmp_path / "train-00000-of-00002.parquet", expected[:14], row_group_size=4)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", expected[14:], row_group_size=5)
    split = open_split(DataConfig(source=str(tmp_path)), "train")
    assert [example.answer for example in split] == expected
    assert [split[index].answer for index in (22, 0, 13, 14)] == [expected[i] for i in (22, 0, 13, 14)]
    assert [one.answer for one in pickle.loads(pickle.dumps(split))] == expected
    assert bool(list(copies_folder().glob("*.arrow"))) == copied


def test_only_the_columns_in_use_decide_whether_a_file_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.data.tables.MAX_GROUP_BYTES", 10 * len(PICTURE))
    wide = table(["axial"] * 3).append_column("scan", pa.array([os.urandom(10 * len(PICTURE))] * 3))
    pq.write_table(wide, tmp_path / "train.parquet", use_dictionary=False)
    assert answers_of(tmp_path) == ["axial"] * 3
    assert not copies_folder().exists()


def test_blocks_that_were_read_are_kept_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.data.tables.MAX_KEPT_BYTES", 2 * table(["axial"] * 4).nbytes)
    write_parquet(tmp_path / "train.parquet", ["axial"] * 32, row_group_size=4)
    rows = TableRows.open([tmp_path / "train.parquet"], folder=tmp_path)
    assert [rows[index]["answer"] for index in range(32)] == ["axial"] * 32
    assert 1 <= len(rows._kept) <= 2


def on_another_machine(
    rows: TableRows | JsonRows, file: Path, monkeypatch: pytest.MonkeyPatch
) -> TableRows | JsonRows:
    """As the first rank hands them to one that has a copy of the file on its own disk, and its own home folder."""
    sent = pickle.dumps(rows)
    shutil.copy2(file, file.with_suffix(".theirs"))
    os.replace(file.with_suffix(".theirs"), file)
    monkeypatch.setenv("TEACHONCE_COPIES", str(file.parent / "their copies"))
    shutil.rmtree(file.parent.parent / "copies", ignore_errors=True)
    monkeypatch.setattr("shared.data.copies.this_machine", lambda: "another one")
    received = pickle.loads(sent)
    assert isinstance(received, type(rows))
    return received


def parquet_and_list(folder: Path) -> list[tuple[TableRows | JsonRows, Path]]:
    folder.mkdir()
    write_parquet(folder / "train.parquet", ["axial", "coronal"])
    (folder / "train.json").write_text(json.dumps([{"answer": "axial"}, {"answer": "coronal"}]))
    table_rows = TableRows.open([folder / "train.parquet"], folder=folder)
    return [
        (table_rows, folder / "train.parquet"),
        (JsonRows([folder / "train.json"]), folder / "train.json"),
    ]


@pytest.mark.parametrize("kind", [0, 1], ids=["table", "JSON"])
def test_a_copy_of_the_file_on_another_machine_is_the_same_file(
    tmp_path: Path, copied: bool, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number on the disk and its time of change are its own."""
    rows, file = parquet_and_list(tmp_path / "data")[kind]
    theirs = on_another_machine(rows, file, monkeypatch)
    assert theirs[1]["answer"] == "coronal"
    assert all(found.is_unchanged() for found in theirs.data_files())


@pytest.mark.parametrize("kind", [0, 1], ids=["table", "JSON"])
def test_another_file_on_another_machine_is_told_as_that(
    tmp_path: Path, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, file = parquet_and_list(tmp_path / "data")[kind]
    os.utime(file, (0, 0))
    theirs = on_another_machine(rows, file, monkeypatch)
    with pytest.raises(
        FileError, match=r"not the file that was opened on another machine of this job.*rsync -a"
    ):
        theirs[1]


def test_on_one_machine_a_copy_with_its_times_kept_is_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rows, file), _ = parquet_and_list(tmp_path / "data")
    with monkeypatch.context() as elsewhere:
        theirs = on_another_machine(rows, file, elsewhere)
    with pytest.raises(FileError, match="has changed since it was opened"):
        theirs[1]


@pytest.mark.parametrize("name", ["train-{:05d}-of-00003.parquet", "train-{:05d}-of-00003.jsonl"])
def test_a_part_that_is_not_there_is_an_error(name: str, tmp_path: Path) -> None:
    for number in (0, 2):
        file = tmp_path / name.format(number)
        if file.suffix == ".parquet":
            write_parquet(file, ["axial"])
        else:
            file.write_text('{"image_id": "p.png", "question": "Which plane?", "answer": "axial"}\n')
    with pytest.raises(DataError, match=r"train: 2 of 3 parts are there; number 1 is missing"):
        open_split(DataConfig(source=str(tmp_path)), "train")


def test_parts_may_be_numbered_from_one(tmp_path: Path) -> None:
    for number in (1, 2):
        write_parquet(tmp_path / f"train-{number}-of-2.parquet", [f"answer {number}"])
    assert answers_of(tmp_path) == ["answer 1", "answer 2"]


def test_parts_of_two_sets_do_not_mix(tmp_path: Path) -> None:
    for name in ("train-0-of-1", "train-0-of-2", "train-1-of-2"):
        write_parquet(tmp_path / f"{name}.parquet", ["axial"])
    with pytest.raises(DataError, match="parts of two sets, of 1 and 2 files, lie together"):
        open_split(DataConfig(source=str(tmp_path)), "train")


def test_files_with_other_columns_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0-of-2.parquet", ["axial"])
    pq.write_table(table(["axial"]).drop_columns(["answer"]), tmp_path / "train-1-of-2.parquet")
    with pytest.raises(DataError, match=r"train-1-of-2.parquet: its columns differ .* \(answer\)"):
        open_split(DataConfig(source=str(tmp_path)), "train")


def test_a_file_that_changes_while_it_is_in_use_is_an_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", ["axial"])
    split = pickle.loads(pickle.dumps(open_split(DataConfig(source=str(tmp_path)), "train")))
    write_parquet(tmp_path / "train.parquet", ["sagittal", "coronal"])
    with pytest.raises(FileError, match="has changed since it was opened"):
        split[0]


def test_a_column_nobody_asked_for_harms_no_row(tmp_path: Path, copied: bool) -> None:
    offsets, letters = pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pa.py_buffer(bytes([255]))
    spoilt = pa.Array.from_buffers(pa.string(), 1, [None, offsets, letters])
    pq.write_table(table(["axial"]).append_column("note", spoilt), tmp_path / "train.parquet")
    assert answers_of(tmp_path) == ["axial"]


def test_columns_whose_dictionary_grows_are_copied(tmp_path: Path, copied: bool) -> None:
    sites = [pa.array([site]).dictionary_encode() for site in ("knee", "head", "hip")]
    pieces = [table(["axial"]).append_column("site", site) for site in sites]
    with pq.ParquetWriter(tmp_path / "train.parquet", pieces[0].schema) as writer:
        for piece in pieces:
            writer.write_table(piece)
    assert answers_of(tmp_path) == ["axial"] * 3


def test_more_files_than_descriptors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.data.tables.MAX_OPEN_FILES", 8)
    for number in range(60):
        write_parquet(tmp_path / f"train-{number:03d}-of-060.parquet", [f"answer {number}"])
    split = open_split(DataConfig(source=str(tmp_path)), "train")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(descriptor.name) for descriptor in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 24, hard))
    try:
        assert [example.answer for example in split] == [f"answer {number}" for number in range(60)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_copy_that_cannot_be_written_is_no_fault_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.data.tables.MAX_GROUP_BYTES", 1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TEACHONCE_COPIES", str(tmp_path / "file" / "copies"))
    write_parquet(tmp_path / "data" / "train.parquet", ["axial"])
    split = open_split(DataConfig(source=str(tmp_path / "data")), "train")
    with pytest.raises(
        FileError, match=r"no copy of .*train\.parquet can be written there.*TEACHONCE_COPIES"
    ):
        split[0]


def test_parts_whose_names_end_in_a_hash_belong_together(tmp_path: Path) -> None:
    for number in range(2):
        write_parquet(
            tmp_path / f"train-0000{number}-of-00002-eb8844602202be60.parquet", [f"answer {number}"]
        )
    assert answers_of(tmp_path) == ["answer 0", "answer 1"]
    (tmp_path / "train-00001-of-00002-eb8844602202be60.parquet").unlink()
    with pytest.raises(DataError, match="1 of 2 parts are there"):
        answers_of(tmp_path)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_of_both_forms_is_read(kind: str, tmp_path: Path) -> None:
    expected = [f"answer {number}" for number in range(10)]
    if kind == "stream":
        write_stream(tmp_path / "train.arrow", expected, rows_per_batch=3)
    else:
        whole = table(expected)
        with (
            pa.OSFile(str(tmp_path / "train.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, whole.schema) as writer,
        ):
            writer.write_table(whole, max_chunksize=3)
    assert answers_of(tmp_path) == expected


def test_an_arrow_stream_cut_between_two_batches_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "train.arrow"
    write_stream(file, ["axial"] * 3, rows_per_batch=3)
    shorter = file.stat().st_size - 8  # the end mark
    write_stream(file, ["axial"] * 6, rows_per_batch=3)
    os.truncate(file, shorter)
    with pa.memory_map(str(file)) as mapped:
        assert len(pa.ipc.open_stream(mapped).read_all()) == 3  # Arrow sees nothing wrong
    with pytest.raises(DataError, match="no end mark"):
        open_split(DataConfig(source=str(tmp_path)), "train")


def test_damage_in_a_row_group_is_an_error_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    write_parquet(file, ["axial"] * 4)
    content = bytearray(file.read_bytes())
    content[4:400] = bytes(396)
    file.write_bytes(content)
    split = open_split(DataConfig(source=str(tmp_path)), "train")
    with pytest.raises(DataError, match=r"train.parquet, block 0: cannot be read"):
        split[0]


@pytest.mark.parametrize("saved", [False, True], ids=["parquet", "saved to disk"])
def test_a_class_is_its_name(saved: bool, tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "image_id": datasets.Value("binary"),
            "question": datasets.Value("string"),
            "answer": datasets.ClassLabel(names=["axial", "coronal"]),
        }
    )
    columns = {"image_id": [PICTURE] * 3, "question": ["Which plane?"] * 3, "answer": [1, 0, -1]}
    data = datasets.Dataset.from_dict(columns, features=features)
    if saved:
        data.save_to_disk(str(tmp_path / "data"))
    else:
        (tmp_path / "data").mkdir()
        data.to_parquet(str(tmp_path / "data" / "train.parquet"))
    split = open_split(DataConfig(source=str(tmp_path / "data")), "train")
    assert [split[0].answer, split[1].answer] == ["coronal", "axial"]
    with pytest.raises(DataError, match="the answer is missing"):
        split[2]


def test_a_compressed_stream_is_decoded_a_batch_at_a_time(tmp_path: Path) -> None:
    """20 MB of it are in some kilobytes each; all at once would take the memory of all rows."""
    path, column = tmp_path / "train.arrow", pa.array([bytes(1 << 20)] * 20, pa.binary())
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(path, pa.schema([("x", pa.binary())]), options=options) as stream:
        for _ in range(10):
            stream.write_batch(pa.record_batch([column], names=["x"]))
    before = pa.total_allocated_bytes()
    rows = TableRows.open([path], folder=tmp_path)
    assert len(rows) == 200
    assert pa.total_allocated_bytes() - before < 1 << 20
    for index in range(0, 200, 7):
        assert rows[index] == {"x": bytes(1 << 20)}
        assert pa.total_allocated_bytes() - before < MAX_KEPT_BYTES + (32 << 20)


def test_a_stream_with_a_dictionary(tmp_path: Path) -> None:
    path, column = tmp_path / "train.arrow", pa.array(["a", "b", "a"]).dictionary_encode()
    with pa.ipc.new_stream(path, pa.schema([("x", column.type)])) as stream:
        stream.write_batch(pa.record_batch([column], names=["x"]))
    assert TableRows.open([path], folder=tmp_path)[1] == {"x": "b"}


ODD = {
    "a time that no Python type holds": pa.array([2**62], pa.timestamp("s")),
    "a zone that is not known": pa.array([1], pa.timestamp("us", tz="Mars/Phobos")),
    "a day beyond all calendars": pa.array([2**30], pa.date32()),
    "a duration that is too long": pa.array([2**62], pa.duration("s")),
    "bytes that are no text": pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pa.py_buffer(b"\xff")]
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_a_value_that_cannot_be_shown_is_an_error_of_its_row(name: str, tmp_path: Path) -> None:
    odd = table(["axial"]).append_column("mode", ODD[name])
    with pa.ipc.new_file(tmp_path / "train.arrow", odd.schema) as file:
        file.write_table(odd)
    split = open_split(DataConfig(source=str(tmp_path)), "train")
    with pytest.raises(DataError, match=r"train\.arrow, block 0: cannot be read"):
        split[0]


def test_a_name_of_two_columns_is_refused(tmp_path: Path) -> None:
    twice = table(["axial"]).append_column("answer", pa.array(["coronal"]))
    pq.write_table(twice, tmp_path / "train.parquet")
    with pytest.raises(DataError, match="'answer' is the name of several columns"):
        open_split(DataConfig(source=str(tmp_path)), "train")


@pytest.mark.parametrize("features", [{"_type": "ClassLabel", "names": 5}, {"_type": "ClassLabel"}])
def test_a_description_of_classes_that_names_none_is_passed_over(
    features: dict[str, Any], tmp_path: Path
) -> None:
    described = json.dumps({"info": {"features": {"mode": features}}})
    numbers = table(["axial"]).append_column("mode", pa.array([0]))
    pq.write_table(numbers.replace_schema_metadata({"huggingface": described}), tmp_path / "train.parquet")
    assert open_split(DataConfig(source=str(tmp_path)), "train")[0].kind == "0"


@pytest.mark.parametrize("kind", ["file", "stream", "stream with a dictionary"])
def test_a_batch_that_unfolds_too_far_is_refused_before_it_is_decoded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megabytes of zeros in some kilobytes."""
    monkeypatch.setattr("shared.data.tables.MAX_BLOCK_BYTES", 1 << 24)
    path, big = tmp_path / "train.arrow", pa.array([bytes(1 << 20)] * 24, pa.binary())
    columns = {"x": big, "y": pa.array(["a"] * 24).dictionary_encode()}
    batch = pa.record_batch({"x": big} if kind == "stream" else columns)
    del columns, big
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with make(path, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    del batch
    assert path.stat().st_size < 1 << 16
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match=r"unfolds to 25,16\d,.*at most 16,777,216.*fewer rows in each"):
        TableRows.open([path], folder=tmp_path)[0]
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_repeated_values_of_a_row_group_do_not_take_all_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary's value takes a bit or two in each row."""
    monkeypatch.setattr("shared.data.tables.MAX_BLOCK_BYTES", 1 << 24)
    path, column = tmp_path / "train.parquet", pa.array([bytes(1 << 20)] * 200, pa.binary())
    pq.write_table(pa.table({"x": column}), path, dictionary_pagesize_limit=1 << 30)
    del column
    assert path.stat().st_size < 1 << 18
    rows, before = TableRows.open([path], folder=tmp_path), pa.total_allocated_bytes()
    with pytest.raises(DataError, match=r"row group 0 unfolds to more than .*fewer rows in each"):
        rows[0]
    assert pa.total_allocated_bytes() - before < 1 << 20
