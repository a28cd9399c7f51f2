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
