"""From journals to files: a unit's answers as Parquet, and the set as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from shared.capture.planning import CaptureData, NumberedRows
from shared.data.processing import ExampleProcessor
from shared.data.rows import VqaSplit
from shared.errors import DataError
from shared.writing.journal import REFUSED, Entry, Journal
from shared.writing.plan import Plan, SetFolder, Unit
from shared.writing.tables import encoded, record, schema_of

Usable = tuple[Entry, str]  # an answer and its text


def finish(
    folder: SetFolder,
    plan: Plan,
    unit: Unit,
    found: Sequence[Entry],
    rows: NumberedRows,
    processor: ExampleProcessor,
) -> None:
    """Writes the unit's file, whole or not at all, with what it leaves out and why.

    Raises   DataError  when a row is not what was asked any more
    """
    split, _ = rows.find(int(unit.rows[0]))
    usable: list[Usable] = []
    skipped: list[dict[str, Any]] = []
    for entry in sorted(found, key=lambda one: (one.row, one.draw)):
        text = processor.written.text(entry.ids)
        reason = entry.reason or processor.written.why_unusable(text)
        if reason is None:
            usable.append((entry, text))
        else:
            row = f"{split.name}[{rows.find(entry.row)[1]}]"
            skipped.append({"row": row, "draw": max(entry.draw, 0), "reason": reason})
    counts = {
        "prompts": len(unit.keys),
        "refused": sum(one.draw == REFUSED for one in found),
        "answers": len(usable),
        "cut": sum(not one.is_whole for one, _ in usable),
        "tokens": sum(len(one.ids) for one, _ in usable),
    }
    about = {"plan": plan.digest, "written_by": plan.written_by, "counts": counts, "skipped": skipped}
    records = _records(plan, unit, split, usable, rows, processor)
    folder.publish(unit, encoded(schema_of(split), records, about))


def _records(
    plan: Plan,
    unit: Unit,
    split: VqaSplit,
    usable: Sequence[Usable],
    rows: NumberedRows,
    processor: ExampleProcessor,
) -> Iterator[dict[str, Any]]:
    key_of = dict(zip(unit.rows.tolist(), unit.keys, strict=True))
    for entry, text in usable:
        _, row = rows.find(entry.row)
        example = split[row]
        if processor.key(example) != key_of[entry.row]:
            raise DataError(f"{split.where(row)}: changed since it was first read; start again")
        yield record(split, example, text, entry.ids, is_whole=entry.is_whole) | {
            str(split.settings.columns.written_by): plan.written_by,
            "source_key": key_of[entry.row].hex(),
            "source_row": row,
            "draw": entry.draw,
        }


def num_kept(folder: SetFolder, plan: Plan) -> int:
    """Answers on disk, in files and journals."""
    number = 0
    for unit in plan.units:
        told = folder.told_by(unit, plan)
        if told is None:
            number += sum(one.draw != REFUSED for one in Journal(folder.journal(unit)).found)
        else:
            number += told["counts"]["answers"]
    return number


def commit(folder: SetFolder, plan: Plan, prompts: CaptureData) -> dict[str, int]:
    """Writes down that the set is whole; returns what is in it.

    Raises   DataError  when a file is gone
    """
    counts: dict[str, int] = {}
    skipped = [{"row": one.row, "reason": one.reason} for one in prompts.unreadable()]
    for unit in plan.units:
        told = folder.told_by(unit, plan)
        if told is None:
            raise DataError(
                f"{folder.path / unit.file}: it is not there. Run the same command again, which writes it"
            )
        skipped += told["skipped"]
        counts = {name: counts.get(name, 0) + number for name, number in told["counts"].items()}
    counts["equal"] = sum(len(part.keys) for part in prompts.keyed) - counts["prompts"]
    counts["left_out"] = len(skipped)
    folder.commit(plan, counts, skipped)
    return counts
