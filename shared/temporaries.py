"""What is being written lies beside what it is to become, under a name that no other process uses.

    remove_left(path)                    # by processes that were killed
    with written_beside(path) as temporary:
        temporary.write_bytes(data)

A reader sees the old file or the new one, and of two writers the later one wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from shared.machine import process_is_alive, this_machine

TEMPORARY_PREFIX = ".tmp-"
SUFFIX = ".partial"  # so that nobody who looks for names with another one takes it for real
OLD_S = 24 * 3600.0  # what another machine has not finished by then, it does not
NAME_CHARACTERS = 64  # of what it is to become
MAX_NUMBER = 1 << 40  # of what a process writes
# A later process may have the number of one that was killed, as in containers: it begins to count elsewhere.
_FIRST = secrets.randbits(60)
_counter = itertools.count(_FIRST)


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` at the end, and is removed where something goes wrong."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        remove_temporary(temporary)
        raise


def remove_left(path: Path) -> None:
    """Removes files and folders that were to become ``path``, of processes that have died; lists its folder."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            left = path.with_name(name)
            if is_temporary(name, of=path.name) and writer_is_dead(left):
                remove_temporary(left)


def remove_temporary(path: Path) -> None:
    """A file or a folder, as far as it can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def temporary_name(name: str) -> str:
    """A name no other process uses, which says whose it is."""
    number = next(_counter)
    return f"{TEMPORARY_PREFIX}{_host()}.{os.getpid()}.{number}.{name[:NAME_CHARACTERS]}{SUFFIX}"


def is_temporary(name: str, *, of: str | None = None) -> bool:
    """Whether :func:`temporary_name` made it; of that name, if one is given."""
    end = ".*" if of is None else re.escape(of[:NAME_CHARACTERS] + SUFFIX)
    return re.fullmatch(r"\.tmp-[^.]*\.[0-9]+\.[0-9]+\." + end, name.rpartition("/")[2]) is not None


def writer_is_dead(path: Path) -> bool:
    """Whether the process of this machine that wrote it has ended; what others have left has to be old."""
    host, pid, number = path.name.removeprefix(TEMPORARY_PREFIX).split(".")[:3]
    if host == _host():
        is_reused = int(pid) == os.getpid() and not 0 <= int(number) - _FIRST < MAX_NUMBER
        return is_reused or not process_is_alive(int(pid))
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > OLD_S
    return False


def _host() -> str:
    """The machine for people, and a mark that tells it from others with the same name, as containers often have."""
    host = "".join(c for c in socket.gethostname() if c.isalnum() or c == "-")
    return f"{host}-{hashlib.sha256(this_machine().encode()).hexdigest()[:8]}"
