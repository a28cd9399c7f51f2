"""What libraries say goes into a log, so that the screen has our own lines alone; and what is for the log alone.

    with LibraryOutput.collected():           # in shared.cli.run, around every command
        ...
        keep_library_output(folder / "run.log")       # by a command that has a folder; before, it waits in memory
        ...
        quiet_libraries()                     # when the libraries are imported, and have made their handlers

Python's warnings and the libraries' log records are written with time and name, each once, by the first rank, as are
this package's own (``logging.getLogger(__name__).info``); native code writes to file descriptor 2, which is the log's
for every rank.  Bars of libraries are left out.  Without
``collected`` (in a notebook, in tests) all of this does nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

NATIVE = 2  # the file descriptor of standard error
OWN = "shared"  # the logger of this package's modules, which is read from INFO on; libraries' from WARNING on
FORMAT = "%(asctime)s %(name)s %(levelname)s: %(message)s"


class LibraryOutput:
    """Where the libraries' output goes: into an unnamed file, and from ``keep`` on into one with a name."""

    active: LibraryOutput | None = None  # of this process; what it forks inherits it

    def __init__(self) -> None:
        self._file = _unnamed_file()
        self._screen: int | None = None
        self.kept_in: Path | None = None

    @classmethod
    @contextmanager
    def collected(cls, *, native: bool = True) -> Iterator[LibraryOutput]:
        """Collects for as long as the context lasts.

        native  what native code, and programs started meanwhile, write to standard error as well; not where those
                programs are ours
        """
        output = cls()
        handler = _Handler(output)
        previous = cls.active
        cls.active = output
        logging.captureWarnings(True)
        logging.getLogger().addHandler(handler)
        logging.getLogger(OWN).setLevel(logging.INFO)
        try:
            if native:
                output._take_native()
            yield output
        finally:
            cls.active = previous
            logging.getLogger().removeHandler(handler)
            logging.getLogger(OWN).setLevel(logging.NOTSET)
            logging.captureWarnings(False)
            # The descriptor stays the log's: what native code says while the interpreter ends belongs there.

    def _take_native(self) -> None:
        """Gives ``sys.stderr`` a descriptor of its own for the screen, and the old one to the file."""
        try:
            is_plain = sys.stderr.fileno() == NATIVE
        except (AttributeError, OSError):
            is_plain = False
        if not is_plain:  # somebody else has taken it already, as a notebook does
            return
        sys.stderr.flush()
        self._screen = os.dup(NATIVE)
        sys.stderr = os.fdopen(
            self._screen, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors
        )
        os.dup2(self._file.fileno(), NATIVE)
        sys.unraisablehook = self._unraisable

    def _unraisable(self, found: Any) -> None:
        """Of an object that could not be put away, which nobody can catch: often a half-made one, after its error."""
        with contextlib.suppress(Exception):
            told = "".join(traceback.format_exception_only(found.exc_value))
            self.write(f"{found.err_msg or 'Exception ignored in'}: {found.object!r}\n{told}")

    def keep(self, path: Path) -> None:
        """From here on into this file, and what was collected before, too.  All ranks of a machine may share it."""
        if path == self.kept_in:
            return
        with contextlib.suppress(OSError):  # the disk is full, or not ours: no reason to end a command
            file = open(path, "ab", buffering=0, opener=_without_waiting)  # noqa: SIM115
            file.write(self.text().encode())
            self._file, self.kept_in = file, path
            if self._screen is not None:
                os.dup2(file.fileno(), NATIVE)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._file.write(text.encode("utf-8", errors="replace"))

    def text(self) -> str:
        """What was collected so far and is in no file with a name yet."""
        if self.kept_in is not None:
            return ""
        end = self._file.seek(0, os.SEEK_END)
        return os.pread(self._file.fileno(), end, 0).decode("utf-8", errors="replace")


class _Handler(logging.Handler):
    """Log records of all libraries, warnings among them: each once, and of the first rank, which speaks for all."""

    def __init__(self, output: LibraryOutput) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(FORMAT))
        self._output = output
        self._seen: set[tuple[str, str]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        said = (record.name, record.getMessage())
        if said in self._seen or (record.levelno < logging.ERROR and os.environ.get("RANK", "0") != "0"):
            return
        self._seen.add(said)
        self._output.write(self.format(record) + "\n")


def _unnamed_file() -> IO[bytes]:
    """For as long as the process; in memory where there can be such files, as a disk may be full or not ours."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("teachonce"), "w+b", buffering=0)
    return tempfile.TemporaryFile("w+b", buffering=0)


def _without_waiting(path: str, flags: int) -> int:
    """To open a pipe for writing would wait for who reads from it."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def keep_library_output(path: Path) -> None:
    """Where a command collects what libraries say: in this file from here on."""
    if LibraryOutput.active is not None:
        LibraryOutput.active.keep(path)
        quiet_libraries()


def quiet_libraries() -> None:
    """Takes from the libraries that are imported by now their handlers for the screen, and their bars."""
    if LibraryOutput.active is None:
        return
    for logger in [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]:
        for handler in [one for one in logger.handlers if _is_for_the_screen(one)]:
            logger.removeHandler(handler)
            logger.propagate = True
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if "datasets" in sys.modules:
        from datasets import disable_progress_bars

        disable_progress_bars()


def _is_for_the_screen(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
