"""Which machine this is: a process number, or a file of a local disk, means something on one alone."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


@cache
def this_machine() -> str:
    """This boot of this machine, and the space of its process numbers, which a container has of its own.

    Empty where the system does not tell.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_is_alive(pid: int) -> bool:
    """Whether a process of this machine runs under that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    fields = process_fields(pid)
    return fields is None or fields[0] not in "ZX"


def process_fields(pid: int) -> list[str] | None:
    """What Linux tells of a process: its state (Z: it has ended, and its parent has not looked), ...; see proc(5).

    None where there is none, and where Linux does not tell of those of other users.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()
