"""Stopping in order: the first SIGTERM or Ctrl-C asks, the second ends the process at once.

Who stops a job often signals each of its processes, and launchers hand on what they get.  So SIGTERMs that come
together are one.

    with stop_on_signals() as stop:
        for step in steps:
            if stop.received:
                save()
                return INTERRUPTED_STATUS

Before a process listens so, and after it, it has nothing to save: a signal ends it at once.  If its command goes on
where it was stopped, SIGTERM is a stop in order then too (``stopped_while_starting``; of ranks the launcher says so).

Nothing here imports torch, so that a program can listen before it loads what takes seconds.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.runtime import World

INTERRUPTED_STATUS = (
    75  # EX_TEMPFAIL: stopped in order, after saving; ``command_to_go_on`` goes on from there
)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
GO_ON = "TEACHONCE_GO_ON"  # what the user typed, where that is not this process's own command line
# Where a machine's first rank leaves its exit status, of which torchrun says nothing.  An empty file: the rank has
# something to save.  No file: it has not.
STATUS_FILE = "TEACHONCE_STATUS_FILE"
SAME_REQUEST_S = 2.0  # after the first SIGTERM, others are the same one, handed on
NOTHING_TO_SAVE = "stopped before there was anything to save. The same command goes on"


@dataclass
class StopRequest:
    """Whether the process has been asked to stop; false until a signal arrives."""

    received: bool = False

    def agreed(self, world: World) -> bool:
        """Whether any rank has been asked: the same answer on all ranks, which must all call this."""
        return world.any(self.received)


@contextmanager
def stop_on_signals(*, before_death: Callable[[], None] = lambda: None) -> Iterator[StopRequest]:
    """The first signal asks for an orderly stop, the second ends the process at once; SIGTERMs within
    ``SAME_REQUEST_S`` are one.

    before_death  called by the second one: for processes that have to end with this one
    """
    request = StopRequest()
    asked: list[tuple[int, float]] = []  # the first signal to this process; another rank's may come before it

    def on_signal(number: int, frame: FrameType | None) -> None:
        request.received = True
        now_s = time.monotonic()
        if not asked:
            asked.append((number, now_s))
            return
        first, begin_s = asked[0]
        if number == first == signal.SIGTERM and now_s - begin_s < SAME_REQUEST_S:
            return
        before_death()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    with restored_handlers():
        for number in SIGNALS:
            signal.signal(number, on_signal)
        _note(has_work=True)
        yield request
        _note(has_work=False)


@contextmanager
def stopped_while_starting(*, goes_on: bool) -> Iterator[None]:
    """What SIGTERM means where ``stop_on_signals`` does not listen: it ends a command that goes on with status 75.

    A rank keeps the signal's own meaning, which ends it inside torch too, where it waits for ranks that do not come.

    goes_on  whether the command, when it is called again, does what is left
    """
    own = os.getpid()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # forked: it is no command
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        with suppress(OSError):
            os.write(1, f"{NOTHING_TO_SAVE}\n".encode())
        os._exit(INTERRUPTED_STATUS)  # an import, in whose middle an exception would come up, may swallow it

    with restored_handlers():
        if not goes_on:
            _note(has_work=True)
        elif "RANK" not in os.environ and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, on_signal)
        yield


@contextmanager
def restored_handlers() -> Iterator[None]:
    """Puts back what answered the signals before, whoever took them over meanwhile."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_status(status: int) -> None:
    """For who has started this process by torchrun; that of this machine's first rank counts."""
    if (file := _status_file()) is not None:
        with suppress(OSError):  # without it the launcher knows the signal
            file.write_text(str(status), encoding="ascii")


def _note(*, has_work: bool) -> None:
    """For who has started this process by torchrun: whether it loses something when it ends without a status."""
    if (file := _status_file()) is not None:
        with suppress(OSError):
            file.touch() if has_work else file.unlink()


def _status_file() -> Path | None:
    """None but for a machine's first rank."""
    is_first = STATUS_FILE in os.environ and os.environ.get("LOCAL_RANK") == "0"
    return Path(os.environ[STATUS_FILE]) if is_first else None


def status_left_in(path: Path) -> int | None:
    """None where the first rank has not come to its end."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return None


def command_to_go_on(*, resume: bool) -> str:
    """The command line that does what is left, for messages.

    resume  whether a run is to go on, which a command has to say
    """
    if GO_ON in os.environ:
        return os.environ[GO_ON]
    asks = resume and "--resume" not in sys.argv
    if "RANK" in os.environ:  # of torchrun's own arguments nothing is known here
        return "the same torchrun command" + (" with --resume" if asks else "")
    program = Path(sys.argv[0])
    is_module = program.name == "__main__.py"
    called = [python_as_called(), "-m", program.parent.name] if is_module else [_as_called(sys.argv[0])]
    return shlex.join([*called, *sys.argv[1:], *(["--resume"] if asks else [])])


def python_as_called() -> str:
    """This Python, so that a shell in this folder finds it again."""
    typed = sys.orig_argv[0]
    is_this = os.path.dirname(typed) and os.path.abspath(typed) == os.path.abspath(sys.executable)
    return _as_called(typed if is_this else sys.executable)


def _as_called(program: str) -> str:
    """Its name where a shell finds it by that; else its path: an environment is often not activated."""
    name = os.path.basename(program)
    found = shutil.which(name)
    return name if found and os.path.abspath(found) == os.path.abspath(program) else program
