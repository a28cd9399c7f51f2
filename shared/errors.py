"""The errors a user can cause and mend.

Each message says, in one or two sentences, where it happened, what was found, what was needed and what to
do about it.  The command lines print such an error as one message and leave with its ``exit_status``;
everything else is our own mistake and keeps its traceback.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

_ADDRESS = re.compile(
    r" at 0x[0-9a-fA-F]+(?=>)"
)  # of an object, as Python shows it: <_io.BytesIO object at 0x7f...>
# As torch says it: of the host, a thread's stack, C++ at large; of libraries of kernels (oneDNN, cuBLAS, cuDNN);
# of CUDA, its driver, Triton, and NCCL; of a GPU too full for cuBLAS to begin.
OUT_OF_MEMORY = (
    *("can't allocate memory", "can't start new thread", "Resource temporarily unavailable", "bad_alloc"),
    *("could not create a primitive", "could not execute a primitive", "ALLOC_FAILED", "ALLOCATION_FAILED"),
    *("CUDA out of memory", ": out of memory", "'out of memory'"),
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
)
# As gloo and its store say that another process of the job is gone, and that one has not come.
LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "Broken pipe",
)
NEVER_CAME = (
    "socket has timed out",
    "waiting for clients",
    "wait timeout after",
    "Connect timeout",
    "Connection refused",
)
MAX_TEXT, MAX_LINES = 200, 10  # of what a message quotes


class TeachonceError(ValueError):
    """Base of all errors whose message is meant for the user.

    Messages are kept, as reasons for rows left out, so the same fault must have the same message in every process:
    addresses of objects, which libraries put into theirs, are taken out.  And they must be Unicode: half of a
    surrogate pair, as a file's name may hold, is written as an escape.
    """

    exit_status = 1

    def __init__(self, message: str) -> None:
        super().__init__(_ADDRESS.sub("", message).encode(errors="backslashreplace").decode())


class RecipeError(TeachonceError):
    """A recipe, or a setting given on the command line, is wrong."""

    exit_status = 3


class DataError(TeachonceError):
    """A data set cannot be opened, or one of its rows cannot be used."""

    exit_status = 4


class CacheFormatError(TeachonceError):
    """A cache is damaged, incomplete, or of another format version."""

    exit_status = 5


class CacheMismatchError(TeachonceError):
    """A sound cache does not belong to this teacher, student, data set or recipe."""

    exit_status = 6


class CheckpointError(TeachonceError):
    """A checkpoint is damaged, missing, or belongs to another run."""

    exit_status = 7


class TrainingError(TeachonceError):
    """Training cannot go on: a loss or gradient that is not finite, or memory that does not suffice."""

    exit_status = 8


class HubError(TeachonceError):
    """The Hugging Face Hub refuses, or cannot be reached."""

    exit_status = 9


class FileError(TeachonceError):
    """A file or folder cannot be read or written, whatever is in it."""

    exit_status = os.EX_IOERR


class NotAFileError(TeachonceError):
    """In a file's place there is a named pipe, a device, a socket or a folder."""

    exit_status = os.EX_IOERR


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device or of the host, which torch tells in different types and words."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or any(words in str(error) for words in OUT_OF_MEMORY)


def shortened(text: str) -> str:
    """A text of the user's as a message may quote it."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT // 2]}...{text[-MAX_TEXT // 4 :]}"


def listed(lines: Sequence[str]) -> str:
    """One line for each; of many the first, and how many more there are."""
    shown = [f"  - {line}" for line in lines[:MAX_LINES]]
    more = [f"  ... and {len(lines) - MAX_LINES:,} more"] if len(lines) > MAX_LINES else []
    return "\n".join([*shown, *more])
