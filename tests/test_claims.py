"""Units shared out among processes that come late, leave, die, fall silent or hang: each captured, none lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import fsspec
import pytest
from cache_examples import VERSIONS, Clock, capture, files_of, keys_and_rows, make_identity, make_row

import shared.cache.claimant as claimant_module
import shared.cache.storage as storage_module
import shared.machine as machine_module
from shared.cache import CacheBusyError, CacheReader, CacheWriter, Claims, DataSource, Plan, Unit, Wanted
from shared.cache.claimant import (
    BEATS,
    Claimant,
    Onlooker,
    claimant_files,
    remove_claims,
    somebody_at_work,
    somebody_may_be_at_work,
    somebody_may_capture,
)
from shared.cache.claims import PATIENCE_S
from shared.cache.layout import CLAIMS, PLAN_NAME, claim_name, claimant_file
from shared.cache.storage import Folder, LocalFolder, open_folder
from shared.capture.opening import open_planned
from shared.errors import CacheFormatError

IDENTITY = make_identity()
FORK = multiprocessing.get_context("fork")
SHORT_S = 0.6
LONG_S = 600.0


def never() -> bool:
    return False


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


@pytest.fixture
def planned(tmp_path: Path) -> tuple[CacheWriter, Plan]:
    """Thirty units of one example."""
    return plan_of(str(tmp_path / "cache"), 30)


def plan_of(location: str, num_units: int) -> tuple[CacheWriter, Plan]:
    with CacheWriter.open(location, IDENTITY, created_by=VERSIONS) as writer:
        return writer, writer.plan(keys_and_rows(range(num_units)), examples_per_shard=1)


def publish(writer: CacheWriter, unit: Unit) -> None:
    with writer.unit(unit) as shard:
        for number in unit.rows:
            shard.add(make_row(int(number)))


def capture_all(writer: CacheWriter, claims: Claims) -> list[Unit]:
    """What there is to be claimed until all is finished."""
    done = []
    while True:
        while (unit := claims.next()) is not None:
            publish(writer, unit)
            claims.finish(unit)
            done.append(unit)
        if not claims.wait(never):
            return done


def in_process(work: Callable[[], object]) -> int:
    """The exit code of a process that does it."""
    process = FORK.Process(target=work)
    process.start()
    process.join(timeout=60)
    assert process.exitcode is not None
    return process.exitcode


def claim_and_die(writer: CacheWriter, plan: Plan, num_units: int) -> None:
    """By SIGKILL, with the last units in hand, claimed in batches."""

    def work() -> None:
        claims = Claims(writer.folder, plan.units, timeout_s=LONG_S)
        for number in range(num_units):
            unit = claims.next()
            assert unit is not None
            if number < num_units - 1:
                publish(writer, unit)
                claims.finish(unit)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_process(work) == -signal.SIGKILL


def claimed_units(folder: Folder) -> list[str]:
    return [name for name in folder.names(CLAIMS) if not name.endswith(".json")]


def foreign_claimant(folder: Folder, name: str, *, beat: int = 1) -> None:
    """As a process of another machine has it."""
    facts = {"beat": beat, "host": "other", "machine": "another boot", "pid": 1, "started": "1"}
    folder.publish(claimant_file(name), json.dumps(facts).encode())


def test_several_share_the_units_and_no_unit_is_done_twice(planned: tuple[CacheWriter, Plan]) -> None:
    writer, plan = planned
    done: dict[int, list[Unit]] = {}

    def work(number: int) -> None:
        own = CacheWriter.join(str(writer.folder.path), IDENTITY)  # type: ignore[attr-defined]
        with Claims(own.folder, plan.units, timeout_s=LONG_S) as claims:
            done[number] = capture_all(own, claims)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = Counter(unit.unit_id for some in done.values() for unit in some)
    assert counts == Counter(unit.unit_id for unit in plan.units)
    assert all(done.values())
    assert writer.folder.names(CLAIMS) == []


def test_alone_the_units_come_in_order_and_the_folder_is_looked_at_once_for_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, plan = plan_of(str(tmp_path / "cache"), 100)
    looks = []
    names = LocalFolder.names
    monkeypatch.setattr(
        LocalFolder, "names", lambda folder, prefix: [looks.append(prefix), names(folder, prefix)][1]
    )
    with Claims(writer.folder, plan.units, timeout_s=LONG_S) as claims:
        assert capture_all(writer, claims) == list(plan.units)
    assert looks.count(CLAIMS) <= 100 / 5


class LookedAtSlowly(dict[str, Unit]):
    """Other threads run between two of its keys."""

    def __iter__(self) -> Iterator[str]:
        for key in super().__iter__():
            time.sleep(0.0002)
            yield key


def test_units_are_finished_by_one_thread_while_another_one_claims(planned: tuple[CacheWriter, Plan]) -> None:
    writer, plan = planned
    captured: SimpleQueue[Unit | None] = SimpleQueue()
    with Claims(writer.folder, plan.units, timeout_s=LONG_S) as claims:
        claims._left = LookedAtSlowly(claims._left)

        def finish() -> None:
            while (unit := captured.get()) is not None:
                claims.finish(unit)

        thread = threading.Thread(target=finish)
        thread.start()
        try:
            while (unit := claims.next()) is not None:
                captured.put(unit)
        finally:
            captured.put(None)
            thread.join()
        assert claims.is_complete


def test_a_claim_whose_answer_is_lost_is_ours_all_the_same(
    planned: tuple[CacheWriter, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that has no answer sends it once more, and the storage says that something is there."""
    writer, plan = planned
    create = LocalFolder.create
    with (
        Claims(writer.folder, plan.units, timeout_s=LONG_S) as other,
        Claims(writer.folder, plan.units, timeout_s=LONG_S) as claims,
    ):
        theirs = other.next()
        monkeypatch.setattr(LocalFolder, "create", lambda *put: create(*put) and False)
        mine = []
        while (unit := claims.next()) is not None:
            publish(writer, unit)
            claims.finish(unit)
            mine.append(unit)
        assert theirs not in mine
        assert len(mine) == 29
        assert theirs is not None
        publish(writer, theirs)
        other.finish(theirs)
        assert not claims.wait(never)
        assert claims.is_to_commit(never)
    assert claimed_units(writer.folder) == []


def test_one_that_comes_late_finds_what_is_left(planned: tuple[CacheWriter, Plan]) -> None:
    writer, plan = planned
    with Claims(writer.folder, plan.units, timeout_s=LONG_S) as first:
        for _ in range(3):
            unit = first.next()
            assert unit is not None
            publish(writer, unit)
            first.finish(unit)
        with Claims(writer.folder, plan.units, timeout_s=LONG_S) as late:
            late.next()
            assert late.num_left == 27
            assert late.num_examples_of_others == 3
        capture_all(writer, first)
    assert first.is_complete


def test_units_of_a_killed_process_are_claimed_again_at_once(planned: tuple[CacheWriter, Plan]) -> None:
    writer, plan = planned
    claim_and_die(writer, plan, 8)
    lost = claimed_units(writer.folder)
    assert len(lost) > 1  # the one in hand, and those claimed ahead
    with Claims(writer.folder, plan.units, timeout_s=LONG_S) as claims:
        done = capture_all(writer, claims)
    assert len(done) == 30 - 7
    assert {unit.unit_id for unit in done[-len(lost) :]} == {
        name.removeprefix(CLAIMS).partition(".")[0] for name in lost
    }
    assert claimed_units(writer.folder) == []


def test_those_of_a_machine_that_is_silent_are_claimed_again_in_time(
    planned: tuple[CacheWriter, Plan],
) -> None:
    writer, plan = planned
    foreign_claimant(writer.folder, "other")
    for unit in plan.units[:2]:
        writer.folder.create(claim_name(unit.unit_id, 0), b"other")
    with Claims(writer.folder, plan.units, timeout_s=SHORT_S) as claims:
        begin = time.monotonic()
        done = capture_all(writer, claims)
        assert time.monotonic() - begin >= SHORT_S
    assert set(done[:28]) == set(plan.units[2:])
    assert len(done) == 30


def test_those_of_a_machine_that_is_heard_are_waited_for(planned: tuple[CacheWriter, Plan]) -> None:
    writer, plan = planned
    (unit,) = plan.units[:1]
    foreign_claimant(writer.folder, "other")
    writer.folder.create(claim_name(unit.unit_id, 0), b"other")

    clock = Clock()

    def at_work() -> None:
        for beat in range(2, 12):
            time.sleep(0.05)
            foreign_claimant(writer.folder, "other", beat=beat)
            clock.now += SHORT_S / 4
        publish(writer, unit)
        writer.folder.remove(claim_name(unit.unit_id, 0))

    thread = threading.Thread(target=at_work)
    with Claims(writer.folder, plan.units, timeout_s=SHORT_S) as claims:
        claims._onlooker._clock = lambda: clock.now
        thread.start()
        done = capture_all(writer, claims)
    thread.join()
    assert len(done) == 29
    assert unit not in done


def test_a_claim_that_a_crash_left_empty_is_taken_in_time(planned: tuple[CacheWriter, Plan]) -> None:
    writer, plan = planned
    writer.folder.create(claim_name(plan.units[4].unit_id, 0), b"")
    with Claims(writer.folder, plan.units, timeout_s=SHORT_S) as claims:
        assert len(capture_all(writer, claims)) == 30


def test_one_that_leaves_gives_back_what_it_has_in_hand(planned: tuple[CacheWriter, Plan]) -> None:
    writer, plan = planned
    with Claims(writer.folder, plan.units, timeout_s=LONG_S) as leaving:
        for _ in range(4):
            leaving.next()
        assert len(claimed_units(writer.folder)) >= 4
    assert writer.folder.names(CLAIMS) == []
    with Claims(writer.folder, plan.units, timeout_s=LONG_S) as claims:
        assert len(capture_all(writer, claims)) == 30


def test_of_several_that_find_a_dead_ones_unit_one_takes_it(planned: tuple[CacheWriter, Plan]) -> None:
    writer, plan = planned
    (unit,) = plan.units[:1]
    for other in plan.units[1:]:
        publish(writer, other)
    writer.folder.create(claim_name(unit.unit_id, 0), b"gone")  # a claimant without a file has left
    both = [Claims(writer.folder, plan.units, timeout_s=LONG_S) for _ in range(2)]
    assert [claims.next() is unit for claims in both] == [True, False]
    both[0].close()
    assert both[1].next() is unit
    both[1].close()


def test_one_alone_commits_and_the_others_wait_for_it(planned: tuple[CacheWriter, Plan]) -> None:
    writer, plan = planned
    first, second = (Claims(writer.folder, plan.units, timeout_s=LONG_S) for _ in range(2))
    capture_all(writer, first)
    assert not second.wait(never)
    assert first.is_to_commit(never)
    found: list[bool] = []
    waiting = threading.Thread(target=lambda: found.append(second.is_to_commit(never)))
    waiting.start()
    time.sleep(0.3)
    assert not found
    with writer.locked():
        writer.commit(plan)
    remove_claims(writer.folder)
    waiting.join()
    assert found == [False]
    for claims in (first, second):
        claims.close()
    assert not (Path(writer.folder.path) / CLAIMS).exists()  # type: ignore[attr-defined]


def test_where_the_one_that_commits_dies_another_does(planned: tuple[CacheWriter, Plan]) -> None:
    writer, plan = planned

    def work() -> None:
        claims = Claims(writer.folder, plan.units, timeout_s=LONG_S)
        capture_all(writer, claims)
        assert claims.is_to_commit(never)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_process(work) == -signal.SIGKILL
    with Claims(writer.folder, plan.units, timeout_s=LONG_S) as claims:
        assert capture_all(writer, claims) == []
        assert claims.is_to_commit(never)


def test_a_stop_ends_all_waits(planned: tuple[CacheWriter, Plan]) -> None:
    writer, plan = planned
    with Claims(writer.folder, plan.units, timeout_s=LONG_S) as others:
        while others.next() is not None:
            pass
        with Claims(writer.folder, plan.units, timeout_s=LONG_S) as claims:
            assert not claims.wait(lambda: True)
            assert not claims.is_complete
            assert not claims.is_to_commit(lambda: True)


def test_what_all_have_told_is_there_when_they_rest(planned: tuple[CacheWriter, Plan]) -> None:
    writer, plan = planned
    with (
        Claims(writer.folder, plan.units, timeout_s=LONG_S) as claims,
        Claimant(writer.folder, timeout_s=LONG_S) as other,
    ):
        claims.claimant.tell(examples=3, idle=True)
        threading.Timer(0.4, lambda: other.tell(examples=4, idle=True)).start()
        assert sorted(facts["examples"] for facts in claims.told()) == [3, 4]


def test_another_job_is_not_waited_for(planned: tuple[CacheWriter, Plan]) -> None:
    writer, plan = planned
    with (
        Claims(writer.folder, plan.units, timeout_s=LONG_S, job="ours") as claims,
        Claimant(writer.folder, timeout_s=LONG_S, job="theirs") as other,
    ):
        claims.claimant.tell(examples=3, idle=True)
        other.tell(examples=4)
        begin = time.monotonic()
        assert [facts["examples"] for facts in claims.told(job="ours")] == [3]
        assert time.monotonic() - begin < PATIENCE_S / 2


# --- plans ------------------------------------------------------------------------------------------------


def planned_with_others(
    location: str, numbers: Sequence[int], stack: ExitStack
) -> tuple[CacheWriter, Plan, list[Unit]]:
    """As a capture plans that others may join: of these rows, whose data set has a fingerprint of its own."""
    wanted = Wanted.of_pairs(keys_and_rows(numbers))
    source = DataSource(name="drawn", split="train", fingerprint=f"of {list(numbers)}", rows=1)
    opened = open_planned(
        location,
        make_identity(data=(source,)),
        wanted.keys,
        wanted.rows,
        examples_per_shard=1,
        with_others=stack,
        timeout_s=LONG_S,
    )
    return opened.writer, opened.plan, opened.pending


def test_another_plan_is_refused_from_the_moment_that_one_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there are claims: while what is finished is read, which takes long, and while ranks are told."""
    location, num_skipped, seen = str(tmp_path / "cache"), CacheWriter.num_skipped, []
    with ExitStack() as stack:
        writer, plan, pending = planned_with_others(location, range(10), stack)
        assert pending == list(plan.units)
        publish(writer, plan.units[0])

    def is_refused() -> None:
        with pytest.raises(CacheBusyError, match=f"process {os.getpid()} on .* by another plan"):
            planned_with_others(location, range(5, 30), stack)

    def reading(writer: CacheWriter, unit: Unit) -> int | None:
        if not seen:
            seen.append(unit)
            is_refused()
        return num_skipped(writer, unit)

    monkeypatch.setattr(CacheWriter, "num_skipped", reading)
    with ExitStack() as stack:
        writer, plan, pending = planned_with_others(location, range(10), stack)
        assert seen
        is_refused()
        with Claims(writer.folder, pending, timeout_s=LONG_S) as claims:
            stack.close()
            is_refused()
            assert capture_all(writer, claims) == list(plan.units[1:])  # alone, so in order
    assert writer.folder.names(CLAIMS) == []
    with ExitStack() as stack:
        assert len(planned_with_others(location, range(5, 30), stack)[1].units) == 25


def test_two_that_plan_the_same_at_once_both_read_what_is_finished(tmp_path: Path) -> None:
    """One that has only planned has not read it yet, so the other one may not trust it."""
    location = str(tmp_path / "cache")
    with ExitStack() as stack:
        writer, plan, _ = planned_with_others(location, range(4), stack)
        publish(writer, plan.units[0])
        (shard,) = (tmp_path / "cache" / "shards").iterdir()
        shard.write_bytes(b"damaged")
        assert planned_with_others(location, range(4), stack)[2][0].unit_id == plan.units[0].unit_id
        assert not shard.exists()


def test_a_commit_whose_plan_was_replaced_changes_nothing(tmp_path: Path) -> None:
    """Where nothing locks, or a process was taken to be dead."""
    location = str(tmp_path / "cache")
    with ExitStack() as stack:
        first, plan, _ = planned_with_others(location, range(10), stack)
    with ExitStack() as stack:
        other, other_plan, _ = planned_with_others(location, range(5, 30), stack)
    for writer, units in ((other, other_plan.units[:15]), (first, plan.units)):
        for unit in units:
            publish(writer, unit)
    before = files_of(tmp_path / "cache")
    with pytest.raises(CacheFormatError, match="changed since it was planned"), first.locked():
        first.commit(plan)
    assert files_of(tmp_path / "cache") == before
    for unit in other_plan.units[15:]:
        publish(other, unit)
    with other.locked():
        other.commit(other_plan)
    assert CacheReader(location).contains([key for key, _ in keys_and_rows(range(5, 30))]).all()
    with pytest.raises(CacheFormatError, match="changed since it was planned"):
        first.require_committed(plan)
    other.require_committed(other_plan)


@pytest.mark.parametrize("left", ["its plan", "no plan", "the plan of another"])
def test_a_plan_that_was_committed_already_is_not_committed_again(tmp_path: Path, left: str) -> None:
    """Its process was killed before it could remove the plan, or was taken to be dead when it was not."""
    location, shards = str(tmp_path / "cache"), tmp_path / "cache" / "shards"
    with ExitStack() as stack:
        first, plan, _ = planned_with_others(location, range(10), stack)
        late = CacheWriter.join(location, first.identity, created_by={"teachonce": "another"})
    for unit in plan.units:
        publish(first, unit)
    stored = first.folder.read(PLAN_NAME)
    with first.locked():
        manifest = first.commit(plan)
    num_shards = 10
    if left == "its plan":
        first.folder.publish(PLAN_NAME, stored)
    elif left == "the plan of another":
        with ExitStack() as stack:
            other, _, pending = planned_with_others(location, range(30), stack)
        publish(other, pending[0])
        stored, num_shards = first.folder.read(PLAN_NAME), 11
    with late.locked():
        assert late.commit(plan) == manifest
    assert len(list(shards.iterdir())) == num_shards
    assert (first.folder.size(PLAN_NAME) is None) == (left != "the plan of another")
    if left == "the plan of another":
        assert first.folder.read(PLAN_NAME) == stored


# --- claimants --------------------------------------------------------------------------------------------


def test_a_claimant_is_heard_as_long_as_it_lives(tmp_path: Path) -> None:
    folder, clock = open_folder(tmp_path), Clock()
    onlooker = Onlooker(folder, timeout_s=LONG_S, clock=clock.monotonic)
    with Claimant(folder, timeout_s=SHORT_S) as one:
        name = claimant_file(one.name)
        for _ in range(6):
            assert not onlooker.is_dead(name)
            seen = folder.read(name)
            wait_until(lambda: folder.read(name) != seen)  # noqa: B023
            clock.now += LONG_S
    assert onlooker.is_dead(name)


def test_a_claimant_is_seen_once_while_its_file_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file lies beside the old one for a moment: counted, what it tells would be counted twice."""
    folder, seen = open_folder(tmp_path), []
    replace = os.replace

    def looked_at_before(*paths: Path) -> None:
        seen.append((len(folder.names(CLAIMS)), claimant_files(folder)))
        replace(*paths)

    with Claimant(folder, timeout_s=LONG_S) as one, monkeypatch.context() as patch:
        patch.setattr(os, "replace", looked_at_before)
        one.tell(refused=1)
    assert seen == [(2, [claimant_file(one.name)])]


def test_one_that_leaves_while_it_is_looked_at_is_not_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(tmp_path)
    foreign_claimant(folder, "other")
    is_dead = Onlooker.is_dead

    def leaves_then(self: Onlooker, name: str) -> bool:
        found = is_dead(self, name)
        folder.remove(name)
        return found

    monkeypatch.setattr(Onlooker, "is_dead", leaves_then)
    monkeypatch.setattr(claimant_module, "time", Clock())
    assert somebody_at_work(folder, timeout_s=LONG_S) is None


@pytest.mark.parametrize("looks", [somebody_may_capture, somebody_may_be_at_work])
def test_one_that_leaves_between_the_list_and_its_file_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: Callable[[Folder], bool]
) -> None:
    folder = open_folder(tmp_path)
    foreign_claimant(folder, "other")
    assert looks(folder)
    read = LocalFolder.read

    def leaves_before(self: LocalFolder, name: str, **options: Any) -> bytes:
        folder.remove(name)
        return read(self, name, **options)

    monkeypatch.setattr(LocalFolder, "read", leaves_before)
    assert not looks(folder)


@pytest.mark.parametrize("write", ["publish", "create"])
def test_who_comes_while_the_last_one_leaves_makes_the_folder_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    folder, mkdir, left = open_folder(tmp_path), Path.mkdir, []

    def removed_at_once(path: Path, *arguments: Any, **options: Any) -> None:
        mkdir(path, *arguments, **options)
        if not left:
            left.append(path)
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed_at_once)
    getattr(folder, write)("claims/x.json", b"here")
    assert left
    assert folder.read("claims/x.json") == b"here"


def test_the_end_of_a_capture_takes_nothing_from_one_that_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, replace = open_folder(tmp_path), os.replace

    def others_end(*paths: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        remove_claims(folder)
        replace(*paths)

    folder.create(claim_name("commit", 0), b"other")
    monkeypatch.setattr(os, "replace", others_end)
    with Claimant(folder, timeout_s=LONG_S) as late:
        assert folder.names(CLAIMS) == [claimant_file(late.name)]


def test_a_claim_that_cannot_be_written_is_not_left_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait until it has been silent for long enough."""
    folder = open_folder(tmp_path)
    folder.publish(claimant_file("x"), b"")

    def opened_full(path: Path) -> IO[bytes]:
        path.touch()
        return os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb")

    monkeypatch.setattr(storage_module, "_new_file", opened_full)
    with pytest.raises(CacheFormatError, match="no space left"):
        folder.create(claim_name("commit", 0), b"x")
    assert folder.names(CLAIMS) == [claimant_file("x")]


def test_a_process_of_another_user_is_not_dead_where_linux_hides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As /proc does that is mounted with hidepid: a signal is refused, and there is nothing to read."""

    def refused(*_: int) -> None:
        raise PermissionError

    folder = open_folder(tmp_path)
    with Claimant(folder, timeout_s=LONG_S) as one:
        monkeypatch.setattr(machine_module.os, "kill", refused)
        for module in (machine_module, claimant_module):
            monkeypatch.setattr(module, "process_fields", lambda _: None)
        assert not Onlooker(folder, timeout_s=LONG_S).is_dead(claimant_file(one.name))


def test_one_that_hangs_falls_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, clock, seen = open_folder(tmp_path), Clock(), []
    monkeypatch.setattr(claimant_module, "time", clock)

    def is_silent() -> bool:
        seen.append(folder.read(claimant_file(one.name)))
        time.sleep(5 * SHORT_S / BEATS)
        return folder.read(claimant_file(one.name)) == seen[-1]

    with Claimant(folder, timeout_s=SHORT_S, patience_s=10) as one:
        wait_until(lambda: one._num_beats > 2)
        clock.now = 11.0
        wait_until(is_silent)  # a beat may have been under way
        assert is_silent()
        one.check()
        wait_until(lambda: folder.read(claimant_file(one.name)) != seen[-1])


@pytest.mark.parametrize("error", [CacheFormatError("the storage does not answer"), ZeroDivisionError()])
def test_a_thread_that_cannot_write_ends_the_capture_when_others_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    clock = Clock()
    monkeypatch.setattr(claimant_module, "time", clock)
    with Claimant(open_folder(tmp_path), timeout_s=SHORT_S) as one, monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "publish", fails)
        wait_until(lambda: one._error is not None)
        one.check()  # it may answer again
        clock.now += 2 * SHORT_S
        with pytest.raises(type(error)):
            one.check()


def test_who_is_at_work_is_named_and_the_dead_are_not(
    planned: tuple[CacheWriter, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, plan = planned
    folder = writer.folder
    with Claimant(folder, timeout_s=LONG_S):
        assert str(os.getpid()) in str(somebody_at_work(folder, timeout_s=LONG_S))
    claim_and_die(writer, plan, 2)
    foreign_claimant(folder, "other")
    begin = time.monotonic()
    assert somebody_at_work(folder, timeout_s=SHORT_S) is None
    assert time.monotonic() - begin >= SHORT_S
    assert folder.names(CLAIMS) == []
    foreign_claimant(folder, "other")
    beats = count(2)
    clock = Clock(lambda _: foreign_claimant(folder, "other", beat=next(beats)))
    monkeypatch.setattr(claimant_module, "time", clock)
    assert somebody_at_work(folder, timeout_s=LONG_S) == "process 1 on other"
    assert next(beats) == 3  # it was seen to live at once


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"pid": "x", "machine": 3}', b"[" * 5000])
def test_a_damaged_file_of_a_claimant_is_no_living_one(tmp_path: Path, content: bytes) -> None:
    folder = open_folder(tmp_path)
    folder.publish(claimant_file("x"), content)
    assert somebody_at_work(folder, timeout_s=0.3) is None
    assert claimant_files(folder) == []


# --- storages ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "memory", "s3"])
def anywhere(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    name = f"claims-{time.time_ns()}"
    if request.param == "local":
        yield str(tmp_path / "cache")
    elif request.param == "memory":
        yield f"memory://{name}/cache"
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)
    else:
        settings = {
            "AWS_ENDPOINT_URL": request.getfixturevalue("s3_server"),
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for variable, value in settings.items():
            monkeypatch.setenv(variable, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
        yield f"s3://{name}/cache"


def test_a_file_is_created_once(anywhere: str) -> None:
    folders = [open_folder(anywhere) for _ in range(2)]
    assert folders[0].create("claims/a.0", b"one")
    assert not folders[1].create("claims/a.0", b"two")
    assert folders[1].read("claims/a.0") == b"one"
    folders[1].remove("claims/a.0")
    assert folders[1].create("claims/a.0", b"two")


def test_two_share_a_cache_wherever_it_lies(anywhere: str, tmp_path: Path) -> None:
    _, plan = plan_of(anywhere, 8)
    statuses: list[Any] = []

    def work() -> None:
        writer = CacheWriter.join(anywhere, IDENTITY, created_by=VERSIONS)
        with Claims(writer.folder, plan.units, timeout_s=LONG_S) as claims:
            capture_all(writer, claims)
            if claims.is_to_commit(never):
                with writer.locked():
                    writer.commit(plan)
                remove_claims(writer.folder)
                statuses.append("committed")
            else:
                statuses.append("seen")

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == ["committed", "seen"]
    folder = open_folder(anywhere)
    assert folder.size(PLAN_NAME) is None
    assert folder.names(CLAIMS) == []
    capture(tmp_path / "alone", range(8), examples_per_shard=1)
    alone = files_of(tmp_path / "alone")
    assert {name: folder.read(name) for name in alone} == alone
