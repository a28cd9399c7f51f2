"""Caches behind fsspec URLs: written, read and grown; staged locally, checked, and within a bound."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import datasets
import fsspec
import pytest
import yaml
from cache_examples import VERSIONS, capture, files_of, keys_and_rows, make_identity, make_key, make_row
from click.testing import CliRunner
from fsspec.implementations.local import LocalFileSystem
from s3fs import S3FileSystem

from shared.cache import CacheReader, CacheWriter, Staging
from shared.cache import storage as storage_module
from shared.cache import verified as verified_module
from shared.cache.claimant import claimant_files, told_by_claimants
from shared.cache.export import export
from shared.cache.merge import merge
from shared.cache.staging import Staging as StagingFolder
from shared.cache.storage import LocalFolder, RemoteFolder, open_folder
from shared.cache.verify import verify
from shared.errors import CacheFormatError, RecipeError
from stage1_teacher.__main__ import commands

FORK = multiprocessing.get_context("fork")
KEYS = [make_key(number) for number in range(20)]


@pytest.fixture
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEACHONCE_STAGING", str(tmp_path / "staging"))
    return tmp_path / "staging"


@pytest.fixture
def memory(staging: Path) -> Iterator[str]:
    """A cache in a file system that only this process and its forks see."""
    capture("memory://bucket/cache", range(20))
    yield "memory://bucket/cache"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.fixture
def s3(s3_server: str, staging: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    settings = {"AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").mkdir(f"bucket-{time.time_ns()}")
    (bucket,) = sorted(fsspec.filesystem("s3").ls("", refresh=True))[-1:]
    return f"s3://{bucket}/caches/drawn"


def test_a_file_url_is_a_local_folder(tmp_path: Path) -> None:
    capture(f"file://{tmp_path}/cache", range(5))
    assert isinstance(open_folder(f"file://{tmp_path}/cache"), LocalFolder)
    assert len(CacheReader(str(tmp_path / "cache"))) == 5


def test_two_captures_at_once_cannot_damage_each_other(staging: Path) -> None:
    """Object stores have no locks.  Other data, and some examples of both; the plan that was stored last counts."""
    url = f"memory://together-{time.time_ns()}/cache"
    writers = [CacheWriter.open(url, make_identity(), created_by=VERSIONS) for _ in range(2)]
    plans = []
    for writer, numbers in zip(writers, (range(10), range(5, 20)), strict=True):
        plans.append(writer.plan(keys_and_rows(numbers), examples_per_shard=5))
    for turn in range(3):
        for writer, plan in zip(writers, plans, strict=True):
            for unit in plan.units[turn : turn + 1]:
                with writer.unit(unit) as shard:
                    for number in unit.rows:
                        shard.add(make_row(int(number)))
    with pytest.raises(CacheFormatError, match="changed since it was planned; run the same command again"):
        writers[0].commit(plans[0])
    writers[1].commit(plans[1])
    assert len(CacheReader(url)) == 15
    again = CacheWriter.open(url, make_identity(), created_by=VERSIONS)
    plan = again.plan(keys_and_rows(range(10)), examples_per_shard=5)
    assert [again.is_finished(unit) for unit in plan.units] == [True]
    again.commit(plan)
    reader = CacheReader(url)
    assert len(reader) == 20
    assert len(reader.rows(list(reader.keys()))) == 20


def check_life_of_a_cache(url: str, tmp_path: Path) -> None:
    """Captured in two goes, grown, read, verified, merged and exported: as a local one."""
    local = tmp_path / "local"
    with CacheWriter.open(url, make_identity(), created_by=VERSIONS) as writer:
        plan = writer.plan(keys_and_rows(range(20)), examples_per_shard=5)
        for unit in plan.units[::2]:
            with writer.unit(unit) as shard:
                for number in unit.rows:
                    shard.add(make_row(int(number)))
        writer.log("interrupted")
    with pytest.raises(CacheFormatError, match=r"no manifest\.json"):
        CacheReader(url)
    assert capture(url, range(20)) == capture(local, range(20))
    assert capture(url, range(27)) == capture(local, range(27))
    filesystem, root = fsspec.core.url_to_fs(url)
    stored = {path[len(root) + 1 :]: filesystem.cat_file(path) for path in filesystem.find(root)}
    stored.pop("log.jsonl")
    assert stored == files_of(local)
    reader = CacheReader(url)
    for number, ids in enumerate(reader.read([make_key(number) for number in range(27)])[0]):
        assert ids.tolist() == make_row(number).answer_ids.tolist()
    assert verify(url).faults == ()
    assert merge([url, str(local)], f"{url}-merged", created_by=VERSIONS).shards == reader.manifest.shards
    assert export(reader, tmp_path / "parquet") == 27


def test_segments_and_a_sample_in_memory(memory: str, staging: Path) -> None:
    url, filesystem = "memory://bucket/segments", fsspec.filesystem("memory")
    for number in (60, 70, 71):
        capture(url, range(number), examples_per_shard=1)
    manifest = CacheReader(url).manifest
    assert [segment.shards for segment in manifest.segments] == [64, 7]
    assert len(filesystem.glob(f"{url}/list-*")) == 3  # one is of the commit before
    found = verify(url, sample=3, seed=1)
    assert (found.faults, found.num_checked, found.num_shards) == ((), 3, 71)
    capture(url, range(71), examples_per_shard=1)
    assert len(filesystem.glob(f"{url}/list-*")) == 2
    assert verify(url).notes == ()
    numbers = (0, 63, 64, 70)
    rows = CacheReader(url).rows([make_key(number) for number in numbers])
    assert [row.payload for row in rows] == [make_row(number).payload for number in numbers]
    filesystem.pipe_file(f"{url}/claims/host.1.aa.json", b"{}")  # somebody is at work, perhaps at the commit
    filesystem.pipe_file(f"{url}/list-0123456789abcdef.arrow", b"of a manifest to come")
    capture(url, range(71), examples_per_shard=1)
    assert len(filesystem.glob(f"{url}/list-*")) == 3
    filesystem.rm(f"{url}/claims", recursive=True)
    capture(url, range(71), examples_per_shard=1)
    assert len(filesystem.glob(f"{url}/list-*")) == 2
    filesystem.rm_file(f"{url}/{manifest.files[0].name}")
    assert CacheReader(url).manifest == manifest  # from the copy
    assert "is missing" in verify(url).faults[0]
    capture(url, range(71), examples_per_shard=1)
    assert verify(url).faults == ()


def test_a_cache_in_memory(staging: Path, tmp_path: Path) -> None:
    check_life_of_a_cache("memory://elsewhere/caches/drawn", tmp_path)


def test_a_cache_whose_path_looks_like_a_pattern(staging: Path) -> None:
    url = "memory://bucket-[1]/what*/is this"
    capture("memory://bucket-1/whatever/is this", range(5))
    capture(url, range(7))
    assert len(CacheReader(url)) == 7
    assert verify(url).faults == ()
    filesystem = fsspec.filesystem("memory")
    for name in ("/bucket-[1]", "/bucket-1"):
        for path in list(filesystem.store):
            if path.startswith(name):
                filesystem.rm_file(path)


def test_a_cache_on_s3(s3: str, tmp_path: Path) -> None:
    check_life_of_a_cache(s3, tmp_path)


class VendorError(Exception):
    """Of a library of cloud storage: no OSError, nor anything else one could know."""


@pytest.mark.parametrize("method", ["glob", "size", "cat_file", "pipe_file", "rm_file", "open"])
@pytest.mark.parametrize("error", [VendorError("SlowDown"), OSError(5, "Input/output error"), TimeoutError()])
def test_a_storage_that_fails_is_one_error(
    memory: str, method: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use() -> None:
        capture(memory, range(27))
        CacheReader(memory, staging=Staging(tmp_path)).read(KEYS)

    def fail(*_: object, **__: object) -> None:
        raise error

    filesystem = fsspec.filesystem("memory")
    with monkeypatch.context() as patched:
        patched.setattr(type(filesystem), method, fail)
        with pytest.raises(CacheFormatError, match=f"does not answer as it should .{type(error).__name__}"):
            use()
    use()


def test_a_read_that_ends_early_is_no_damage(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that is taken for damaged would be removed and captured again."""
    with CacheWriter.open(memory, make_identity(), created_by=VERSIONS) as writer:
        plan = writer.plan(keys_and_rows(range(25)), examples_per_shard=5)
        with writer.unit(plan.units[0]) as shard:
            for number in plan.units[0].rows:
                shard.add(make_row(int(number)))
    filesystem = fsspec.filesystem("memory")
    whole = filesystem.cat_file
    with CacheWriter.open(memory, make_identity(), created_by=VERSIONS) as writer:
        with monkeypatch.context() as patched:
            patched.setattr(type(filesystem), "cat_file", lambda _, path: whole(path)[:-9])
            with pytest.raises(CacheFormatError, match="only a part of it arrived"):
                writer.is_finished(plan.units[0])
        assert writer.is_finished(plan.units[0])


def test_a_file_that_another_process_writes_meanwhile_is_read_as_it_is_now(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As claimants do all the time: a listing remembers sizes, and a size and the content are two requests."""
    folder, elsewhere = open_folder(s3), S3FileSystem(skip_instance_cache=True)
    name = "claims/host.1.aa.json"
    folder.publish(name, b'{"beat": 9}')
    assert claimant_files(folder) == [name]
    elsewhere.pipe_file(f"{s3}/{name}", b'{"beat": 10}')
    assert told_by_claimants(folder) == {name: {"beat": 10}}
    assert isinstance(folder, RemoteFolder)
    filesystem = folder.connect()[0]
    size, contents = filesystem.size, [b'{"beat": 100}', b'{"beat": 1000}']

    def size_then_another(path: str) -> int:
        found = size(path)
        if contents:
            elsewhere.pipe_file(path, contents.pop(0))
        return found

    monkeypatch.setattr(filesystem, "size", size_then_another)
    assert told_by_claimants(folder) == {name: {"beat": 1000}}


def test_two_that_log_at_once_lose_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As two jobs that are stopped together do; a store has no way to add a line."""
    folder = open_folder(f"memory://log-{time.time_ns()}/cache")
    folder.append("log.jsonl", b"captured", max_bytes=1000)
    pipe = storage_module._pipe

    def another_one_too(*arguments: Any) -> None:
        monkeypatch.setattr(storage_module, "_pipe", pipe)
        pipe(*arguments)
        found = b"captured\nanother was interrupted\n"  # it had read the log before
        folder.publish("log.jsonl", found)

    monkeypatch.setattr(storage_module, "_pipe", another_one_too)
    folder.append("log.jsonl", b"interrupted", max_bytes=1000)
    lines = folder.read("log.jsonl").splitlines()
    assert lines == [b"captured", b"another was interrupted", b"interrupted"]


def test_a_bucket_that_is_missing_is_not_made(s3: str) -> None:
    filesystem = fsspec.filesystem("s3")
    before = filesystem.ls("", refresh=True)
    folder = open_folder(s3.replace("bucket", "buckett"))
    for write in (folder.publish, folder.create):
        with pytest.raises(CacheFormatError, match=r"buckett.*, shards/a: cannot be written .*bucket"):
            write("shards/a", b"data")
    assert filesystem.ls("", refresh=True) == before


def test_folders_of_a_storage_that_has_some_are_made(
    tmp_path: Path, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"local://{tmp_path}/deep/cache"

    def fail(*_: object, **__: object) -> None:
        raise VendorError("SlowDown")

    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystem, "makedirs", fail)
        with pytest.raises(CacheFormatError, match=r"does not answer as it should .VendorError"):
            capture(url, range(5))
    assert capture(url, range(5)).totals.examples == 5


def read_in_worker(sent: bytes) -> int:
    return sum(len(ids) for ids in pickle.loads(sent).read(KEYS)[0])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_from_s3(s3: str, staging: Path, method: str) -> None:
    capture(s3, range(20))
    reader = CacheReader(s3)
    reader.read(KEYS[:1])
    with multiprocessing.get_context(method).Pool(2) as pool:
        totals = pool.map(read_in_worker, [pickle.dumps(reader)] * 3)
    assert totals == [sum(len(make_row(number).answer_ids) for number in range(20))] * 3
    assert len(list(staging.glob("*.arrow"))) == 6  # four shards, their list and the index


def test_a_flipped_bit_on_s3_is_found_on_arrival(s3: str, staging: Path) -> None:
    manifest = capture(s3, range(20))
    path = f"{s3}/{manifest.shards[1].name}"
    filesystem = fsspec.filesystem("s3")
    data = bytearray(filesystem.cat_file(path))
    data[len(data) // 2] ^= 1
    filesystem.pipe_file(path, bytes(data))
    reader = CacheReader(s3)
    reader.read(KEYS[:5])
    with pytest.raises(CacheFormatError, match=rf"is not what the manifest says .* delete {path} and run"):
        reader.read(KEYS)
    assert len(list(staging.glob("*.arrow"))) == 3
    assert not list(staging.glob("*.part"))


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_what_arrives_wrong_is_not_kept(memory: str, staging: Path, damage: bytes | None) -> None:
    reader = CacheReader(memory)
    filesystem, root = fsspec.core.url_to_fs(memory)
    path = f"{root}/{reader.manifest.shards[0].name}"
    whole = filesystem.cat_file(path)
    if damage is None:
        filesystem.rm(path)
    else:
        filesystem.pipe_file(path, whole + b"more" if damage == b"" else damage)
    with pytest.raises(CacheFormatError, match="is missing" if damage is None else "is not what"):
        reader.read(KEYS)
    assert not list(staging.glob("*.part"))
    filesystem.pipe_file(path, whole)
    assert len(reader.read(KEYS)[0]) == 20


def test_staged_files_are_used_again(memory: str, staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CacheReader(memory).read(KEYS)
    monkeypatch.setattr(RemoteFolder, "open", lambda *_: pytest.fail("fetched again"))
    assert len(CacheReader(memory).read(KEYS)[0]) == 20


def test_a_staged_file_that_changed_is_fetched_again(memory: str, staging: Path) -> None:
    reader = CacheReader(memory)
    rows = reader.rows(KEYS)
    path = staging / f"{reader.manifest.shards[0].sha256}.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + b"?" + whole[201:])
    assert [row.payload for row in CacheReader(memory).rows(KEYS)] == [row.payload for row in rows]
    assert path.read_bytes() == whole


def test_a_staging_disk_that_damages_everything_is_given_up(
    memory: str, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = CacheReader(memory)
    monkeypatch.setattr(verified_module, "sha256_of_file", lambda _: "0" * 64)
    with pytest.raises(CacheFormatError, match=r"shard 00000: its copy in .* was lost 100 times"):
        reader.read(KEYS)


def staged_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_the_staging_folder_stays_within_its_bound(memory: str, staging: Path) -> None:
    manifest = CacheReader(memory).manifest
    largest = max(shard.bytes for shard in manifest.shards)
    bound = sum(file.bytes for file in manifest.files) + 2 * largest
    reader = CacheReader(memory, staging=Staging(staging, max_bytes=bound))
    for number in (0, 19, 7, 12, 1, 18):
        reader._shards.clear()
        assert reader.rows([make_key(number)])[0].key == make_key(number)
        assert staged_bytes(staging) <= bound
    with pytest.raises(CacheFormatError, match="Set TEACHONCE_STAGING_BYTES higher"):
        CacheReader(memory, staging=Staging(staging, max_bytes=100))


def test_the_least_recently_used_makes_room(memory: str, staging: Path) -> None:
    folder = open_folder(memory)
    assert isinstance(folder, RemoteFolder)
    shards = CacheReader(memory).manifest.shards
    for path in staging.glob("*.arrow"):
        path.unlink()
    area = StagingFolder(staging, max_bytes=sum(shard.bytes for shard in shards[:3]))

    def fetch(number: int) -> None:
        shard = shards[number]
        area.fetch(folder, shard.name, sha256=shard.sha256, num_bytes=shard.bytes)

    for number in (0, 1, 2, 0, 3):
        fetch(number)
        time.sleep(0.01)
    left = {path.stem for path in staging.glob("*.arrow")}
    assert shards[0].sha256 in left
    assert shards[3].sha256 in left
    assert shards[1].sha256 not in left


def test_shards_make_room_before_lists_and_indices(memory: str, staging: Path) -> None:
    """Which are mapped once for a whole epoch, and needed by each process that starts."""
    manifest = CacheReader(memory).manifest
    largest = max(shard.bytes for shard in manifest.shards)
    bound = sum(file.bytes for file in manifest.files) + 2 * largest
    reader = CacheReader(memory, staging=Staging(staging, max_bytes=bound))
    for number in (0, 7, 12, 18):
        time.sleep(0.01)
        assert reader.rows([make_key(number)])[0].key == make_key(number)
    left = {path.stem for path in staging.glob("*.arrow")}
    assert left >= {file.sha256 for file in manifest.files}
    assert manifest.shards[0].sha256 not in left


def test_a_mapped_shard_outlives_its_file(memory: str, staging: Path) -> None:
    reader = CacheReader(memory)
    before = reader.rows(KEYS)
    for path in staging.glob("*.arrow"):
        path.unlink()
    assert [row.payload for row in reader.rows(KEYS)] == [row.payload for row in before]
    assert len(CacheReader(memory)) == 20


def read_many_times(url: str, folder: Path, bound: int, seed: int) -> None:
    for turn in range(6):
        reader = CacheReader(url, staging=Staging(folder, max_bytes=bound))
        rows = reader.rows(KEYS[(seed + turn) % 4 :: 4])
        assert [row.key for row in rows] == KEYS[(seed + turn) % 4 :: 4]


def test_many_processes_share_a_tight_staging_folder(memory: str, staging: Path) -> None:
    manifest = CacheReader(memory).manifest
    bound = sum(file.bytes for file in manifest.files) + 3 * max(shard.bytes for shard in manifest.shards)
    processes = [
        FORK.Process(target=read_many_times, args=(memory, staging, bound, seed)) for seed in range(4)
    ]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        try:
            most = max(most, staged_bytes(staging))
        except FileNotFoundError:
            continue
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert most <= bound


def test_a_copy_takes_its_name_only_while_nobody_counts(
    memory: str, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes room reads all names, then all sizes: a file renamed in between would count for nothing."""
    folder = open_folder(memory)
    assert isinstance(folder, RemoteFolder)
    shard = CacheReader(memory).manifest.shards[0]
    area = Staging(staging, max_bytes=1 << 20)
    with contextlib.ExitStack() as counting:

        def open_while_another_counts(name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
            counting.enter_context(area._locked(".lock"))
            return RemoteFolder.open(folder, name)

        monkeypatch.setattr(folder, "open", open_while_another_counts)
        fetching = threading.Thread(
            target=area.fetch,
            args=(folder, shard.name),
            kwargs={"sha256": shard.sha256, "num_bytes": shard.bytes},
        )
        fetching.start()
        fetching.join(timeout=0.5)
        copies = [path.suffix for path in staging.glob(f"{shard.sha256}*")]
    fetching.join()
    assert copies == [".part"]
    assert [path.suffix for path in staging.glob(f"{shard.sha256}*")] == [".arrow"]


def test_what_a_killed_process_was_fetching_is_cleared_away(memory: str, staging: Path) -> None:
    staging.mkdir(parents=True, exist_ok=True)
    process = FORK.Process(target=os._exit, args=(0,))
    process.start()
    process.join()
    dead = staging / f"{'0' * 64}.{process.pid}.part"
    dead.write_bytes(bytes(100_000))
    others = [staging / name for name in ("x.part", f"{'0' * 64}.{'9' * 30}.part", "notes.part.txt")]
    for path in others:  # not ours
        path.touch()
    bound = sum(shard.bytes for shard in CacheReader(memory).manifest.shards) + 10_000
    CacheReader(memory, staging=Staging(staging, max_bytes=bound)).read(KEYS)
    assert not dead.exists()
    assert all(path.exists() for path in others)


def test_what_another_machine_is_fetching_is_left_to_it(
    memory: str, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a home folder that machines or containers share: a number of a process says nothing about theirs."""
    folder = open_folder(memory)
    assert isinstance(folder, RemoteFolder)
    theirs, *others = CacheReader(memory).manifest.shards
    slot = int(theirs.sha256[:4], 16) % 64
    mine = next(
        shard for shard in others if int(shard.sha256[:4], 16) % 64 != slot
    )  # else it waits for theirs
    area, own = Staging(staging, max_bytes=1 << 20), os.getpid()

    def open_while_this_machine_fetches(name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        with monkeypatch.context() as here:
            here.setattr(os, "getpid", lambda: own)
            area.fetch(RemoteFolder(memory), mine.name, sha256=mine.sha256, num_bytes=mine.bytes)
        return RemoteFolder.open(folder, name)

    monkeypatch.setattr(folder, "open", open_while_this_machine_fetches)
    monkeypatch.setattr(os, "getpid", lambda: 999_999_999)  # of no process here
    copy = area.fetch(folder, theirs.name, sha256=theirs.sha256, num_bytes=theirs.bytes)
    assert copy.stat().st_size == theirs.bytes
    assert not list(staging.glob("*.part"))


def test_a_part_that_nobody_writes_is_cleared_away_whatever_lives_under_its_number(
    memory: str, staging: Path
) -> None:
    shard = CacheReader(memory).manifest.shards[0]
    left = staging / f"{'0' * 64}.{os.getppid()}.part"
    left.write_bytes(b"of another machine")
    Staging(staging).fetch(RemoteFolder(memory), shard.name, sha256=shard.sha256, num_bytes=shard.bytes)
    assert not left.exists()


def test_a_copy_that_somebody_removes_is_not_blamed_on_the_storage(
    memory: str, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(memory)
    assert isinstance(folder, RemoteFolder)
    shard = CacheReader(memory).manifest.shards[0]

    def open_and_remove(name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        for path in staging.glob("*.part"):
            path.unlink()
        return RemoteFolder.open(folder, name)

    monkeypatch.setattr(folder, "open", open_and_remove)
    with pytest.raises(CacheFormatError, match=r"cannot be written \(No such file or directory\)"):
        Staging(staging).fetch(folder, shard.name, sha256=shard.sha256, num_bytes=shard.bytes)


@pytest.mark.parametrize("value", ["abc", "0", "-1", "1.5", "64 GiB"])
def test_a_bound_that_is_no_number_is_an_error_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("TEACHONCE_STAGING_BYTES", value)
    with pytest.raises(RecipeError, match=f"TEACHONCE_STAGING_BYTES: '{value}' found"):
        Staging()


def test_a_staging_folder_that_is_a_file_is_an_error_of_the_user(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("file", "file/below"):
        monkeypatch.setenv("TEACHONCE_STAGING", str(tmp_path / name))
        with pytest.raises(RecipeError, match=rf"staging folder .*{name}: .* Set TEACHONCE_STAGING"):
            CacheReader(memory)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError("Forbidden")])
def test_what_cannot_be_fetched_is_not_blamed_on_the_disk_here(
    memory: str, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(RemoteFolder, "open", fail)
    with pytest.raises(
        CacheFormatError, match=r"does not answer as it should .*(Input/output error|Forbidden)"
    ):
        CacheReader(memory)


def test_an_unknown_protocol_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(CacheFormatError, match="cannot be reached"):
        CacheReader("nosuch://bucket/cache")


def test_a_capture_by_command_writes_to_s3(
    s3: str, tmp_path: Path, vqa_folder: Path, teacher_folder: Path, student_folder: Path
) -> None:
    """And what reads a cache reads it from there."""
    tree = {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": s3, "examples_per_shard": 5, "num_workers": 0},
        "student": {"model": str(student_folder)},
        "optimization": {"max_steps": 1},
        "run": {"name": "mine"},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    local = str(tmp_path / "local")
    for arguments in (
        ["capture", str(recipe)],
        ["capture", str(recipe), "--set", f"cache.path={local}"],
        ["capture", str(recipe)],  # again: there is nothing to do
        ["verify", s3],
        ["inspect", s3],
        ["export", s3, str(tmp_path / "export")],
    ):
        result = CliRunner().invoke(commands, arguments, catch_exceptions=False)
        assert result.exit_code == 0, (arguments, result.output)
    remote, here = CacheReader(s3), CacheReader(local)
    assert [shard.sha256 for shard in remote.manifest.shards] == [s.sha256 for s in here.manifest.shards]
    assert len(datasets.load_dataset("parquet", data_dir=str(tmp_path / "export"), split="train")) == 16
