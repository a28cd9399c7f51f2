"""Storage behind a URL that fails at random: one error, or the right result; and when it answers, the right one.

``flaky://PATH`` is the local file system, whose calls fail with a probability of ``FlakyFileSystem.odds``: with
errors of the system, of the network, of a vendor's library, with reads that end early and writes that stop half way.
"""

from __future__ import annotations

import errno
import io
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tests.torture.cases import Outcome, Result
from tests.torture.commands import clear_left_behind, run
from tests.torture.damage import parquet_rows
from tests.torture.judging import judge
from tests.torture.materials import RUN, Materials, cache_files, difference, run_content


class VendorError(Exception):
    """As libraries of cloud storage have their own, of no common base."""


ERRORS: tuple[Callable[[], Exception], ...] = (
    lambda: OSError(errno.EIO, "Input/output error"),
    lambda: TimeoutError("the request timed out"),
    lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    lambda: PermissionError(errno.EACCES, "Access denied"),
    lambda: VendorError("An error occurred (SlowDown): please reduce your request rate"),
    lambda: OSError("Could not connect to the endpoint URL"),
)


class FlakyFileSystem(LocalFileSystem):
    protocol = "flaky"
    cachable = False
    odds = 0.0
    chance = random.Random(0)

    @classmethod
    def _fail(cls) -> None:
        if cls.chance.random() < cls.odds:
            raise cls.chance.choice(ERRORS)()

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        text = str(path).removeprefix("flaky://")
        return super()._strip_protocol(text)

    def size(self, path: str) -> int:
        self._fail()
        return super().size(path)

    def glob(self, path: str, **options: Any) -> Any:
        self._fail()
        return super().glob(path, **options)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._fail()
        super().makedirs(path, exist_ok=exist_ok)

    def cat_file(self, path: str, *_: Any, **options: Any) -> bytes:
        self._fail()
        return self._cut(self._local(path).read_bytes())

    def pipe_file(self, path: str, value: bytes, *_: Any, **options: Any) -> None:
        self._fail()
        if self.chance.random() < self.odds / 2:
            self._local(path).write_bytes(value[: self.chance.randrange(len(value) + 1)])
            self._fail()
        else:
            self._local(path).write_bytes(value)

    def rm_file(self, path: str) -> None:
        self._fail()
        self._local(path).unlink()

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self._fail()
        return io.BytesIO(self._cut(self._local(path).read_bytes()))

    def _local(self, path: str) -> Path:
        return Path(self._strip_protocol(path))

    def _cut(self, data: bytes) -> bytes:
        if self.chance.random() < self.odds / 2:
            return data[: self.chance.randrange(len(data) + 1)]
        return data


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


def remote_case(things: Materials, number: int, chance: random.Random, folder: Path) -> Result:
    cache = folder / "cache"
    url, runs, out = f"flaky://{cache}", folder / "runs", folder / "out"
    whole = things.whole_cache
    same_cache = lambda: difference(cache_files(cache), whole, what="the cache")  # noqa: E731
    jobs: list[tuple[str, list[str], Callable[[], str | None]]] = [
        ("teacher-cache", ["capture", *things.arguments(cache=url)], same_cache),
        (
            "train-student",
            ["run", *things.arguments(cache=url, runs=runs)],
            lambda: difference(run_content(runs / RUN), things.whole_runs[1], what="the run"),
        ),
        ("teacher-cache", ["verify", url], lambda: None),
        ("teacher-cache", ["capture", *things.arguments(cache=url)], same_cache),
        (
            "teacher-cache",
            ["export", url, str(out)],
            lambda: None if sum(map(len, parquet_rows(out).values())) == 16 else "rows are missing",
        ),
        ("teacher-cache", ["inspect", url], lambda: None),
        ("teacher-cache", ["merge", url, f"flaky://{out}"], lambda: None),
    ]
    program, arguments, fault = jobs[number % len(jobs)]
    if arguments[0] != "capture":
        for name, data in whole.items():
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            (cache / name).write_bytes(data)
    FlakyFileSystem.chance = random.Random(chance.random())
    staging = folder / "staging"
    result = None
    for odds in (chance.choice([0.02, 0.1, 0.3]), chance.choice([0.02, 0.1]), 0.0):
        result = _once(program, arguments, fault, odds=odds, staging=staging, attempt=result is not None)
        if result.outcome not in (Outcome.REFUSED, Outcome.RIGHT):
            return result
        if result.outcome is Outcome.RIGHT:
            return result
    assert result is not None
    return Result(Outcome.LOST, f"{result.what}, also when it answers", result.said)


def _once(
    program: str,
    arguments: list[str],
    fault: Callable[[], str | None],
    *,
    odds: float,
    staging: Path,
    attempt: bool,
) -> Result:
    def before() -> None:
        FlakyFileSystem.odds = odds
        os.environ["TEACHONCE_STAGING"] = str(staging)

    again = ["--resume"] if attempt and arguments[0] == "run" else []
    ended = run(program, [*arguments, *again], before=before)
    FlakyFileSystem.chance = random.Random(FlakyFileSystem.chance.random())
    result = judge(
        ended, f"{program} {arguments[0]}, one call in {odds and 1 / odds:.0f} fails", is_right=fault
    )
    left = clear_left_behind()
    return Result(Outcome.HUNG, f"{result.what}: processes left", ended.said) if left else result
