"""``verify``: every byte of a cache read, and every fault listed; or every byte of some shards, drawn at random.

Hashes first; then what hashes cannot see, because it was wrong when it was written: structure, ranges,
sums, and the agreement of payloads, summaries, index and manifest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from shared import codec
from shared.cache.format import MAX_SHARD_BYTES, sha256_hex
from shared.cache.index import CacheIndex, KeyIndex, open_index
from shared.cache.layout import (
    MANIFEST_NAME,
    PLAN_NAME,
    SHARDS,
    foreign_names,
    shard_names,
    table_names,
    unit_in,
)
from shared.cache.manifest import Manifest, load_manifest
from shared.cache.segments import open_segment_list, read_file
from shared.cache.shard import ShardView, open_shard
from shared.cache.shard_list import ShardInfo, ShardList
from shared.cache.storage import Folder, open_folder
from shared.errors import CacheFormatError
from shared.permutation import Permutation, stream
from shared.recipes.policies import Random, Threshold
from shared.sparse import SparseTargets
from shared.temporaries import TEMPORARY_PREFIX, is_temporary

TOLERANCE_NATS = 1e-3  # a position: the teacher computes in fp32
FP16_SLACK = 0.01  # of a position's weights together: their logs are fp16
FP16_ROUNDING = 2.0**-11  # of a number, at most
LOWEST_FP16 = -65504.0  # for all log-probs below, as a model has at what it masks
ROWS_DECODED_TOGETHER = 256
MAX_TOLD = 10  # missing shards by name


@dataclass(frozen=True)
class Verification:
    """``faults`` make a cache unfit for use; ``notes`` are leavings that do no harm.

    num_shards, num_bytes  of the whole cache; bytes of shards alone
    num_checked            shards whose every byte was read
    checked_bytes          of those
    """

    faults: tuple[str, ...]
    notes: tuple[str, ...]
    num_shards: int = 0
    num_bytes: int = 0
    num_checked: int = 0
    checked_bytes: int = 0


def verify(
    location: str,
    *,
    sample: int | None = None,
    seed: int = 0,
    on_shard: Callable[[ShardInfo], None] | None = None,
) -> Verification:
    """Checks a whole cache; ``on_shard`` is called after each shard.

    ``sample``  so many shards, drawn without replacement by ``seed``; None: all.  Manifest, lists and indices
                are checked as a whole, and that every shard is there
    Raises   CacheFormatError  only where there is no manifest to check anything against
    """
    folder = open_folder(location)
    manifest = load_manifest(folder)
    if manifest is None:
        raise CacheFormatError(
            f"{folder.where}: no {MANIFEST_NAME}; there is no cache, or its capture did not end."
        )
    tables, faults = _open_tables(folder, manifest)
    chosen = _chosen(manifest.num_shards, sample, seed)
    num_bytes = checked_bytes = num_checked = 0
    for table in tables:
        for place in chosen[bisect_left(chosen, table.places.start) : bisect_left(chosen, table.places.stop)]:
            info = table.shards[place - table.places.start]
            where = f"{folder.where}, shard {place:05d} ({info.name})"
            faults += [f"{where}: {fault}" for fault in _shard_faults(folder, manifest, info, place, table)]
            num_checked, checked_bytes = num_checked + 1, checked_bytes + info.bytes
            if on_shard is not None:
                on_shard(info)
        num_bytes += table.shards.total("bytes")
    names = [name for table in tables for name in table.shards.names()]
    there = shard_names(folder)
    if len(chosen) < manifest.num_shards:
        faults += _missing_faults(folder, names, there)
    is_known = len(names) == manifest.num_shards
    if is_known:
        manifest = manifest.with_shards(ShardList.joined(table.shards for table in tables))
        faults += _total_faults(manifest)
    return Verification(
        tuple(faults),
        tuple(_other_files(folder, manifest, set(there) - set(names) if is_known else ())),
        num_shards=manifest.num_shards,
        num_bytes=num_bytes,
        num_checked=num_checked,
        checked_bytes=checked_bytes,
    )


@dataclass(frozen=True, eq=False)
class _Tables:
    """What a segment says of its shards, whose places in the cache these are; no index where it is damaged."""

    places: range
    shards: ShardList
    index: KeyIndex | None


def _open_tables(folder: Folder, manifest: Manifest) -> tuple[list[_Tables], list[str]]:
    """Those of the segments whose list is whole, and all faults of lists and indices."""
    tables: list[_Tables] = []
    faults: list[str] = []
    read = partial(read_file, folder)
    for segment, first in zip(manifest.segments, manifest.first_places, strict=True):
        try:
            shards = manifest.shards if segment.list is None else open_segment_list(segment, read)
        except CacheFormatError as error:
            faults.append(str(error))
            continue
        try:
            where = f"{folder.where}, {segment.index.name}"
            data, sizes = read(segment.index), shards.column("examples")
            index = open_index(data, shard_sizes=sizes, where=where)
            faults += _index_faults(index, [one.index for one in tables if one.index is not None])
        except CacheFormatError as error:
            faults.append(str(error))
            index = None
        tables.append(_Tables(range(first, first + segment.shards), shards, index))
    return tables, faults


def _chosen(num_shards: int, sample: int | None, seed: int) -> list[int]:
    """Places of the shards that are read, in ascending order."""
    if sample is None or sample >= num_shards:
        return list(range(num_shards))
    drawn = Permutation(num_shards, key=stream(seed, 0))[np.arange(sample)]
    return sorted(drawn.tolist())


def _missing_faults(folder: Folder, names: Sequence[str], there: Sequence[str]) -> Iterator[str]:
    """Shards that are not there, of which a sample may have none."""
    found = set(there)
    missing = [name for name in names if name not in found]
    for name in missing[:MAX_TOLD]:
        yield f"{folder.where}, {name}: is missing"
    if len(missing) > MAX_TOLD:
        yield f"{folder.where}: {len(missing) - MAX_TOLD} more shards are missing"


def _index_faults(index: KeyIndex, others: Sequence[KeyIndex]) -> Iterator[str]:
    if (index.keys[1:] <= index.keys[:-1]).any():
        yield "index: its keys are not in strictly ascending order; a key may be missed or lie in two shards"
    if not np.array_equal(np.sort(index.places), np.arange(len(index))):
        yield "index: its places are not the numbers of the examples, each once"
    if (CacheIndex.of(others).find_array(index.keys) >= 0).any():
        yield "index: a key lies in two segments"


def _shard_faults(
    folder: Folder, manifest: Manifest, info: ShardInfo, place: int, tables: _Tables
) -> Iterator[str]:
    try:
        data = folder.read(info.name, max_bytes=MAX_SHARD_BYTES)
    except CacheFormatError as error:
        yield str(error)
        return
    except OSError as error:
        yield f"cannot be read ({error.strerror or error})"
        return
    found = sha256_hex(data)
    if len(data) != info.bytes or found != info.sha256:
        told = f"{info.bytes} with {info.sha256[:12]} in the manifest"
        yield f"{len(data)} bytes with sha256 {found[:12]} found, {told}"
        return  # what follows would only echo this
    try:
        view = open_shard(data, where="structure")
    except CacheFormatError as error:
        yield str(error)
        return
    yield from _header_faults(view, manifest, info)
    yield from _row_faults(view, manifest)
    yield from _payload_faults(view, manifest)
    if tables.index is not None and not _is_in_index(view, place - tables.places.start, tables.index):
        yield "its keys or numbers of positions are not those of the index"


def _is_in_index(view: ShardView, place: int, index: KeyIndex) -> bool:
    found = index.find_array(view.keys)
    if (found < 0).any():
        return False
    shards, rows = index.locate(found)
    return bool(
        (shards == place).all()
        and np.array_equal(rows, np.arange(len(view)))
        and np.array_equal(index.num_positions[found], view.num_positions)
    )


def _header_faults(view: ShardView, manifest: Manifest, info: ShardInfo) -> Iterator[str]:
    if view.metadata.get("identity") != manifest.identity.content():
        yield "its metadata name another identity than the manifest"
    told = manifest.identity.targets.columns
    for name, values in (("label_log_prob", view.label_log_probs), ("label_gain", view.label_gains)):
        if (values is not None) != (name in told):
            yield f"has {'no ' if name in told else 'a '}column {name}, other than the manifest says"
    if view.metadata.get("unit") != unit_in(info.name):
        yield f"its metadata name unit {view.metadata.get('unit')}, its file name another"
    counts = {
        "examples": len(view),
        "positions": int(view.num_positions.sum(dtype=np.int64)),
        "entries": int(view.num_entries.sum(dtype=np.int64)),
        "truncated": int(view.truncated.sum()),
    }
    for name, count in counts.items():
        if count != getattr(info, name):
            yield f"{count} {name} found, {getattr(info, name)} in the manifest"


def _row_faults(view: ShardView, manifest: Manifest) -> Iterator[str]:
    inputs = manifest.identity.inputs
    lengths = np.diff(view.answer_offsets)
    tokens = view.answer_dictionary[view.answer_indices]
    outside = np.append(0, np.cumsum((tokens < 0) | (tokens >= inputs.vocab_size)))
    highest = (np.log(inputs.vocab_size) + TOLERANCE_NATS) * lengths[:, None]
    entropies = view.entropy_sums
    checks = {
        "num_positions is not the number of answer ids": lengths != view.num_positions,
        "an answer id is outside the vocabulary": np.diff(outside[view.answer_offsets]) > 0,
        "ce_sum is negative or not finite": ~(
            np.isfinite(view.ce_sums) & (view.ce_sums >= -TOLERANCE_NATS * lengths)
        ),
        "an entropy sum is not between 0 and log(vocab_size) a position": ~(
            (entropies >= -TOLERANCE_NATS * lengths[:, None]) & (entropies <= highest)
        ).all(axis=1),
    }
    for fault, wrong in checks.items():
        if wrong.any():
            yield _of_rows(view, fault, np.flatnonzero(wrong))
    yield from _label_faults(view)
    yield from _gain_faults(view)


def _label_faults(view: ShardView) -> Iterator[str]:
    """Log-probs of labels are the cross-entropy's summands, each rounded to fp16."""
    if view.label_log_probs is None:
        return
    values = view.label_log_probs.astype(np.float64)
    is_wrong = ~(np.isfinite(values) & (values <= 0))
    sums, wrong = (
        np.diff(np.append(0.0, np.cumsum(each))[view.answer_offsets])
        for each in (np.where(is_wrong, 0.0, values), is_wrong)
    )
    if is_wrong.any():
        yield _of_rows(view, "a label_log_prob is above 0 or not finite", np.flatnonzero(wrong))
    slack = np.abs(view.ce_sums) * FP16_ROUNDING + TOLERANCE_NATS * np.diff(view.answer_offsets)
    is_cut = np.diff(np.append(0, np.cumsum(values <= LOWEST_FP16))[view.answer_offsets]) > 0
    differs = (wrong == 0) & ~is_cut & ~(np.abs(sums + view.ce_sums) <= slack)
    if differs.any():
        yield _of_rows(view, "label_log_prob does not sum to -ce_sum", np.flatnonzero(differs))


def _gain_faults(view: ShardView) -> Iterator[str]:
    """A label is likelier with the pictures by no more than its log-prob without them can be below 0."""
    if view.label_gains is None:
        return
    values = view.label_gains.astype(np.float64)
    wrong, sums, sizes = (
        np.diff(np.append(0.0, np.cumsum(each))[view.answer_offsets])
        for each in (
            ~np.isfinite(values),
            *(np.where(np.isfinite(values), of, 0.0) for of in (values, abs(values))),
        )
    )
    if wrong.any():
        yield _of_rows(view, "a label_gain is not finite", np.flatnonzero(wrong))
    slack = sizes * FP16_ROUNDING + TOLERANCE_NATS * np.diff(view.answer_offsets)
    too_low = (wrong == 0) & ~(sums >= -view.ce_sums - slack)
    if too_low.any():
        yield _of_rows(view, "label_gain sums to less than -ce_sum", np.flatnonzero(too_low))


def _payload_faults(view: ShardView, manifest: Manifest) -> Iterator[str]:
    for start in range(0, len(view), ROWS_DECODED_TOGETHER):
        yield from _faults_of_payloads(
            view, range(start, min(start + ROWS_DECODED_TOGETHER, len(view))), manifest
        )


def _faults_of_payloads(view: ShardView, rows: range, manifest: Manifest) -> Iterator[str]:
    identity = manifest.identity
    told = view.num_positions[rows.start : rows.stop].astype(np.int64)
    targets, problem = None, ""
    try:
        targets = codec.decode(
            [view.payload(row) for row in rows],
            policy=identity.targets.policy,
            temperatures=identity.targets.temperatures,
            vocab_size=identity.inputs.vocab_size,
            num_positions=told.tolist(),
            num_entries=view.num_entries[rows.start : rows.stop].tolist(),
        )
    except CacheFormatError as error:
        problem = str(error)
    if targets is None and len(rows) > 1:  # one of them: look at each
        for row in rows:
            yield from _faults_of_payloads(view, range(row, row + 1), manifest)
    elif targets is None:
        yield _of_rows(view, problem, np.array(rows))
    else:
        bounds = np.append(0, np.cumsum(told))
        entries = np.diff(targets.offsets.numpy()[bounds])
        wrong_count = entries != view.num_entries[rows.start : rows.stop]
        if wrong_count.any():
            yield _of_rows(
                view, "payload has another number of entries", rows.start + np.flatnonzero(wrong_count)
            )
        low, high = _mass_bounds(targets)
        for temperature in targets.temperatures:
            mass = _masses(targets, temperature)
            finite = np.isfinite(mass)
            checks = {
                f"weights at temperature {temperature:g} are not finite": ~finite,
                f"weights do not sum to {low:.3f} ... {high:.3f}": finite & ~((mass >= low) & (mass <= high)),
            }
            for fault, wrong in checks.items():
                if wrong.any():
                    wrong_rows = np.unique(np.searchsorted(bounds, np.flatnonzero(wrong), "right") - 1)
                    yield _of_rows(view, fault, rows.start + wrong_rows)


def _masses(targets: SparseTargets, temperature: float) -> npt.NDArray[np.float32]:
    """(N,) the sum of a position's weights; not finite where one is not."""
    weights = targets.weights(temperature)
    return torch.zeros(targets.num_positions).index_add_(0, targets.position_index, weights).numpy()


def _mass_bounds(targets: SparseTargets) -> tuple[float, float]:
    """Between what a position's weights surely sum to.

    A threshold's tail is drawn in steps of tau, and its kept probabilities are rounded at random, each to a
    neighbour at most sqrt(p * tau) / 8 away: at most 1/8 for all that lie above tau.
    """
    if targets.temperatures != (1.0,):
        return 0.0, float("inf")
    if isinstance(targets.policy, Threshold):
        slack = targets.policy.tau + 1 / 8 + FP16_SLACK
        return 1 - slack, 1 + slack
    return (1 - FP16_SLACK if isinstance(targets.policy, Random) else 0.0), 1 + FP16_SLACK


def _total_faults(manifest: Manifest) -> Iterator[str]:
    totals = manifest.totals
    for name in ("examples", "positions", "entries", "truncated"):
        found = manifest.shards.total(name)
        if found != getattr(totals, name):
            yield f"{MANIFEST_NAME}: {getattr(totals, name)} {name} in its totals, {found} in its shards"
    num_bytes = manifest.shards.total("bytes") + sum(file.bytes for file in manifest.files)
    if num_bytes != totals.bytes:
        yield f"{MANIFEST_NAME}: {totals.bytes} bytes in its totals, {num_bytes} in its shards, lists and indices"
    if len(manifest.skipped) != totals.skipped:
        yield f"{MANIFEST_NAME}: {totals.skipped} skipped rows in its totals, {len(manifest.skipped)} listed"


def _other_files(folder: Folder, manifest: Manifest, strays: Collection[str]) -> list[str]:
    """Notes about files that the manifest does not name; ``strays``: shards that no list names."""
    growing = folder.size(PLAN_NAME) is not None
    current = {file.name for file in manifest.files}
    with suppress(CacheFormatError):
        newer = load_manifest(folder)
        if newer is not None and newer != manifest:  # a capture committed meanwhile
            current |= {file.name for file in newer.files}
            strays = set(strays) - set(newer.shards.names())
    tables = [name for name in table_names(folder) if name not in current]
    temporary = folder.names(SHARDS + TEMPORARY_PREFIX) + folder.names(TEMPORARY_PREFIX)
    half_written = [name for name in temporary if is_temporary(name)]
    unknown = foreign_names(folder) + ([] if growing else sorted(strays))
    notes = [f"{PLAN_NAME} is there: a capture goes on, or was interrupted"] if growing else []
    notes += [f"{name} is left over; the next capture removes it" for name in half_written + tables]
    notes += [f"{name} is not in the manifest; readers pass it over" for name in unknown]
    return [f"{folder.where}: {note}" for note in notes]


def _of_rows(view: ShardView, fault: str, rows: np.ndarray) -> str:
    more = f" and {len(rows) - 1} more rows" if len(rows) > 1 else ""
    return f"row {int(rows[0])} (key {view.key(int(rows[0])).hex()}){more}: {fault}"
