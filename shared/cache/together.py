"""Several caches: what a list and a mix have in common.  All are opened, and compared in pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.cache.format import canonical_json, sha256_hex
from shared.cache.identity import Comparison, InputsIdentity
from shared.cache.index import Keys, as_key_array, split_keys
from shared.cache.reader import CacheReader
from shared.cache.staging import Staging
from shared.errors import CacheFormatError, CacheMismatchError
from shared.recipes.policies import Policy, VisualGain

MAX_NAMED = 8  # caches, in a message


class Together(ABC):
    """Several caches, open.

    kind           what they are called; ``where``, which opens every message, names them as well
    many_teachers  they may be of different teachers
    same_rows      a row's targets are added up
    remedy         what to do where they do not fit together
    """

    kind: str
    many_teachers: bool
    same_rows: bool
    remedy: str

    def __init__(self, locations: Sequence[str], staging: Staging | None) -> None:
        if not locations:
            raise CacheMismatchError(f"{self.kind}: no cache is named. Name one or more")
        self.parts = _opened(locations, staging or Staging())  # one folder, one bound
        more = f" and {len(locations) - MAX_NAMED} more" if len(locations) > MAX_NAMED else ""
        self.location = ", ".join(locations[:MAX_NAMED]) + more
        self.where = f"{self.kind} {self.location}"
        self.notices = self._compare()

    def _compare(self) -> tuple[str, ...]:
        """Each with those before it, up to the first that it differs from; returns notices.

        Raises   CacheMismatchError  with both names of each pair that differs, and all that differs
        """
        problems: list[str] = []
        notices: list[str] = []
        for number, part in enumerate(self.parts):
            for before in self.parts[:number]:
                found = beside(before, part, many_teachers=self.many_teachers, same_rows=self.same_rows)
                notices += found.notices
                if found.refusals:
                    listed = "\n".join(f"  - {line}" for line in found.refusals)
                    problems.append(
                        f"cache {part.location} beside cache {before.location}: {len(found.refusals)} "
                        f"difference(s):\n{listed}"
                    )
                    break
        if problems:
            raise CacheMismatchError("\n".join([*problems, self.remedy]))
        return tuple(dict.fromkeys(notices))

    @property
    def policy(self) -> Policy:
        return self.parts[0].policy

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Those that all of them have."""
        captured = [part.temperatures for part in self.parts]
        return tuple(t for t in captured[0] if all(t in one for one in captured))

    @property
    def staging_bytes(self) -> int | None:
        """How much of the remote ones may lie on this machine at a time; None where all are local."""
        return next((part.staging_bytes for part in self.parts if part.staging_bytes is not None), None)

    def __contains__(self, key: bytes) -> bool:
        return bool(self.contains([key])[0])

    @abstractmethod
    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """(len(keys),) bool."""

    def require_student(
        self,
        inputs: InputsIdentity,
        *,
        temperature: float,
        policy: Policy | None = None,
        seed: int | None = None,
        temperatures: Sequence[float] | None = None,
        label_log_prob: bool = False,
        visual_gain: VisualGain | None = None,
        teacher: str | None = None,
    ) -> tuple[str, ...]:
        """As ``CacheReader.require_student``, of each; all that keeps a student away is raised at once."""
        problems, notices = [], list(self.notices)
        for part in self.parts:
            try:
                found = part.require_student(
                    inputs,
                    temperature=temperature,
                    policy=policy,
                    seed=None if self.same_rows else seed,
                    temperatures=temperatures,
                    label_log_prob=label_log_prob,
                    visual_gain=visual_gain,
                    teacher=teacher,
                )
                notices += [f"cache {part.location}: {one}" for one in found]
            except CacheMismatchError as error:
                problems.append(str(error))
        if problems:
            raise CacheMismatchError("\n".join(problems))
        return tuple(notices)


def _opened(locations: Sequence[str], staging: Staging) -> tuple[CacheReader, ...]:
    """Raises   CacheFormatError  with all that cannot be opened"""
    readers, problems = [], []
    for location in locations:
        try:
            readers.append(CacheReader(location, staging=staging, num_together=len(locations)))
        except CacheFormatError as error:
            problems.append(str(error))
    if problems:
        raise CacheFormatError("\n".join(problems))
    return tuple(readers)


def beside(one: CacheReader, other: CacheReader, *, many_teachers: bool, same_rows: bool) -> Comparison:
    return one.manifest.identity.compare_beside(
        other.manifest.identity,
        sides=(f"in {one.location}", f"in {other.location}"),
        many_teachers=many_teachers,
        same_rows=same_rows,
    )


def require_none(
    where: str, told: str, missing: npt.NDArray[np.int64], keys: Keys, names: Sequence[str]
) -> None:
    """Raises   CacheMismatchError  with the first of these places, and how many there are"""
    if not len(missing):
        return
    first = int(missing[0])
    key = split_keys(as_key_array(keys)[first : first + 1])[0].hex()
    name = f"{names[first]} " if names else ""
    others = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
    raise CacheMismatchError(
        f"{where}: {told} example {name}(key {key}){others} of the {len(keys)} asked for. It was "
        "captured from other data, pictures, answers or another prompt: run teacher-cache to capture what is missing."
    )


def digest_of(*facts: object) -> str:
    return sha256_hex(canonical_json(facts).encode())
