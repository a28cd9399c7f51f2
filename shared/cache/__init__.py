"""The teacher cache: a folder of Arrow shards, lists and indices of them, and a manifest written last.

docs/cache-format.md is its specification.

Writing (stage one).  ``location`` is a path or any fsspec URL; the first process opens, the others join::

    CacheWriter.open(location, identity: Identity, *, created_by: Mapping[str, str]) -> CacheWriter
    CacheWriter.join(location, identity, *, created_by=None) -> CacheWriter
    writer.manifest                 the committed Manifest that grows, or None
    writer.stored_plan()            -> Plan | None    an interrupted capture's, or the opening process's, plan
    writer.plan(Wanted.of(keys, rows) or (key, row number) pairs, *, examples_per_shard, skipped=()) -> Plan
    plan.units                      tuple[Unit]: unit_id, keys (tuple of bytes), rows (n,) int64, len()
    plan.skipped, plan.duplicates, plan.num_examples
    writer.is_finished(unit)        -> bool           reads and hashes the shard
    writer.num_skipped(unit)        -> int | None     the same: the examples that it leaves out
    with writer.unit(unit) as shard: shard.add(Row(...)); shard.skip(key, row="train[17]", reason="...")
    with Claims(folder, units, timeout_s=...) as claims: ...      who does which unit; see shared.cache.claims
    with writer.locked(): ...       for log and commit, where the writer has joined
    writer.log(event, **facts)      a line of log.jsonl; by one process at a time
    writer.commit(plan, *, settle_s=0.0, max_skipped=None) -> Manifest
    writer.require_committed(plan, *, settle_s=0.0)   by whichever process
    writer.close()                  or use the writer as a context manager

    Row(key, answer_ids (n,) int32, num_entries, ce_sum, entropy_sums (T,) float64, payload, truncated=False,
        label_log_prob=None or (n,) fp16, label_gain=None or (n,) fp16)
                                    the sums are stored as float32
    Identity(teacher=TeacherIdentity(name, revision, weights_fingerprint, dtype),
             inputs=InputsIdentity(tokenizer_fingerprint, template_fingerprint, image_processor_fingerprint,
                                   vocab_size, max_answer_tokens),
             targets=TargetsIdentity.of_capture(policy, temperatures=temperatures, seed=seed),
             data=(DataSource(name, split, fingerprint, rows), ...))
    SkippedRow(row="train[17]", reason="...", key=None or hex)

Reading (stage two)::

    CacheReader(location, *, staging: Staging | None = None)      picklable; one thread each
    reader.manifest                .sha256 names the cache; .identity, .shards, .skipped, .totals, .created_by
    reader.manifest.shards          a sequence whose entries are made when asked for; .column("bytes"), .names()
    reader.policy, reader.temperatures, len(reader), key in reader
    reader.contains(keys)           -> (n,) bool
    reader.num_positions(keys, *, names=()) -> (n,) int64, from the index alone
    reader.read(keys, *, names=())  -> (list of (n,) int32 tensors, SparseTargets)
    reader.rows(keys, *, names=())  -> list[Row]      with ce_sum and entropy_sums; targets not decoded
    reader.targets(rows)            -> SparseTargets  of such rows
    reader.has_label_log_prob, reader.label_log_probs(rows) -> (N,) fp32
    reader.visual_gain              "blurred", "removed" or None;  reader.label_gains(rows) -> (N,) fp32
    reader.keys()                   all keys in stored order
    reader.require_student(inputs: InputsIdentity, *, temperature, policy=None, seed=None, temperatures=None,
                            label_log_prob=False, visual_gain=None, teacher=None)   -> notices
    reader.parts, reader.fingerprint, reader.skipped, reader.lacking(keys), reader.teachers(keys)
    CacheList(locations, *, duplicates="refuse", teachers="one")    the same, of caches of different rows
    CacheMix(locations, *, weights=None)    the same, of caches of the same rows; targets(rows) -> MixedTargets
    open_caches(recipe.cache)       -> Cache          one of the three
    Staging(folder=None, *, max_bytes=None)   local copies of a remote cache; TEACHONCE_STAGING[_BYTES]

Tools, each in the module of its name::

    verify(location, *, sample=None, seed=0, on_shard=None) -> Verification(faults, notes, ...)
    merge(sources, out, *, created_by) -> Manifest
    export(reader, out, *, on_shard=None) -> number of rows                    a folder of Parquet files
    inspect(reader, *, sampled_rows=2048) -> dict of plain JSON types

Errors: ``CacheFormatError`` (damaged, incomplete, another version, no space), ``CacheBusyError`` (of these:
another capture is at work), ``CacheMismatchError`` (a sound cache of something else).
"""

from shared.cache.cache_list import CacheList
from shared.cache.cache_mix import CacheMix, MixedRow
from shared.cache.claims import Claims
from shared.cache.identity import (
    Comparison,
    DataSource,
    Identity,
    InputsIdentity,
    PromptIdentity,
    TargetsIdentity,
    TeacherIdentity,
)
from shared.cache.lock import CacheBusyError
from shared.cache.manifest import Manifest, SkippedRow
from shared.cache.plan import Plan, Unit
from shared.cache.planning import Wanted
from shared.cache.reader import CacheReader
from shared.cache.several import Cache, open_caches
from shared.cache.shard import Row
from shared.cache.staging import Staging
from shared.cache.writer import CacheWriter

__all__ = [
    "Cache",
    "CacheBusyError",
    "CacheList",
    "CacheMix",
    "CacheReader",
    "CacheWriter",
    "Claims",
    "Comparison",
    "DataSource",
    "Identity",
    "InputsIdentity",
    "Manifest",
    "MixedRow",
    "Plan",
    "PromptIdentity",
    "Row",
    "SkippedRow",
    "Staging",
    "TargetsIdentity",
    "TeacherIdentity",
    "Unit",
    "Wanted",
    "open_caches",
]
