"""An export on its way to the Hugging Face Hub: looked at as a whole first, then one commit.

    plan = plan_push(Path("work/runs/phantom"), "me/my-student", revision=None)
    push(plan, private=True)

An export lists its files with their SHA-256 in ``teachonce.json``.  One that lacks a file, has a changed one, or
has a file that nobody listed is refused: what is public cannot be taken back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from shared.errors import CheckpointError, HubError, RecipeError
from shared.models.adapters import PROVENANCE
from shared.models.weight_files import read_provenance
from stage2_student.publishing.card import CARD
from stage2_student.runs.checkpoint import hashes

# As git has them: parts between slashes that do not begin with a dot, and nothing that it reads as something else.
_PART = r"(?!\.)(?:(?!\.\.|@\{)[^\x00-\x20\x7f~^:?*\[\\/])+(?<!\.lock)"
_BRANCH = re.compile(rf"(?!-|refs/|@\Z|HEAD\Z){_PART}(?:/{_PART})*(?<!\.)")
OWN = (CARD, "LICENSE*", "NOTICE*")  # what the owner of an export writes or adds


@dataclass(frozen=True)
class Push:
    """A whole export, and where it is to go."""

    folder: Path
    repo_id: str
    revision: str | None
    files: dict[str, int]  # name -> bytes

    def lines(self, *, private: bool) -> list[str]:
        """What would be sent, for people."""
        width = max(map(len, self.files))
        kind = "private" if private else "public, or as it is where it exists"
        return [
            f"{self.folder} -> {self.repo_id}, revision {self.revision or 'main'} ({kind})",
            *(f"  {name:<{width}}  {size:>15,} bytes" for name, size in self.files.items()),
            f"  {'in all':<{width}}  {sum(self.files.values()):>15,} bytes",
        ]


def plan_push(place: Path, repo_id: str, *, revision: str | None) -> Push:
    """Looks at every byte of an export: that of a run's folder, or the folder itself.

    Raises   RecipeError      when there is no export, it holds other files, or ``repo_id`` or ``revision`` is no name
             CheckpointError  when a file is missing or was changed
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(f"{repo_id}: no name of a repository ({error}). Give owner/name") from error
    if revision is not None and _BRANCH.fullmatch(revision) is None:
        raise RecipeError(f"--revision {revision!r}: no name of a branch. Give one, such as trial or v1.0")
    if place.exists() and not place.is_dir():
        raise RecipeError(f"{place}: no folder. Give the folder of a run, or of an export")
    folder = place if (place / PROVENANCE).exists() else place / "export"
    wanted = _listed(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    known = {*wanted, PROVENANCE, *(parent for name in wanted for parent in _folders_of(name))}
    unknown = [name for name, path in paths.items() if name not in known and not _is_own(path, name)]
    if unknown:
        raise RecipeError(
            f"{folder}: {unknown[0]!r} is no part of the export. Move it away, or export into another folder"
        )
    found = {name: path for name, path in paths.items() if path.is_file()}
    have = hashes(folder)
    for name, sha256 in {**wanted, CARD: None}.items():
        if name not in have or (sha256 is not None and have[name] != sha256):
            state = "changed" if name in have else "is missing"
            raise CheckpointError(
                f"{folder}: {name} {state} since it was exported. `train-student export` writes it again"
            )
    return Push(folder, repo_id, revision, {name: path.stat().st_size for name, path in found.items()})


def push(plan: Push, *, private: bool) -> str:
    """Makes the repository where there is none, and sends all files as one commit; returns its address.

    The token is where ``hf auth login`` puts it, or in ``HF_TOKEN``.

    Raises   HubError  when there is no token, the Hub refuses or cannot be reached, or the repository is
                       public and was to be private
    """
    if get_token() is None:
        raise HubError("no token for the Hugging Face Hub found. Run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with _told(plan.repo_id, api.endpoint):
        api.create_repo(plan.repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(plan.repo_id).private:
            raise HubError(
                f"{plan.repo_id}: exists and is public, --private was asked for. Nothing was sent. Make it "
                "private on the Hub, or choose another name"
            )
        if plan.revision is not None:
            api.create_branch(plan.repo_id, branch=plan.revision, exist_ok=True)
        sent = api.upload_folder(
            repo_id=plan.repo_id,
            folder_path=plan.folder,
            revision=plan.revision,
            allow_patterns=list(plan.files),
            commit_message="Upload the student",
        )
    return str(sent.commit_url)


@contextmanager
def _told(repo_id: str, endpoint: str) -> Iterator[None]:
    """What the client raises, as one message."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = error.server_message or str(error).strip().splitlines()[-1]
        do = "Check that the token may write there" if status in (401, 403) else "Nothing was committed"
        raise HubError(f"{repo_id}: {endpoint} answered {status} ({reason}). {do}") from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{repo_id}: HF_HUB_OFFLINE is set. Unset it to reach {endpoint}") from error
    except ValueError as error:
        if isinstance(error, HubError):
            raise
        raise HubError(f"{repo_id}: {error}".strip()) from error
    except Exception as error:
        if not _is_of_the_network(error):
            raise
        raise HubError(f"{repo_id}: {endpoint} cannot be reached ({error}). Nothing was committed") from error


def _is_of_the_network(error: Exception) -> bool:
    """The client's HTTP library has errors of its own, and changed its name between releases."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0].startswith(
        ("httpx", "requests")
    )


def _listed(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files that were exported."""
    facts = read_provenance(folder)
    if facts is None:
        raise RecipeError(
            f"{folder}: no export there ({PROVENANCE} is missing). Give the folder of a run, or of an export"
        )
    listed = facts.get("sha256")
    if not isinstance(listed, dict):
        raise CheckpointError(
            f"{folder / PROVENANCE}: damaged, or of an earlier release: it does not list the files. `train-student "
            "export` writes it again"
        )
    return {str(name): str(sha256) for name, sha256 in listed.items()}


def _folders_of(name: str) -> list[str]:
    return [parent.as_posix() for parent in Path(name).parents][:-1]


def _is_own(path: Path, name: str) -> bool:
    """A file at the top, by its name."""
    return path.is_file() and any(name == path.name and fnmatch(name, pattern) for pattern in OWN)
