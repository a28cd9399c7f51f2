"""Where a model or a data set is: a path of this machine, or a name on the Hugging Face Hub.

    require_no_typo("data/mien", what="data.source data/mien", error=DataError)
    require_hub_asked_once()               # before a library asks it, again and again
    raise DataError(f"...: {why(error)}")  # after it failed

The Hub's libraries ask several times for each of several files.  Here it is asked once a process; where there is no
answer they are told to look at what they fetched before, and nowhere else.
"""

from __future__ import annotations

import difflib
import os
from functools import cache
from pathlib import Path

import click
import huggingface_hub.constants as hub
from huggingface_hub import get_session

from shared.errors import TeachonceError

DATA_SUFFIXES = {".parquet", ".arrow", ".jsonl", ".json", ".csv", ".safetensors", ".yaml"}
TIMEOUT_S = 10
MAX_SHOWN = 5


def is_local(name: str) -> bool:
    """Whether a model or data set lies in this machine's files."""
    return Path(name).exists()


def require_no_typo(name: str, *, what: str, error: type[TeachonceError]) -> None:
    """Raises   ``error`` with the nearest folder, when nothing is there and ``name`` can only be a path.

    Names of the Hub have one slash at most, and nothing of that first word is here.
    """
    path = Path(name)
    is_path = (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or path.suffix in DATA_SUFFIXES
        or os.path.lexists(path)  # a link to nothing
        or (len(path.parts) > 1 and os.path.lexists(path.parent))
    )
    if is_path and not path.exists():
        raise error(f"{what}: no such file or folder; {nearest(path)}")


def nearest(path: Path) -> str:
    """What is there in place of a path that is not: the most alike, or else some of its neighbours."""
    if hint := did_you_mean(path):
        return hint
    there = _existing(path)
    names = sorted(entry.name for entry in there.iterdir()) if there.is_dir() else []
    visible = [name for name in names if not name.startswith(".")]
    folder = "this folder" if there == Path.cwd() else str(_shown(there, path))
    more = ", ..." if len(visible) > MAX_SHOWN else ""
    return f"{folder} holds {', '.join(visible[:MAX_SHOWN]) or 'nothing'}{more}"


def did_you_mean(path: Path) -> str | None:
    """The path that is most alike, where one is; None for a path that is there."""
    whole, there = path.absolute(), _existing(path)
    if there == whole or not there.is_dir():
        return None
    first, *rest = whole.relative_to(there).parts
    alike = difflib.get_close_matches(first, [entry.name for entry in there.iterdir() if entry.exists()], n=1)
    if not alike:
        return None
    candidates = (there.joinpath(alike[0], *rest), there / alike[0])
    return f"did you mean {_shown(next(one for one in candidates if one.exists()), path)}?"


def _existing(path: Path) -> Path:
    """The longest part of a path that is there."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return there


def require_hub_asked_once() -> None:
    """Says in one line that the Hub cannot be reached, if so, and keeps the libraries from trying."""
    reason = unreachable()
    if reason is not None and not hub.HF_HUB_OFFLINE:
        hub.HF_HUB_OFFLINE = True
        import datasets

        datasets.config.HF_HUB_OFFLINE = True
        if os.environ.get("RANK", "0") == "0":
            click.echo(f"note: {reason}; only what was fetched before is used", err=True)


@cache
def unreachable() -> str | None:
    """Why the Hub does not answer; None when it does."""
    if hub.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(hub.ENDPOINT, timeout=TIMEOUT_S)
    except Exception as error:  # of whichever library makes the Hub's requests
        return f"{hub.ENDPOINT} cannot be reached ({str(error) or type(error).__name__})"
    return None


def why(name: str, error: Exception) -> str:
    """What to say when a library could not open ``name``: one line."""
    if not is_local(name) and unreachable() is not None:
        return f"it is not on this machine, and {unreachable()}. Connect it, or give a folder"
    if "trust_remote_code" in str(error):
        return (
            "it brings code of its own, which is never run here. Give a model that Transformers has a class for, or "
            "convert it to one"
        )
    said = (str(error).strip() or "nothing more is said").splitlines()[0]
    return (
        said if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: {said}"
    )


def _shown(found: Path, asked: Path) -> Path:
    """Relative to the working folder where the user's path was, and it lies in it."""
    if asked.is_absolute() or not found.is_relative_to(Path.cwd()):
        return found
    return found.relative_to(Path.cwd())


def is_there(location: str) -> bool:
    """Whether a cache may lie there: remote ones are not asked."""
    return "://" in location or Path(location).exists()
