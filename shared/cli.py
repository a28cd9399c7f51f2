"""What the two command lines have in common: options, and how errors leave the program."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from shared.errors import TeachonceError

FILE = click.Path(path_type=Path, dir_okay=False)  # to be written
FOLDER = click.Path(path_type=Path, file_okay=False)  # to write into
# What is wrong with a place that the user named, or with its disk.
OF_FILES = {
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO),
}
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


def run(group: click.Command) -> None:
    """Runs a command line; a user's error is one message and a status of its own, not a traceback."""
    try:
        status = group.main(standalone_mode=False)
    except TeachonceError as error:
        rank = os.environ.get("RANK", "0")
        click.echo(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", err=True)
        sys.exit(error.exit_status)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None or error.errno not in OF_FILES:
            raise
        click.echo(f"error: {error.filename}: {os.strerror(error.errno).lower()}", err=True)
        sys.exit(os.EX_IOERR)
    except click.Abort:
        click.echo("aborted", err=True)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
