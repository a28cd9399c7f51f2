"""Whose answers and losses a round holds: the student of one run, and of no other that took its name later.

    require_same_student(one)       # notes it the first time

Settings do not tell it: a run that was removed and made again with others has its old name.
"""

from __future__ import annotations

import json

from shared.cache.storage import LocalFolder
from shared.errors import CheckpointError
from shared.models.weight_files import read_provenance
from shared.regular_files import read_regular
from shared.rounds.plan import Round
from shared.vouched import opened, vouched

STUDENT = "student.json"  # in a round's folder: SHA-256 of the weights that its run has exported


def require_same_student(one: Round) -> None:
    """Of a round whose run is finished.

    Raises   CheckpointError  when its student has written or was measured before, and is another one by now
    """
    weights = _exported(one)
    if not weights:  # an export of other tools, or none: there is nothing to compare
        return
    noted = _noted(one)
    if noted is None:
        one.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(vouched({"run": str(one.run), "weights": weights}), indent=1) + "\n"
        LocalFolder(one.folder).publish(STUDENT, text.encode())
    elif noted != weights:
        _refuse(one, "has been trained anew since")


def require_not_gone(one: Round) -> None:
    """Raises   CheckpointError  when the run of a round that has left answers or losses was removed"""
    if _noted(one) is not None and not one.run.exists():
        _refuse(one, "is gone")


def _refuse(one: Round, what: str) -> None:
    raise CheckpointError(
        f"{one.run}: this run {what}. Answers and losses in {one.rounds.folder} are of its student. Choose "
        f"another run.name, bring the run back, or delete {one.rounds.folder} and the runs of its rounds"
    )


def _noted(one: Round) -> dict[str, str] | None:
    try:
        weights = opened(json.loads(read_regular(one.folder / STUDENT)))["weights"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{one.folder / STUDENT}: damaged ({error}). Delete it, if the runs are as they were"
        ) from error
    return dict(weights)


def _exported(one: Round) -> dict[str, str]:
    """SHA-256 of each file of weights of the round's export."""
    files = (read_provenance(one.run / "export") or {}).get("sha256") or {}
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
