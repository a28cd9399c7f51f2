"""The first SIGTERM asks, the second one ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from typing import Any

from shared.runtime import stop_on_sigterm

FORK = multiprocessing.get_context("fork")


def _work_until_asked(ready: Any, asked: Any) -> None:
    """Goes on for a minute after it was asked to stop, as a step of a large model would."""
    with stop_on_sigterm() as stop:
        ready.set()
        while not stop.received:
            time.sleep(0.01)
        asked.set()
        time.sleep(60)


def test_a_second_sigterm_ends_the_process_at_once() -> None:
    ready, asked = FORK.Event(), FORK.Event()
    process = FORK.Process(target=_work_until_asked, args=(ready, asked))
    process.start()
    assert ready.wait(30)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert asked.wait(30)
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=30)
    assert process.exitcode == -signal.SIGTERM


def test_the_handler_of_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        assert signal.getsignal(signal.SIGTERM) != before
        assert not stop.received
    assert signal.getsignal(signal.SIGTERM) == before
