"""Reads the files of torch.distributed.checkpoint without running anything that is in them.

    dcp.load(state, storage_reader=CheckpointReader(folder, files=names))

Where tensors lie is a pickle, ``.metadata``, and a pickle runs whatever its writer wishes.  A run's folder may come
from a stranger, who writes its hashes too.  Here that pickle may name the few classes that describe tensors and
nothing else; entries that are no tensors, which torch would unpickle without limits, are refused, and so is a place
outside the checkpoint.  The tensors themselves torch reads with ``weights_only=True``.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_DESCRIBING = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},  # looks a layout up by its name
    "torch": {"Size"},  # and the dtypes
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},  # Python 3.13
    "collections": {"OrderedDict"},
}
METADATA = ".metadata"


class CheckpointReader(dcp.FileSystemReader):
    """A reader of one folder.

    files   names that tensors may lie in
    """

    def __init__(self, folder: Path, *, files: Collection[str]) -> None:
        super().__init__(folder)
        self._folder = folder
        self._files = frozenset(files)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises   ValueError  when the folder describes anything but tensors in its own files"""
        with open(self._folder / METADATA, "rb") as file:
            metadata = _unpickled(file)
        self._require_tensors(metadata)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _require_tensors(self, metadata: Any) -> None:
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError(f"{METADATA} describes no tensors")
        for name, described in metadata.state_dict_metadata.items():
            if not isinstance(described, TensorStorageMetadata):
                raise ValueError(
                    f"{METADATA} says that {name} is a {type(described).__name__}; only tensors are read"
                )
        for place in metadata.storage_data.values():
            if place.relative_path not in self._files or getattr(place, "transform_descriptors", None):
                raise ValueError(
                    f"{METADATA} points to {place.relative_path!r}, which is no file of the checkpoint"
                )


def _unpickled(file: BinaryIO) -> Any:
    try:
        return _Describing(file).load()
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # what is no such pickle fails in ways of its own
        raise ValueError(f"{METADATA} cannot be read ({type(error).__name__}: {error})") from error


def _member(kind: Any, name: str) -> Any:
    """``getattr`` of an enum's members alone."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"{METADATA} asks for {name} of {kind}, which is no member of an enum")
    return kind[name]


class _Describing(pickle.Unpickler):
    """Unpickles descriptions of tensors alone."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _DESCRIBING.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # as Python 3.11.0 to 3.11.3 write a member of an enum
            return _member
        raise pickle.UnpicklingError(
            f"{METADATA} asks for {module}.{name}, which no description of tensors needs; it was not run"
        )
