"""What commands are given, damaged or a stranger's: files of data, pictures, models, tokenizers, templates.

Such a file may say anything, and who reads it may take it for what it says; a command must not crash, hang or end in
a traceback, and rows that cannot be used are named.  Commands have three more GiB of memory than they start with.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.samples import make_examples
from tests.torture.cases import Outcome, Result
from tests.torture.commands import clear_left_behind, limit_memory, run
from tests.torture.damage import IN_PLACE, KINDS, spoil
from tests.torture.hostile import LIMIT_S, MORE_MEMORY_BYTES
from tests.torture.judging import judge
from tests.torture.materials import Materials
from tests.torture.mutations import mutate

SPLITS = {"train": range(12), "validation": range(12, 16)}
FORMS = ("parquet", "arrow", "jsonl", "json")


def input_case(things: Materials, number: int, chance: random.Random, folder: Path) -> Result:
    case = (_damaged_data, _forged_model, _forged_rows, _forged_model)[number % 4]
    what, changes = case(things, chance, folder)
    commands = [
        ("train-student", "check"),
        ("teacher-cache", "capture"),
        ("train-student", "run"),
        ("teacher-cache", "check"),
    ]
    program, name = chance.choice(commands)
    cache = things.cache if name == "run" else folder / "cache"
    changes |= {"data__max_dropped": chance.choice([0, 0, 20])}
    arguments = [name, *things.arguments(cache=cache, runs=folder / "runs", **changes)]
    ended = run(program, arguments, before=lambda: limit_memory(MORE_MEMORY_BYTES), limit_s=LIMIT_S)
    result = judge(ended, f"{what}; {program} {name}", is_right=lambda: None)
    left = clear_left_behind()
    return Result(Outcome.HUNG, f"{result.what}: processes left", ended.said) if left else result


def _damaged_data(things: Materials, chance: random.Random, folder: Path) -> tuple[str, dict[str, object]]:
    """A file of a data set in one of its forms, or a picture beside it."""
    data, form = folder / "data", chance.choice(FORMS)
    for split, numbers in SPLITS.items():
        _write(data / f"{split}.{form}", _rows(data, numbers))
    files = sorted(data.rglob("*.*"))
    return f"{form}: {spoil(chance.choice(files), chance.choice(KINDS), chance)}", {"data__source": data}


def _forged_rows(things: Materials, chance: random.Random, folder: Path) -> tuple[str, dict[str, object]]:
    """Rows of other content: what stands in them may be of any kind."""
    data = folder / "data"
    rows = {split: _rows(data, numbers) for split, numbers in SPLITS.items()}
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(12)
        rows["train"][place] = mutate(rows["train"][place], chance)
    for split, some in rows.items():
        _write(data / f"{split}.jsonl", some)
    return "forged rows", {"data__source": data}


def _forged_model(things: Materials, chance: random.Random, folder: Path) -> tuple[str, dict[str, object]]:
    """A setting of another kind in a model's own files, or a damaged one."""
    role = chance.choice(["student", "teacher"])
    model = folder / role
    shutil.copytree(things.folder / role, model)
    path = chance.choice(sorted(model.iterdir()))
    if path.suffix == ".json" and chance.random() < 0.8:
        path.write_text(json.dumps(mutate(json.loads(path.read_text()), chance)))
        what = f"a forged {path.name} of the {role}"
    else:
        what = f"{role}: {spoil(path, chance.choice(IN_PLACE), chance)}"
    return what, {f"{role}__model": model}


def _rows(data: Path, numbers: range) -> list[dict[str, object]]:
    """With pictures beside them."""
    (data / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for one in (make_examples(16)[number] for number in numbers):
        name = f"pictures/{one.index}.png"
        (data / name).write_bytes(one.images[0])
        text = {"question": one.question, "answer": one.answer, "mode": one.kind, "case_id": one.case}
        rows.append({"image_id": name, **text})
    return rows


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, compression="none")
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
