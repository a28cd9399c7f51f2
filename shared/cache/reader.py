"""Reading a cache: rows by key, in any order, from any number of processes.

    reader = CacheReader("caches/medpix")            # or "s3://bucket/medpix"
    answer_ids, targets = reader.read(batch.keys)

Shards are mapped, not loaded, and only a bounded number of them at a time, so memory does not grow with the
cache. A reader is sent to a data-loader worker as its location and manifest: the worker maps the files for
itself.  One reader serves one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from shared import codec
from shared.cache.format import as_buffer
from shared.cache.gains import gains_of
from shared.cache.identity import InputsIdentity
from shared.cache.index import CacheIndex, Keys, as_key_array, split_keys
from shared.cache.layout import MANIFEST_NAME
from shared.cache.manifest import Manifest, load_manifest
from shared.cache.segments import FileInfo, open_shards
from shared.cache.shard import Row, ShardView, open_shard
from shared.cache.staging import Staging
from shared.cache.storage import Folder, LocalFolder, RemoteFolder, open_folder
from shared.cache.verified import VerifiedFiles
from shared.errors import CacheFormatError, CacheMismatchError
from shared.places import did_you_mean
from shared.recipes.policies import Policy, VisualGain
from shared.sparse import SparseTargets
from shared.sparse.entropies import position_entropies

MAX_OPEN_SHARDS = 512  # each holds a file descriptor; processes often may have 1,024
MAX_MAPPED_BYTES = 256 << 20  # what streaming adds to the memory of a process, at most
OPENINGS = 10  # while others commit to the cache one after another
OF_TOKENIZERS = ("inputs.tokenizer", "inputs.template", "inputs.vocab_size")
FETCHES = 100  # of one remote file, before a copy that is gone or changed each time is given up


class CacheReader:
    """A committed cache, opened for reading.

    Raises   CacheFormatError  when there is no manifest, or one of another version, or files are damaged
    Holds    ``key in reader`` and ``len(reader)`` touch no shard; a shard's hash is checked before its
             first use
    """

    def __init__(self, location: str, *, staging: Staging | None = None, num_together: int = 1) -> None:
        """num_together  readers that share what this process may map at a time"""
        folder = open_folder(location)
        self.location = location
        self._num_together = num_together
        self.manifest = _committed(folder)
        for _ in range(OPENINGS):
            try:
                self._open(folder, staging or Staging(), VerifiedFiles())
                return
            except CacheFormatError:
                newer = _committed(folder)
                if newer == self.manifest:
                    raise
                self.manifest = newer  # a capture committed meanwhile, and the next one cleared away
        self._open(folder, staging or Staging(), VerifiedFiles())

    def _open(self, folder: Folder, staging: Staging, verified: VerifiedFiles) -> None:
        self._folder, self._staging, self._verified = folder, staging, verified
        self._shards: OrderedDict[int, ShardView] = OrderedDict()
        self._mapped_bytes = 0
        if self.manifest.format_version > 1:
            self.manifest = self.manifest.with_shards(open_shards(self.manifest.segments, self._map_table))
        self.index = CacheIndex.open(self.manifest, self._map_table, where=folder.where)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "location": self.location,
            "manifest": self.manifest.dumps(),
            "staging": self._staging,
            "verified": self._verified,
            "num_together": self._num_together,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        folder = open_folder(state["location"])
        self.location, self._num_together = state["location"], state["num_together"]
        self.manifest = Manifest.loads(state["manifest"], where=folder.where)
        self._open(folder, state["staging"], state["verified"])

    @property
    def parts(self) -> tuple[CacheReader, ...]:
        """The caches that are read: this one.  See ``shared.cache.several``."""
        return (self,)

    @property
    def where(self) -> str:
        """What opens every message."""
        return self._folder.where

    @property
    def fingerprint(self) -> str:
        """Hex, of what it holds."""
        return self.manifest.sha256

    @property
    def skipped(self) -> dict[str, str]:
        """Why rows are not in it, by the key in hex, of those whose key is known."""
        return {row.key: row.reason for row in self.manifest.skipped if row.key}

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Of all teachers whose targets it holds."""
        return (self.manifest.identity.teacher.label,)

    def teachers(self, keys: Keys) -> list[str]:
        """Of the rows of these keys, the name of each one's teacher."""
        return list(self.teacher_names) * len(keys)

    def teachers_digest(self, keys: Keys) -> str:
        """Whose targets these rows have: the fingerprint of their teacher's weights."""
        return self.manifest.identity.teacher.weights_fingerprint

    @property
    def policy(self) -> Policy:
        return self.manifest.identity.targets.policy

    @property
    def temperatures(self) -> tuple[float, ...]:
        return self.manifest.identity.targets.temperatures

    @property
    def has_label_log_prob(self) -> bool:
        """Whether rows carry the teacher's log-prob of each written token."""
        return self.manifest.identity.targets.label_log_prob

    @property
    def visual_gain(self) -> VisualGain | None:
        """What became of the pictures in the pass that rows' gains are measured against; None: they carry none."""
        return self.manifest.identity.targets.visual_gain

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, key: bytes) -> bool:
        return bool(self.index.find([key])[0] >= 0)

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """(len(keys),) bool."""
        return self.index.find(keys) >= 0

    def lacking(self, keys: Keys) -> list[tuple[CacheReader, npt.NDArray[np.int64]]]:
        """Itself and the places of the keys that are not in it; empty where there are none."""
        places = np.flatnonzero(~self.contains(keys))
        return [(self, places)] if len(places) else []

    def num_positions(self, keys: Keys, *, names: Sequence[str] = ()) -> npt.NDArray[np.int64]:
        """(len(keys),) int64, from the index alone.  Raises CacheMismatchError as :meth:`read` does."""
        return self.index.lengths(self._find(keys, names))

    def read(
        self, keys: Sequence[bytes], *, names: Sequence[str] = ()
    ) -> tuple[list[torch.Tensor], SparseTargets]:
        """The rows of these keys, in their order.

        Returns  answer_ids: one (n,) int32 tensor for each key; targets: all their positions, one after the
                 other; entropies as ``shared.sparse.entropies`` has them: exact in sum over a row
        Raises   CacheMismatchError  for a key that is not in the cache; ``names`` say which example that is
                 CacheFormatError    when a shard is damaged
        """
        rows = self.rows(keys, names=names)
        return [torch.from_numpy(row.answer_ids) for row in rows], self.targets(rows)

    def rows(self, keys: Sequence[bytes], *, names: Sequence[str] = ()) -> list[Row]:
        """The rows of these keys, their payloads not decoded.  Raises as :meth:`read` does."""
        found = self._find(keys, names)
        shards, numbers = self.index.locate(found)
        rows = [self.shard(s).row(r) for s, r in zip(shards.tolist(), numbers.tolist(), strict=True)]
        for key, length, row in zip(keys, self.index.lengths(found).tolist(), rows, strict=True):
            if row.num_positions != length:
                raise CacheFormatError(
                    f"{self._folder.where}, example {key.hex()}: {row.num_positions} answer tokens found, {length} "
                    "in the index. Run teacher-cache verify, and capture the cache again."
                )
            if row.key != key:
                raise CacheFormatError(
                    f"{self._folder.where}: where the index says {key.hex()} there is {row.key.hex()}. Run "
                    "teacher-cache verify, and capture the cache again."
                )
        return rows

    def targets(self, rows: Sequence[Row]) -> SparseTargets:
        """The rows' payloads decoded, one after the other, with their entropies."""
        targets = self._decode(rows)
        lengths = np.array([row.num_positions for row in rows], dtype=np.int64)
        sums = np.array([row.entropy_sums for row in rows], dtype=np.float64).reshape(
            len(rows), len(self.temperatures)
        )
        return replace(targets, entropy=position_entropies(targets, sums, lengths.tolist()))

    def label_log_probs(self, rows: Sequence[Row]) -> torch.Tensor:
        """The teacher's log-prob of each written token at temperature 1, (N,) fp32, one row after the other.

        Raises   CacheMismatchError  when the cache was captured without them
        """
        if not self.has_label_log_prob:
            raise CacheMismatchError(
                f"{self._folder.where}: holds no log-probs of the written tokens. Capture a cache with "
                "cache.label_log_prob: true."
            )
        found = [row.label_log_prob for row in rows if row.label_log_prob is not None]
        return torch.from_numpy(np.concatenate([np.empty(0, np.float16), *found]).astype(np.float32))

    def label_gains(self, rows: Sequence[Row]) -> torch.Tensor:
        """By how much the pictures raise the log-prob of each written token, (N,) fp32 nats, one row after the other.

        Raises   CacheMismatchError  when the cache was captured without them
                 CacheFormatError    when one is not finite
        """
        return gains_of(rows, where=self._folder.where)

    def _decode(self, rows: Sequence[Row]) -> SparseTargets:
        vocab_size = self.manifest.identity.inputs.vocab_size
        try:
            return codec.decode(
                [row.payload for row in rows],
                policy=self.policy,
                temperatures=self.temperatures,
                vocab_size=vocab_size,
                num_positions=[row.num_positions for row in rows],
                num_entries=[row.num_entries for row in rows],
            )
        except CacheFormatError as error:
            for row in rows if len(rows) > 1 else ():  # says which one it is
                self._decode([row])
            example = f", example {rows[0].key.hex()}" if rows else ""
            raise CacheFormatError(f"{self._folder.where}{example}: {error}") from error

    def shards(self, keys: Keys, *, names: Sequence[str] = ()) -> npt.NDArray[np.int64]:
        """(len(keys),), the number of each key's shard, from the index alone.  Raises as :meth:`read` does."""
        return self.index.locate(self._find(keys, names))[0]

    @property
    def num_shards(self) -> int:
        return self.manifest.num_shards

    @property
    def staging_bytes(self) -> int | None:
        """How much of a remote cache may lie on this machine at a time; None of a local one."""
        return None if isinstance(self._folder, LocalFolder) else self._staging.max_bytes

    def keys(self) -> Iterator[bytes]:
        """All keys in stored order, which reads each shard once."""
        for keys, _ in self.index.shard_columns():
            yield from split_keys(keys)

    def shard(self, number: int) -> ShardView:
        """A shard's columns, mapped; its hash is checked before its first use."""
        view = self._shards.get(number)
        if view is None:
            view = open_shard(self.shard_bytes(number), where=self._where(number))
            self._require_counts(view, number)
            self._shards[number] = view
            self._mapped_bytes += view.num_bytes
            self._close_least_recently_used()
        self._shards.move_to_end(number)
        return view

    def _require_counts(self, view: ShardView, number: int) -> None:
        """What is decoded later is bounded by what manifest and index say."""
        info = self.manifest.shards[number]
        has_optional = (view.label_gains is not None, view.label_log_probs is not None)
        found = (len(view), view.entropy_sums.shape[1], int(view.num_entries.sum()), *has_optional)
        told_optional = (self.visual_gain is not None, self.has_label_log_prob)
        told = (info.examples, len(self.temperatures), info.entries, *told_optional)
        if found != told:
            raise CacheFormatError(
                f"{self._where(number)}: (rows, temperatures, entries, label_gain, label_log_prob) {found} found, "
                f"{told} in the manifest. Run teacher-cache verify, and capture the cache again."
            )

    def shard_bytes(self, number: int) -> pa.Buffer:
        """A shard's file, mapped; its hash is checked before its first use."""
        info = self.manifest.shards[number]
        return self._map(info.name, info.sha256, info.bytes, where=self._where(number))

    def _where(self, number: int) -> str:
        return f"{self._folder.where}, shard {number:05d}"

    def require_student(
        self,
        inputs: InputsIdentity,
        *,
        temperature: float,
        policy: Policy | None = None,
        seed: int | None = None,
        temperatures: Sequence[float] | None = None,
        label_log_prob: bool = False,
        visual_gain: VisualGain | None = None,
        teacher: str | None = None,
    ) -> tuple[str, ...]:
        """Raises CacheMismatchError with all that keeps a student away; returns notices of the rest.

        teacher  the recipe's, if the inputs are made with its tokenizer, as of a student with another one
        """
        comparison = self.manifest.identity.compare_student(
            inputs,
            temperature=temperature,
            policy=policy,
            seed=seed,
            temperatures=temperatures,
            label_log_prob=label_log_prob,
            visual_gain=visual_gain,
        )
        remedy = "Use the teacher's tokenizer and template and the cache's targets, or capture another cache."
        is_another = any(line.startswith(OF_TOKENIZERS) for line in comparison.refusals)
        if is_another and teacher is not None:
            remedy = (
                f"Tokenizer and template are those of teacher.model {teacher} (and data.chat_template). Name the "
                "teacher that this cache was captured with and the cache's targets, or capture another cache."
            )
        elif is_another:
            remedy += " To train a student with another tokenizer, set student.other_vocabulary: true."
        comparison.require(where=self._folder.where, remedy=remedy)
        return comparison.notices

    def _close_least_recently_used(self) -> None:
        max_shards, max_bytes = MAX_OPEN_SHARDS // self._num_together, MAX_MAPPED_BYTES // self._num_together
        while len(self._shards) > 1 and (len(self._shards) > max_shards or self._mapped_bytes > max_bytes):
            self._mapped_bytes -= self._shards.popitem(last=False)[1].num_bytes

    def _map_table(self, file: FileInfo) -> pa.Buffer:
        """A list or an index."""
        return self._map(file.name, file.sha256, file.bytes, where=f"{self._folder.where}, {file.name}")

    def _map(self, name: str, sha256: str, num_bytes: int, *, where: str) -> pa.Buffer:
        if isinstance(self._folder, LocalFolder):
            try:
                return self._map_verified(self._folder.path / name, sha256, num_bytes, where=where)
            except FileNotFoundError as error:
                raise CacheFormatError(
                    f"{where}: {name} is missing. Run teacher-cache again: only what is missing is made again."
                ) from error
        assert isinstance(self._folder, RemoteFolder)
        tables = {file.sha256 for file in self.manifest.files}
        if sha256 not in tables:  # a table is mapped once, and every process that starts needs it
            self._staging.keep(tables)
        for _ in range(FETCHES):
            path = self._staging.fetch(self._folder, name, sha256=sha256, num_bytes=num_bytes)
            try:
                return self._map_verified(path, sha256, num_bytes, where=where)
            except FileNotFoundError:  # removed meanwhile by another process, to make room
                continue
            except CacheFormatError:  # the copy changed since it arrived whole
                path.unlink(missing_ok=True)
        raise CacheFormatError(
            f"{where}: its copy in {self._staging.folder} was lost {FETCHES} times in a row. Look after that "
            "disk, or set TEACHONCE_STAGING_BYTES higher: too many processes share too little room."
        )

    def _map_verified(self, path: Path, sha256: str, num_bytes: int, *, where: str) -> pa.Buffer:
        buffer = as_buffer(path)
        if buffer.size != num_bytes:
            raise CacheFormatError(
                f"{where}: {buffer.size} bytes found, {num_bytes} in the manifest; the file changed after it was "
                f"committed. Delete {path} and run teacher-cache again: only what is missing is made again."
            )
        self._verified.require(path, sha256, where=where)
        return buffer

    def _find(self, keys: Keys, names: Sequence[str]) -> npt.NDArray[np.int64]:
        found = self.index.find(keys)
        missing = np.flatnonzero(found < 0)
        if len(missing):
            first = int(missing[0])
            key = split_keys(as_key_array(keys)[first : first + 1])[0]
            name = f"{names[first]} " if names else ""
            others = f", nor are {len(missing) - 1} others" if len(missing) > 1 else ""
            raise CacheMismatchError(
                f"{self._folder.where}: example {name}(key {key.hex()}) is not in it{others} of "
                f"the {len(keys)} asked for. It was captured from other data, pictures, answers or another "
                "prompt: run teacher-cache with this recipe to capture what is missing."
            )
        return found


def _committed(folder: Folder) -> Manifest:
    """Raises   CacheFormatError  where there is no manifest"""
    manifest = load_manifest(folder)
    if manifest is not None:
        return manifest
    near = f" Or {hint}" if isinstance(folder, LocalFolder) and (hint := did_you_mean(folder.path)) else ""
    raise CacheFormatError(
        f"{folder.where}: no {MANIFEST_NAME}; there is no cache, or its capture did not end. Run "
        f"teacher-cache.{near}"
    )
