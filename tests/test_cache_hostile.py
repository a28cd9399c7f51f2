"""Caches of somebody else: whatever lies in them, one error, in time and memory that the files bound."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import zstandard
from cache_examples import as_version_1, capture, make_key

from shared.cache import CacheReader
from shared.cache.index import open_index
from shared.cache.shard import open_shard
from shared.cache.shard_list import open_list
from shared.cache.verify import verify
from shared.codec import decode, encode
from shared.codec.dictionary import DICTIONARY
from shared.errors import CacheFormatError, CacheMismatchError
from shared.recipes.policies import Policy, Random, Threshold, TopK, TopP
from shared.sparse import SparseTargets, position_seeds, sparsify
from tests.torture.mutations import forge, forge_list, forge_shard, forge_table, mutate

NUMBERS = range(8)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    capture(tmp_path / "cache", NUMBERS)
    return tmp_path / "cache"


def read_all(cache: Path) -> None:
    CacheReader(str(cache)).read([make_key(number) for number in NUMBERS])


def assert_refused(cache: Path, match: str) -> None:
    """By the reader, and by ``verify`` as an error or a fault."""
    with pytest.raises(CacheFormatError, match=match):
        read_all(cache)
    try:
        faults = "\n".join(verify(str(cache)).faults)
    except CacheFormatError as error:
        faults = str(error)
    assert faults


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"examples": 2**53 - 1}, "do not fit into"),
        ({"positions": 2**53 - 1}, "do not fit into"),
        ({"examples": 2**40, "bytes": 2**53 - 1}, "a shard has at most"),
        ({"entries": 2**53 - 1}, "more than 5 examples can have"),
        ({"truncated": 6}, "do not fit into"),
    ],
)
def test_numbers_that_no_shard_has(cache: Path, numbers: dict[str, int], message: str) -> None:
    forge_list(cache, lambda columns: columns.update({name: [n] * 2 for name, n in numbers.items()}))
    assert_refused(cache, message)
    as_version_1(capture_anew(cache))
    forge(cache, lambda tree: [shard.update(numbers) for shard in tree["shards"]])
    assert_refused(cache, message)


def capture_anew(cache: Path) -> Path:
    shutil.rmtree(cache)
    capture(cache, NUMBERS)
    return cache


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda columns: columns.update({name: values[:1] for name, values in columns.items()}),
            "1 shards with 5",
        ),
        (lambda columns: columns["examples"].reverse(), "not those of the index|in the manifest"),
        (lambda columns: columns["examples"].__setitem__(0, 4), "2 shards with 7 examples found, 2 with 8"),
        (lambda columns: columns["unit"].reverse(), "is missing"),
        (lambda columns: columns["positions"].__setitem__(0, 1 << 60), "less than 9007199254740992"),
    ],
)
def test_a_list_that_says_something_else(cache: Path, change: Callable[[dict], object], message: str) -> None:
    forge_list(cache, change)
    assert_refused(cache, message)


def test_a_list_that_is_another_table(cache: Path) -> None:
    forge_table(cache, "list", index_of(cache).read_bytes())
    assert_refused(cache, "its columns are not those of a list of shards")
    forge_table(capture_anew(cache), "index", list_of(cache).read_bytes())
    assert_refused(cache, "its columns are not those of an index")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["segments"].append(tree["segments"][0]), r"segments: of \[2, 2\] shards"),
        (lambda tree: tree["segments"][0].update(list=None), "segments: each needs a list"),
        (lambda tree: tree["segments"][0].update(shards=3), "2 shards with 8 examples found, 3 with 8"),
        (lambda tree: tree["segments"][0].update(shards=(1 << 53) - 1), "shards found, at most"),
        (lambda tree: tree.update(segments=[]), "8 examples in its totals"),
    ],
)
def test_segments_that_no_capture_writes(cache: Path, change: Callable[[dict], object], message: str) -> None:
    forge(cache, change)
    assert_refused(cache, message)


def test_an_index_too_small_for_its_examples(cache: Path) -> None:
    forge(cache, lambda tree: tree["segments"][0]["index"].update(bytes=8 * 16 - 1))
    assert_refused(cache, "an index of 127 bytes")
    as_version_1(capture_anew(cache))
    forge(cache, lambda tree: tree["index"].update(bytes=8 * 16 - 1))
    assert_refused(cache, "an index of 127 bytes")


def test_problems_of_a_manifest_are_capped(cache: Path) -> None:
    as_version_1(cache)
    forge(cache, lambda tree: tree.update(shards=[{"name": "x"}] * 500))
    with pytest.raises(CacheFormatError, match=r"and 2990 more\.") as caught:
        read_all(cache)
    assert len(str(caught.value)) < 2000


def test_a_deep_manifest(cache: Path) -> None:
    (cache / "manifest.json").write_text("[" * 200_000)
    assert_refused(cache, "not JSON")


def shard_of(cache: Path) -> Path:
    return cache / CacheReader(str(cache)).manifest.shards[0].name


def index_of(cache: Path) -> Path:
    return cache / json.loads((cache / "manifest.json").read_text())["segments"][0]["index"]["name"]


def list_of(cache: Path) -> Path:
    return cache / json.loads((cache / "manifest.json").read_text())["segments"][0]["list"]["name"]


@pytest.mark.parametrize("which", [shard_of, index_of, list_of, lambda cache: cache / "manifest.json"])
def test_what_is_no_regular_file(cache: Path, which: Callable[[Path], Path]) -> None:
    """A pipe would block, a folder is none, a device never ends."""
    path = which(cache)
    path.unlink()
    os.mkfifo(path)
    assert_refused(cache, "is (a named pipe|a device), not a file")
    path.unlink()
    path.symlink_to("/dev/zero")
    assert_refused(cache, "is (a named pipe|a device), not a file")
    path.unlink()
    path.mkdir()
    assert_refused(cache, "is a folder, not a file")


@pytest.mark.parametrize("which", [shard_of, index_of, list_of, lambda cache: cache / "manifest.json"])
def test_files_of_holes(cache: Path, which: Callable[[Path], Path]) -> None:
    path = which(cache)
    for size in (1 << 42, 1 << 25):
        os.truncate(path, size)
        assert_refused(cache, "bytes found")


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_arrow_buffers(cache: Path, compression: str) -> None:
    """200 MB of zeros in some kilobytes: refused from the metadata."""
    batch = pa.ipc.open_file(shard_of(cache).read_bytes()).get_batch(0)
    metadata = batch.schema.metadata
    column = batch.schema.get_field_index("payload")
    zeros = pa.array([bytes(40 << 20)] * len(batch), pa.binary())
    batch = batch.set_column(column, batch.schema.field(column), zeros).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(
        sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)
    ) as stream:
        stream.write_batch(batch)
    data = sink.getvalue().to_pybytes()
    assert len(data) < 2 << 20
    before = pa.total_allocated_bytes()
    with pytest.raises(CacheFormatError, match="compressed Arrow buffers"):
        open_shard(data, where="shard")
    assert pa.total_allocated_bytes() - before < 4 << 20
    forge_shard(cache, data)
    assert_refused(cache, "compressed Arrow buffers")


# Payloads.


def payload_of(symbols: bytes, *, id_bits: int, plain: bytes | None = None, bits: bytes = b"") -> bytes:
    compressor = zstandard.ZstdCompressor(dict_data=zstandard.ZstdCompressionDict(DICTIONARY))
    frame = compressor.compress(symbols)[4:]
    head = bytes([1 << 5 | id_bits]) + varint(len(frame))
    return head + (b"" if plain is None else varint(len(plain)) + plain) + frame + bits


def varint(value: int) -> bytes:
    encoded = b""
    while value > 127:
        encoded, value = encoded + bytes([value & 127 | 128]), value >> 7
    return encoded + bytes([value])


@pytest.mark.parametrize("symbol", [128 + 31, 0])
def test_a_few_bytes_that_would_be_millions_of_entries(symbol: int) -> None:
    """2**24 positions, or entries of one, in some hundred bytes: nothing of it is decompressed."""
    payload = payload_of(bytes([128]) + bytes([symbol]) * (2**24 - 1), id_bits=18)
    assert len(payload) < 2000
    tracemalloc.start()
    try:
        for policy in (Threshold(tau=1 / 512), Random(draws=50), TopK(k=8)):
            with pytest.raises(CacheFormatError, match="length is out of bounds"):
                decode([payload], policy=policy, vocab_size=250_000, num_positions=[3])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_row_of_more_entries_than_it_says(cache: Path) -> None:
    """Allowed by the policy, and by its positions: 300 entries of one position are not decompressed for 3."""
    policy = TopK(k=300)
    logprobs = torch.zeros(1, 500).log_softmax(-1)
    payload = encode(sparsify(logprobs, policy, seeds=position_seeds(0, b"entries", 1)))
    options = {"policy": policy, "vocab_size": 500, "num_positions": [1]}
    assert decode([payload], num_entries=[300], **options).num_entries == 300
    with pytest.raises(CacheFormatError, match="length is out of bounds"):
        decode([payload], num_entries=[3], **options)


def test_entries_that_manifest_and_shard_tell_otherwise(cache: Path) -> None:
    forge_list(cache, lambda columns: columns["entries"].__setitem__(0, columns["entries"][0] - 1))
    assert_refused(cache, "entries.* in the manifest")


def test_a_frame_that_does_not_say_its_size() -> None:
    compressor = zstandard.ZstdCompressor(
        dict_data=zstandard.ZstdCompressionDict(DICTIONARY), write_content_size=False
    ).compressobj()
    frame = (compressor.compress(bytes([128 + 31]) * 99) + compressor.flush())[4:]
    with pytest.raises(CacheFormatError, match="length is out of bounds"):
        decode([bytes([1 << 5]) + varint(len(frame)) + frame], policy=Threshold(), vocab_size=99)


def made(policy: Policy, temperatures: tuple[float, ...] = (1.0,), **changes: torch.Tensor) -> SparseTargets:
    logprobs = torch.randn(4, 60, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    seeds = position_seeds(0, b"hostile", 4)
    return replace(sparsify(logprobs, policy, temperatures=temperatures, seeds=seeds), **changes)


@pytest.mark.parametrize(
    ("targets", "policy", "message"),
    [
        (made(TopK(k=6)), TopK(k=5), "has 6 entries; 1 to 5"),
        (made(TopP(p=0.9, max_k=6)), TopP(p=0.9, max_k=5), "has 6 entries; 1 to 5"),
        (
            made(Threshold(tau=1 / 50, values="fp16")),
            Threshold(tau=1 / 4, values="fp16"),
            "bits|level|entries",
        ),
        (made(Random(draws=7)), Random(draws=9), "draws are not the policy's 9"),
        (made(Random(draws=7)), Random(draws=6), "draws are not the policy's 6|entries"),
        (made(TopK(k=6), logprobs=torch.zeros(24).half()), TopK(k=6), "masses sum to more than"),
        (made(Random(draws=7)).slice(0, 0), Random(draws=7), ""),
    ],
)
def test_what_this_policy_does_not_make(targets: SparseTargets, policy: Policy, message: str) -> None:
    if not message:
        assert decode([encode(targets)], policy=policy, vocab_size=60).num_positions == 0
        return
    with pytest.raises(CacheFormatError, match=message):
        decode([encode(targets)], policy=policy, vocab_size=60)


@pytest.mark.parametrize("policy", [TopK(k=3), Random(draws=5), TopP(p=0.5)])
def test_positions_without_entries_where_there_are_none(policy: Policy) -> None:
    with pytest.raises(CacheFormatError, match="a position has 0 entries"):
        decode([payload_of(bytes([128 + 31] * 3), id_bits=0)], policy=policy, vocab_size=60)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("offset", [-5.0, 5.0])
def test_log_normalisers_out_of_their_bounds(temperature: float, offset: float) -> None:
    temperatures = (1.0, temperature)
    for policy in (TopK(k=3), Threshold(tau=1 / 16), Random(draws=9)):
        targets = made(policy, temperatures)
        options = {"policy": policy, "temperatures": temperatures, "vocab_size": 60}
        assert decode([encode(targets)], **options).num_positions == 4
        wrong = replace(targets, log_normalizers=targets.log_normalizers + offset)
        with pytest.raises(CacheFormatError, match="log-normaliser at temperature"):
            decode([encode(wrong)], **options)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("temperatures", [(1.0,), (2.0,), (1.0, 0.1), (0.05, 1.0, 100.0)])
def test_what_teachers_give_is_within_all_bounds(temperatures: tuple[float, ...], spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for vocab_size in (1, 2, 700, 5000):
        logprobs = (spread * torch.randn(6, vocab_size, generator=generator)).log_softmax(-1)
        for policy in (
            Threshold(tau=1e-6),
            Threshold(tau=1 / 600),
            Threshold(tau=1.0),
            Random(draws=40),
            TopK(k=9),
        ):
            seeds = position_seeds(2, b"bounds", 6)
            targets = sparsify(logprobs, policy, temperatures=temperatures, seeds=seeds)
            options = {"policy": policy, "temperatures": temperatures, "vocab_size": vocab_size}
            found = decode([encode(targets)], num_positions=[6], **options)
            assert torch.equal(found.ids, targets.ids)


def test_rows_are_unpacked_in_bounded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [made(Threshold(tau=1 / 64)).slice(start, start + 2) for start in (0, 1, 2)]
    payloads = [encode(row) for row in rows]
    options = {"policy": rows[0].policy, "vocab_size": 60, "num_positions": [2, 2, 2]}
    whole = decode(payloads, **options)
    monkeypatch.setattr("shared.codec.payload._BLOCK_SYMBOLS", 1)
    apart = decode(payloads, **options)
    assert torch.equal(whole.ids, apart.ids)
    assert torch.equal(whole.offsets, apart.offsets)
    with pytest.raises(CacheFormatError, match=r"positions, 1 needed|out of bounds"):
        decode(payloads, **(options | {"num_positions": [2, 1, 2]}))


# Chance: what the cases above did not think of.


def survives(action: Callable[[], object]) -> None:
    with contextlib.suppress(CacheFormatError, CacheMismatchError):
        action()


@pytest.mark.parametrize("version", [1, 2])
def test_mutated_manifests_end_in_one_error(cache: Path, version: int) -> None:
    if version == 1:
        as_version_1(cache)
    generator, path = random.Random(0), cache / "manifest.json"
    sound = json.loads(path.read_text())
    for _ in range(200):
        path.write_text(json.dumps(sound))
        forge(cache, lambda tree: mutate(tree, generator))
        survives(lambda: read_all(cache))
        survives(lambda: verify(str(cache)))


def test_every_bit_of_arrows_own_structures(cache: Path) -> None:
    """Names that are no UTF-8, buffers of odd lengths, columns twice: Arrow takes them, or fails in its own ways."""
    sizes = CacheReader(str(cache)).manifest.shards.column("examples")
    for path in (shard_of(cache), index_of(cache), list_of(cache)):
        sound = path.read_bytes()
        for place in range(0, len(sound), 3):
            data = sound[:place] + bytes([sound[place] ^ 1 << place % 8]) + sound[place + 1 :]
            survives(lambda: open_shard(data, where="shard"))  # noqa: B023
            survives(lambda: open_index(data, shard_sizes=sizes, where="index"))  # noqa: B023
            survives(lambda: list(open_list(data, where="list")))  # noqa: B023


def test_mutated_shards_end_in_one_error(cache: Path) -> None:
    """Flipped bytes in a shard that the manifest vouches for: what the hash does not keep away."""
    generator, sound = random.Random(1), shard_of(cache).read_bytes()
    for _ in range(60):
        data = bytearray(sound)
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        forge_shard(cache, bytes(data))
        survives(lambda: read_all(cache))
        survives(lambda: verify(str(cache)))
