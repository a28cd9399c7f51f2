"""A reader written from docs/cache-format.md and docs/targets.md alone reads what the project wrote.

Above the line nothing of the project is imported; below it a cache is made, and both readers are compared.
Payloads are taken apart by the reader in ``payload_reader``, which is written from the text as well.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from payload_reader import read_payload, spec_grid


def canonical(value: Any) -> bytes:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert (manifest["format"], manifest["format_version"]) == ("teachonce-cache", 2)
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    assert hashlib.sha256(canonical(rest)).hexdigest() == manifest["sha256"]
    return manifest


def read_arrow(folder: Path, entry: dict[str, Any]) -> tuple[pa.RecordBatch, dict[str, Any]]:
    data = (folder / entry["name"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    assert len(data) == entry["bytes"]
    stream = pa.ipc.open_file(data)
    assert stream.num_record_batches == 1
    metadata = stream.schema.metadata[b"teachonce"]
    assert canonical(json.loads(metadata)) == metadata
    return stream.get_batch(0), json.loads(metadata)


def segment_sizes(num_shards: int) -> list[int]:
    sizes = []
    while num_shards >= 64:
        sizes.append(min(2 ** (num_shards.bit_length() - 1), 65536))
        num_shards -= sizes[-1]
    return [*sizes, num_shards] if num_shards else sizes


def read_lists(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards of all segments, in order, as version 1 wrote them into the manifest."""
    shards = []
    for segment in manifest["segments"]:
        batch, metadata = read_arrow(folder, segment["list"])
        assert metadata == {"format": "teachonce-cache", "format_version": 2, "list": True}
        assert [(field.name, str(field.type), field.nullable) for field in batch.schema] == [
            ("unit", "fixed_size_binary[8]", False),
            ("sha256", "fixed_size_binary[32]", False),
            *((name, "uint64", False) for name in ("bytes", "examples", "positions", "entries", "truncated")),
        ]
        assert len(batch) == segment["shards"]
        assert sum(batch.column("examples").to_pylist()) == segment["examples"]
        for row in batch.to_pylist():
            unit, sha256 = row.pop("unit").hex(), row.pop("sha256").hex()
            shards.append({"name": f"shards/{unit}-{sha256}.arrow", "sha256": sha256, **row})
    assert [segment["shards"] for segment in manifest["segments"]] == segment_sizes(len(shards))
    files = [segment[kind]["bytes"] for segment in manifest["segments"] for kind in ("list", "index")]
    assert sum(shard["bytes"] for shard in shards) + sum(files) == manifest["totals"]["bytes"]
    for name in ("examples", "positions", "entries", "truncated"):
        assert sum(shard[name] for shard in shards) == manifest["totals"][name]
    return shards


def read_index(
    folder: Path, manifest: dict[str, Any], shards: list[dict[str, Any]]
) -> dict[bytes, tuple[int, int, int]]:
    found: dict[bytes, tuple[int, int, int]] = {}
    first = 0
    for segment in manifest["segments"]:
        batch, metadata = read_arrow(folder, segment["index"])
        assert metadata == {"format": "teachonce-cache", "format_version": 1, "index": True}
        assert [(field.name, str(field.type)) for field in batch.schema] == [
            ("key", "fixed_size_binary[16]"),
            ("place", "uint32"),
            ("num_positions", "uint8"),
        ]
        keys, places, counts = (column.to_pylist() for column in batch.columns)
        assert keys == sorted(set(keys))
        assert len(keys) == segment["examples"]
        for key, place, count in zip(keys, places, counts, strict=True):
            shard, row = first, place
            while row >= shards[shard]["examples"]:
                row -= shards[shard]["examples"]
                shard += 1
            assert key not in found
            found[key] = (shard, row, count)
        first += segment["shards"]
    assert len(found) == manifest["totals"]["examples"]
    return found


def content_identity(manifest: dict[str, Any]) -> dict[str, Any]:
    identity = json.loads(json.dumps(manifest["identity"]))
    for part, name in (("teacher", "name"), ("teacher", "revision")):
        del identity[part][name]
    del identity["data"]
    return {"format_version": 1, **identity}


def read_shard(folder: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> list[dict[str, Any]]:
    batch, metadata = read_arrow(folder, entry)
    identity = content_identity(manifest)
    assert metadata["identity"] == identity
    unit, sha256 = Path(entry["name"]).stem.split("-")
    assert (unit, sha256) == (metadata["unit"], entry["sha256"])
    temperatures = len(manifest["identity"]["targets"]["temperatures"])
    kinds = {field.name: str(field.type) for field in batch.schema}
    assert kinds.pop("answer_ids").startswith("list<item: dictionary<values=int32, indices=uint")
    assert all(kinds.pop(name) in ("uint8", "uint16", "uint32") for name in ("num_positions", "num_entries"))
    assert kinds == {
        "key": "fixed_size_binary[16]",
        "truncated": "bool",
        "ce_sum": "float",
        "entropy_sums": f"fixed_size_list<item: float not null>[{temperatures}]",
        "payload": "binary",
    }
    rows = batch.to_pylist()
    assert not metadata["skipped"]
    digest = hashlib.sha256(canonical(identity)).digest()
    keys = b"".join(row["key"] for row in rows)
    assert hashlib.blake2b(digest + keys, digest_size=8).hexdigest() == unit
    return rows


def key_of(*items: bytes) -> bytes:
    data = b"".join(len(item).to_bytes(8, "little") + item for item in items)
    return hashlib.blake2b(data, digest_size=16).digest()


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


# ------------------------------------------------------------------------------------------------------------

from cache_examples import capture, make_example, make_identity, make_key  # noqa: E402

from shared.cache import TargetsIdentity  # noqa: E402
from shared.data.conversations import Turn  # noqa: E402
from shared.data.processing import ExampleProcessor  # noqa: E402
from shared.data.rows import Example  # noqa: E402
from shared.recipes.policies import Random, Threshold, TopK, TopP  # noqa: E402
from shared.sparse import SparseTargets  # noqa: E402


def read_entries(found: dict[str, Any], settings: TargetsIdentity, expected: SparseTargets) -> None:
    """Takes a row's payload apart and compares its entries with the targets that were captured."""
    policy, temperatures = settings.policy, settings.temperatures
    grid = spec_grid(policy.model_dump(), temperatures)
    max_level = policy.draws - 1 if isinstance(policy, Random) else len(grid) - 1
    positions, plain = read_payload(found["payload"], max_level=max_level, has_plain=temperatures != (1.0,))
    assert [len(entries) for entries in positions] == expected.counts.tolist()
    entries = [entry for position in positions for entry in position]
    assert [entry[0] for entry in entries] == expected.ids.tolist()
    levels = np.array([entry[1] for entry in entries])
    if isinstance(policy, Random):
        assert np.array_equal(levels + 1, expected.draw_counts.numpy())
    else:
        assert np.array_equal(grid[levels], expected.logprobs.numpy())
    normalizers = expected.log_normalizers.numpy().ravel()
    assert np.array_equal(np.frombuffer(plain, "<f4", normalizers.size), normalizers)


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0), (3.0,)])
@pytest.mark.parametrize("policy", [Threshold(tau=1 / 16), TopK(k=4), TopP(p=0.7), Random(draws=30)])
def test_a_reader_made_from_the_text_reads_a_cache(tmp_path: Path, policy, temperatures) -> None:
    identity = make_identity(policy=policy, temperatures=temperatures)
    capture(tmp_path, range(23), identity=identity)
    manifest = read_manifest(tmp_path)
    entries = read_lists(tmp_path, manifest)
    index = read_index(tmp_path, manifest, entries)
    shards = [read_shard(tmp_path, manifest, entry) for entry in entries]
    assert manifest["totals"]["positions"] == sum(row["num_positions"] for rows in shards for row in rows)
    for number in range(23):
        shard, place, num_positions = index[make_key(number)]
        found = shards[shard][place]
        row, targets = make_example(number, identity)
        assert found["key"] == row.key
        assert found["answer_ids"] == row.answer_ids.tolist()
        assert found["num_positions"] == num_positions == targets.num_positions
        assert found["num_entries"] == targets.num_entries
        assert found["truncated"] == row.truncated
        assert found["ce_sum"] == row.ce_sum
        assert np.array_equal(found["entropy_sums"], row.entropy_sums)
        read_entries(found, identity.targets, targets)


def test_a_reader_made_from_the_text_reads_segments(tmp_path: Path) -> None:
    for number in (70, 200):
        capture(tmp_path, range(number), examples_per_shard=1)
    manifest = read_manifest(tmp_path)
    assert [segment["shards"] for segment in manifest["segments"]] == [128, 64, 8]
    entries = read_lists(tmp_path, manifest)
    index = read_index(tmp_path, manifest, entries)
    for number in (0, 127, 128, 199):
        shard, place, _ = index[make_key(number)]
        assert read_shard(tmp_path, manifest, entries[shard])[place]["key"] == make_key(number)


@pytest.mark.parametrize(
    ("ids", "is_whole"), [(None, True), (None, False), ((5, 6), True), ((5, 6), False), ((), False)]
)
def test_keys_computed_from_the_text(
    processor: ExampleProcessor, ids: tuple[int, ...] | None, is_whole: bool
) -> None:
    written = [] if ids is None and is_whole else [b"teachonce written answer 1", compact([ids, is_whole])]
    answer = "Größe" if ids is None else ""
    tokens = processor.prompt_fingerprint.encode()
    single = Example.single(b"picture", "Was?", "Größe", answer_ids=ids, answer_end=is_whole)
    assert processor.key(single) == key_of(*written, b"picture", tokens, b"Was?", answer.encode())
    asked, told = ("user", (None, "Was?", None)), ("assistant", ("Größe",))
    turns = tuple(Turn(role, parts) for role, parts in (asked, told, ("user", ("Und?",)), told))
    several = Example((b"one", b"two"), turns, answer_ids=ids, answer_end=is_whole)
    listed = [[turn.role, list(turn.parts)] for turn in turns]
    listed[-1][1] = [answer] if ids is None else []
    assert processor.key(several) == key_of(
        *written, b"teachonce conversation 1", tokens, b"all", compact(listed), b"one", b"two"
    )
