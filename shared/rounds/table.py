"""What came out of all rounds, side by side, and what it took of the teacher; of what the runs have left on disk.

click.echo("\\n".join(table_of(rounds)))        # also written to NAME-rounds/rounds.json
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from shared.cache.log import log_records
from shared.cache.manifest import load_manifest
from shared.cache.storage import LocalFolder, open_folder
from shared.data.rows import open_split
from shared.regular_files import read_regular
from shared.rounds.plan import Round, Rounds
from shared.vouched import opened, vouched

JSON = "rounds.json"
HEAD = f"{'round':>5}{'own rows':>10}" + "".join(
    f"{name:>8}" for name in ("CE", "KL", "own CE", "own KL", "a row", "right")
)
HEAD += f"{'captured':>12}{'live':>12}"
LEGEND = (
    "CE, KL: nats a position, over held-out rows with the given answers; own: along the student's own",
    "greedy answers to held-out prompts; a row: own KL with each answer counted alike. right: of the short",
    "answers. captured: positions of the teacher so far, each row once; live: of a teacher that takes part",
    "in every step.",
)


@dataclass(frozen=True)
class Outcome:
    """Of one round; None where it was not measured.

    own_rows   training rows with the student's own answers
    ce, kl     over held-out rows with the given answers, nats a position
    own_ce, own_kl   along the student's own greedy answers to held-out prompts
    own_row_kl       the same, a mean over answers of their means over positions
    right      share of the short answers
    captured   positions that the teacher has computed for the training's cache so far
    live       positions that it had computed so far if it took part in every step
    steps      of the round alone
    """

    round: int
    run: str
    own_rows: int
    ce: float | None
    kl: float | None
    own_ce: float | None
    own_kl: float | None
    own_row_kl: float | None
    right: float | None
    captured: int
    live: int
    steps: int

    def line(self) -> str:
        losses = "".join(
            _cell(value, ".3f", 8) for value in (self.ce, self.kl, self.own_ce, self.own_kl, self.own_row_kl)
        )
        counts = f"{_cell(self.right, '.1%', 8)}{self.captured:>12,}{self.live:>12,}"
        return f"{self.round:>5}{self.own_rows:>10,}{losses}{counts}"


def table_of(rounds: Rounds) -> list[str]:
    """The lines of the table; the figures are kept as JSON beside the rounds.

    Raises   OSError, ValueError  when a finished run's files are gone or damaged
    """
    found = list(outcomes(rounds))
    rounds.folder.mkdir(parents=True, exist_ok=True)
    told = vouched({"rounds": [asdict(one) for one in found]})
    LocalFolder(rounds.folder).publish(JSON, (json.dumps(told, indent=1) + "\n").encode())
    return [HEAD, *(one.line() for one in found), *LEGEND]


def outcomes(rounds: Rounds) -> Iterable[Outcome]:
    """Of each round, from round 0 on."""
    captured = captured_so_far(rounds)
    live = 0
    for one in rounds.all:
        results = opened(json.loads(read_regular(one.run / "results.json")))
        after, answers = results["after"] or {}, results["answers"] or {}
        own = _losses_along(one)
        live += sum(_positions_of_steps(one.run))
        yield Outcome(
            round=one.number,
            run=str(one.run),
            own_rows=_own_rows(one),
            ce=after.get("ce_loss"),
            kl=after.get("kl"),
            own_ce=own.get("ce"),
            own_kl=own.get("kl"),
            own_row_kl=own.get("by_row", {}).get("kl"),
            right=(answers.get("accuracy") or {}).get("mean"),
            captured=captured[one.number],
            live=live,
            steps=results["step"],
        )


def captured_so_far(rounds: Rounds) -> list[int]:
    """Positions that the cache has for each round: all, but for what later rounds, or other runs' rounds, have added.

    What other runs have added is what the cache's log says.  An answer that a later round gives to a row once
    more is captured once.
    """
    assert rounds.recipe.cache is not None
    folder = open_folder(rounds.recipe.cache.location)
    manifest = load_manifest(folder)
    total = 0 if manifest is None else manifest.totals.positions
    names = {one.run.name for one in rounds.all}
    for record in log_records(folder):
        recipe = record.get("recipe") or {}
        is_of_rounds = record.get("event") == "captured" and recipe.get("data", {}).get("written")
        if is_of_rounds and recipe["run"]["name"] not in names:
            total -= int(record.get("positions", 0))
    seen: set[tuple[Any, ...]] = set()
    added = [_new_positions(one, seen) for one in rounds.all]
    return list(accumulate(added, initial=total - sum(added)))[1:]


def _new_positions(one: Round, seen: set[tuple[Any, ...]]) -> int:
    """Of the answers that a round has added to those ``seen``, ends of turns among them."""
    names, total = one.rounds.recipe.data.columns, 0
    for file in sorted(one.answers.glob("*.parquet")):
        table = pq.read_table(file, columns=["source_key", names.answer_ids, names.answer_end])
        for key, ids, is_whole in zip(*(column.to_pylist() for column in table.columns), strict=True):
            answer = (key, tuple(ids), is_whole)
            total += 0 if answer in seen else len(ids) + is_whole
            seen.add(answer)
    return total


def _own_rows(one: Round) -> int:
    """Training rows with the student's own answers."""
    written = open_split(one.training.data, "train").written
    return 0 if written is None else written.num_answers


def _losses_along(one: Round) -> dict[str, Any]:
    """Of the student's own greedy answers; empty where they were not measured."""
    try:
        found = json.loads(read_regular(one.losses))
    except FileNotFoundError:
        return {}
    return opened(found[0])


def _positions_of_steps(run: Path) -> Iterable[int]:
    for line in read_regular(run / "metrics.jsonl").decode().splitlines():
        record = json.loads(line)
        if record.get("event") == "step":
            yield int(record["num_positions"])


def _cell(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"
