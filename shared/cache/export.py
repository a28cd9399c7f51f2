"""``export``: a cache as plain Parquet, for other tools and other trainers.

One file a shard, one row an example; ids, log-probs and weights are lists of lists: one list a position.
``datasets.load_dataset("parquet", data_dir=OUT)`` opens the folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shared.cache.format import make_metadata
from shared.cache.layout import require_in_no_cache
from shared.cache.manifest import Manifest, ShardInfo
from shared.cache.reader import CacheReader
from shared.cache.storage import explain_write_errors, sync_folder
from shared.errors import CacheFormatError
from shared.temporaries import temporary_name

ROWS_TOGETHER = 256


def export(
    reader: CacheReader, out: str | Path, *, on_shard: Callable[[ShardInfo], None] | None = None
) -> int:
    """Writes all rows to a new folder, which appears when it is complete; returns their number.

    Columns  key (hex), answer_ids, ce_sum, entropy_sums, truncated; label_log_prob and label_gain where the
             cache has them; ids, logprobs and weights (temperature 1) or weights_T for the other
             temperatures, a list a position
    Raises   CacheFormatError  when the folder is there already or lies in a cache, or the cache is damaged
    """
    target = Path(out)
    require_in_no_cache(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CacheFormatError(f"{target}: is there already. Name a new folder to export to.")
    temporary = target.parent / temporary_name(target.name)
    with explain_write_errors(f"export {target}", "Parquet"):
        temporary.mkdir(parents=True)
        try:
            for place, info in enumerate(reader.manifest.shards):
                _export_shard(reader, place, temporary / f"part-{place:05d}.parquet")
                if on_shard is not None:
                    on_shard(info)
            if not reader.manifest.shards:
                pq.write_table(_schema(reader.manifest).empty_table(), temporary / "part-00000.parquet")
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(target.parent)
    return len(reader)


def _export_shard(reader: CacheReader, place: int, path: Path) -> None:
    view = reader.shard(place)
    with pq.ParquetWriter(path, _schema(reader.manifest), compression="zstd") as stream:
        for start in range(0, len(view), ROWS_TOGETHER):
            stream.write_batch(_batch(reader, place, range(start, min(start + ROWS_TOGETHER, len(view)))))


def weights_column(temperature: float) -> str:
    """``weights`` at temperature 1, ``weights_T`` at others."""
    return "weights" if temperature == 1.0 else f"weights_{temperature:g}"


def _schema(manifest: Manifest) -> pa.Schema:
    """The columns; the metadata say which cache they come from."""
    temperatures = manifest.identity.targets.temperatures
    source = {"cache": manifest.sha256, "identity": manifest.identity.model_dump(mode="json")}
    floats = pa.list_(pa.list_(pa.float32()))
    return pa.schema(
        [
            ("key", pa.string()),
            ("answer_ids", pa.list_(pa.int32())),
            ("ce_sum", pa.float64()),
            ("entropy_sums", pa.list_(pa.float64())),
            ("truncated", pa.bool_()),
            ("ids", pa.list_(pa.list_(pa.int32()))),
            ("logprobs", floats),
            *((weights_column(temperature), floats) for temperature in temperatures),
            *((name, pa.list_(pa.float32())) for name in manifest.identity.targets.columns),
        ],
        metadata=make_metadata(source),
    )


def _batch(reader: CacheReader, place: int, numbers: range) -> pa.RecordBatch:
    view = reader.shard(place)
    rows = [view.row(number) for number in numbers]
    targets = reader.targets(rows)
    by_row = _offsets([row.num_positions for row in rows])
    by_position = targets.offsets.numpy()

    def nested(values: npt.NDArray[np.generic]) -> pa.Array:
        inner = pa.ListArray.from_arrays(pa.array(by_position, pa.int32()), pa.array(values))
        return pa.ListArray.from_arrays(pa.array(by_row, pa.int32()), inner)

    columns = [
        pa.array([row.key.hex() for row in rows]),
        pa.array([row.answer_ids for row in rows], pa.list_(pa.int32())),
        pa.array([row.ce_sum for row in rows], pa.float64()),
        pa.array([row.entropy_sums for row in rows], pa.list_(pa.float64())),
        pa.array([row.truncated for row in rows]),
        nested(targets.ids.numpy()),
        nested(targets.logprobs.float().numpy()),
        *(nested(targets.weights(temperature).numpy()) for temperature in reader.temperatures),
    ]
    for name in reader.manifest.identity.targets.columns:
        values = np.concatenate([getattr(row, name) for row in rows]).astype(np.float32)
        columns.append(pa.ListArray.from_arrays(pa.array(by_row, pa.int32()), pa.array(values)))
    return pa.RecordBatch.from_arrays(columns, schema=_schema(reader.manifest))


def _offsets(lengths: list[int]) -> npt.NDArray[np.int64]:
    return np.append(0, np.cumsum(lengths)).astype(np.int64)
