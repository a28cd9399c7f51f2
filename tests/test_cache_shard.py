"""A shard's bytes: any rows, there and back, and nothing else taken for a shard."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from cache_examples import make_row
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache import Row
from shared.cache.format import FORMAT, METADATA_KEY, canonical_json
from shared.cache.shard import encode_shard, open_shard
from shared.errors import CacheFormatError

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
ids = st.integers(0, 2**31 - 1)


@st.composite
def rows(draw, num_temperatures: int) -> Row:
    return Row(
        key=draw(st.binary(min_size=16, max_size=16)),
        answer_ids=np.array(draw(st.lists(ids, max_size=20)), dtype=np.int32),
        num_entries=draw(ids),
        ce_sum=draw(finite),
        entropy_sums=np.array([draw(finite) for _ in range(num_temperatures)]),
        payload=draw(st.binary(max_size=50)),
        truncated=draw(st.booleans()),
    )


@given(data=st.data(), num_temperatures=st.integers(1, 3))
@settings(max_examples=60)
def test_rows_come_back_as_they_were(data: st.DataObject, num_temperatures: int) -> None:
    written = data.draw(st.lists(rows(num_temperatures), max_size=6))
    metadata = {"unit": "u", "skipped": [], "text": "\u00e4"}
    encoded = encode_shard(written, num_temperatures=num_temperatures, metadata=metadata)
    assert encoded.equals(encode_shard(written, num_temperatures=num_temperatures, metadata=metadata))
    view = open_shard(encoded, where="shard")
    assert len(view) == len(written)
    assert {name: view.metadata[name] for name in metadata} == metadata
    for number, row in enumerate(written):
        found = view.row(number)
        assert (found.key, found.payload, found.truncated) == (row.key, row.payload, row.truncated)
        assert (found.num_entries, found.ce_sum) == (row.num_entries, row.ce_sum)
        assert found.answer_ids.dtype == np.int32
        assert np.array_equal(found.answer_ids, row.answer_ids)
        assert np.array_equal(found.entropy_sums, row.entropy_sums)


@pytest.mark.parametrize(
    ("distinct", "index"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_answer_ids_take_as_few_bytes_as_they_can(distinct: int, index: str) -> None:
    answer = np.arange(distinct, dtype=np.int32)[::-1] * 3
    row = Row(bytes(16), answer, 0, 0.0, np.zeros(1), b"")
    encoded = encode_shard([row], num_temperatures=1, metadata={})
    kind = pa.ipc.open_file(encoded).schema.field("answer_ids").type.value_type
    assert str(kind.index_type) == index
    assert np.array_equal(open_shard(encoded, where="shard").answer_ids(0), answer)


def as_file(batch: pa.RecordBatch, *, batches: int = 1) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as stream:
        for _ in range(batches):
            stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def a_batch() -> pa.RecordBatch:
    return pa.ipc.open_file(encode_shard([make_row(1)], num_temperatures=1, metadata={})).get_batch(0)


def with_metadata(value: bytes) -> pa.RecordBatch:
    return a_batch().replace_schema_metadata({METADATA_KEY: value})


def retyped(name: str, kind: pa.DataType) -> pa.RecordBatch:
    batch = a_batch()
    return batch.set_column(batch.schema.get_field_index(name), name, pa.nulls(1, kind))


NEWER = canonical_json({"format": FORMAT, "format_version": 9}).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as an Arrow file"),
        (b"ARROW1\0\0 and no more", "cannot be read as an Arrow file"),
        (as_file(a_batch())[:-40], "cannot be read as an Arrow file"),
        (as_file(a_batch(), batches=2), "2 record batches found"),
        (as_file(a_batch().replace_schema_metadata({})), "no 'teachonce' metadata"),
        (as_file(with_metadata(b"{")), "is not JSON"),
        (as_file(with_metadata(b"[]")), "is not a JSON object"),
        (as_file(with_metadata(b"{}")), "format None found"),
        (as_file(with_metadata(NEWER)), "version 9 found"),
        (as_file(a_batch().drop_columns(["payload"])), "column 'payload' is None"),
        (as_file(a_batch().drop_columns(["entropy_sums"])), "column 'entropy_sums' is None"),
        (as_file(retyped("ce_sum", pa.float64())), "column 'ce_sum' is double"),
        (as_file(retyped("answer_ids", pa.list_(pa.int32()))), "column 'answer_ids' is list"),
        (as_file(retyped("ce_sum", pa.float32())), "null values found"),
    ],
)
def test_what_is_no_shard_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(CacheFormatError) as error:
        open_shard(data, where="shard 00003")
    assert str(error.value).startswith("shard 00003: ")
    assert message in str(error.value)
