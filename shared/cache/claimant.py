"""A process that captures, as the others see it: a file that changes as long as it lives.

    with Claimant(folder, timeout_s=180) as me:
        me.note(examples=12)          # goes out soon; ``tell`` does not wait
        me.check()                    # now and then: while nobody calls it, the process is taken to hang

Clocks of machines differ, so no time is compared with another machine's: whoever looks on measures by its own clock
for how long a file has not changed.  A process of the same machine is looked up instead.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from shared.cache.layout import CLAIM_NAME, CLAIMANT_NAME, CLAIMS, claimant_file
from shared.cache.storage import Folder, LocalFolder
from shared.errors import TeachonceError
from shared.machine import process_fields, process_is_alive, this_machine
from shared.temporaries import is_temporary, writer_is_dead

BEATS = 12  # in the time after which a silent process is taken to be dead
MAX_BEAT_S = 15.0
FRESH_S = 5.0  # facts wait for so long at most
MAX_BYTES = 1 << 16


class Claimant:
    """This process's file, written again and again by a thread until :meth:`close`.

    timeout_s  after which the others take its silence for its end
    patience_s  for how long it may do without :meth:`check`; beyond that it hangs, and the thread falls silent
    facts      for others to read from the start: ``job``, for those who ask of their own; ``plans`` of one that has
               not read yet what is finished
    """

    def __init__(self, folder: Folder, *, timeout_s: float, patience_s: float = 600.0, **facts: Any) -> None:
        host = re.sub(r"[^A-Za-z0-9-]", "", socket.gethostname())[:40] or "host"
        self.name = f"{host}.{os.getpid()}.{secrets.token_hex(4)}"
        self._folder, self._timeout_s, self._patience_s = folder, timeout_s, patience_s
        self._facts: dict[str, Any] = facts
        self._num_beats = 0
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._checked = self._written = time.monotonic()
        self._error: BaseException | None = None
        self.tell()
        self._thread = threading.Thread(target=self._beat, name="claimant", daemon=True)
        self._thread.start()

    def note(self, **facts: Any) -> None:
        """Adds facts for others to read, soon."""
        self._facts |= facts
        if time.monotonic() - self._written > FRESH_S:
            with suppress(TeachonceError, OSError):  # ``check`` raises what lasts
                self.tell()

    def tell(self, **facts: Any) -> None:
        """Adds facts for others to read, now."""
        with self._writing:
            self._facts |= facts
            self._num_beats += 1
            content = {"beat": self._num_beats, "host": socket.gethostname(), **this_process(), **self._facts}
            self._folder.publish(claimant_file(self.name), json.dumps(content).encode())
            self._written = time.monotonic()

    def check(self) -> None:
        """Says that this process goes on.

        Raises   the thread's error, where it could not write for so long that the others take over
        """
        self._checked = time.monotonic()
        if self._error is not None and self._checked - self._written > self._timeout_s:
            raise self._error

    def close(self) -> None:
        """Removes the file: this process takes no part any more."""
        self._ended.set()
        self._thread.join()
        self._folder.remove(claimant_file(self.name))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _beat(self) -> None:
        while not self._ended.wait(min(self._timeout_s / BEATS, MAX_BEAT_S)):
            if time.monotonic() - self._checked > self._patience_s:
                continue
            try:
                self.tell()
                self._error = None
            except (TeachonceError, OSError) as error:  # a storage may answer again
                self._error = error
            except BaseException as error:  # raised by ``check`` when the others have noticed the silence
                self._error = error
                return


class Onlooker:
    """Which claimants are dead, as far as can be told from here."""

    def __init__(
        self, folder: Folder, *, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._timeout_s, self._clock = folder, timeout_s, clock
        self._seen: dict[str, tuple[bytes, float]] = {}

    def is_dead(self, name: str) -> bool:
        """Whether the file is gone, or its process, or it has not changed for too long since it was first looked at.

        name  of the file
        """
        try:
            content = self._folder.read(name, max_bytes=MAX_BYTES)
        except FileNotFoundError:
            return True
        return is_gone(_facts_in(content)) or self.is_silent(name, content)

    def is_silent(self, name: str, content: bytes) -> bool:
        now = self._clock()
        before, since = self._seen.get(name, (None, now))
        if content != before:
            self._seen[name] = (content, now)
            return False
        return now - since >= self._timeout_s


def claimant_files(folder: Folder) -> list[str]:
    return [name for name in folder.names(CLAIMS) if CLAIMANT_NAME.fullmatch(name)]


def told_by_claimants(folder: Folder) -> dict[str, dict[str, Any]]:
    """What each claimant's file says, nothing where it is damaged; without those that leave meanwhile."""
    told = {}
    for name in claimant_files(folder):
        with suppress(FileNotFoundError):
            told[name] = _facts_in(folder.read(name, max_bytes=MAX_BYTES))
    return told


def somebody_at_work(folder: Folder, *, timeout_s: float) -> str | None:
    """A living claimant, as people name it; what dead ones have left is removed where there is none.

    Waits until it is clear, for ``timeout_s`` at most: claimants of other machines are dead when they are silent.
    """
    onlooker = Onlooker(folder, timeout_s=timeout_s)
    first = told_by_claimants(folder)
    while left := {
        name: facts for name, facts in told_by_claimants(folder).items() if not onlooker.is_dead(name)
    }:
        for name, facts in left.items():
            if is_here(facts) or facts != first.get(name):
                return f"process {facts.get('pid')} on {facts.get('host')}"
        time.sleep(min(1.0, timeout_s / BEATS))
    remove_claims(folder)
    return None


def somebody_may_be_at_work(folder: Folder) -> bool:
    """Whether there is a claimant that is not known to be dead; does not wait until it is clear."""
    return not all(map(is_gone, told_by_claimants(folder).values()))


def somebody_may_capture(folder: Folder) -> bool:
    """The same, of those that have read what was finished when they began."""
    told = told_by_claimants(folder).values()
    return any(not is_gone(facts) and not facts.get("plans") for facts in told)


def remove_claims_of_the_dead(folder: Folder) -> None:
    """Removes what is left in a cache where nobody captures; nothing where somebody may."""
    if not somebody_may_be_at_work(folder):
        remove_claims(folder)


def remove_claims(folder: Folder) -> None:
    """Removes all claims and claimants' files, and their folder; not what one that lives is just writing."""
    for name in folder.names(CLAIMS):
        if CLAIM_NAME.fullmatch(name) or CLAIMANT_NAME.fullmatch(name) or _is_left(folder, name):
            folder.remove(name)
    remove_empty_claims(folder)


def _is_left(folder: Folder, name: str) -> bool:
    """Whether one that has died was writing it."""
    return isinstance(folder, LocalFolder) and is_temporary(name) and writer_is_dead(folder.path / name)


def remove_empty_claims(folder: Folder) -> None:
    if isinstance(folder, LocalFolder):
        with suppress(OSError):  # others are there
            os.rmdir(folder.path / CLAIMS)


def this_process() -> dict[str, Any]:
    """What tells this process from all others, on its machine and elsewhere."""
    return {"machine": this_machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_here(facts: dict[str, Any]) -> bool:
    """Whether the process that wrote them runs on this machine."""
    return _is_of_here(facts) and _started(facts["pid"]) == facts.get("started") is not None


def is_gone(facts: dict[str, Any]) -> bool:
    """Whether the process that wrote them ran on this machine, and no longer does."""
    if not _is_of_here(facts):
        return False
    if process_fields(facts["pid"]) is None and process_is_alive(facts["pid"]):
        return False  # another user's, of which Linux may tell nothing more
    return _started(facts["pid"]) != facts.get("started")


def _facts_in(content: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _is_of_here(facts: dict[str, Any]) -> bool:
    return facts.get("machine") == this_machine() != "" and isinstance(facts.get("pid"), int)


def _started(pid: int) -> str | None:
    """When a process began, in ticks of the kernel; None for one that has ended."""
    fields = process_fields(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]
