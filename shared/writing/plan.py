"""Who writes what, and how: the plan of a set, and its folder from the first batch to the last file.

.plan.json                       from the beginning: what has to be the same to go on
.partial/train-00000.jsonl       answers of a unit that is not finished
.partial/train-00000.json        SHA-256 of the file of one that is, until the set is whole
train-00000-of-00003.parquet     a finished unit
README.md                        a card for people and the Hub, which also says which files are the data
written.json                     last: the set is whole, and each file's SHA-256
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from shared.cache import Wanted
from shared.cache.format import sha256_hex
from shared.cache.index import split_keys
from shared.cache.layout import require_in_no_cache
from shared.cache.lock import CacheBusyError, CaptureLock
from shared.cache.storage import LocalFolder, explain_write_errors
from shared.capture.planning import CaptureData, NumberedRows
from shared.data.processing import ExampleProcessor
from shared.data.written import WRITTEN
from shared.errors import RecipeError, listed
from shared.permutation import Permutation, stream
from shared.recipes import DataConfig, Recipe, WriteConfig
from shared.regular_files import read_regular
from shared.runtime import World
from shared.vouched import digest_of, opened, vouched
from shared.writing.card import CARD, card
from shared.writing.tables import told_by

PLAN, PARTIAL, LOCK = ".plan.json", ".partial", ".lock"  # and WRITTEN, last
NAMES = ("model", "revision", "run", "step")  # of a writer: for people, and not compared


@dataclass(frozen=True)
class Writer:
    """The model that answers.

    weights   fingerprint of what is loaded
    run, step of a student: the folder of its run, and the checkpoint's step
    """

    role: Literal["teacher", "student"]
    model: str
    revision: str | None
    weights: str
    dtype: str
    run: str | None = None
    step: int | None = None


@dataclass(frozen=True, eq=False)
class Unit:
    """Prompts of a split whose answers are in one file.

    rows  (n,) int64, numbers over all splits
    """

    split: str
    number: int
    total: int
    rows: np.ndarray
    keys: tuple[bytes, ...]

    @property
    def unit_id(self) -> str:
        return f"{self.split}-{self.number:05d}"

    @property
    def file(self) -> str:
        return f"{self.unit_id}-of-{self.total:05d}.parquet"


@dataclass(frozen=True, eq=False)
class Plan:
    """identity  what has to be the same to go on; ``begun`` when the first process began, in UTC"""

    identity: dict[str, Any]
    begun: str
    units: tuple[Unit, ...]

    @property
    def digest(self) -> str:
        return digest_of({"identity": self.identity, "begun": self.begun})

    @property
    def written_by(self) -> str:
        """Who writes, how and when: what each row says, and the manifest of a cache keeps."""
        writer = {name: value for name, value in self.identity["writer"].items() if value is not None}
        told = {**writer, **self.identity["how"], "when": self.begun, "teachonce": self.identity["teachonce"]}
        return json.dumps(told, sort_keys=True)


def identity_of(
    config: WriteConfig, data: DataConfig, processor: ExampleProcessor, found: CaptureData, writer: Writer
) -> dict[str, Any]:
    """As JSON gives it back."""
    how = {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "per_prompt": config.per_prompt,
        "max_new_tokens": config.max_new_tokens or data.max_answer_tokens,
        "seed": config.seed,
    }
    identity = {
        "writer": asdict(writer),
        "how": how,
        "data": [
            {"split": part.split.name, "fingerprint": part.fingerprint, "prompts": len(part.keys)}
            for part in found.keyed
        ],
        "columns": data.columns.model_dump(exclude_defaults=True),  # which name those of the files
        "image_processor": processor.image_processor_fingerprint,
        "date": processor.date,
        "prompts_per_file": config.prompts_per_file,
        "teachonce": version("teachonce"),
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def choice(keys: np.ndarray, config: WriteConfig) -> np.ndarray:
    """Places of the prompts to ask, rising: a pure function of the seed, the keys and the part.

    keys     (n, 16) uint8; of equal ones the first is asked
    Returns  (m,) int64
    """
    wanted = Wanted.of(keys, np.arange(len(keys)))
    seed = config.seed.to_bytes(8, "little")
    ranks = [hashlib.blake2b(key, key=seed, digest_size=8).digest() for key in split_keys(wanted.keys)]
    order = np.argsort(np.array(ranks, "S8"), kind="stable")
    number = min(config.prompts or len(order), len(order))
    places = (config.part * number + np.arange(number)) % len(order)
    return np.sort(wanted.rows[order[places]])


def in_steps(recipe: Recipe, steps: tuple[int, int], num_rows: int) -> np.ndarray:
    """Places of the training rows that a run takes in these steps, (m,) int64, rising; as its order has them.

    num_rows  that can be used
    """
    batch = recipe.optimization.global_batch_size
    steps_per_epoch = -(-num_rows // batch)
    found = []
    for epoch in range(steps[0] // steps_per_epoch, -(-steps[1] // steps_per_epoch)):
        first, last = (min(max(0, step - epoch * steps_per_epoch) * batch, num_rows) for step in steps)
        if last - first == num_rows:
            return np.arange(num_rows)
        order = Permutation(num_rows, key=stream(recipe.run.seed, epoch))
        found.append(order[np.arange(first, last)])
    return np.unique(np.concatenate(found))


def units_of(found: CaptureData, prompts_per_file: int) -> tuple[Unit, ...]:
    """Of each split in order; of equal rows of a split the first one is asked."""
    rows = NumberedRows(tuple(part.split for part in found.keyed))
    units = []
    for index, part in enumerate(found.keyed):
        wanted = Wanted.of(part.keys, part.rows + rows.first_number(index))
        starts = range(0, len(wanted.keys), prompts_per_file)
        for number, start in enumerate(starts):
            some = slice(start, start + prompts_per_file)
            keys = tuple(split_keys(wanted.keys[some]))
            units.append(Unit(part.split.name, number, len(starts), wanted.rows[some], keys))
    return tuple(units)


class SetLock(CaptureLock):
    """One process at a time writes a set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / LOCK


@dataclass(eq=False)
class SetFolder:
    """Where a set is written."""

    path: Path
    files: LocalFolder = field(init=False)

    def __post_init__(self) -> None:
        self.files = LocalFolder(self.path)
        self.files.where = f"written set {self.path}"

    @contextmanager
    def taken(self, world: World) -> Iterator[None]:
        """Nobody else writes there meanwhile; called by all ranks, the first one holds the lock for all.

        Raises   RecipeError       when another process writes there, or what is there is no written set
                 CacheFormatError  when a new set would lie in a cache
        """
        lock = SetLock(self.path)
        try:
            world.by_main(lambda: self._take(lock))
            yield
        finally:
            lock.close()
            if world.is_main:
                with suppress(OSError):  # a set that could not begin leaves no empty folder
                    self.path.rmdir()

    def _take(self, lock: SetLock) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RecipeError(
                f"{self.path}: a file lies where the folder of answers is to be. Name another one"
            )
        is_new = not self.path.is_dir() or all(one.name.startswith(".") for one in self.path.iterdir())
        if not is_new and self.stored() is None:
            raise RecipeError(
                f"{self.path}: something is there that is no set of written answers. Name another folder"
            )
        if is_new:
            require_in_no_cache(self.path)
        with explain_write_errors(self.files.where, LOCK):
            try:
                lock.acquire()
            except CacheBusyError as error:
                raise RecipeError(
                    f"{self.path}: another process writes answers there. Wait until it has ended, or stop it"
                ) from error

    def stored(self) -> dict[str, Any] | None:
        """The plan that is there, or that of the whole set; None where there is none.

        Raises   RecipeError  when it is damaged
        """
        for name in (PLAN, WRITTEN):
            try:
                told = opened(json.loads(read_regular(self.path / name)))
                return {"identity": dict(told["identity"]), "begun": str(told["begun"])}
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise RecipeError(
                    f"{self.path / name}: cannot be read ({error}). Delete {self.path} and write the answers again"
                ) from error
        return None

    def planned(self, identity: dict[str, Any], units: tuple[Unit, ...]) -> Plan:
        """The plan to follow: that which is there, or a new one.

        Raises   RecipeError  when the answers there were written otherwise
        """
        stored = self.stored()
        if stored is None:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            stored = {"identity": identity, "begun": now}
            self._publish_plan(stored)
        elif different := _differences(stored["identity"], identity):
            raise RecipeError(
                f"{self.path}: the answers there were written otherwise:\n{listed(different)}\n"
                "Name another folder, or delete this one"
            )
        return Plan(stored["identity"], stored["begun"], units)

    def told_by(self, unit: Unit, plan: Plan) -> dict[str, Any] | None:
        """What a finished unit's file says of itself; None where there is none of this plan."""
        with suppress(OSError, ValueError):
            told = told_by(self.path / unit.file)
            if told.get("plan") == plan.digest:
                return told
        return None

    def publish(self, unit: Unit, data: pa.Buffer) -> None:
        """A finished unit's file, whole or not at all; first what it must hash to."""
        self._note(unit, sha256_hex(data))
        self.files.publish(unit.file, data)

    def remove_damaged(self, plan: Plan) -> None:
        """Files of a set that goes on, where they are not what was written: their answers are written again.

        Of a file from an earlier release nothing says what it must hash to; it is taken as it is.
        """
        for unit in plan.units:
            noted = self._noted(unit)
            if noted is not None and noted != self._hash(unit):
                self.files.remove(unit.file)

    def _note(self, unit: Unit, sha256: str) -> None:
        told = json.dumps(vouched({"sha256": sha256}))
        self.files.publish(f"{PARTIAL}/{unit.unit_id}.json", told.encode())

    def _noted(self, unit: Unit) -> str | None:
        """What a unit's file must hash to, "" where that is damaged; None where nothing says it."""
        try:
            return str(
                opened(json.loads(read_regular(self.path / PARTIAL / f"{unit.unit_id}.json")))["sha256"]
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, RecursionError):
            return ""

    def journal(self, unit: Unit) -> Path:
        return self.path / PARTIAL / f"{unit.unit_id}.jsonl"

    def is_whole(self, plan: Plan) -> bool:
        """Whether the set was finished, and every file is what it was; files that are not are removed."""
        hashes = self._told_hashes()
        if hashes is None:
            return False
        broken = [unit for unit in plan.units if hashes.get(unit.file) != self._hash(unit)]
        if broken:
            self._publish_plan({"identity": plan.identity, "begun": plan.begun})
            for unit in plan.units:
                self._note(unit, str(hashes.get(unit.file)))
            for name in (WRITTEN, *(unit.file for unit in broken)):
                self.files.remove(name)
        else:
            self._forget_work()
        return not broken

    def _told_hashes(self) -> dict[str, Any] | None:
        """As ``written.json`` has them; None where it is missing or damaged: the set is finished once more."""
        try:
            hashes = opened(json.loads(read_regular(self.path / WRITTEN))).get("files")
        except (OSError, ValueError, RecursionError):
            return None
        return hashes if isinstance(hashes, dict) else None

    def _publish_plan(self, told: Mapping[str, Any]) -> None:
        self.files.publish(PLAN, json.dumps(vouched(told), indent=1).encode())

    def _forget_work(self) -> None:
        """Plan and journals of a set that is whole."""
        self.files.remove(PLAN)
        shutil.rmtree(self.path / PARTIAL, ignore_errors=True)

    def commit(self, plan: Plan, counts: Mapping[str, int], skipped: Sequence[Mapping[str, Any]]) -> None:
        """Says that the set is whole; called once, by the first rank, when every unit is."""
        told = {
            "identity": plan.identity,
            "begun": plan.begun,
            "written_by": json.loads(plan.written_by),
            "counts": dict(counts),
            "skipped": list(skipped),
            "files": {unit.file: self._noted(unit) or self._hash(unit) for unit in plan.units},
        }
        self.files.publish(CARD, card(told).encode())
        self.files.publish(WRITTEN, json.dumps(vouched(told), indent=1).encode())
        self._forget_work()

    def _hash(self, unit: Unit) -> str | None:
        """SHA-256 of a unit's file; None where there is none."""
        try:
            with open(self.path / unit.file, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None


def as_it_began(recipe: Recipe, folder: SetFolder) -> Recipe:
    """A set that goes on asks as on the day on which it began, where the chat template prints the date."""
    stored = folder.stored() if recipe.data.date is None and folder.path.is_dir() else None
    return recipe if stored is None else recipe.of_day(stored["identity"].get("date"))


def _differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What is not the same, both sides; names of models and the release do not count."""
    # A release before had no columns in a plan.
    flat, ours = _flat(stored), _flat(asked if "columns" in stored else {**asked, "columns": {}})
    return [
        f"{name}: {flat.get(name)!r} there, {ours.get(name)!r} asked for"
        for name in sorted({*flat, *ours})
        if name.rpartition(".")[2] not in (*NAMES, "teachonce") and flat.get(name) != ours.get(name)
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, list):
        tree = {str(number): one for number, one in enumerate(tree)}
    if not isinstance(tree, Mapping):
        return {prefix.removesuffix("."): tree}
    return {
        name: value for key, part in tree.items() for name, value in _flat(part, f"{prefix}{key}.").items()
    }
