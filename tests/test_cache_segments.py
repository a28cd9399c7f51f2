"""The list of shards in files of its own: few, shared between commits, opened without a Python object an entry."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache_examples import as_version_1, capture, files_of, make_identity, make_key, make_row
from click.testing import CliRunner

from shared.cache import CacheReader, shard_list
from shared.cache.commit import Contents, NewShard, require_places, write_segment
from shared.cache.export import export
from shared.cache.format import sha256_hex
from shared.cache.index import CacheIndex, split_keys
from shared.cache.inspect import inspect
from shared.cache.manifest import Manifest
from shared.cache.merge import merge
from shared.cache.plan import Plan, make_unit
from shared.cache.segments import FEWEST, MOST, FileInfo, Segment, segment_sizes, spans
from shared.cache.shard import view_shard
from shared.cache.shard_list import ShardInfo, ShardList, open_list
from shared.cache.storage import LocalFolder
from shared.cache.verify import verify
from shared.errors import CacheFormatError, CacheMismatchError
from shared.recipes.policies import TopK
from stage1_teacher.__main__ import commands

# Manifests of caches of 7, 23 and no examples, as the release before version 2 wrote them: digests without what the
# shards' bytes decide, in which the last bit of a sum may be another one on another processor.
FIRST_VERSION = {
    7: "bf1d939e5d5cd495ab6d943d32f79a5107a8dc0e1fa8adcb351ccae160feb5f5",
    23: "83d59646f3d75450bc0c3eef5c792d8191d0af80566ec8fc208d72baee95ac84",
    0: "ec40bd320e5eec54fa3554ecc8f7da15ffeeb616111166fc9f606b24a1959445",
}
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def cache_of_130(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many shards of one example, in segments of 128 and 2; tests take a copy."""
    path = tmp_path_factory.mktemp("cache") / "130"
    capture(path, range(130), examples_per_shard=1)
    return path


@pytest.fixture
def large(cache_of_130: Path, tmp_path: Path) -> Path:
    return shutil.copytree(cache_of_130, tmp_path / "large")


def listed(num_shards: int) -> ShardList:
    """Shards that are nowhere."""
    shards = []
    for number in range(num_shards):
        sha256 = f"{number:064x}"
        name = f"shards/{number:016x}-{sha256}.arrow"
        shards.append(
            ShardInfo(name=name, sha256=sha256, bytes=999, examples=3, positions=9, entries=20, truncated=1)
        )
    return ShardList.of(shards)


def test_sizes_are_the_digits_of_the_number() -> None:
    assert segment_sizes(0) == []
    assert segment_sizes(63) == [63]
    assert segment_sizes(64) == [64]
    assert segment_sizes(1000) == [512, 256, 128, 64, 40]
    assert segment_sizes(2 * MOST + 100) == [MOST, MOST, 64, 36]
    for num_shards in (*range(300), 99_999, 100_000, 1_000_000):
        sizes = segment_sizes(num_shards)
        assert sum(sizes) == num_shards
        assert len(sizes) <= num_shards // MOST + 11
        assert [span.stop - span.start for span in spans(num_shards)] == sizes


def test_adding_shards_one_by_one_writes_few_of_them_again() -> None:
    """In all some forty entries for each shard; a list written as a whole each time takes half of their number."""
    written, before = 0, set()
    for num_shards in range(1, 20_000):
        after = set(spans(num_shards))
        written += sum(len(span) for span in after - before)
        before = after
    assert written / 20_000 < FEWEST / 2 + 10


def test_a_list_behaves_like_the_shards_that_it_is_made_of(tmp_path: Path) -> None:
    shards = listed(200)
    infos = list(shards)
    assert len(shards) == len(infos) == 200
    assert shards[7] == infos[7]
    assert shards[-1] == infos[-1]
    assert list(shards[3:9:2]) == infos[3:9:2]
    assert shards[::-1] == ShardList.of(infos[::-1])
    assert shards != shards[1:]
    assert shards.names() == [info.name for info in infos]
    assert shards.total("positions") == 1800
    assert shards.column("bytes").tolist() == [999] * 200
    with pytest.raises(IndexError):
        shards[200]
    joined = ShardList.joined([shards[:50], shards[50:50], shards[50:]])
    assert joined == shards
    assert joined[50:].encode().equals(ShardList.of(infos[50:]).encode())  # however it came about
    (tmp_path / "list").write_bytes(shards.encode())
    assert open_list(tmp_path / "list", where="list") == shards
    assert len(open_list(ShardList.of([]).encode(), where="list")) == 0
    with pytest.raises(ValueError, match="a shard is called"):
        ShardList.of([infos[0].model_copy(update={"sha256": infos[1].sha256})])


def test_many_small_commits_give_the_cache_of_one(cache_of_130: Path, tmp_path: Path) -> None:
    for number in (1, 40, 70, 129, 130):
        capture(tmp_path / "grown", range(number), examples_per_shard=1)
    manifest = CacheReader(str(cache_of_130)).manifest
    assert [segment.shards for segment in manifest.segments] == [128, 2]
    grown, whole = files_of(tmp_path / "grown"), files_of(cache_of_130)
    leavings = grown.keys() - whole.keys()  # of the commit before, for those who still read it
    assert {name: data for name, data in grown.items() if name not in leavings} == whole
    assert leavings
    reader = CacheReader(str(tmp_path / "grown"))
    keys = [make_key(number) for number in (129, 0, 127, 128, 64)]
    assert reader.num_positions(keys).tolist() == [1 + n % 7 for n in (129, 0, 127, 128, 64)]
    assert [row.payload for row in reader.rows(keys)] == [make_row(n).payload for n in (129, 0, 127, 128, 64)]
    assert reader.shards(keys).tolist() == [129, 0, 127, 128, 64]
    assert list(reader.keys()) == [make_key(number) for number in range(130)]
    assert reader.contains([make_key(130), make_key(100)]).tolist() == [False, True]
    assert verify(str(tmp_path / "grown")).faults == ()
    assert len(verify(str(tmp_path / "grown")).notes) == len(leavings)
    capture(tmp_path / "grown", range(130), examples_per_shard=1)
    assert files_of(tmp_path / "grown") == whole


def test_a_commit_writes_what_is_new(large: Path) -> None:
    paths = [large / file.name for file in CacheReader(str(large)).manifest.segments[0].files()]
    for path in paths:
        os.utime(path, (1, 1))
    manifest = capture(large, range(134), examples_per_shard=1)
    assert [segment.shards for segment in manifest.segments] == [128, 6]
    assert [path.stat().st_mtime for path in paths] == [1, 1]
    assert not verify(str(large)).faults


def test_a_shard_lost_in_a_large_segment_is_captured_into_its_place(large: Path) -> None:
    manifest, before = CacheReader(str(large)).manifest, files_of(large)
    for place in (5, 128):
        (large / manifest.shards[place].name).unlink()
    assert capture(large, range(130), examples_per_shard=1) == manifest
    assert files_of(large) == before


def test_one_of_many_lists_lost_hides_no_other_fault(large: Path) -> None:
    manifest = CacheReader(str(large)).manifest
    (large / next(manifest.segments[0].files()).name).unlink()
    (large / manifest.shards[129].name).write_bytes(b"?")
    faults = verify(str(large)).faults
    assert len(faults) == 2
    assert "list-" in faults[0]
    assert "shard 00129" in faults[1]


def test_150_000_shards_of_512_rows_have_a_manifest_of_a_few_kilobytes() -> None:
    """Version 1 refused them: 64 MiB of JSON."""
    shards = listed(64).take(np.arange(150_000) % 64)
    file = FileInfo(name="index-0123456789abcdef.arrow", sha256="0" * 64, bytes=1 << 30)
    segments = [
        Segment(
            shards=len(span), examples=shards[span.start : span.stop].total("examples"), list=file, index=file
        )
        for span in spans(150_000)
    ]
    facts = {"skipped": (), "duplicates": 0, "created_by": {}}
    manifest = Manifest.build(identity=make_identity(), segments=segments, shards=shards, **facts)
    data = manifest.dumps()
    assert len(data) < 8000
    assert Manifest.loads(data, where="cache").num_shards == 150_000
    assert len(shards.encode()) < 81 * 150_000


def test_entries_that_nobody_asks_for_become_no_objects(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ShardInfo] = []
    info_of = shard_list._info
    monkeypatch.setattr(shard_list, "_info", lambda row: made.append(info_of(row)) or made[-1])
    reader = pickle.loads(pickle.dumps(CacheReader(str(large))))
    reader.num_positions([make_key(number) for number in range(130)])
    assert (len(reader.manifest.shards), made) == (130, [])
    reader.read([make_key(number) for number in (3, 70, 129)])
    assert len({info.name for info in made}) == 3
    assert capture(large, range(131), examples_per_shard=1).num_shards == 131
    assert len({info.name for info in made}) == 3  # nor does a commit look at the old ones


def test_a_plan_of_shards_that_the_manifest_does_not_have(tmp_path: Path) -> None:
    manifest = capture(tmp_path, range(10))
    for plan in (
        Plan(make_identity(), (), lost=(2,)),
        Plan(make_identity(), (make_unit("00", [], np.empty(0, np.int64), slot=7),)),
    ):
        with pytest.raises(CacheFormatError, match=r"plan\.arrow: shard \d found, the manifest has 2"):
            Contents.of_plan(plan, manifest, CacheIndex.of([]), [])


def test_a_commit_holds_no_shard_open(tmp_path: Path) -> None:
    """A process may map 65,530 files at a time."""
    shard = capture(tmp_path, range(3)).shards[0]
    held = NewShard.of(shard.name, view_shard(LocalFolder(tmp_path), shard.name, where="shard"))
    assert split_keys(held.columns[0]) == [make_key(number) for number in range(3)]
    gc.collect()
    assert shard.name not in Path("/proc/self/maps").read_text()


def grow_and_die(path: Path, die_at: int) -> None:
    """Killed around the ``die_at``-th fsync or rename."""
    counter = itertools.count()

    def killing(function: Callable[..., object]) -> Callable[..., object]:
        def called(*args: object) -> object:
            if next(counter) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return called

    os.fsync, os.replace = killing(os.fsync), killing(os.replace)
    capture(path, range(66), examples_per_shard=1)


@pytest.mark.parametrize("version", [1, 2])
def test_a_commit_that_joins_segments_killed_at_any_moment(tmp_path: Path, version: int) -> None:
    """63 shards become 66: the list and the index of 64, those of two, then the manifest."""
    base, whole = tmp_path / "base", tmp_path / "whole"
    capture(base, range(63), examples_per_shard=1)
    if version == 1:
        as_version_1(base)
    shutil.copytree(base, whole)
    for _ in range(2):  # the second clears away what the first has left
        capture(whole, range(66), examples_per_shard=1)
    sizes = []
    for die_at in (13, 17, 21, 25, 26):
        torn = tmp_path / f"torn-{die_at}"
        shutil.copytree(base, torn)
        process = FORK.Process(target=grow_and_die, args=(torn, die_at))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        sizes.append(len(CacheReader(str(torn))))
        assert verify(str(torn)).faults == ()
        for _ in range(2):
            capture(torn, range(66), examples_per_shard=1)
        assert files_of(torn) == files_of(whole)
    assert sizes == [63, 63, 63, 63, 66]


# version 1


def without_bytes_of_shards(manifest: Path) -> bytes:
    tree = json.loads(manifest.read_bytes())
    del tree["sha256"]
    for one in (*tree["shards"], tree["totals"]):
        one |= {"bytes": 0, "entries": 0}
    for shard in tree["shards"]:
        assert shard["name"].endswith(f"-{shard.pop('sha256')}.arrow")
        shard["name"] = shard["name"].rpartition("-")[0]
    return json.dumps(tree, indent=1).encode()


@pytest.mark.parametrize("number", FIRST_VERSION)
def test_a_cache_of_version_1_is_read_everywhere(tmp_path: Path, number: int) -> None:
    cache = tmp_path / "cache"
    shards = capture(cache, range(number)).shards
    as_version_1(cache)
    assert sha256_hex(without_bytes_of_shards(cache / "manifest.json")) == FIRST_VERSION[number]
    assert not list(cache.glob("list-*"))
    reader = CacheReader(str(cache))
    assert reader.manifest.shards == shards
    assert reader.manifest.dumps() == (cache / "manifest.json").read_bytes()
    for one in (reader, pickle.loads(pickle.dumps(reader))):
        keys = [make_key(n) for n in range(number)]
        assert [row.payload for row in one.rows(keys)] == [make_row(n).payload for n in range(number)]
    assert inspect(reader)["format_version"] == 1
    assert verify(str(cache)).faults == verify(str(cache), sample=1).faults == ()
    assert export(reader, tmp_path / "parquet") == number
    if number:
        assert merge([str(cache)], str(tmp_path / "merged"), created_by={}).shards == shards


def test_a_cache_of_version_1_grows_into_one_of_version_2(tmp_path: Path) -> None:
    torn, whole = tmp_path / "torn", tmp_path / "whole"
    for path in (torn, whole):
        capture(path, range(23))
    old = as_version_1(torn)
    reader = CacheReader(str(torn))
    assert capture(torn, range(23)) == old  # nothing new: it stays what students' checkpoints name
    assert capture(torn, range(30)) == capture(whole, range(30))
    assert (
        len(pickle.loads(pickle.dumps(reader)).read([make_key(22)])[0]) == 1
    )  # who reads the old one goes on
    capture(torn, range(30))
    capture(whole, range(30))
    assert files_of(torn) == files_of(whole)


def test_a_damaged_cache_of_version_1_is_mended_as_one(tmp_path: Path) -> None:
    capture(tmp_path, range(23))
    manifest = as_version_1(tmp_path)
    before = files_of(tmp_path)
    (tmp_path / manifest.segments[0].index.name).unlink()
    capture(tmp_path, range(23))
    assert files_of(tmp_path) == before
    (tmp_path / manifest.shards[1].name).unlink()
    assert capture(tmp_path, range(23)) == manifest
    assert files_of(tmp_path) == before


def test_a_cache_of_version_1_captured_otherwise_is_refused(tmp_path: Path) -> None:
    capture(tmp_path, range(7))
    as_version_1(tmp_path)
    with pytest.raises(CacheMismatchError, match="difference"):
        capture(tmp_path, range(9), identity=make_identity(policy=TopK(k=2)))


def grow(path: Path, numbers: range) -> None:
    for number in numbers:
        capture(path, range(number), examples_per_shard=1)


def test_a_version_1_cache_killed_while_it_grows_is_old_or_new(tmp_path: Path) -> None:
    torn, whole = tmp_path / "torn", tmp_path / "whole"
    for path in (torn, whole):
        capture(path, range(60), examples_per_shard=1)
        as_version_1(path)
    capture(whole, range(70), examples_per_shard=1)
    for delay_s in (0.01, 0.03, 0.06, 0.1):
        process = FORK.Process(target=grow, args=(torn, range(70, 71)))
        process.start()
        time.sleep(delay_s)
        process.kill()
        process.join()
        assert len(CacheReader(str(torn))) in (60, 70)
    grow(torn, range(70, 71))
    grow(whole, range(70, 71))
    grow(torn, range(70, 71))
    assert files_of(torn) == files_of(whole)


def test_readers_keep_working_while_commits_follow_each_other(tmp_path: Path) -> None:
    """Each opens the newest cache, whatever the next captures clear away meanwhile."""
    capture(tmp_path, range(4), examples_per_shard=1)
    process = FORK.Process(target=grow, args=(tmp_path, range(5, 70)))
    process.start()
    sizes = []
    try:
        while process.is_alive():
            reader = CacheReader(str(tmp_path))
            sizes.append(len(reader))
            assert len(reader.read([make_key(len(reader) - 1), make_key(0)])[0]) == 2
    finally:
        process.join()
    assert process.exitcode == 0
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 5
    assert len(CacheReader(str(tmp_path))) == 69


def test_a_commit_over_cleared_files_is_refused_where_nothing_locks(tmp_path: Path) -> None:
    from test_cache_writer import keys_and_rows, open_writer, write_unit

    manifest = capture(tmp_path, range(65), examples_per_shard=1)
    with open_writer(tmp_path) as writer:
        plan = writer.plan(keys_and_rows(range(66)), examples_per_shard=1)
        write_unit(writer, plan.units[0])
        paths = [tmp_path / file.name for file in manifest.segments[0].files()]
        saved = [path.read_bytes() for path in paths]
        for path in paths:
            path.unlink()
        with pytest.raises(
            CacheFormatError, match="changed since it was planned; run the same command again"
        ):
            writer.commit(plan)
        assert json.loads((tmp_path / "manifest.json").read_text())["sha256"] == manifest.sha256
    for path, data in zip(paths, saved, strict=True):
        path.write_bytes(data)
    assert capture(tmp_path, range(66), examples_per_shard=1).totals.examples == 66


# verify --sample


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_sample_says_what_it_read(tmp_path: Path) -> None:
    manifest = capture(tmp_path, range(40), examples_per_shard=2)
    seen: list[str] = []
    found = verify(str(tmp_path), sample=5, seed=3, on_shard=lambda shard: seen.append(shard.name))
    assert (found.faults, found.num_checked, found.num_shards) == ((), 5, 20)
    assert found.num_bytes == manifest.shards.total("bytes")
    assert found.checked_bytes == sum(shard.bytes for shard in manifest.shards if shard.name in seen)
    again: list[str] = []
    verify(str(tmp_path), sample=5, seed=3, on_shard=lambda shard: again.append(shard.name))
    assert again == seen
    verify(str(tmp_path), sample=5, seed=4, on_shard=lambda shard: again.append(shard.name))
    assert again[5:] != seen
    # every shard is drawn by some seed, and a damaged one is found by those that draw it
    flip(tmp_path / seen[2])
    faults = verify(str(tmp_path), sample=5, seed=3).faults
    assert len(faults) == 1
    assert seen[2] in faults[0]
    assert len({bool(verify(str(tmp_path), sample=5, seed=seed).faults) for seed in range(20)}) == 2
    whole = verify(str(tmp_path), sample=20)
    assert (whole.num_checked, len(whole.faults)) == (20, 1)


def test_a_sample_finds_whatever_is_lost(tmp_path: Path) -> None:
    manifest = capture(tmp_path, range(60), examples_per_shard=2)
    for place in range(1, 14):
        (tmp_path / manifest.shards[place].name).unlink()
    (tmp_path / "notes.txt").write_text("?")
    found = verify(str(tmp_path), sample=1)
    faults = found.faults
    assert sum("is missing" in fault for fault in faults) == 10
    assert any("3 more shards are missing" in fault for fault in faults)
    assert any("notes.txt is not in the manifest" in note for note in found.notes)
    for file in manifest.files:
        flip(tmp_path / file.name)
    assert any(manifest.files[0].name in fault for fault in verify(str(tmp_path), sample=1).faults)


def test_the_command_says_seed_and_share_and_has_the_status_of_verify(tmp_path: Path) -> None:
    manifest = capture(tmp_path, range(40), examples_per_shard=2)

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(commands, ["verify", str(tmp_path), *arguments], standalone_mode=False)
        return result.return_value, result.output

    status, output = run("--sample", "4", "--seed", "7")
    assert status == 0
    assert "0 fault(s) in 4 of 20 shards, drawn with seed 7: " in output
    assert "% of their bytes. The others were not read; manifest, lists and indices were" in output
    assert "0 fault(s) in 20 shard(s)" in run()[1]
    assert "0 fault(s) in 20 shard(s)" in run("--sample", "99")[1]
    for shard in manifest.shards:
        flip(tmp_path / shard.name)
    assert run("--sample", "4")[0] == run()[0] == CacheFormatError.exit_status
    assert run("--sample", "0")[0] is None


@pytest.mark.parametrize("twin", [0, 63, 64, 69])
def test_an_example_in_two_shards_is_refused_in_whichever_segment(twin: int) -> None:
    keys = [make_key(number) for number in range(70)]
    keys[66] = keys[twin]
    new = [
        NewShard(info.model_copy(update={"examples": 1}), (np.frombuffer(key, "S16"), np.array([3])))
        for info, key in zip(listed(70), keys, strict=True)
    ]
    published: list[str] = []
    with pytest.raises(CacheFormatError, match=rf"example {keys[twin].hex()} lies in two shards \(1 such"):
        Contents.of_new(new).write_segments(lambda name, _: published.append(name), where="cache")


def test_more_examples_than_an_index_has_places_for_are_refused() -> None:
    require_places([1 << 26] * 64, where="cache")
    with pytest.raises(CacheFormatError, match="4294967297 examples in 64 shards"):
        require_places([1 << 26] * 63 + [(1 << 26) + 1], where="cache")
    shards = ShardList.of(
        info.model_copy(update={"examples": 1 << 29, "bytes": 1 << 33}) for info in listed(9)
    )
    with pytest.raises(
        CacheFormatError, match=r"at most 4294967296 possible\. Set cache\.examples_per_shard"
    ):
        write_segment(shards, [], lambda *_: None, where="cache")
