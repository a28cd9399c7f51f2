"""Killed, restarted, shared out among processes: the cache that results is always the same, byte for byte."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest
from cache_examples import VERSIONS, capture, files_of, keys_and_rows, make_identity, make_row

from shared.cache import CacheReader, CacheWriter, Unit
from shared.cache.plan import Plan
from shared.cache.storage import LocalFolder
from shared.cache.verify import verify
from shared.errors import CacheFormatError
from shared.temporaries import temporary_name

IDENTITY = make_identity()
FORK = multiprocessing.get_context("fork")
NUMBERS = range(30)


def open_writer(path: Path) -> CacheWriter:
    return CacheWriter.open(str(path), IDENTITY, created_by=VERSIONS)


def write_unit(writer: CacheWriter, unit: Unit) -> None:
    with writer.unit(unit) as shard:
        for number in unit.rows:
            shard.add(make_row(int(number)))


def start(path: Path, *, events: list[str], die_at: int) -> None:
    """Captures in a process of its own, which is killed at the ``die_at``-th system call that matters."""
    counter = itertools.count()

    def killing(name: str, function):
        def called(*args, **kwargs):
            if next(counter) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return called

    for name in events:
        setattr(os, name, killing(name, getattr(os, name)))
    capture(path, NUMBERS, order=-1)


@pytest.mark.parametrize("die_at", range(0, 36, 3))
def test_killed_at_any_system_call_and_started_again(tmp_path: Path, die_at: int) -> None:
    """Around every fsync and rename of plan, shards, index and manifest; twice, so that leavings pile up."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    capture(whole, NUMBERS)
    for attempt, again in enumerate((die_at, max(0, die_at - 2))):
        process = FORK.Process(
            target=start, args=(torn,), kwargs={"events": ["fsync", "replace"], "die_at": again}
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL or attempt or die_at > 27
        if (torn / "manifest.json").exists():
            assert CacheReader(str(torn)).manifest == CacheReader(str(whole)).manifest
    capture(torn, NUMBERS)
    assert files_of(torn) == files_of(whole)


def test_killed_at_a_random_moment_while_growing(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for path in (whole, torn):
        capture(path, range(12))
    capture(whole, NUMBERS)
    for delay_s in (0.002, 0.01, 0.03):
        process = FORK.Process(target=capture, args=(torn, NUMBERS))
        process.start()
        time.sleep(delay_s)
        process.kill()
        process.join()
        assert len(CacheReader(str(torn))) in (12, 30)
    capture(torn, NUMBERS)
    ignored = {name for name in files_of(torn) if name.startswith(("index-", "list-"))}
    left = {name: data for name, data in files_of(torn).items() if name not in ignored}
    assert left == {name: data for name, data in files_of(whole).items() if name in left}
    assert not verify(str(torn)).faults


def test_only_the_missing_units_are_done_again(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(NUMBERS), examples_per_shard=5)
        for unit in (plan.units[4], plan.units[1]):
            write_unit(writer, unit)
    with open_writer(tmp_path) as writer:
        stored = writer.stored_plan()
        assert stored is not None
        assert [unit.unit_id for unit in stored.units] == [unit.unit_id for unit in plan.units]
        assert [writer.is_finished(unit) for unit in stored.units] == [False, True, False, False, True, False]
        again = writer.plan(keys_and_rows(NUMBERS), examples_per_shard=5)
        assert [unit.unit_id for unit in again.units] == [unit.unit_id for unit in plan.units]


def test_a_damaged_shard_is_done_again(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(10)), examples_per_shard=5)
        for unit in plan.units:
            write_unit(writer, unit)
    path = sorted((tmp_path / "shards").iterdir())[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with open_writer(tmp_path) as writer:
        assert sorted(map(writer.is_finished, plan.units)) == [False, True]
        assert not path.exists()


def test_stray_temporary_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for folder in (tmp_path, tmp_path / "shards"):
        (folder / temporary_name("x")).write_bytes(b"half")
    capture(tmp_path, range(3))
    assert not list(tmp_path.rglob(".tmp-*"))


def test_where_locks_do_not_work_only_the_dead_are_cleared_away(tmp_path: Path) -> None:
    process = FORK.Process(target=lambda: (tmp_path / temporary_name("dead")).write_bytes(b"half"))
    process.start()
    process.join()
    alive = temporary_name("alive")
    (tmp_path / alive).write_bytes(b"half")
    LocalFolder(tmp_path).remove_temporaries(alive_too=False)
    assert [path.name for path in tmp_path.iterdir()] == [alive]


def test_what_another_machine_is_writing_is_left_until_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a container with this one's host name, say: the number of its process means nothing here."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("shared.temporaries.this_machine", lambda: "another one")
        elsewhere.setattr(os, "getpid", lambda: 999_999_999)  # of no process here
        theirs = tmp_path / temporary_name("theirs")
    theirs.write_bytes(b"half")
    LocalFolder(tmp_path).remove_temporaries(alive_too=False)
    assert theirs.exists()
    two_days_ago = time.time() - 2 * 86_400
    os.utime(theirs, (two_days_ago, two_days_ago))
    LocalFolder(tmp_path).remove_temporaries(alive_too=False)
    assert not theirs.exists()


def test_finished_units_of_another_plan_are_kept(tmp_path: Path) -> None:
    """The data set grew, and the shard size changed, before the first capture ended."""
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(20)), examples_per_shard=5)
        for unit in (plan.units[0], plan.units[2]):
            write_unit(writer, unit)
    with open_writer(tmp_path) as writer:
        stored = writer.stored_plan()
        assert stored is not None
        assert stored.num_examples == 20
        plan = writer.plan(keys_and_rows([*range(-3, 0), *range(22)]), examples_per_shard=8)
        assert [unit.rows.tolist() for unit in plan.units] == [
            [0, 1, 2, 3, 4],
            [10, 11, 12, 13, 14],
            [-3, -2, -1, 5, 6, 7, 8, 9],
            [15, 16, 17, 18, 19, 20, 21],
        ]
        assert [writer.is_finished(unit) for unit in plan.units] == [True, True, False, False]
        for unit in plan.units[2:]:
            write_unit(writer, unit)
        writer.commit(plan)
    assert len(CacheReader(str(tmp_path))) == 25
    assert not verify(str(tmp_path)).faults


def test_finished_units_that_are_not_wanted_any_more_are_removed_and_noted(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(10)), examples_per_shard=5)
        write_unit(writer, plan.units[0])
    manifest = capture(tmp_path, range(3, 12))
    assert manifest.totals.examples == 9
    assert '"discarded"' in (tmp_path / "log.jsonl").read_text()
    assert not verify(str(tmp_path)).faults


def take_units(path: Path, share: int, shares: int) -> None:
    writer = CacheWriter.join(str(path), IDENTITY)
    plan = writer.stored_plan()
    assert plan is not None
    for unit in plan.units[share::shares]:
        write_unit(writer, unit)


def test_many_processes_write_one_cache(tmp_path: Path) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    capture(whole, NUMBERS)
    with open_writer(shared) as writer:
        plan = writer.plan(keys_and_rows(NUMBERS), examples_per_shard=5)
        # two do the first half, a third does everything: units done twice are no harm
        workers = [
            FORK.Process(target=take_units, args=(shared, *share)) for share in ((0, 2), (1, 2), (0, 1))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        writer.commit(plan)
    assert files_of(shared) == files_of(whole)


def test_two_different_shards_of_one_unit_leave_one(tmp_path: Path) -> None:
    """A teacher that is not deterministic may answer differently when a unit is captured twice."""
    from dataclasses import replace

    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(3)), examples_per_shard=3)
        for noise in (0.0, 1e-3):
            with writer.unit(plan.units[0]) as shard:
                for number in range(3):
                    row = make_row(number)
                    shard.add(replace(row, ce_sum=row.ce_sum + noise))
        assert len(list((tmp_path / "shards").iterdir())) == 2
        writer.commit(plan)
    assert len(list((tmp_path / "shards").iterdir())) == 1
    assert not verify(str(tmp_path)).faults


def test_the_commit_waits_for_slow_file_systems(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(4)), examples_per_shard=2)
        write_unit(writer, plan.units[0])

        def late() -> None:
            time.sleep(0.2)
            write_unit(CacheWriter.join(str(tmp_path), IDENTITY), plan.units[1])

        process = FORK.Process(target=late)
        process.start()
        assert writer.commit(plan, settle_s=10).totals.examples == 4
        process.join()


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(NUMBERS), examples_per_shard=7)
    read = Plan.decode((tmp_path / "plan.arrow").read_bytes(), where="plan")
    assert read.identity == plan.identity
    assert (read.request, read.base, read.duplicates, read.lost) == (plan.request, plan.base, 0, ())
    assert [(u.unit_id, u.keys, u.rows.tolist()) for u in read.units] == [
        (u.unit_id, u.keys, u.rows.tolist()) for u in plan.units
    ]


def test_a_plan_with_any_flipped_bit_is_refused_before_arrow_sees_it(tmp_path: Path) -> None:
    """A flipped bit in a column made another plan; one in Arrow's own structures brought it down."""
    with open_writer(tmp_path) as writer:
        writer.plan(keys_and_rows(range(6)), examples_per_shard=3)
    sound = (tmp_path / "plan.arrow").read_bytes()
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(CacheFormatError, match="plan: sha256"):
            Plan.decode(bytes(damaged), where="plan")


@pytest.mark.parametrize("damage", [b"", b"ARROW1 no more", "old form"])
def test_after_a_damaged_plan_is_deleted_finished_units_are_kept(tmp_path: Path, damage) -> None:
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(NUMBERS), examples_per_shard=5)
        write_unit(writer, plan.units[1])
    path = tmp_path / "plan.arrow"
    path.write_bytes(path.read_bytes()[:-32] if damage == "old form" else damage)
    with pytest.raises(
        CacheFormatError, match=r"plan\.arrow: .* Delete the file and run teacher-cache again"
    ):
        open_writer(tmp_path)
    path.unlink()
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(NUMBERS), examples_per_shard=5)
        assert [writer.is_finished(unit) for unit in plan.units] == [False, True, False, False, False, False]


@pytest.mark.parametrize(
    "change",
    [
        *({"slots": None}, {"lost": 5}, {"identity": {}}, {"skipped": [3]}, {"base": ...}, {"base": 1}),
        *({"slots": ["x", 0]}, {"slots": [-1, 0]}, {"lost": ["x"]}, {"request": None}, {"duplicates": "3"}),
    ],
)
def test_a_sound_file_that_is_no_plan_is_refused(tmp_path: Path, change: dict) -> None:
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(6)), examples_per_shard=3)
    table = pa.ipc.open_file(plan.encode().to_pybytes()[:-32]).read_all()
    metadata = json.loads(table.schema.metadata[b"teachonce"]) | change
    metadata = {name: value for name, value in metadata.items() if value is not ...}
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({b"teachonce": json.dumps(metadata).encode()})
    with pa.ipc.new_file(sink, table.schema) as stream:
        stream.write_table(table)
    data = sink.getvalue().to_pybytes()
    with pytest.raises(CacheFormatError, match="cannot be read"):
        Plan.decode(data + hashlib.sha256(data).digest(), where="plan")


def test_a_compressed_plan_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(6)), examples_per_shard=3)
    table = pa.ipc.open_file(plan.encode().to_pybytes()[:-32]).read_all()
    zeros = pa.array([bytes(16)] * (1 << 20), pa.binary(16))
    rows = pa.array([0] * (1 << 20), pa.int64())
    table = pa.table([zeros, rows, rows.cast(pa.int32())], schema=table.schema)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, table.schema, options=options) as stream:
        stream.write_table(table)
    data = sink.getvalue().to_pybytes()
    assert len(data) < 1 << 16
    before = pa.total_allocated_bytes()
    with pytest.raises(CacheFormatError, match="compressed Arrow buffers"):
        Plan.decode(data + hashlib.sha256(data).digest(), where="plan")
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_plan_whose_numbers_point_outside_of_it_is_refused(tmp_path: Path) -> None:
    """Arrow took any offsets and lengths for good, and crashed on them."""
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(6)), examples_per_shard=3)
    sound = plan.encode().to_pybytes()[:-32]
    for place in range(len(sound)):
        data = sound[:place] + bytes([sound[place] ^ 0x40]) + sound[place + 1 :]
        with contextlib.suppress(CacheFormatError):
            Plan.decode(data + hashlib.sha256(data).digest(), where="plan")


@pytest.mark.parametrize("name", ["plan.arrow", "log.jsonl"])
def test_files_of_a_capture_that_nobody_can_have_written_are_refused(tmp_path: Path, name: str) -> None:
    with open_writer(tmp_path) as writer:
        writer.plan(keys_and_rows(range(6)), examples_per_shard=3)
    with open(tmp_path / name, "ab") as file:
        file.truncate(1 << 42)

    def use() -> None:
        capture(tmp_path, range(6))
        open_writer(tmp_path).log("event")

    with pytest.raises(CacheFormatError, match=rf"{name}.* bytes found, at most"):
        use()
