"""Reading a cache: rows by key, from any process, never more memory than a few shards, never a changed byte."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from cache_examples import capture, make_example, make_identity, make_key, make_row
from hypothesis import given
from hypothesis import strategies as st

from shared.cache import CacheReader
from shared.cache import reader as reader_module
from shared.cache import verified as verified_module
from shared.cache.index import CacheIndex, KeyIndex, open_index, split_keys
from shared.errors import CacheFormatError, CacheMismatchError
from shared.recipes.policies import Random, Threshold, TopK, TopP


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    capture(tmp_path / "cache", range(40))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified_module, "default_stamps", lambda: tmp_path / "stamps")


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0), (0.5, 4.0)])
@pytest.mark.parametrize("policy", [Threshold(tau=1 / 16), TopK(k=5), TopP(p=0.8), Random(draws=20)])
def test_what_was_captured_is_read_in_the_order_asked_for(tmp_path: Path, policy, temperatures) -> None:
    identity = make_identity(policy=policy, temperatures=temperatures)
    capture(tmp_path, range(20), identity=identity)
    reader = CacheReader(str(tmp_path))
    assert (reader.policy, reader.temperatures, len(reader)) == (policy, temperatures, 20)
    numbers = random.Random(0).choices(range(20), k=33)  # some come twice
    answer_ids, targets = reader.read([make_key(number) for number in numbers])
    start = 0
    for number, answer in zip(numbers, answer_ids, strict=True):
        row, expected = make_example(number, identity)
        found = targets.slice(start, start + row.num_positions)
        start += row.num_positions
        assert answer.dtype == torch.int32
        assert answer.tolist() == row.answer_ids.tolist()
        for name in ("ids", "logprobs", "log_normalizers", "draw_counts"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        for temperature in temperatures:
            assert torch.equal(found.weights(temperature), expected.weights(temperature))
        # of the row exact
        torch.testing.assert_close(found.entropy.sum(0), expected.entropy.sum(0))
    assert start == targets.num_positions


def test_rows_carry_the_sums(cache: Path) -> None:
    (row,) = CacheReader(str(cache)).rows([make_key(17)])
    expected = make_row(17)
    assert row.ce_sum == expected.ce_sum
    assert row.entropy_sums.tolist() == expected.entropy_sums.tolist()
    assert (row.key, row.truncated, row.num_entries) == (
        expected.key,
        expected.truncated,
        expected.num_entries,
    )


def test_the_index_answers_without_the_shards(cache: Path) -> None:
    reader = CacheReader(str(cache))
    for shard in (cache / "shards").iterdir():
        shard.unlink()
    assert make_key(3) in reader
    assert make_key(99) not in reader
    assert reader.contains([make_key(99), make_key(0)]).tolist() == [False, True]
    assert reader.num_positions([make_key(6), make_key(0)]).tolist() == [7, 1]
    assert list(reader.keys()) == [make_key(number) for number in range(40)]  # the order of capture
    with pytest.raises(CacheFormatError, match=r"shard 00000: .* is missing\. Run teacher-cache again"):
        reader.read([make_key(0)])


def test_an_index_of_another_order_is_found_out(cache: Path) -> None:
    reader = CacheReader(str(cache))
    reader.index = CacheIndex.of(replace(part, places=part.places[::-1]) for part in reader.index.parts)
    with pytest.raises(CacheFormatError, match=r"where the index says|\d+ in the index"):
        reader.read([make_key(number) for number in range(40)])


def test_no_keys_give_no_positions(cache: Path) -> None:
    answer_ids, targets = CacheReader(str(cache)).read([])
    assert answer_ids == []
    assert (targets.num_positions, targets.num_entries) == (0, 0)


def test_a_missing_example_is_named(cache: Path) -> None:
    reader = CacheReader(str(cache))
    keys, names = [make_key(1), make_key(70), make_key(71)], ["train[1]", "train[70]", "train[71]"]
    for call in (reader.read, reader.rows, reader.num_positions):
        with pytest.raises(CacheMismatchError) as error:
            call(keys, names=names)
        assert f"train[70] (key {make_key(70).hex()}) is not in it, nor are 1 others of the 3" in str(
            error.value
        )
    with pytest.raises(ValueError, match="16 bytes"):
        reader.read([b"short"])


def read_in_worker(sent: bytes, numbers: list[int]) -> list[list[int]]:
    reader = pickle.loads(sent)
    return [ids.tolist() for ids in reader.read([make_key(number) for number in numbers])[0]]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_many_processes_read_at_once(cache: Path, method: str) -> None:
    reader = CacheReader(str(cache))
    reader.read([make_key(0)])
    jobs = [(pickle.dumps(reader), random.Random(seed).choices(range(40), k=10)) for seed in range(4)]
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.starmap(read_in_worker, jobs)
    for (_, numbers), result in zip(jobs, results, strict=True):
        assert result == [make_row(number).answer_ids.tolist() for number in numbers]


class Keys(torch.utils.data.Dataset):
    def __init__(self, reader: CacheReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.reader.read([make_key(number)])[0][0]


def test_data_loader_workers_read(cache: Path) -> None:
    loader = torch.utils.data.DataLoader(Keys(CacheReader(str(cache))), batch_size=None, num_workers=2)
    assert [ids.tolist() for ids in loader] == [make_row(number).answer_ids.tolist() for number in range(40)]


def test_a_pickled_reader_is_small(cache: Path) -> None:
    reader = CacheReader(str(cache))
    reader.read([make_key(number) for number in range(40)])
    assert len(pickle.dumps(reader)) < len(reader.manifest.dumps()) + 2000


def test_open_shards_are_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 3)
    reader = CacheReader(str(cache))
    for number in random.Random(1).choices(range(40), k=100):
        assert reader.rows([make_key(number)])[0].key == make_key(number)
        assert len(reader._shards) <= 3
    monkeypatch.setattr(reader_module, "MAX_MAPPED_BYTES", 1)
    reader.read([make_key(number) for number in range(40)])
    assert len(reader._shards) == 1


@pytest.mark.parametrize("at", [0.0, 0.02, 0.3, 0.6, 0.999])
def test_a_flipped_bit_in_a_shard_is_found_before_its_first_use(cache: Path, at: float) -> None:
    reader = CacheReader(str(cache))
    flip(cache / reader.manifest.shards[2].name, at)
    reader.read([make_key(9)])
    for _ in range(2):
        with pytest.raises(CacheFormatError, match=r"shard 00002: sha256 .* differs from the manifest"):
            reader.read([make_key(10)])


def test_a_truncated_shard_is_found(cache: Path) -> None:
    reader = CacheReader(str(cache))
    path = cache / reader.manifest.shards[0].name
    for size in (path.stat().st_size - 1, 100, 0):
        os.truncate(path, size)
        with pytest.raises(CacheFormatError, match="shard 00000"):
            CacheReader(str(cache)).read([make_key(0)])


def test_a_flipped_bit_in_index_list_or_manifest_is_found_on_opening(cache: Path) -> None:
    for file in CacheReader(str(cache)).manifest.files:
        flip(cache / file.name)
        with pytest.raises(CacheFormatError, match=rf"{file.name}: sha256"):
            CacheReader(str(cache))
        flip(cache / file.name)
    assert len(CacheReader(str(cache))) == 40
    for at in (0.1, 0.4, 0.9):
        flip(cache / "manifest.json", at)
        with pytest.raises(CacheFormatError, match=r"manifest\.json"):
            CacheReader(str(cache))
        flip(cache / "manifest.json", at)


def settle(cache: Path) -> None:
    """Makes all files old enough for stamps."""
    for path in cache.rglob("*.arrow"):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns - 3_000_000_000))


def count_hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    hashed: list[Path] = []
    original = verified_module.sha256_of_file
    monkeypatch.setattr(verified_module, "sha256_of_file", lambda path: hashed.append(path) or original(path))
    return hashed


def test_a_shard_is_hashed_once_for_all_processes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(cache)
    hashed = count_hashed(monkeypatch)
    keys = [make_key(number) for number in range(40)]
    reader = CacheReader(str(cache))
    reader.read(keys)
    assert len(hashed) == len(set(hashed)) == 10  # eight shards, their list and the index
    CacheReader(str(cache)).read(keys)
    pickle.loads(pickle.dumps(reader)).read(keys)
    assert len(hashed) == 10
    # written to since: hashed again, and found out
    flip(cache / reader.manifest.shards[0].name)
    with pytest.raises(CacheFormatError, match="shard 00000"):
        CacheReader(str(cache)).read(keys)
    # a day later
    for stamp in (cache.parent / "stamps").iterdir():
        os.utime(stamp, (0, 0))
    hashed.clear()
    CacheReader(str(cache)).read(keys[5:])
    assert len(hashed) == 9


def test_a_shard_written_over_with_its_times_kept_is_hashed_again(cache: Path) -> None:
    settle(cache)
    reader = CacheReader(str(cache))
    reader.read([make_key(0)])
    path = cache / reader.manifest.shards[0].name
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(CacheFormatError, match="shard 00000"):
        CacheReader(str(cache)).read([make_key(0)])


def test_a_stamp_of_a_clock_that_was_ahead_is_not_believed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be, until that day has come."""
    settle(cache)
    CacheReader(str(cache))
    for stamp in (cache.parent / "stamps").iterdir():
        os.utime(stamp, (2 * time.time(), 2 * time.time()))
    hashed = count_hashed(monkeypatch)
    CacheReader(str(cache))
    assert len(hashed) == 2


def test_stamps_of_others_are_not_believed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(cache)
    CacheReader(str(cache))
    (cache.parent / "stamps").chmod(0o777)
    hashed = count_hashed(monkeypatch)
    CacheReader(str(cache))
    assert len(hashed) == 2


def test_without_a_place_for_stamps_everything_is_hashed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified_module, "default_stamps", lambda: Path("/proc/no/stamps"))
    settle(cache)
    assert len(CacheReader(str(cache)).read([make_key(0)])[0]) == 1


def test_files_just_written_are_not_stamped(cache: Path) -> None:
    CacheReader(str(cache)).read([make_key(0)])
    assert not (cache.parent / "stamps").exists()


def test_shards_are_mapped_not_loaded(cache: Path) -> None:
    reader = CacheReader(str(cache))
    reader.read([make_key(0)])
    maps = Path("/proc/self/maps").read_text()
    assert reader.manifest.shards[0].name in maps
    assert reader.manifest.segments[0].index.name in maps
    assert reader.manifest.shards[1].name not in maps


keys_strategy = st.lists(st.binary(min_size=16, max_size=16), unique=True, max_size=60)


def as_shards(groups: list[list[bytes]]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.frombuffer(b"".join(keys), dtype="S16"), np.arange(len(keys))) for keys in groups]


@given(stored=keys_strategy, asked=keys_strategy)
def test_the_index_finds_what_a_dictionary_finds(stored: list[bytes], asked: list[bytes]) -> None:
    groups = [[], *(stored[start : start + 7] for start in range(0, len(stored), 7)), []]
    places = {key: (s, r) for s, keys in enumerate(groups) for r, key in enumerate(keys)}
    encoded = KeyIndex.from_shards(as_shards(groups)).encode()
    index = open_index(encoded, shard_sizes=[len(keys) for keys in groups], where="index")
    assert split_keys(index.keys) == sorted(stored)
    asked = asked + stored[::2]
    found = index.find(asked)
    assert [place >= 0 for place in found.tolist()] == [key in places for key in asked]
    held = [key for key in asked if key in places]
    shards, rows = index.locate(index.find(held))
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == [places[key] for key in held]
    assert index.num_positions[index.find(held)].tolist() == [places[key][1] for key in held]
    assert [split_keys(keys) for keys, _ in index.shard_columns()] == groups
    assert [counts.tolist() for _, counts in index.shard_columns()] == [list(range(len(g))) for g in groups]


@given(key=st.binary(min_size=0, max_size=16))
def test_keys_that_differ_in_trailing_zeros_only_are_different_keys(key: bytes) -> None:
    padded = key.ljust(16, b"\0")
    other = padded[:-1] + bytes([padded[-1] ^ 1])
    assert KeyIndex.from_shards(as_shards([[padded]])).find([padded, other]).tolist() == [0, -1]
    assert KeyIndex.from_shards(as_shards([[padded], [other, padded]])).duplicates() == [padded]


@pytest.mark.parametrize(("most", "kind"), [(255, "uint8"), (256, "uint16"), (65536, "uint32")])
def test_numbers_of_positions_take_as_few_bytes_as_they_can(most: int, kind: str) -> None:
    columns = (np.frombuffer(bytes(16), dtype="S16"), np.array([most]))
    encoded = KeyIndex.from_shards([columns]).encode()
    assert str(pa.ipc.open_file(encoded).schema.field("num_positions").type) == kind
    assert open_index(encoded, shard_sizes=[1], where="index").num_positions.tolist() == [most]
