"""The survey of all rows: shared by ranks, kept beside the cache, and read again by the next start."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import encoded_picture
from stage2_runs import FORK, make_recipe, on_ranks

from shared.data import sources
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import Example, VqaSplit, open_split
from shared.errors import CacheFormatError, DataError
from shared.recipes import DataConfig
from shared.runtime import World, alone
from shared.surveying import Keyed, Surveyors, survey_keys
from shared.surveying.kept import Kept, decoded, encoded, place_beside
from shared.surveying.parts import parts_of
from shared.temporaries import temporary_name

PICTURES = [encoded_picture(seed, size=(16 + 8 * seed, 16)) for seed in range(4)]


def write_table(path: Path, name: str, number: int, *, first: int = 0, **changed: Any) -> None:
    """Rows ``first`` to ``first + number - 1`` of one long set, as Parquet, without compression."""
    rows = [
        {
            "image_id": {"bytes": PICTURES[row % 4], "path": None},
            "question": f"what is number {row:06d}?",
            "answer": f"it is {row % 7}",
        }
        for row in range(first, first + number)
    ]
    rows[0] |= changed
    pq.write_table(
        pa.Table.from_pylist(rows), path / name, compression="none", use_dictionary=False, row_group_size=100
    )


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Three files of 300 rows."""
    (tmp_path / "data").mkdir()
    for number in range(3):
        write_table(tmp_path / "data", f"train-{number}.parquet", 300, first=300 * number)
    return DataConfig(source=str(tmp_path / "data"))


@pytest.fixture
def mine(tmp_path: Path) -> Surveyors:
    return Surveyors(kept_at=str(tmp_path / ".survey"))


@pytest.fixture
def read_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the rows that are read, as they are."""
    numbers: list[int] = []
    read = VqaSplit.__getitem__

    def noting(split: VqaSplit, index: int) -> Example:
        numbers.append(index)
        return read(split, index)

    monkeypatch.setattr(VqaSplit, "__getitem__", noting)
    return numbers


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    return lambda: capsys.readouterr().out


def same(one: Keyed, other: Keyed) -> bool:
    arrays = all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("rows", "keys", "lengths", "pixels")
    )
    rest = ("unreadable", "num_outvoted", "has_pictures", "fingerprint")
    return arrays and all(getattr(one, name) == getattr(other, name) for name in rest)


def kept_files(mine: Surveyors) -> list[Path]:
    assert mine.kept_at is not None
    return sorted(path for path in Path(mine.kept_at).rglob("*") if path.is_file())


def whole_files(mine: Surveyors) -> list[Path]:
    """Without those that are being written."""
    return [path for path in kept_files(mine) if not path.name.startswith(".")]


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the lines of a kept part, and vouches for them."""
    batch = decoded(path.read_bytes())
    lines = batch.to_pylist()
    for line in lines:
        change(line)
    changed = pa.RecordBatch.from_pylist(lines, schema=batch.schema)
    path.write_bytes(encoded(changed))


def test_what_is_kept_is_read_instead_of_the_data(
    data: DataConfig, processor: ExampleProcessor, mine: Surveyors, read_rows: list[int]
) -> None:
    first = survey_keys(data, "train", processor, mine)
    assert same(first, survey_keys(data, "train", processor))
    assert first.keys.shape == (900, 16)
    assert first.keys[7].tobytes() == processor.key(first.split[7])
    read_rows.clear()
    assert same(survey_keys(data, "train", processor, mine), first)
    assert len(read_rows) <= 40  # some are read again to be compared


def test_it_is_the_same_as_row_by_row(
    vqa_folder: Path, processor: ExampleProcessor, data_config: DataConfig
) -> None:
    found = survey_keys(data_config, "train", processor)
    for row, key, pixels in zip(found.rows, found.keys, found.pixels, strict=True):
        example = found.split[int(row)]
        assert key.tobytes() == processor.key(example)
        assert (pixels > 0) == (processor.picture_tokens(example) > 0)
    approximate = [processor.approximate_length(found.split[int(row)]) for row in found.rows]
    assert len(set(found.lengths - approximate)) == 1  # the template's


@pytest.mark.parametrize("back", [False, True])
def test_a_file_that_has_changed_is_surveyed_again_and_only_that(
    data: DataConfig, processor: ExampleProcessor, mine: Surveyors, read_rows: list[int], back: bool
) -> None:
    """Also where its size is the same and its time of modification was set back."""
    before = survey_keys(data, "train", processor, mine)
    path = Path(data.source) / "train-1.parquet"
    status = path.stat()
    write_table(path.parent, path.name, 300, first=300, answer="it is x")
    if back:
        assert path.stat().st_size == status.st_size
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    read_rows.clear()
    after = survey_keys(data, "train", processor, mine)
    assert set(range(300, 600)) <= set(read_rows)
    assert len(set(read_rows) - set(range(300, 600))) <= 40
    assert np.flatnonzero((before.keys != after.keys).any(axis=1)).tolist() == [300]
    assert same(after, survey_keys(data, "train", processor))


def test_a_file_that_was_touched_is_not(
    data: DataConfig, processor: ExampleProcessor, mine: Surveyors, read_rows: list[int]
) -> None:
    survey_keys(data, "train", processor, mine)
    (Path(data.source) / "train-1.parquet").touch()
    read_rows.clear()
    survey_keys(data, "train", processor, mine)
    assert len(read_rows) <= 40


def test_a_large_file_is_known_by_its_ends_and_its_times(
    data: DataConfig, processor: ExampleProcessor, mine: Surveyors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.data.data_files.WHOLE_BYTES", 1000)
    monkeypatch.setattr("shared.data.data_files.END_BYTES", 1000)
    survey_keys(data, "train", processor, mine)
    path = Path(data.source) / "train-1.parquet"
    status = path.stat()
    written = path.read_bytes()
    place = written.index(b"it is 5", len(written) // 2)
    with open(path, "r+b") as file:  # in the middle, and neither the size nor the footer changes
        file.seek(place)
        file.write(b"it is Z")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert same(survey_keys(data, "train", processor, mine), survey_keys(data, "train", processor))


def test_files_before_it_may_grow(
    data: DataConfig, processor: ExampleProcessor, mine: Surveyors, read_rows: list[int]
) -> None:
    """What is kept of a file says nothing of where it lies in the split."""
    write_table(
        Path(data.source), "train-2.parquet", 300, first=600, image_id={"bytes": None, "path": "gone.png"}
    )
    assert [row for row, _ in survey_keys(data, "train", processor, mine).unreadable] == [600]
    write_table(Path(data.source), "train-0.parquet", 310)
    read_rows.clear()
    found = survey_keys(data, "train", processor, mine)
    assert len(set(read_rows) - set(range(310))) <= 45
    assert same(found, survey_keys(data, "train", processor))
    ((row, reason),) = found.unreadable
    assert row == 610
    assert "row 610" in reason


def damage_by_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another_part(path: Path) -> None:
    others = [other for other in path.parent.parent.rglob("*.arrow") if other.parent != path.parent]
    same_size = [other for other in others if other.name.split("-", 1)[1] == path.name.split("-", 1)[1]]
    shutil.copy(same_size[0], path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [damage_by_a_bit, cut_short, empty, of_another_part, a_folder, Path.unlink]
)
def test_what_is_damaged_is_made_again(
    data: DataConfig,
    processor: ExampleProcessor,
    mine: Surveyors,
    read_rows: list[int],
    told: Callable[[], str],
    damage: Callable[[Path], object],
) -> None:
    first = survey_keys(data, "train", processor, mine, show=True)
    assert told() == ""
    path = next(path for path in kept_files(mine) if path.name.endswith("-0-256.arrow"))
    damage(path)
    read_rows.clear()
    assert same(survey_keys(data, "train", processor, mine, show=True), first)
    if damage is not Path.unlink:  # which any user may do
        assert f"note: survey {path.parent}, {path.name}: " in told()
    assert 256 <= len(set(read_rows)) <= 300


@pytest.mark.parametrize(
    ("name", "value"), [("key", bytes(16)), ("text_tokens", 9999), ("pictures", []), ("reason", "no")]
)
def test_a_kept_survey_that_lies_is_found_out(
    data: DataConfig,
    processor: ExampleProcessor,
    mine: Surveyors,
    read_rows: list[int],
    told: Callable[[], str],
    name: str,
    value: Any,
) -> None:
    """Rows are read again and compared at each start; what disagrees once is not believed in the rest."""
    first = survey_keys(data, "train", processor, mine)
    for path in kept_files(mine):
        rewritten(path, lambda line: line.update({name: value}))
    read_rows.clear()
    assert same(survey_keys(data, "train", processor, mine, show=True), first)
    assert set(read_rows) == set(range(900))
    if name != "reason":  # a row that is said to be of no use is read again in any case
        assert f"its {name.replace('_', ' ')} is not what an earlier survey has kept. All rows of" in told()
    read_rows.clear()
    survey_keys(data, "train", processor, mine, show=True)
    assert len(read_rows) <= 40
    assert "note" not in told()


@pytest.mark.parametrize(
    "changed",
    [
        {"system_prompt": "Be brief."},
        {"max_answer_tokens": 3},
        {"answers": "majority"},
        {"columns": {"answer": "question"}},
        {"text_only": True},
    ],
)
def test_other_settings_are_surveyed_for_themselves(
    data: DataConfig, student_folder: Path, mine: Surveyors, read_rows: list[int], changed: dict[str, Any]
) -> None:
    other = data.model_copy(update={"columns": data.columns.model_copy(update=changed.pop("columns", {}))})
    other = other.model_copy(update=changed)
    survey_keys(data, "train", open_processor(str(student_folder), data), mine)
    read_rows.clear()
    processor = open_processor(str(student_folder), other)
    assert same(survey_keys(other, "train", processor, mine), survey_keys(other, "train", processor))
    assert len(read_rows) >= 1800


def test_the_bounds_of_pictures_ask_for_no_other_survey(
    data: DataConfig, student_folder: Path, mine: Surveyors, read_rows: list[int]
) -> None:
    """Sizes of pictures are kept: how many tokens they make is told by the processor of the day."""
    before = survey_keys(data, "train", open_processor(str(student_folder), data), mine)
    other = data.model_copy(update={"min_pixels": 65536, "max_dropped": 5, "limit": 700})
    processor = open_processor(str(student_folder), other)
    read_rows.clear()
    found = survey_keys(other, "train", processor, mine)
    assert len(read_rows) < 256
    assert same(found, survey_keys(other, "train", processor))
    assert len(found.rows) == 700
    assert (found.lengths > before.lengths[:700]).all()


@pytest.fixture
def by_path(tmp_path: Path) -> DataConfig:
    """Forty rows that name the files of their pictures; the last is not there."""
    folder = tmp_path / "named"
    folder.mkdir()
    lines = []
    for row in range(40):
        if row < 39:
            (folder / f"{row}.png").write_bytes(PICTURES[row % 4])
        lines.append(json.dumps({"image": f"{row}.png", "question": "what?", "answer": f"it is {row}"}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return DataConfig(source=str(folder), max_dropped=1)


@pytest.mark.parametrize("back", [False, True])
def test_a_picture_s_own_file_is_looked_after(
    by_path: DataConfig, processor: ExampleProcessor, mine: Surveyors, back: bool
) -> None:
    before = survey_keys(by_path, "train", processor, mine)
    path = Path(by_path.source) / "5.png"
    status = path.stat()
    other = bytearray(PICTURES[1])
    other[-20] ^= 1
    path.write_bytes(other)
    if back:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = survey_keys(by_path, "train", processor, mine)
    assert np.flatnonzero((before.keys != after.keys).any(axis=1)).tolist() == [5]


def test_a_picture_that_was_missing_is_found_when_it_is_there(
    by_path: DataConfig, processor: ExampleProcessor, mine: Surveyors
) -> None:
    found = survey_keys(by_path, "train", processor, mine)
    assert [row for row, _ in found.unreadable] == [39]
    assert same(survey_keys(by_path, "train", processor, mine), found)
    (Path(by_path.source) / "39.png").write_bytes(PICTURES[0])
    assert not survey_keys(by_path, "train", processor, mine).unreadable


def test_another_folder_has_other_pictures(
    by_path: DataConfig, processor: ExampleProcessor, mine: Surveyors, tmp_path: Path
) -> None:
    survey_keys(by_path, "train", processor, mine)
    shutil.copytree(by_path.source, tmp_path / "other")
    (tmp_path / "other" / "5.png").write_bytes(PICTURES[2])
    other = by_path.model_copy(update={"source": str(tmp_path / "other")})
    assert same(survey_keys(other, "train", processor, mine), survey_keys(other, "train", processor))


def test_a_folder_above_finds_its_own(
    data: DataConfig, processor: ExampleProcessor, mine: Surveyors, tmp_path: Path, told: Callable[[], str]
) -> None:
    """Relative paths of pictures would begin there, so it is another survey, and no damage."""
    above = data.model_copy(update={"source": str(tmp_path)})
    for one in (data, above, data, above):
        assert same(
            survey_keys(one, "train", processor, mine, show=True), survey_keys(one, "train", processor)
        )
    assert told() == ""


def test_compressed_buffers_are_not_taken(
    data: DataConfig, processor: ExampleProcessor, mine: Surveyors
) -> None:
    """A few bytes of them can take all memory."""
    first = survey_keys(data, "train", processor, mine)
    sink = pa.BufferOutputStream()
    batch = decoded(kept_files(mine)[0].read_bytes())
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_batch(batch)
    packed = sink.getvalue().to_pybytes()
    with pytest.raises(CacheFormatError, match="compressed"):
        decoded(packed + hashlib.sha256(packed).digest())
    kept_files(mine)[0].write_bytes(packed + hashlib.sha256(packed).digest())
    assert same(survey_keys(data, "train", processor, mine), first)


def test_pictures_that_cannot_be_decoded_are_another_survey(
    data: DataConfig, processor: ExampleProcessor, mine: Surveyors
) -> None:
    broken = PICTURES[0][:60] + b"0000" + PICTURES[0][64:]
    write_table(Path(data.source), "train-0.parquet", 300, image_id={"bytes": broken, "path": None})
    for _ in range(2):
        assert not survey_keys(data, "train", processor, mine).unreadable
        assert len(survey_keys(data, "train", processor, mine, decode=True).unreadable) == 1


def test_worker_processes_find_the_same(
    data: DataConfig, processor: ExampleProcessor, tmp_path: Path
) -> None:
    pool = Surveyors(kept_at=str(tmp_path / "pool"), num_workers=2)
    assert same(survey_keys(data, "train", processor, pool), survey_keys(data, "train", processor))
    assert len(kept_files(pool)) == len(parts_of(survey_keys(data, "train", processor, pool).split))


def on_two(data: DataConfig, processor: ExampleProcessor, place: Path) -> list[Any]:
    """Of each rank: what it has found, and the rows that it has read."""

    def survey(world: World) -> tuple[Keyed, list[int]]:
        read: list[int] = []
        plain = VqaSplit.__getitem__
        VqaSplit.__getitem__ = lambda split, row: read.append(row) or plain(split, row)  # type: ignore[method-assign]
        found = survey_keys(data, "train", processor, Surveyors(world, str(place)))
        return found, read

    return on_ranks(2, survey)


def test_ranks_share_the_rows_and_find_the_same(
    data: DataConfig, processor: ExampleProcessor, tmp_path: Path
) -> None:
    plain = survey_keys(data, "train", processor)
    (first, read_first), (second, read_second) = on_two(data, processor, tmp_path / "kept")
    assert same(first, plain)
    assert same(second, plain)
    assert set(read_first) | set(read_second) == set(range(900))
    assert len(read_first) + len(read_second) <= 900 + 16  # template and pixels are measured on one
    (first, read_first), (second, read_second) = on_two(data, processor, tmp_path / "kept")
    assert same(first, plain)
    assert same(second, plain)
    assert len(read_first) + len(read_second) <= 60


def test_an_error_of_one_rank_is_all_ranks(
    data: DataConfig, processor: ExampleProcessor, tmp_path: Path
) -> None:
    def survey(world: World) -> Keyed:
        if world.rank == 1:
            path = Path(data.source) / "train-2.parquet"
            plain = VqaSplit.__getitem__

            def changing(split: VqaSplit, row: int) -> Example:
                path.touch()
                return plain(split, row)

            VqaSplit.__getitem__ = changing  # type: ignore[method-assign]
        return survey_keys(data, "train", processor, Surveyors(world))

    for error in on_ranks(2, survey, errors=True):
        assert "train-2.parquet: the file has changed since it was opened" in str(error)


def test_a_kill_costs_the_part_in_hand(
    data: DataConfig, processor: ExampleProcessor, mine: Surveyors, read_rows: list[int]
) -> None:
    def survey_slowly() -> None:
        plain = VqaSplit.__getitem__
        VqaSplit.__getitem__ = lambda split, row: time.sleep(0.002) or plain(split, row)  # type: ignore[method-assign]
        survey_keys(data, "train", processor, mine)

    process = FORK.Process(target=survey_slowly)
    process.start()
    while not whole_files(mine):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert 0 < len(whole_files(mine)) < 6
    found = survey_keys(data, "train", processor, mine)
    assert len(set(read_rows)) < 900
    assert same(found, survey_keys(data, "train", processor))


def test_what_killed_writers_have_left_is_removed(
    data: DataConfig, processor: ExampleProcessor, mine: Surveyors
) -> None:
    process = FORK.Process(target=lambda: None)
    process.start()
    process.join()
    survey_keys(data, "train", processor, mine)
    kept = kept_files(mine)[0]
    kept.unlink()
    (kept.parent / temporary_name(kept.name).replace(f".{os.getpid()}.", f".{process.pid}.")).touch()
    survey_keys(data, "train", processor, mine)
    assert kept.exists()
    assert not any(path.name.startswith(".") for path in kept_files(mine))


def test_two_at_once_do_no_harm(data: DataConfig, processor: ExampleProcessor, mine: Surveyors) -> None:
    processes = [FORK.Process(target=survey_keys, args=(data, "train", processor, mine)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert all(path.name.endswith(".arrow") and path.name[0] != "." for path in kept_files(mine))
    assert same(survey_keys(data, "train", processor, mine), survey_keys(data, "train", processor))


def test_a_place_that_cannot_be_written_is_no_error(
    data: DataConfig, processor: ExampleProcessor, tmp_path: Path, told: Callable[[], str]
) -> None:
    (tmp_path / "file").touch()
    nowhere = Surveyors(kept_at=str(tmp_path / "file" / ".survey"))
    for _ in range(2):
        found = survey_keys(data, "train", processor, nowhere, show=True)
        assert same(found, survey_keys(data, "train", processor))
        notes = [line for line in told().splitlines() if line.startswith("note")]
        assert len(notes) == 1
        assert "the survey of the rows is not kept" in notes[0]


@pytest.mark.parametrize("fingerprint", [None, "0123"])
def test_rows_without_files_are_kept_by_their_fingerprint(
    data: DataConfig,
    processor: ExampleProcessor,
    mine: Surveyors,
    read_rows: list[int],
    fingerprint: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of the Hub are."""
    files = sorted(str(path) for path in Path(data.source).iterdir())
    held = datasets.Dataset.from_list([row for file in files for row in pq.read_table(file).to_pylist()])
    rows = sources.DatasetRows(held, None, fingerprint)
    monkeypatch.setattr("shared.data.rows.open_rows", lambda *_, **__: rows)
    first = survey_keys(data, "train", processor, mine)
    read_rows.clear()
    assert same(survey_keys(data, "train", processor, mine), first)
    assert len(read_rows) <= 40 if fingerprint else len(read_rows) >= 900
    assert bool(kept_files(mine) if Path(str(mine.kept_at)).exists() else []) == bool(fingerprint)


def test_the_student_reads_what_the_capture_has_kept(
    distillation_tree: dict[str, Any], read_rows: list[int], tmp_path: Path
) -> None:
    """Its cache was captured by other means of the session: nothing but the folder beside it tells."""
    recipe = make_recipe(distillation_tree, run__name="reads", run__root=str(tmp_path))
    processor = open_processor(recipe.student.model, recipe.data)
    split = open_split(recipe.data, "train")
    kept = Kept.of(Surveyors.of_run(recipe).kept_at, split, processor, decode=False)
    assert all(kept.read(part) is not None for part in parts_of(split))
    assert Surveyors.of_run(recipe).kept_at == Surveyors.of_capture(recipe).kept_at


def test_without_a_cache_it_lies_beside_the_runs(
    vqa_folder: Path, student_folder: Path, tmp_path: Path
) -> None:
    tree = {"data": {"source": str(vqa_folder)}, "student": {"model": str(student_folder)}}
    tree |= {"loss": {"kd_ratio": 0.0}, "optimization": {"max_steps": 1}}
    recipe = make_recipe(tree, run__name="plain", run__root=str(tmp_path / "runs"))
    assert Surveyors.of_run(recipe).kept_at == str(tmp_path / "runs" / ".survey")


def test_it_is_kept_beside_a_remote_cache_too(
    data: DataConfig, processor: ExampleProcessor, read_rows: list[int]
) -> None:
    remote = Surveyors(kept_at=place_beside("memory://surveying/cache"))
    first = survey_keys(data, "train", processor, remote)
    read_rows.clear()
    assert same(survey_keys(data, "train", processor, remote), first)
    assert len(read_rows) <= 40
    fsspec.filesystem("memory").rm("/surveying", recursive=True)


@pytest.mark.parametrize(
    ("location", "place"),
    [
        ("/data/caches/medpix", "/data/caches/.survey"),
        ("s3://bucket/caches/medpix", "s3://bucket/caches/.survey"),
        ("s3://bucket", "s3://bucket/.survey"),
        ("file:///data/caches/medpix", "file:///data/caches/.survey"),
    ],
)
def test_a_survey_lies_beside_the_cache(location: str, place: str) -> None:
    assert place_beside(location) == place


def test_numbers_of_a_queue_are_each_taken_once() -> None:
    queue = alone().queue(3)
    assert list(queue) == [0, 1, 2]

    def take(world: World) -> list[int]:
        if world.is_main:
            assert list(alone().queue(1)) == [0]  # of which the other rank knows nothing
        return list(world.queue(101))

    taken = on_ranks(2, take)
    assert sorted(taken[0] + taken[1]) == list(range(101))


def test_what_is_given_up_is_not_taken() -> None:
    queue = alone().queue(3)
    numbers: Iterator[int] = iter(queue)
    assert next(numbers) == 0
    queue.give_up()
    assert list(numbers) == []


def test_a_split_without_usable_rows_is_a_survey_too(tmp_path: Path, processor: ExampleProcessor) -> None:
    lines = [json.dumps({"image": None, "question": "what?", "answer": ""})] * 3
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    found = survey_keys(DataConfig(source=str(tmp_path)), "train", processor)
    assert found.keys.shape == (0, 16)
    assert len(found.unreadable) == 3
    assert len(found.lengths) == 0
    with pytest.raises(DataError):
        found.split[0]


def test_who_wrote_the_answers_is_kept_too(
    tmp_path: Path, processor: ExampleProcessor, mine: Surveyors
) -> None:
    (tmp_path / "written").mkdir()
    for number, writers in enumerate((["b", None, "a"], ["c", "a", "a"])):
        lines = [
            {"image": None, "question": f"what {n}?", "answer": "this", "written_by": writer}
            for n, writer in enumerate(writers)
        ]
        path = tmp_path / "written" / f"train-{number}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
    data = DataConfig(source=str(tmp_path / "written"), text_only=True)
    for _ in range(2):
        assert survey_keys(data, "train", processor, mine).written_by == ("a", "b", "c")
