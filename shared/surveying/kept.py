"""Parts of a survey, kept where the next start finds them.

    kept = Kept.of("caches/.survey", split, processor, decode=False)
    batch = kept.read(part)         # None: to be looked at
    kept.write(part, batch)         # what keeps it from being kept, or None

One Arrow file a part, and its SHA-256 behind it: what was cut or has a flipped bit is not taken.  A file's name and
metadata say what it was found of: the data file's path and content, and all else that a key or a length depends on.
Files are written under another name and renamed, so two processes at once do no harm.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from shared.cache.arrow_file import open_uncompressed
from shared.cache.format import first_line
from shared.cache.storage import Folder, LocalFolder, RemoteFolder, open_folder
from shared.data.copies import Stamp
from shared.data.fingerprints import digest
from shared.data.processing import ExampleProcessor
from shared.data.rows import VqaSplit
from shared.errors import CacheFormatError
from shared.surveying.found import SCHEMA
from shared.surveying.parts import Part

VERSION = 4  # of what is kept, and of how rows are read; another one is surveyed again
FOLDER = ".survey"
METADATA = b"teachonce survey"
MAX_BYTES = 1 << 30
DIGEST_BYTES = 32  # SHA-256
# Settings that change nothing that is found of a row, or that the processor's fingerprints hold.
NOT_OF_ROWS = {
    *(
        "source",
        "written",
        "revision",
        "config",
        "splits",
        "limit",
        "max_dropped",
        "max_answer_tokens",
        "system_prompt",
    ),
    *("date", "chat_template", "background", "min_pixels", "max_pixels"),
}
LIBRARIES = ("teachonce", "transformers", "tokenizers", "pillow", "pyarrow")


def place_beside(location: str) -> str:
    """The folder of surveys beside a cache or a folder of runs, at a path or URL."""
    if "://" not in location:
        return str(Path(location).absolute().parent / FOLDER)
    protocol, _, path = location.rstrip("/").partition("://")
    above = path.rpartition("/")[0] or path  # a bucket has nothing beside it
    return f"{protocol}://{above}/{FOLDER}"


@dataclass
class Kept:
    """Where what is found of one split is kept; with ``location`` None nowhere.  Picklable.

    settings  hex, over all that decides what is found of a row, beside the row
    damaged   what is wrong with files that were kept
    """

    location: str | None
    settings: str
    split: VqaSplit
    damaged: list[str] = field(default_factory=list)
    _refusal: str | None = None
    _tidied: set[Path] = field(default_factory=set, repr=False)
    _contents: dict[Path | None, str | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, location: str | None, split: VqaSplit, processor: ExampleProcessor, *, decode: bool) -> Kept:
        return cls(location, settings_of(split, processor, decode=decode), split)

    def read(self, part: Part) -> pa.RecordBatch | None:
        """What was found of the part; None where it is not there, is damaged, or pictures have changed since."""
        place = self._place(part)
        if place is None:
            return None
        folder, name, told = place
        try:
            batch = decoded(folder.read(name, max_bytes=MAX_BYTES))
            if batch.schema.metadata != told or batch.num_rows != part.num_rows:
                raise ValueError("it was found of other rows")
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None
        except (OSError, ValueError, pa.ArrowException) as error:
            if isinstance(error, CacheFormatError) and isinstance(folder, RemoteFolder):
                self._give_up(error)  # a storage that does not answer takes minutes to say so each time
            else:
                self.damaged.append(f"{folder.where}, {name}: {first_line(error)}")
            return None
        return batch if self._has_the_same_pictures(part, batch) else None

    def write(self, part: Part, batch: pa.RecordBatch) -> str | None:
        """Keeps what was found of a part; returns the reason where it cannot."""
        place = self._place(part)
        if place is not None and part.file.is_unchanged():
            folder, name, told = place
            try:
                self._remove_what_killed_writers_left(folder)
                folder.publish(name, encoded(batch.replace_schema_metadata(told)))
            except (OSError, CacheFormatError) as error:
                self._give_up(error)
        return self._refusal

    def _remove_what_killed_writers_left(self, folder: Folder) -> None:
        if isinstance(folder, LocalFolder) and folder.path not in self._tidied:
            self._tidied.add(folder.path)
            folder.remove_temporaries(alive_too=False)

    def _give_up(self, error: Exception) -> None:
        """One refusal is enough."""
        self.location, self._refusal = None, str(error)

    def _place(self, part: Part) -> tuple[Folder, str, dict[bytes, bytes]] | None:
        """The folder, the name in it, and what the file's metadata must say; None where nothing can be kept."""
        content = self._content(part)
        if self.location is None or content is None:
            return None
        path = self.split.source if part.file.path is None else os.path.abspath(part.file.path)
        below = self.split.rows.folder_of(part.first)
        told = {
            "version": VERSION,
            "settings": self.settings,
            "path": _as_text(path),
            "folder": None if below is None else _as_text(os.path.abspath(below)),
            "content": content,
            "rows": [part.begin, part.end],
        }
        place = digest([told["path"], told["folder"]])
        folder = open_folder(f"{self.location}/{self.settings[:16]}/{place[:16]}")
        folder.where = f"survey {folder.where.removeprefix('cache ')}"
        name = f"{content[:16]}-{part.begin}-{part.end}.arrow"
        return folder, name, {METADATA: json.dumps(told, sort_keys=True).encode()}

    def _content(self, part: Part) -> str | None:
        if part.file.path not in self._contents:
            self._contents[part.file.path] = part.file.content()
        return self._contents[part.file.path]

    def _has_the_same_pictures(self, part: Part, batch: pa.RecordBatch) -> bool:
        files = batch.column("files").flatten()
        if not len(files):
            return True
        folder = os.fsencode(self.split.rows.folder_of(part.first) or Path())
        stamps = np.stack(
            [files.field(name).to_numpy() for name in ("bytes", "modified_ns", "changed_ns")], axis=1
        )
        paths = files.field("path").to_pylist()
        return all(
            _stamp(os.path.join(folder, path)) == stamp
            for path, stamp in zip(paths, stamps.tolist(), strict=True)
        )


def settings_of(split: VqaSplit, processor: ExampleProcessor, *, decode: bool) -> str:
    """Hex, over all that decides what is found of a row, beside the row."""
    return digest(
        {
            "version": VERSION,
            "libraries": {name: _version(name) for name in LIBRARIES},
            "data": split.settings.model_dump(mode="json", exclude=NOT_OF_ROWS),
            "forms": split.forms,
            "columns": split.columns,
            "pictures": split.pictures,
            "prompt": processor.prompt_fingerprint,
            "template": processor.template_fingerprint,
            "rendered": processor.rendered,
            "decode": decode,
        }
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def encoded(batch: pa.RecordBatch) -> bytes:
    """An Arrow file, and its SHA-256."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as stream:
        stream.write_batch(batch)
    data = sink.getvalue().to_pybytes()
    return bytes(data + hashlib.sha256(data).digest())


def decoded(data: bytes) -> pa.RecordBatch:
    """Raises   ValueError, OSError or an error of Arrow's  when these are not the bytes of ``encoded``"""
    body = memoryview(data)[:-DIGEST_BYTES]
    if hashlib.sha256(body).digest() != data[-DIGEST_BYTES:]:
        raise ValueError("its sha256 differs from the one at its end")
    with open_uncompressed(pa.py_buffer(body), where="what was kept") as stream:
        batch = stream.get_batch(0)
    if not batch.schema.equals(SCHEMA):
        raise ValueError("its columns are not those of a survey")
    batch.validate(full=True)
    return batch


def _stamp(path: bytes) -> list[int] | None:
    try:
        found = Stamp.of_status(os.stat(path))
    except OSError:
        return None
    return [found.num_bytes, found.modified_ns, found.changed_ns]


def _as_text(path: str) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")
