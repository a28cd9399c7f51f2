"""What the two command lines have in common: options, and how errors leave the program."""

from __future__ import annotations

import codecs
import contextlib
import errno
import gc
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shared.errors import (
    LOST_CONNECTION,
    NEVER_CAME,
    RecipeError,
    TeachonceError,
    TrainingError,
    is_out_of_memory,
    shortened,
)
from shared.library_output import LibraryOutput, quiet_libraries
from shared.stopping import leave_status, stopped_while_starting
from shared.threads import set_threads

if TYPE_CHECKING:
    from shared.recipes import Recipe


class HomePath(click.Path):
    """A path in which ``~`` is the home folder; shells do not see it in ``--out=~/page.html``.

    Raises   RecipeError  for a URL, which would become a local folder of that name
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in os.fspath(value):
            raise RecipeError(f"{value}: a local path is needed. Name one, and copy it there afterwards")
        return super().convert(os.path.expanduser(value), param, ctx)


class PagePath(HomePath):
    """Of a page to be written: a file of another kind, as a forgotten last argument names it, is not written over."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if path.suffix.lower() not in (".html", ".htm"):
            self.fail(f"{path}: name the page that is to be written, as page.html.", param, ctx)
        return path


class Place(click.ParamType):
    """A path or something else, as a string: the URL of a cache, the name of a model."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return os.path.expanduser(value)


FILE = HomePath(path_type=Path, dir_okay=False)  # to be written
PAGE = PagePath(path_type=Path, dir_okay=False)
FOLDER = HomePath(path_type=Path, file_okay=False)  # to write into
PATH = HomePath(path_type=Path)
PLACE = Place()
# What is wrong with a disk, or with the network that it is behind.
OF_DISKS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.ESTALE, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT),
    getattr(errno, "EREMOTEIO", errno.EIO),  # Linux alone has it
}
# And with a place that the user named.
OF_FILES = OF_DISKS | {
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(
        errno.ENOTEMPTY,
        errno.EACCES,
        errno.EPERM,
        errno.ENXIO,
        errno.ENODEV,
        errno.EBUSY,
        errno.ETXTBSY,
        errno.ENOTCONN,
    ),
    *(errno.EMFILE, errno.ENFILE),
}
# Objects made, less those freed, before Python looks for garbage.  With its own 700 it does so a thousand times while
# libraries are imported, finds nothing, and a start takes a tenth longer.
GARBAGE_THRESHOLD = 20_000
OUT_OF_MEMORY = (
    "the memory does not suffice. Take a smaller model, smaller batches (cache.batch_tokens, "
    "optimization.microbatch_tokens, evaluation.batch_size, data.max_pixels), or more ranks"
)
PATIENCE_S = 5.0
EXIT_STATUS = "exit_status"  # in the file that torchrun reads of a rank that fails
Function = TypeVar("Function", bound=Callable[..., Any])


def recipe_arguments(function: Function) -> Function:
    """RECIPE, a name or a file, and any number of ``--set section.key=value``."""
    function = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Override one key of the recipe; may be given many times.",
    )(function)
    return click.argument("recipe")(function)


def resume_options(function: Function) -> Function:
    """``--resume`` and ``--accept-data-change``, of a command that trains."""
    function = click.option(
        "--accept-data-change",
        is_flag=True,
        help="With --resume: although rows of later steps, or of the validation split, have changed.",
    )(function)
    return click.option("--resume", is_flag=True, help="Go on with the run of this name where it stopped.")(
        function
    )


def require_resume(resume: bool, accept_data_change: bool) -> None:
    """Raises   UsageError  for --accept-data-change without --resume"""
    if accept_data_change and not resume:
        raise click.UsageError("--accept-data-change goes with --resume")


def version_option(function: Function) -> Function:
    """``--version``, which prints the command's name and the package's version."""
    message = "%(prog)s (%(package)s) %(version)s"
    return click.version_option(package_name="teachonce", message=message)(function)


def load_recipe(name: str, *, overrides: tuple[str, ...] = ()) -> Recipe:
    """``shared.recipes.load_recipe``, imported where a command is at work: what answers Ctrl-C is there by then."""
    from shared.recipes import load_recipe as load

    return load(name, overrides=overrides)


def screen_has_unicode() -> bool:
    """Whether standard output takes every character as it is."""
    return codecs.lookup(sys.stdout.encoding or "utf-8").name.startswith("utf")


def run(group: click.Command, *, goes_on: Collection[str] = (), starts_ours: bool = False) -> None:
    """Runs a command line; a user's error is one message and a status of its own, not a traceback.

    goes_on      names of commands that do what is left when they are called again
    starts_ours  the command starts programs of ours, which have the screen as well
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a screen that lacks a character ends no command
    with (
        stopped_while_starting(goes_on=any(name in goes_on for name in sys.argv[1:2])),
        LibraryOutput.collected(native=not starts_ours) as output,
    ):
        status = _status(group, output)
    leave_status(status)
    sys.exit(status)


def _status(group: click.Command, output: LibraryOutput) -> int:
    try:
        set_threads()
        gc.set_threshold(GARBAGE_THRESHOLD, 10, 10)
        quiet_libraries()  # those that came with the command's own module
        status = group.main(standalone_mode=False)
    except TeachonceError as error:
        return tell_once(f"error: {error}", error, error.exit_status)
    except click.ClickException as error:
        with first_to_tell(error) as first:
            if first:
                error.show()
        return error.exit_code
    except OSError as error:
        told = _of_a_file(error)
        if told is None:
            return _our_own_mistake(error, output)
        return tell_once(f"error: {told}", error, os.EX_IOERR)
    except (click.Abort, KeyboardInterrupt) as error:
        return tell_once("aborted", error, 128 + signal.SIGINT)
    except Exception as error:
        if not is_out_of_memory(error):
            return _our_own_mistake(error, output)
        said = shortened(str(error).strip() or type(error).__name__)
        return tell_once(f"error: {OUT_OF_MEMORY} ({said})", error, TrainingError.exit_status)
    return status if isinstance(status, int) else 0


def _of_a_file(error: OSError) -> str | None:
    """What the system says of a file or a disk; None for what is no matter of files."""
    if error.filename is None and error.errno == errno.ENOENT:
        return _of_the_place()
    reason = os.strerror(error.errno).lower() if error.errno is not None else ""
    if error.filename is not None and error.errno in OF_FILES:
        return f"{error.filename}: {reason}"
    if error.filename is None and error.errno in OF_DISKS:  # of a write or a read, which know no name
        return (
            f"{reason}: the system does not say of which file. Look at the disks of the output, the cache and the "
            f"run, and at {tempfile.gettempdir()}"
        )
    return None


def _of_the_place() -> str | None:
    """What is wrong with the folder that the command was started in, or with that for temporary files."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the folder that this was started in is gone. Change into one that is there"
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        return f"{str(error.strerror).lower()}. Set TMPDIR to a folder that can be written"
    return None


def _our_own_mistake(error: Exception, output: LibraryOutput) -> int:
    """Its traceback, and what libraries said before, where no log has it."""
    text = "".join(traceback.format_exception(error))
    said = output.text()
    rank = f"on rank {os.environ['RANK']}:\n" if "RANK" in os.environ else ""
    return tell_once(f"{said}{rank}{text.rstrip()}", error, 1)


def tell_once(text: str, error: BaseException, status: int) -> int:
    """On the screen from the first rank that fails, as an error is often all ranks'; from others into the log.

    Returns  ``status``
    """
    with first_to_tell(error) as first:
        _report_to_torchrun(text, status, counts=first and not _is_of_a_peer(error))
        if first:
            click.echo(text, err=True)
        elif LibraryOutput.active is not None:
            LibraryOutput.active.write(f"on rank {os.environ.get('RANK')}: {text}\n")
    return status


def _report_to_torchrun(text: str, status: int, *, counts: bool) -> None:
    """For who has started this process by torchrun, and for torchrun's own table, in the form that it reads.

    counts  the status of the launch is this one: torchrun looks for the failure with the earliest time
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        timestamp = int(time.time()) + (0 if counts else 3600)
        with contextlib.suppress(OSError):
            Path(error_file).write_text(
                json.dumps({"message": text, "timestamp": timestamp, EXIT_STATUS: status})
            )


@contextlib.contextmanager
def first_to_tell(error: BaseException) -> Iterator[bool]:
    """Whether no other process of the same launch on this machine tells its error; at the end, one has told it.

    They meet in the folder that torchrun makes for a launch.  A rank that fails because another one has, leaves the
    word to that one, which may need a moment.  And none leaves before the word is said: then torchrun ends all.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        yield True
        return
    mark = Path(error_file).parent.parent / "told"  # empty until it is
    if _is_of_a_peer(error):
        _wait_until(mark.exists)
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        yield False
        _wait_until(lambda: mark.stat().st_size > 0)
    except OSError:  # without that folder nobody can be asked
        yield True
    else:
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):
                mark.write_text("told", encoding="ascii")


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    with contextlib.suppress(OSError):  # the folder is gone
        while not is_so() and time.monotonic() < deadline_s:
            time.sleep(0.05)


def _is_of_a_peer(error: BaseException | None) -> bool:
    """Whether it, or what led to it, is a lost connection to another rank."""
    if error is None:
        return False
    text = str(error)
    lost = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or (
        isinstance(error, RuntimeError) and any(words in text for words in (*LOST_CONNECTION, *NEVER_CAME))
    )
    return lost or _is_of_a_peer(error.__cause__)
