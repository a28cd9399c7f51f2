"""``cache.label_log_prob``: the teacher's log-prob of each written token, where a recipe asks for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from cache_examples import VERSIONS, capture, files_of, keys_and_rows, make_identity, make_key, make_row

from shared.cache import CacheReader, CacheWriter, Row
from shared.cache.export import export
from shared.cache.format import sha256_hex
from shared.cache.inspect import inspect
from shared.cache.merge import merge
from shared.cache.shard import encode_shard, open_shard
from shared.cache.verify import verify
from shared.capture.targets import rows_of, sparse_targets
from shared.errors import CacheFormatError, CacheMismatchError
from shared.recipes.policies import Random, Threshold, TopK
from tests.torture.mutations import forge_shard

WITH = make_identity(label_log_prob=True)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    capture(tmp_path / "cache", range(12), identity=WITH)
    return tmp_path / "cache"


def test_rows_give_back_what_was_captured(cache: Path) -> None:
    reader = CacheReader(str(cache))
    assert reader.has_label_log_prob
    rows = reader.rows([make_key(number) for number in (7, 0, 11)])
    for row, number in zip(rows, (7, 0, 11), strict=True):
        assert row.label_log_prob is not None
        assert row.label_log_prob.dtype == np.float16
        assert np.array_equal(row.label_log_prob, make_row(number, WITH).label_log_prob)
    joined = reader.label_log_probs(rows)
    assert joined.dtype == torch.float32
    assert joined.tolist() == [float(value) for row in rows for value in row.label_log_prob]
    assert reader.label_log_probs([]).shape == (0,)
    assert verify(str(cache)).faults == ()
    assert inspect(reader)["identity"]["targets"]["label_log_prob"] is True


def test_a_cache_without_them_says_so_and_keeps_its_bytes(tmp_path: Path) -> None:
    capture(tmp_path, range(7))
    reader = CacheReader(str(tmp_path))
    rows = reader.rows([make_key(3)])
    assert rows[0].label_log_prob is None
    with pytest.raises(CacheMismatchError, match=r"Capture a cache with cache\.label_log_prob: true"):
        reader.label_log_probs(rows)
    assert "label_log_prob" not in (tmp_path / "manifest.json").read_text()
    assert reader.manifest.shards[0].name.startswith(
        "shards/dbebdff3962fdb06-"
    )  # as the release before had it
    fixed = [
        replace(
            make_row(n), ce_sum=0.5 * n, entropy_sums=np.array([0.25 * n]), num_entries=9, payload=bytes(n)
        )
        for n in range(7)
    ]  # figures that no processor rounds in its own way
    encoded = encode_shard(fixed, num_temperatures=1, metadata={})
    assert sha256_hex(encoded) == "fdd7ce0cceb32aaab7f80eb471515b475f94d9ba75f300803bc17eb001dc77fa"


def test_two_bytes_a_position(tmp_path: Path) -> None:
    numbers = range(200)
    without = capture(tmp_path / "without", numbers, examples_per_shard=200)
    held = capture(tmp_path / "with", numbers, examples_per_shard=200, identity=WITH)
    more = held.totals.bytes - without.totals.bytes
    assert 2 * held.totals.positions <= more < 2 * held.totals.positions + 4 * 201 + 800


def test_they_are_never_mixed_silently(cache: Path, tmp_path: Path) -> None:
    difference = "targets.label_log_prob: true in the cache, false asked for"
    with pytest.raises(CacheMismatchError, match=difference):
        capture(cache, range(14))
    capture(tmp_path / "without", range(14))
    with pytest.raises(CacheMismatchError, match="label_log_prob: false in the cache, true asked for"):
        capture(tmp_path / "without", range(14), identity=WITH)
    with pytest.raises(CacheMismatchError, match=difference):
        merge([str(cache), str(tmp_path / "without")], str(tmp_path / "merged"), created_by={})
    assert WITH.digest() != make_identity().digest()


def test_a_student_that_needs_them_is_told(cache: Path, tmp_path: Path) -> None:
    capture(tmp_path / "without", range(3))
    reader = CacheReader(str(tmp_path / "without"))
    with pytest.raises(CacheMismatchError, match=r"targets\.label_log_prob: false in the cache, true asked"):
        reader.require_student(WITH.inputs, temperature=1.0, label_log_prob=True)
    assert reader.require_student(WITH.inputs, temperature=1.0) == ()
    assert CacheReader(str(cache)).require_student(WITH.inputs, temperature=1.0, label_log_prob=True) == ()
    assert CacheReader(str(cache)).require_student(WITH.inputs, temperature=1.0) == ()


def test_merging_and_exporting_keep_them(cache: Path, tmp_path: Path) -> None:
    capture(tmp_path / "other", range(10, 17), identity=WITH)
    merged = str(tmp_path / "merged")
    merge([str(cache), str(tmp_path / "other")], merged, created_by=VERSIONS)  # one shard is written anew
    assert verify(merged).faults == ()
    reader = CacheReader(merged)
    for number in (3, 11, 13):
        (row,) = reader.rows([make_key(number)])
        assert np.array_equal(row.label_log_prob, make_row(number, WITH).label_log_prob)
    export(reader, tmp_path / "parquet")
    rows = datasets.load_dataset("parquet", data_dir=str(tmp_path / "parquet"), split="train")
    by_key = {row["key"]: row["label_log_prob"] for row in rows}
    assert by_key[make_key(13).hex()] == make_row(13, WITH).label_log_prob.astype(np.float32).tolist()


@pytest.mark.parametrize("policy", [Threshold(tau=1 / 16), TopK(k=4), Random(draws=9)])
def test_what_a_capture_makes_is_the_teachers_log_prob(policy) -> None:
    """Of the label, to fp16, whatever the policy kept of the distribution."""
    logits = 4 * torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    logits[4] = -100.0
    logits[4, 7] = 100.0  # certain: its log-prob is 0, never -0
    labels = torch.tensor([3, 1, 4, 1, 7, 9, 2, 6, 5])
    targets, ce = sparse_targets(
        logits,
        labels,
        torch.arange(9),
        logprobs=lambda part: part.log_softmax(-1),
        policy=policy,
        temperatures=(1.0,),
        chunk_size=4,
    )

    class Example:
        def __init__(self, start: int, stop: int) -> None:
            self.key, self.answer_ids, self.truncated = bytes([start] * 16), labels[start:stop], False

    rows = rows_of([Example(0, 5), Example(5, 5), Example(5, 9)], targets, ce)
    assert [len(row.label_log_prob) for row in rows] == [5, 0, 4]
    found = torch.cat([torch.from_numpy(row.label_log_prob) for row in rows])
    exact = logits.double().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    assert found.dtype == torch.float16
    assert torch.allclose(found.double(), exact, rtol=2**-11, atol=2**-24)
    assert not np.signbit(rows[0].label_log_prob[4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: replace(row, label_log_prob=-row.label_log_prob), "above 0 or not finite"),
        (lambda row: replace(row, label_log_prob=row.label_log_prob * np.float16(np.nan)), "not finite"),
        (lambda row: replace(row, label_log_prob=row.label_log_prob * np.float16(-np.inf)), "not finite"),
        (
            lambda row: replace(row, label_log_prob=row.label_log_prob * np.float16(2)),
            "does not sum to -ce_sum",
        ),
    ],
)
def test_verify_finds_what_was_written_wrong(tmp_path: Path, change, message: str) -> None:
    with CacheWriter.open(str(tmp_path), WITH, created_by=VERSIONS) as writer:
        plan = writer.plan(keys_and_rows(range(6)), examples_per_shard=6)
        with writer.unit(plan.units[0]) as shard:
            for number in range(6):
                row = make_row(number, WITH)
                shard.add(change(row) if number == 4 else row)
        writer.commit(plan)
    (fault,) = verify(str(tmp_path)).faults
    assert message in fault
    assert make_key(4).hex() in fault


@pytest.mark.parametrize("values", [None, np.zeros(3, np.float16)])
def test_a_row_without_them_is_the_callers_mistake(values) -> None:
    row: Row = replace(make_row(4), label_log_prob=values)
    with pytest.raises(ValueError, match=r"label_log_prob .* found, .5,. needed"):
        encode_shard([row], num_temperatures=1, metadata={}, optional=("label_log_prob",))
    assert open_shard(encode_shard([row], num_temperatures=1, metadata={}), where="").label_log_probs is None


def other_lengths(batch: pa.RecordBatch) -> pa.Array:
    column = batch.column("label_log_prob")
    return pa.ListArray.from_arrays(
        pa.array([0, *[len(column.values)] * len(batch)], pa.int32()), column.values
    )


@pytest.mark.parametrize("change", ["other lengths", "nulls", "another type", "missing"])
def test_a_shard_of_a_stranger_is_one_error(cache: Path, change: str) -> None:
    reader = CacheReader(str(cache))
    data = (cache / reader.manifest.shards[0].name).read_bytes()
    batch = pa.ipc.open_file(data).get_batch(0)
    place = batch.schema.get_field_index("label_log_prob")
    field = batch.schema.field(place)
    if change == "missing":
        batch = batch.drop_columns(["label_log_prob"])
    elif change == "another type":
        wide = batch.column(place).cast(pa.list_(pa.float32()))
        batch = batch.set_column(place, pa.field(field.name, wide.type, nullable=False), wide)
    elif change == "nulls":
        column = batch.column(place)
        values = pa.array([None] * len(column.values), pa.float16())
        batch = batch.set_column(place, "label_log_prob", pa.ListArray.from_arrays(column.offsets, values))
    else:
        batch = batch.set_column(place, field, other_lengths(batch).cast(field.type))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as stream:
        stream.write_batch(batch)
    forge_shard(cache, sink.getvalue().to_pybytes())
    with pytest.raises(CacheFormatError, match="label_log_prob"):
        CacheReader(str(cache)).read([make_key(0)])
    assert any("label_log_prob" in fault for fault in verify(str(cache)).faults)


def test_a_column_that_the_manifest_does_not_promise_is_refused(cache: Path, tmp_path: Path) -> None:
    capture(tmp_path / "without", range(12))
    data = (cache / CacheReader(str(cache)).manifest.shards[0].name).read_bytes()
    forge_shard(tmp_path / "without", data)
    with pytest.raises(CacheFormatError, match=r"label_log_prob\) .*True\) found, .*False\) in the manifest"):
        CacheReader(str(tmp_path / "without")).read([make_key(0)])


def test_an_interrupted_capture_goes_on_to_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    with CacheWriter.open(str(tmp_path / "torn"), WITH, created_by=VERSIONS) as writer:
        plan = writer.plan(keys_and_rows(range(12)), examples_per_shard=5)
        with writer.unit(plan.units[1]) as shard:
            for number in plan.units[1].rows:
                shard.add(make_row(int(number), WITH))
    capture(tmp_path / "torn", range(12), identity=WITH)
    assert files_of(tmp_path / "torn") == files_of(cache)
