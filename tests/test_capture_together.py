"""Captures by several ranks and several jobs: who comes late, leaves or dies, and what it costs the others."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_examples import Clock, locked_by_another
from stage2_runs import on_ranks
from test_capture import files, run, spoiled, with_values
from test_capture import tree as tree  # the fixture

from shared.cache import CacheBusyError, CacheReader, CacheWriter, Claims, Plan
from shared.cache import lock as lock_module
from shared.cache.claimant import Claimant
from shared.cache.layout import CLAIMS, PLAN_NAME, claim_name
from shared.cache.log import log_records
from shared.cache.storage import open_folder
from shared.capture.loop import capture as own_capture
from shared.data.processing import ExampleProcessor
from shared.errors import CacheFormatError, DataError
from shared.recipes import Recipe
from shared.recipes.files import validate_tree
from shared.runtime import World
from shared.stopping import INTERRUPTED_STATUS, StopRequest
from stage1_teacher.capture import capture
from stage1_teacher.capturing.teacher import Teacher

FORK = multiprocessing.get_context("fork")
WAIT = {"collective_timeout_s": 60}


@pytest.fixture
def whole(tree: dict[str, Any], tmp_path: Path) -> dict[str, bytes]:
    """The files of the cache of one process."""
    assert run(with_values(tree, "cache", path=str(tmp_path / "whole"))) == 0
    return files(tmp_path / "whole")


def at_forward(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Acts at that forward of this process, of the capture itself."""
    calls, hidden = itertools.count(1), Teacher.hidden

    def counted(teacher: Teacher, *arguments: Any) -> torch.Tensor:
        if next(calls) == number:
            act()
        return hidden(teacher, *arguments)

    monkeypatch.setattr(Teacher, "hidden", counted)


def at_shard(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Acts when the first shard of this process is about to get its name."""
    replace = os.replace

    def acting(source: Any, target: Any) -> None:
        if Path(target).parent.name == "shards":
            act()
        replace(source, target)

    monkeypatch.setattr(os, "replace", acting)


def captured_examples(tree: dict[str, Any]) -> list[int]:
    records = log_records(open_folder(tree["cache"]["path"]))
    return [record["examples"] for record in records if record["event"] == "captured"]


def job(tree: dict[str, Any]) -> Any:
    """A capture by a process of its own, started."""
    process = FORK.Process(target=lambda: os._exit(run(tree)))
    process.start()
    return process


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("moment", ["forward", "rename"])
def test_a_lost_rank_costs_its_units_in_hand_and_nothing_else(
    tree: dict[str, Any],
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    lost: int,
    moment: str,
) -> None:
    """Also the first one, which has planned; and in the middle of a shard's publication."""
    recipe = validate_tree(Recipe, tree, origin="recipe test")
    is_lost = FORK.Event()

    def end() -> None:
        is_lost.set()
        os._exit(1)

    def work(world: World) -> int:
        if world.rank != lost:  # it leaves the other one enough to come to its end
            at_forward(monkeypatch, 2, lambda: is_lost.wait(timeout=60))
        elif moment == "forward":
            at_forward(monkeypatch, 3, end)
        else:
            at_shard(monkeypatch, end)
        return capture(recipe, world, StopRequest())

    found = on_ranks(2, work, errors=True, **WAIT)
    assert found[1 - lost] == 0
    assert found[lost] != 0
    cache = Path(tree["cache"]["path"])
    assert files(cache) == whole
    assert not list(cache.rglob(".tmp-*"))
    (num_examples,) = captured_examples(tree)
    assert num_examples <= 16 + 2  # of the one unit that was in hand


def test_jobs_without_a_rendezvous_share_a_cache(tree: dict[str, Any], whole: dict[str, bytes]) -> None:
    jobs = [job(tree) for _ in range(3)]
    for one in jobs:
        one.join(timeout=120)
    assert [one.exitcode for one in jobs] == [0, 0, 0]
    assert files(Path(tree["cache"]["path"])) == whole
    assert sum(captured_examples(tree)) == 16


def test_one_rank_that_is_stopped_leaves_the_rest_to_the_others(
    tree: dict[str, Any], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = validate_tree(Recipe, tree, origin="recipe test")
    is_stopped = FORK.Event()

    def work(world: World) -> int:
        stop = StopRequest()

        def receive() -> None:
            stop.received = True
            is_stopped.set()

        at_forward(monkeypatch, 2, receive if world.rank == 1 else lambda: is_stopped.wait(timeout=60))
        return capture(recipe, world, stop)

    assert on_ranks(2, work, **WAIT) == [0, INTERRUPTED_STATUS]
    assert files(Path(tree["cache"]["path"])) == whole


def test_what_a_stopped_job_says_is_kept_has_what_other_ranks_still_handed_in(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = validate_tree(Recipe, tree, origin="recipe test")
    hands_in = FORK.Event()

    def work(world: World) -> int:
        stop = StopRequest()

        def receive() -> None:
            hands_in.wait(timeout=60)
            stop.received = True

        def publish_slowly() -> None:
            stop.received = True
            hands_in.set()
            time.sleep(2)

        if world.rank == 0:
            at_forward(monkeypatch, 2, receive)
        else:
            at_shard(monkeypatch, publish_slowly)
        return capture(recipe, world, stop)

    assert on_ranks(2, work, **WAIT) == [INTERRUPTED_STATUS, INTERRUPTED_STATUS]
    (kept,) = re.findall(r"stopped: (\d+) of \d+ units of cache", capfd.readouterr().out)
    assert int(kept) == len(list(Path(tree["cache"]["path"], "shards").glob("*.arrow")))


def test_a_job_with_another_plan_is_refused_while_somebody_captures(
    tree: dict[str, Any], whole: dict[str, bytes], processor: ExampleProcessor, tmp_path: Path
) -> None:
    fingerprint = CacheReader(str(tmp_path / "whole")).manifest.identity.teacher.weights_fingerprint
    assert run(tree, StopRequest(received=True)) == INTERRUPTED_STATUS
    folder = open_folder(tree["cache"]["path"])
    recipe = validate_tree(Recipe, tree, origin="recipe test")
    with Claimant(folder, timeout_s=60) as other:
        with pytest.raises(CacheBusyError, match=f"process {os.getpid()} on .* by another plan"):
            run(with_values(tree, "data", limit=4))
        with pytest.raises(CacheBusyError), own_capture(recipe, processor, weights_fingerprint=fingerprint):
            pass
        other.tell(idle=True)
        assert run(tree) == 0  # the same plan: it takes part
    assert files(Path(tree["cache"]["path"])) == whole
    assert run(with_values(tree, "data", limit=4)) == 0


def test_a_job_whose_plan_is_gone_without_its_rows_does_not_say_that_another_has_committed_it(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    is_to_commit, folder = Claims.is_to_commit, open_folder(tree["cache"]["path"])

    def seen_too_late(claims: Claims, is_stopped: Callable[[], bool]) -> bool:
        folder.remove(PLAN_NAME)
        return is_to_commit(claims, is_stopped)

    monkeypatch.setattr(Claims, "is_to_commit", seen_too_late)
    monkeypatch.setattr("stage1_teacher.capture.SETTLE_S", 0.0)
    with pytest.raises(CacheFormatError, match="changed since it was planned; run the same command again"):
        run(tree)
    monkeypatch.setattr(Claims, "is_to_commit", is_to_commit)
    assert "another process" not in capsys.readouterr().out
    assert run(tree) == 0
    assert len(CacheReader(tree["cache"]["path"])) == 16


def test_one_that_joins_does_not_read_again_what_others_have_captured(
    tree: dict[str, Any], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tree, StopRequest(received=True)) == INTERRUPTED_STATUS
    folder = open_folder(tree["cache"]["path"])
    monkeypatch.setattr(CacheWriter, "num_skipped", lambda *_: pytest.fail("a shard is read"))
    with Claimant(folder, timeout_s=60) as other:
        other.tell(idle=True)
        assert run(tree) == 0
    assert files(Path(tree["cache"]["path"])) == whole


def test_what_a_process_of_another_machine_has_left_is_waited_for_and_then_done(
    tree: dict[str, Any], whole: dict[str, bytes]
) -> None:
    assert run(tree, StopRequest(received=True)) == INTERRUPTED_STATUS
    folder = open_folder(tree["cache"]["path"])
    folder.publish(f"{CLAIMS}far.json", b'{"machine": "another", "pid": 1, "host": "far", "idle": true}')
    assert folder.create(f"{CLAIMS}commit.0", b"far")
    begin = time.monotonic()
    assert run(with_values(tree, "cache", claim_timeout_s=2)) == 0
    assert time.monotonic() - begin > 2
    assert files(Path(tree["cache"]["path"])) == whole


OF_ANOTHER = "process 1 on far for a moment\n"


def test_a_stop_while_another_process_plans_ends_in_order(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop, cache = StopRequest(), Path(tree["cache"]["path"])
    with locked_by_another(cache, OF_ANOTHER):
        monkeypatch.setattr(lock_module, "time", Clock(lambda _: setattr(stop, "received", True)))
        assert run(tree, stop) == INTERRUPTED_STATUS
    said = capsys.readouterr().out
    assert (
        f"stopped: cache {cache}: process 1 on far is writing to it, and this process was waiting for" in said
    )
    assert "To go on: " in said
    assert not (cache / PLAN_NAME).exists()


def test_a_stop_while_another_process_has_the_lock_of_the_commit_ends_in_order(
    tree: dict[str, Any],
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop, cache, is_to_commit = StopRequest(), Path(tree["cache"]["path"]), Claims.is_to_commit
    with ExitStack() as stack:

        def then_locked(claims: Claims, is_stopped: Callable[[], bool]) -> bool:
            found = is_to_commit(claims, is_stopped)
            stack.enter_context(locked_by_another(cache, OF_ANOTHER))
            monkeypatch.setattr(lock_module, "time", Clock(lambda _: setattr(stop, "received", True)))
            return found

        monkeypatch.setattr(Claims, "is_to_commit", then_locked)
        monkeypatch.setattr("stage1_teacher.capture.LAST_WORD_S", 0.0)
        assert run(tree, stop) == INTERRUPTED_STATUS
    assert "stopped: 8 of 8 units" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(tree) == 0
    assert files(cache) == whole


@pytest.mark.parametrize("text", ["", "process 1 on far\n", OF_ANOTHER])
def test_a_stopped_job_does_not_wait_for_its_line_in_the_log(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    stop, cache = StopRequest(), Path(tree["cache"]["path"])
    with ExitStack() as stack:

        def is_locked() -> None:
            stack.enter_context(locked_by_another(cache, text))
            stop.received = True

        at_forward(monkeypatch, 2, is_locked)
        monkeypatch.setattr("stage1_teacher.capture.LAST_WORD_S", 0.0)
        assert run(tree, stop) == INTERRUPTED_STATUS


def with_spoiled(tree: dict[str, Any], folder: Path, *rows: int, max_dropped: int) -> dict[str, Any]:
    changed = with_values(spoiled(tree, folder, rows=rows), "data", max_dropped=max_dropped)
    changed["data"]["source"] = str(folder)
    return changed


def stopped_after_the_first_unit(tree: dict[str, Any]) -> None:
    assert run(tree, StopRequest(received=True)) == INTERRUPTED_STATUS
    assert len(list(Path(tree["cache"]["path"], "shards").glob("*.arrow"))) == 1


def test_rows_left_out_are_counted_over_all_sessions(tree: dict[str, Any], tmp_path: Path) -> None:
    """Before anything is paid for in vain."""
    tree = with_spoiled(tree, tmp_path / "spoiled", 1, 3, max_dropped=1)
    stopped_after_the_first_unit(tree)
    with pytest.raises(DataError, match=r"row 3.* That makes 2 left out, data.max_dropped allows 1"):
        run(tree)
    with pytest.raises(DataError, match=r"1 row.s. are left out so far, data.max_dropped allows 0"):
        run(with_values(tree, "data", max_dropped=0))
    assert run(with_values(tree, "data", max_dropped=2)) == 0
    assert CacheReader(tree["cache"]["path"]).manifest.totals.skipped == 2


def test_one_that_joins_counts_what_others_have_read(tree: dict[str, Any], tmp_path: Path) -> None:
    """They have read the shards; it has not.  What they tell and what lies there is not counted twice."""
    tree = with_spoiled(tree, tmp_path / "spoiled", 1, 3, max_dropped=3)
    stopped_after_the_first_unit(tree)
    with Claimant(open_folder(tree["cache"]["path"]), timeout_s=60, refused_before=3) as other:
        other.tell(idle=True)
        with pytest.raises(DataError, match=r"row 3.* That makes 4 left out, data.max_dropped allows 3"):
            run(tree)
        other.tell(refused_before=1, refused=1)
        assert run(tree) == 0


def test_what_a_killed_process_has_told_is_not_counted_beside_its_shards(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = with_spoiled(tree, tmp_path / "spoiled", 1, 3, max_dropped=2)
    with monkeypatch.context() as patch:
        at_forward(patch, 2, lambda: os._exit(9))
        killed = job(tree)
        killed.join(timeout=120)
    assert killed.exitcode == 9
    assert run(tree) == 0


def test_rows_left_out_are_counted_after_a_wait_for_others(tree: dict[str, Any], tmp_path: Path) -> None:
    tree = with_values(tree, "cache", claim_timeout_s=2)
    tree = with_spoiled(tree, tmp_path / "spoiled", 3, 5, max_dropped=1)
    stopped_after_the_first_unit(tree)
    folder = open_folder(tree["cache"]["path"])
    plan = Plan.decode(folder.read(PLAN_NAME), where="plan")
    folder.publish(f"{CLAIMS}far.json", b'{"machine": "another", "pid": 1, "host": "far", "idle": true}')
    (unit,) = (unit for unit in plan.units if 5 in unit.rows)
    assert folder.create(claim_name(unit.unit_id, 0), b"far")
    with pytest.raises(DataError, match=r"row 5.* That makes 2 left out, data.max_dropped allows 1"):
        run(tree)


def test_rows_left_out_are_counted_over_all_that_capture(tree: dict[str, Any], tmp_path: Path) -> None:
    tree = with_values(spoiled(tree, tmp_path / "spoiled"), "data", max_dropped=1)
    tree["data"]["source"] = str(tmp_path / "spoiled")
    assert run(tree, StopRequest(received=True)) == INTERRUPTED_STATUS
    with Claimant(open_folder(tree["cache"]["path"]), timeout_s=60) as other:
        other.tell(refused=1, idle=True)
        with pytest.raises(DataError, match=r"That makes 2 left out, data.max_dropped allows 1"):
            run(tree)
        other.tell(refused=0, idle=True)
        assert run(tree) == 0
    assert CacheReader(tree["cache"]["path"]).manifest.totals.skipped == 1
