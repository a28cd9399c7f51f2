"""A function in a process of its own: its answer, its errors, and deaths on either side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.own_process import in_own_process


def test_the_answer_comes_from_another_process() -> None:
    assert in_own_process(os.getpid) != os.getpid()


def test_an_error_is_raised_here() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        in_own_process(os.listdir, "nowhere")


def test_a_killed_process_is_one_error_and_no_wait() -> None:
    with pytest.raises(RuntimeError, match="raise_signal: its process was killed before it answered"):
        in_own_process(signal.raise_signal, signal.SIGKILL)


def test_the_process_ends_with_the_one_that_started_it() -> None:
    """A pipe is at its end when the last process that could write has ended."""
    work = "print('begun', flush=True) or __import__('time').sleep(300)"
    code = f"from tests.benchmarks.own_process import in_own_process; in_own_process(eval, {work!r})"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.kill()
        assert process.stdout.read() == ""
