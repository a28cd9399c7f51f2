"""A model's weight files, looked at and not loaded: whether they are whole, and whether they are the same.

    files = weight_files("models/large", None)      # None where they are not on this machine
    files.require_whole()
    files.stamp                                      # cheap: sizes, times, headers
    files.content()                                  # of every tensor's bytes, however the files are cut

A file that was never fetched (a pointer of Git LFS), was cut, or is missing is told before a library trips over it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import try_to_load_from_cache

from shared.errors import CheckpointError, RecipeError
from shared.models.adapters import PROVENANCE, SETTINGS, lineage
from shared.places import is_local
from shared.regular_files import read_regular
from shared.vouched import opened

# In the order in which Transformers looks for them; a .json names the files of a model cut into several.
NAMES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
GENERATION = "generation_config.json"
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
LFS_POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 100_000_000  # as safetensors has it
PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a model, and of the models it is an adapter of.

    missing     names that an index, or Transformers, asks for
    generation  settings of generation: where they cannot be read, Transformers goes on without them
    """

    model: str
    files: tuple[Path, ...]
    missing: tuple[Path, ...]
    generation: tuple[Path, ...] = ()

    def require_whole(self) -> None:
        """Raises   RecipeError  with every file that cannot be loaded"""
        if faults := self.faults() or self._changed():
            more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise RecipeError(
                f"model {self.model}: its files cannot be loaded: {'; '.join(faults[:3])}{more}. Fetch the "
                "files again"
            )

    def faults(self) -> list[str]:
        """One for every file that cannot be loaded."""
        faults = [f"{path}: is missing" for path in self.missing]
        faults += [f"{path}: {fault}" for path in self.files if (fault := _fault(path))]
        return faults + [f"{path}: is no JSON object" for path in self.generation if not _is_object(path)]

    def _changed(self) -> list[str]:
        """Of an export of ours, one for each file that is not what was written; reads every byte.

        Settings, tokenizer and processor among them: with one number changed they make another model.  Those of
        generation are the user's to change, and no figure depends on them.
        """
        folders = {path.parent: _exported(path.parent) for path in self.files}
        return [
            f"{folder / name}: changed since it was exported (delete {PROVENANCE} beside it to take it as it is)"
            for folder, wanted in folders.items()
            for name, sha256 in wanted.items()
            if name != GENERATION and (folder / name).is_file() and _sha256(folder / name) != sha256
        ]

    @cached_property
    def stamp(self) -> str:
        """Hex; equal as long as nobody wrote the files."""
        digest = hashlib.sha256()
        for path in self.files:
            stat = path.stat()
            with open(path, "rb") as file:
                header = file.read(min(_header_bytes(path), MAX_HEADER_BYTES))
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n".encode())
            digest.update(hashlib.sha256(header).digest())
        return digest.hexdigest()

    def content(self) -> str:
        """Hex, over names, types, shapes and bytes of all tensors, however they were cut; reads every byte."""
        digest = hashlib.sha256()
        for name, path, begin, end in sorted(self._parts()):
            digest.update(f"{name} {end - begin}\n".encode())
            with open(path, "rb") as file:
                file.seek(begin)
                _feed(digest, file, end - begin)
        return digest.hexdigest()

    def _parts(self) -> Iterator[tuple[str, str, int, int]]:
        """(what it is, file, first byte, end): each tensor of safetensors, other files as a whole."""
        for number, path in enumerate(self.files):
            if path.suffix != ".safetensors":
                yield f"{number} {path.name}", str(path), 0, path.stat().st_size
                continue
            offset = _header_bytes(path)
            for name, tensor in _header(path).items():
                begin, end = tensor["data_offsets"]
                yield f"{name} {tensor['dtype']} {tensor['shape']}", str(path), offset + begin, offset + end


def weight_files(model: str, revision: str | None) -> WeightFiles | None:
    """None where the model is not on this machine.  Raises   RecipeError  for an index that is no index"""
    files: list[Path] = []
    missing: list[Path] = []
    generation: list[Path] = []
    for name, its_revision in lineage(model, revision):
        folder = _folder(name, its_revision)
        if folder is None:
            return None
        for path in _named(folder):
            (files if path.is_file() else missing).append(path)
        if (settings := folder / GENERATION).is_file():
            generation.append(settings)
    return WeightFiles(model, tuple(files), tuple(missing), tuple(generation))


def require_whole_weights(model: str, revision: str | None) -> None:
    """Raises   RecipeError  when a local folder's weights are missing, cut or never fetched"""
    files = weight_files(model, revision)
    if files is not None and (
        files.files or is_local(model)
    ):  # the Hub's are fetched when they are asked for
        files.require_whole()


def _folder(name: str, revision: str | None) -> Path | None:
    """A local folder, or the one that the Hub's files were fetched to."""
    if Path(name).is_dir():
        return Path(name)
    if is_local(name):
        return None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # a path, and none of this machine
        return None
    return Path(found).parent if isinstance(found, str) else None


def _named(folder: Path) -> list[Path]:
    names = ADAPTER_NAMES if (folder / SETTINGS).exists() else NAMES
    first = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
    if first.suffix != ".json":
        return [first]
    try:
        index = json.loads(first.read_text(encoding="utf-8"))["weight_map"]
        return sorted({folder / name for name in index.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecipeError(f"{first}: is no index of weight files. Fetch it again") from error


def _fault(path: Path) -> str | None:
    """What is wrong with a file, or None."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        begin = file.read(len(LFS_POINTER))
    if size == 0:
        return "is empty"
    if begin == LFS_POINTER:
        return f"is a pointer of Git LFS, {size} bytes, in place of the weights (`git lfs pull` fetches them)"
    if path.suffix != ".safetensors":
        return None
    try:
        needed = _header_bytes(path) + max(
            (tensor["data_offsets"][1] for tensor in _header(path).values()), default=0
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"is no safetensors file: its header cannot be read ({size:,} bytes)"
    return (
        None if size == needed else f"has {size:,} bytes, its header says {needed:,}: it was cut or changed"
    )


def _is_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def _exported(folder: Path) -> dict[str, str]:
    """Name -> SHA-256; empty for folders of others, and of releases that did not list their files."""
    listed = (read_provenance(folder) or {}).get("sha256")
    return {str(name): str(sha256) for name, sha256 in listed.items()} if isinstance(listed, dict) else {}


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """What an export of ours says of itself; None for folders of others.

    Raises   CheckpointError  when it is damaged
    """
    path = folder / PROVENANCE
    try:
        return opened(json.loads(read_regular(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}). `train-student export` writes it again, with the files that it lists"
        ) from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header_bytes(path: Path) -> int:
    """Where the tensors begin; 0 for other kinds of files."""
    if path.suffix != ".safetensors":
        return 0
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _header(path: Path) -> dict[str, Any]:
    length = _header_bytes(path)
    if not 8 < length <= min(path.stat().st_size, MAX_HEADER_BYTES):
        raise ValueError("a header longer than the file")
    with open(path, "rb") as file:
        header = json.loads(file.read(length)[8:])
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    for tensor in tensors.values():
        begin, end = tensor["data_offsets"]
        known = isinstance(tensor["dtype"], str) and isinstance(tensor["shape"], list)
        if not known or type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
            raise ValueError("a tensor that is described otherwise")
    return tensors


def _feed(digest: Any, file: BinaryIO, length: int) -> None:
    while length > 0 and (piece := file.read(min(length, PIECE_BYTES))):
        digest.update(piece)
        length -= len(piece)
