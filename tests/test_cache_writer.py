"""Writing a cache: whole or absent, the same bytes however it came about."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_examples import (
    VERSIONS,
    Clock,
    capture,
    files_of,
    keys_and_rows,
    locked_by_another,
    make_identity,
    make_key,
    make_row,
)

from shared.cache import CacheBusyError, CacheReader, CacheWriter, DataSource, SkippedRow, Unit
from shared.cache import lock as lock_module
from shared.cache import storage as storage_module
from shared.cache.lock import CaptureLock, WaitStoppedError
from shared.cache.log import log_records
from shared.cache.manifest import Manifest
from shared.cache.merge import merge
from shared.cache.plan import make_unit
from shared.cache.shard import encode_shard
from shared.cache.verify import verify
from shared.errors import CacheFormatError, CacheMismatchError, DataError
from shared.recipes.policies import TopK

IDENTITY = make_identity()


def open_writer(path: Path, **changes) -> CacheWriter:
    return CacheWriter.open(str(path), changes.pop("identity", IDENTITY), created_by=VERSIONS)


def write_unit(writer: CacheWriter, unit: Unit, *, then: Exception | None = None) -> None:
    with writer.unit(unit) as shard:
        for number in unit.rows:
            shard.add(make_row(int(number), writer.identity))
        if then is not None:
            raise then


def test_rows_and_units_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    capture(tmp_path / "a", range(23))
    capture(tmp_path / "b", range(23), order=-1)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert len(list((tmp_path / "a" / "shards").iterdir())) == 5


def test_totals_are_sums_over_the_rows(tmp_path: Path) -> None:
    manifest = capture(tmp_path, range(23))
    rows = [make_row(number) for number in range(23)]
    assert manifest.totals.examples == 23
    assert manifest.totals.positions == sum(len(row.answer_ids) for row in rows)
    assert manifest.totals.entries == sum(row.num_entries for row in rows)
    assert manifest.totals.truncated == sum(row.truncated for row in rows) == 3
    sizes = {path.name: path.stat().st_size for path in tmp_path.rglob("*.arrow")}
    assert manifest.totals.bytes == sum(sizes.values())


def test_equal_rows_are_captured_once_and_counted(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows([3, 1, 3, 1, 1, 2]), examples_per_shard=2)
        assert [unit.rows.tolist() for unit in plan.units] == [[3, 1], [2]]
        for unit in plan.units:
            write_unit(writer, unit)
        manifest = writer.commit(plan)
    assert (manifest.totals.examples, manifest.totals.duplicates) == (3, 3)


def test_skipped_rows_are_listed_with_their_reasons(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        broken = SkippedRow(row="train[9]", reason="the picture cannot be read")
        plan = writer.plan(keys_and_rows([0, 1, 2]), examples_per_shard=2, skipped=[broken])
        with writer.unit(plan.units[0]) as shard:
            shard.add(make_row(1))
            shard.skip(make_key(0), row="train[0]", reason="NaN")
        with writer.unit(plan.units[1]) as shard:
            shard.skip(make_key(2), row="train[2]", reason="NaN")
        manifest = writer.commit(plan)
    assert [(row.row, row.reason) for row in manifest.skipped] == [
        ("train[9]", "the picture cannot be read"),
        ("train[0]", "NaN"),
        ("train[2]", "NaN"),
    ]
    assert (manifest.totals.examples, manifest.totals.skipped) == (1, 3)
    assert not verify(str(tmp_path)).faults
    assert make_key(2) not in CacheReader(str(tmp_path))


def capture_but(
    path: Path, numbers: range, refused: set[int], *, unreadable: Sequence[SkippedRow] = (), **changes
) -> Manifest:
    """Two examples in each unit; some of them are refused."""
    with open_writer(path, **changes) as writer:
        plan = writer.stored_plan() or writer.plan(
            keys_and_rows(numbers), examples_per_shard=2, skipped=unreadable
        )
        for unit in plan.units:
            if writer.is_finished(unit):
                continue
            with writer.unit(unit) as shard:
                for number in unit.rows.tolist():
                    if number in refused:
                        shard.skip(make_key(number), row=f"train[{number}]", reason="NaN")
                    else:
                        shard.add(make_row(number))
        return writer.commit(plan)


@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (3,), (0, 2)])
def test_a_lost_shard_with_refused_rows_is_captured_again_as_it_was(
    tmp_path: Path, lost: tuple[int, ...]
) -> None:
    """And what was refused elsewhere is not tried again for it."""
    odd = SkippedRow(row="train[9]", reason="no picture")
    manifest = capture_but(tmp_path, range(8), {1, 4, 7}, unreadable=[odd])
    before = files_of(tmp_path)
    for place in lost:
        (tmp_path / manifest.shards[place].name).unlink()
    assert capture_but(tmp_path, range(8), {1, 4, 7}, unreadable=[odd]) == manifest
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("places", [(2,), (0, 3)])
def test_a_lost_list_of_shards_without_rows_is_made_again(tmp_path: Path, places: tuple[int, ...]) -> None:
    manifest = capture_but(tmp_path, range(8), {2 * place + one for place in places for one in (0, 1)})
    assert [place for place, shard in enumerate(manifest.shards) if not shard.examples] == list(places)
    before = files_of(tmp_path)
    (tmp_path / manifest.segments[0].list.name).unlink()
    open_writer(tmp_path).close()
    assert files_of(tmp_path) == before


def test_a_lost_shard_without_rows_leaves_no_unit_that_nobody_can_finish(tmp_path: Path) -> None:
    manifest = capture_but(tmp_path, range(6), {2, 3})
    before = files_of(tmp_path)
    for shard in manifest.shards[:2]:
        (tmp_path / shard.name).unlink()
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(6)), examples_per_shard=2)
        assert [(unit.slot, unit.rows.tolist()) for unit in plan.units] == [(0, [0, 1]), (None, [2, 3])]
        # As an earlier release planned it.
        empty = make_unit(IDENTITY.digest(), [], np.empty(0, np.int64), slot=1)
        writer.folder.publish("plan.arrow", replace(plan, units=(*plan.units, empty)).encode())
    repaired = capture_but(tmp_path, range(6), {2, 3})
    assert repaired.totals == manifest.totals
    assert files_of(tmp_path).keys() >= {name for name in before if name.startswith("shards/")}
    assert not verify(str(tmp_path)).faults


def test_a_shard_without_rows_is_listed_once_however_often_its_examples_are_refused(tmp_path: Path) -> None:
    for size in (4, 6, 8):
        manifest = capture_but(tmp_path, range(size), {0, 1})
    names = manifest.shards.names()
    assert len(names) == len(set(names)) == 4
    assert (manifest.totals.examples, manifest.totals.skipped) == (6, 2)
    assert not verify(str(tmp_path)).faults


def test_rows_are_left_out_as_the_last_capture_of_them_says(tmp_path: Path) -> None:
    """Of two sets of data, each captured alone."""
    first, second = (
        make_identity(data=(DataSource(name="drawn", split=name, fingerprint=name, rows=9),))
        for name in ("train", "validation")
    )
    odd = SkippedRow(row="train[9]", reason="no picture")
    capture_but(tmp_path, range(4), {1, 2}, unreadable=[odd], identity=first)
    capture_but(tmp_path, range(20, 22), {21}, identity=second)
    for size in (6, 8):
        manifest = capture_but(tmp_path, range(size), {2}, unreadable=[odd], identity=first)
    assert [row.row for row in manifest.skipped] == ["train[9]", "train[2]", "train[21]"]
    manifest = capture_but(tmp_path, range(20, 22), set(), identity=second)
    assert [row.row for row in manifest.skipped] == ["train[9]", "train[2]"]
    assert not verify(str(tmp_path)).faults


def test_an_empty_capture_is_a_cache_without_examples(tmp_path: Path) -> None:
    manifest = capture(tmp_path, [])
    assert manifest.totals.examples == 0
    reader = CacheReader(str(tmp_path))
    assert len(reader) == 0
    assert make_key(0) not in reader
    assert not verify(str(tmp_path)).faults


def test_an_exception_in_a_unit_leaves_nothing_of_it(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(8)), examples_per_shard=4)
        write_unit(writer, plan.units[0])
        with pytest.raises(RuntimeError, match="the teacher died"):
            write_unit(writer, plan.units[1], then=RuntimeError("the teacher died"))
        assert writer.is_finished(plan.units[0])
        assert not writer.is_finished(plan.units[1])
        with pytest.raises(CacheFormatError, match="1 of 2 units are not captured"):
            writer.commit(plan)
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(CacheFormatError, match=r"no manifest\.json"):
        CacheReader(str(tmp_path))


def test_a_unit_takes_its_own_rows_once_and_all_of_them(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows([0, 1]), examples_per_shard=2)
        shard = writer.unit(plan.units[0])
        shard.add(make_row(0))
        for number in (0, 7):
            with pytest.raises(ValueError, match="not one of its, or came twice"):
                shard.add(make_row(number))
        with pytest.raises(ValueError, match="1 of 2 rows are missing"), writer.unit(plan.units[0]) as shard:
            shard.add(make_row(0))
        assert not writer.is_finished(plan.units[0])


@pytest.mark.parametrize(
    "change",
    [
        {"ce_sum": float("nan")},
        {"entropy_sums": np.array([np.inf])},
        {"entropy_sums": np.zeros(2)},
        {"key": b"k"},
    ],
)
def test_a_row_that_contradicts_itself_is_refused(change: dict) -> None:
    with pytest.raises(ValueError):
        encode_shard([replace(make_row(1), **change)], num_temperatures=1, metadata={})


def test_a_full_disk_loses_the_unit_in_hand_only(tmp_path: Path) -> None:
    """The kernel refuses to write past a limit, as a full disk would, in the middle of the second shard."""
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from cache_examples import *
writer = CacheWriter.open({str(tmp_path / "c")!r}, make_identity(), created_by=VERSIONS)
plan = writer.plan(keys_and_rows(range(40)), examples_per_shard=20)
def write(unit):
    with writer.unit(unit) as shard:
        for number in unit.rows: shard.add(make_row(int(number)))
write(plan.units[0])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write(plan.units[1])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "CacheFormatError" in ended.stderr
    assert "no space left" in ended.stderr
    assert len(list((tmp_path / "c" / "shards").iterdir())) == 1
    capture(tmp_path / "c", range(40), examples_per_shard=20)
    capture(tmp_path / "whole", range(40), examples_per_shard=20)
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("failing", ["sync_file", "sync_folder", "sha256_of_file"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_of_publishing_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    folder = storage_module.LocalFolder(tmp_path)
    folder.publish("manifest.json", b"old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(storage_module, failing, fail)
    with pytest.raises((CacheFormatError, KeyboardInterrupt)):
        folder.publish("manifest.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    expected = b"new" if failing == "sync_folder" else b"old"
    assert (tmp_path / "manifest.json").read_bytes() == expected


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EACCES])
def test_whatever_the_system_refuses_is_one_error_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage_module, "sync_file", fail)
    with pytest.raises(CacheFormatError) as error:
        storage_module.LocalFolder(tmp_path).publish("x", b"data")
    assert f"cache {tmp_path}, x: " in str(error.value)
    assert os.strerror(number) in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["file", "file/below", "a" * 300])
def test_a_path_that_can_be_no_folder_is_one_error_with_the_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"theirs")
    for use in (open_writer, lambda path: CacheReader(str(path))):
        with pytest.raises(CacheFormatError, match=name):
            use(tmp_path / name)


def test_bytes_that_come_back_changed_are_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "sha256_of_file", lambda _: "0" * 64)
    with pytest.raises(CacheFormatError, match="read back other bytes"):
        storage_module.LocalFolder(tmp_path).publish("x", b"data")
    assert not list(tmp_path.iterdir())


def test_growing_captures_only_what_is_new(tmp_path: Path) -> None:
    old = capture(tmp_path, range(12))
    before = files_of(tmp_path)
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(20)), examples_per_shard=5)
        assert [unit.rows.tolist() for unit in plan.units] == [[12, 13, 14, 15, 16], [17, 18, 19]]
        for unit in plan.units:
            write_unit(writer, unit)
            assert CacheReader(str(tmp_path)).manifest == old  # until the commit the old cache stands
        new = writer.commit(plan)
    assert new.shards[:3] == old.shards
    assert new.totals.examples == 20
    after = files_of(tmp_path)
    assert all(after[name] == data for name, data in before.items() if name != "manifest.json")
    assert not verify(str(tmp_path)).faults


def test_a_reader_of_the_old_cache_goes_on_while_it_grows(tmp_path: Path) -> None:
    import pickle

    capture(tmp_path, range(12))
    reader = CacheReader(str(tmp_path))
    sent_to_worker = pickle.dumps(reader)
    capture(tmp_path, range(20))
    worker = pickle.loads(sent_to_worker)
    assert len(worker) == len(reader) == 12
    assert len(worker.read([make_key(11)])[0]) == 1
    assert len(CacheReader(str(tmp_path))) == 20


def test_nothing_new_leaves_the_manifest_as_it_is(tmp_path: Path) -> None:
    capture(tmp_path, range(12))
    before = files_of(tmp_path)
    with CacheWriter.open(str(tmp_path), IDENTITY, created_by={"teachonce": "99"}) as writer:
        plan = writer.plan(keys_and_rows(range(12)), examples_per_shard=7)
        assert not plan.units
        writer.commit(plan)
    assert files_of(tmp_path) == before


def test_data_of_a_second_split_join_the_first(tmp_path: Path) -> None:
    capture(tmp_path, range(6))
    validation = DataSource(name="drawn", split="validation", fingerprint="d1", rows=3)
    grown = capture(tmp_path, range(6, 9), identity=make_identity(data=(validation,)))
    assert [source.split for source in grown.identity.data] == ["train", "validation"]
    assert grown.totals.examples == 9


def test_all_who_wrote_answers_of_a_split_stay_named(tmp_path: Path) -> None:
    """Each round lays other answers over the same split, and the rows of earlier ones stay."""
    for first, writers in ((0, ()), (6, ("round 1",)), (9, ("round 2",)), (12, ())):
        source = DataSource(name="drawn", split="train", fingerprint=f"d{first}", rows=3, written_by=writers)
        grown = capture(tmp_path, range(first, first + 3), identity=make_identity(data=(source,)))
    assert [source.written_by for source in grown.identity.data] == [("round 1", "round 2")]
    assert [source.fingerprint for source in grown.identity.data] == ["d12"]


def test_a_lost_shard_is_captured_again_in_its_old_place(tmp_path: Path) -> None:
    manifest = capture(tmp_path, range(23))
    before = files_of(tmp_path)
    (tmp_path / manifest.shards[1].name).unlink()
    (tmp_path / manifest.shards[3].name).unlink()
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(23)), examples_per_shard=100)
        assert [unit.rows.tolist() for unit in plan.units] == [[5, 6, 7, 8, 9], [15, 16, 17, 18, 19]]
        write_unit(writer, plan.units[1])  # and then it is interrupted
    capture(tmp_path, range(23), examples_per_shard=100)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("kind", ["index", "list"])
@pytest.mark.parametrize("damage", [None, b"", b"ARROW1"])
@pytest.mark.parametrize("numbers", [range(23), range(30)])
def test_a_lost_or_damaged_index_or_list_is_made_again_from_the_shards(
    tmp_path: Path, kind: str, damage: bytes | None, numbers: range
) -> None:
    manifest = capture(tmp_path / "c", range(23))
    capture(tmp_path / "whole", range(23))
    if len(numbers) > 23:
        capture(tmp_path / "whole", numbers)
    path = tmp_path / "c" / getattr(manifest.segments[0], kind).name
    path.unlink() if damage is None else path.write_bytes(damage)
    assert "Run teacher-cache again" in verify(str(tmp_path / "c")).faults[0]
    with pytest.raises(CacheFormatError, match=rf"{kind}-.* [Rr]un teacher-cache again"):
        CacheReader(str(tmp_path / "c"))
    capture(tmp_path / "c", numbers)
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")


def test_an_index_and_a_shard_lost_together_are_mended_as_the_error_says(tmp_path: Path) -> None:
    manifest = capture(tmp_path, range(23))
    before = files_of(tmp_path)
    (tmp_path / manifest.segments[0].index.name).unlink()
    (tmp_path / manifest.shards[1].name).unlink()
    (tmp_path / manifest.shards[2].name).write_bytes(b"damaged")
    with pytest.raises(CacheFormatError, match=r"shard 00001 .*Delete manifest\.json and run teacher-cache"):
        open_writer(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(23)), examples_per_shard=5)
        assert [writer.is_finished(unit) for unit in plan.units] == [True, False, False, True, True]
    capture(tmp_path, range(23))
    assert files_of(tmp_path) == before


def test_a_list_and_an_index_lost_together_are_mended_as_the_error_says(tmp_path: Path) -> None:
    manifest = capture(tmp_path, range(23))
    before = files_of(tmp_path)
    for file in manifest.files:
        (tmp_path / file.name).unlink()
    assert len(verify(str(tmp_path)).faults) == 1
    with pytest.raises(CacheFormatError, match=r"list-.*Delete manifest\.json and run teacher-cache"):
        open_writer(tmp_path)
    (tmp_path / "manifest.json").unlink()
    capture(tmp_path, range(23))
    assert files_of(tmp_path) == before


def test_a_shard_lost_after_planning_is_not_dropped_silently(tmp_path: Path) -> None:
    manifest = capture(tmp_path, range(10))
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(12)), examples_per_shard=5)
        write_unit(writer, plan.units[0])
        (tmp_path / manifest.shards[0].name).unlink()
        assert writer.stored_plan() is None
        with pytest.raises(CacheFormatError, match="changed since it was planned"):
            writer.commit(plan)


def test_another_capture_is_refused_with_all_differences(tmp_path: Path) -> None:
    capture(tmp_path, range(3))
    other = make_identity(policy=TopK(k=8), tokenizer_fingerprint="t1", weights_fingerprint="w1")
    with pytest.raises(CacheMismatchError) as refused:
        open_writer(tmp_path, identity=other)
    message = str(refused.value)
    for part in ("3 difference(s)", '"w0"', '"w1"', '"t0"', '"t1"', '"threshold"', '"top_k"'):
        assert part in message
    # an unfinished capture is as jealous as a committed one
    with open_writer(tmp_path / "unfinished") as writer:
        writer.plan(keys_and_rows(range(3)), examples_per_shard=2)
    with pytest.raises(CacheMismatchError, match="unfinished"):
        open_writer(tmp_path / "unfinished", identity=other)


def test_a_renamed_teacher_with_the_same_weights_is_the_same(tmp_path: Path) -> None:
    capture(tmp_path, range(3))
    renamed = make_identity(name="elsewhere/teacher", revision="abc")
    assert renamed.digest() == IDENTITY.digest()
    assert capture(tmp_path, range(5), identity=renamed).totals.examples == 5


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(CacheFormatError, match=r"thesis\.tex"):
        open_writer(tmp_path)


def test_the_log_holds_what_the_manifest_must_not(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.log("started", host="h")
        writer.log("ended", seconds=1.5)
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "ended"]
    assert all("time" in event for event in events)


def test_a_line_of_the_log_is_written_once(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.log("first")
        path = tmp_path / "log.jsonl"
        before = path.stat().st_ino, path.read_bytes()
        writer.log("second")
        assert path.stat().st_ino == before[0]
        assert path.read_bytes().startswith(before[1])
        path.write_bytes(path.read_bytes() + b'{"event": "to')  # a machine lost power
        writer.log("third")
    assert [record["event"] for record in log_records(writer.folder)] == ["first", "second", "third"]


def test_a_line_of_the_log_that_does_not_fit_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_writer(tmp_path) as writer:
        writer.log("first")
        before = (tmp_path / "log.jsonl").read_bytes()

        def fail(_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(storage_module, "sync_file", fail)
        with pytest.raises(CacheFormatError, match="no space left"):
            writer.log("second")
        assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_commit_counts_the_rows_that_are_left_out(tmp_path: Path) -> None:
    row = SkippedRow(row="train[9]", reason="no answer")
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(4)), examples_per_shard=2, skipped=[row])
        for unit in plan.units:
            with writer.unit(unit) as shard:
                shard.add(make_row(int(unit.rows[0])))
                shard.skip(unit.keys[1], row=f"train[{unit.rows[1]}]", reason="torn")
        assert [writer.num_skipped(unit) for unit in plan.units] == [1, 1]
        before = files_of(tmp_path)
        with pytest.raises(DataError, match=r"3 row.s. are left out so far, data.max_dropped allows 2"):
            writer.commit(plan, max_skipped=2)
        assert files_of(tmp_path) == before
        assert writer.commit(plan, max_skipped=3).totals.skipped == 3


def test_one_capture_at_a_time(tmp_path: Path) -> None:
    with open_writer(tmp_path):
        with pytest.raises(CacheBusyError, match="this very process is writing"):
            open_writer(tmp_path)
        program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from cache_examples import *
CacheWriter.open({str(tmp_path)!r}, make_identity(), created_by=VERSIONS)
"""
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert "CacheBusyError" in ended.stderr
        assert "is writing to it. Wait until it has ended" in ended.stderr
    open_writer(tmp_path).close()
    assert not list(tmp_path.iterdir())


OF_ANOTHER = ["", "process 1 on far\n", "process 1 on far for a moment\n"]


@pytest.mark.parametrize("text", OF_ANOTHER)
def test_a_lock_that_is_given_back_soon_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Its new owner may not have written its name yet, nor taken out that of one who was killed."""
    with locked_by_another(tmp_path, text) as release:
        clock = Clock(lambda _: release())
        monkeypatch.setattr(lock_module, "time", clock)
        CaptureLock.in_folder(tmp_path, for_a_moment=True).close()
        assert clock.now == lock_module.POLL_S


@pytest.mark.parametrize(
    ("text", "name"), [("", "another process"), ("process 1 on far\n", "process 1 on far")]
)
def test_one_who_stays_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str
) -> None:
    clock = Clock()
    monkeypatch.setattr(lock_module, "time", clock)
    with (
        locked_by_another(tmp_path, text),
        pytest.raises(CacheBusyError, match=f"{name} is writing to it. Wait until it has ended"),
    ):
        CaptureLock.in_folder(tmp_path, for_a_moment=True)
    assert 0 < clock.now < 60


def test_a_long_wait_is_told_and_has_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked_by_another(tmp_path, OF_ANOTHER[2]) as release:
        clock = Clock(lambda now: now > 1000 and release())
        monkeypatch.setattr(lock_module, "time", clock)
        CaptureLock.in_folder(tmp_path).close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"cache {tmp_path}: waiting for process 1 on far, which plans or commits there"


@pytest.mark.parametrize("failing", ["pwrite", "ftruncate"])
def test_a_full_disk_does_not_keep_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Else a process that goes on after the error, as a notebook does, is locked out by itself."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(CacheFormatError, match="no space left"):
            CaptureLock.in_folder(tmp_path)
    CaptureLock.in_folder(tmp_path).close()


def test_a_lock_is_given_back_also_where_its_file_must_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = CaptureLock.in_folder(tmp_path)

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        lock.close()
    with locked_by_another(tmp_path, ""):
        pass


def test_a_folder_that_the_last_one_removes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, folder = Path.mkdir, tmp_path / "run"

    def removed_once(path: Path, *arguments: Any, **options: Any) -> None:
        mkdir(path, *arguments, **options)
        monkeypatch.setattr(Path, "mkdir", mkdir)
        path.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed_once)
    CaptureLock.in_folder(folder).close()
    assert folder.is_dir()


@pytest.mark.parametrize("text", OF_ANOTHER)
def test_a_stop_ends_the_wait_for_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    clock = Clock()
    monkeypatch.setattr(lock_module, "time", clock)
    with (
        locked_by_another(tmp_path, text),
        pytest.raises(WaitStoppedError, match="this process was waiting for"),
    ):
        CaptureLock.in_folder(tmp_path, for_a_moment=True, is_stopped=lambda: clock.now >= 0.5)
    assert clock.now < 0.6
    CaptureLock.in_folder(tmp_path, is_stopped=lambda: True).close()  # free: there is no wait


@pytest.mark.parametrize("name", ["shards/000000.tar", "shards/0123456789abcdef-copy.arrow", "index-a.html"])
def test_files_of_others_are_neither_taken_for_a_cache_nor_removed(tmp_path: Path, name: str) -> None:
    """WebDataset calls its folder ``shards``, too: a capture into such a data set once removed it."""
    source = tmp_path / "source"
    capture(source, range(2))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"theirs")
    with pytest.raises(CacheFormatError, match=f"holds '{name}' but no manifest"):
        open_writer(tmp_path)
    with pytest.raises(CacheFormatError, match="holds"):
        merge([str(source)], str(tmp_path), created_by={})
    assert (tmp_path / name).read_bytes() == b"theirs"


def test_files_of_others_outlive_every_capture_into_a_cache(tmp_path: Path) -> None:
    capture(tmp_path, range(6))
    theirs = [tmp_path / name for name in ("shards/000000.tar", "index-a.html", ".tmp-mine", "shards/.tmp-x")]
    for path in theirs:
        path.write_bytes(b"theirs")
    capture(tmp_path, range(12))
    with open_writer(tmp_path) as writer:  # interrupted
        write_unit(writer, writer.plan(keys_and_rows(range(30)), examples_per_shard=5).units[0])
    capture(tmp_path, range(14))
    assert [path.read_bytes() for path in theirs] == [b"theirs"] * 4
    found = verify(str(tmp_path))
    assert found.faults == ()
    assert sorted(note.split(": ", 1)[1] for note in found.notes if "readers" in note) == [
        "index-a.html is not in the manifest; readers pass it over",
        "shards/000000.tar is not in the manifest; readers pass it over",
    ]
