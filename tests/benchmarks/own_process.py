"""A function in a process of its own, whose memory is given back and whose death is noticed.

found = in_own_process(function, argument, ...)
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or raises; function and arguments are pickled.

    Raises   RuntimeError  when the process ended before it answered
    Holds    the process ends with this one
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RuntimeError(
                f"{function.__qualname__}: its process was killed before it answered. The machine may lack memory"
            ) from None


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
