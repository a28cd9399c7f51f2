"""Writes the drawn set as Parquet files with the columns of MedPix-VQA.

A split is a pure function of (seed, name, number of pictures, picture size): it does not change with the
sizes of the other splits, and a longer one begins with the shorter one.  The folder is complete or absent.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import DataError
from shared.phantom.anatomy import Picture, draw_case
from shared.phantom.draw import draw, encode
from shared.phantom.questions import QUESTIONS_PER_PICTURE, ask

SPLITS = ("train", "validation", "test")
DRAWING_VERSION = 3
"""Part of what a folder says of itself; raise it when the same arguments draw something else."""

MIN_SIZE, MAX_SIZE = 64, 1024
PICTURES_PER_ROW_GROUP = 100
STRING = {"dtype": "string", "_type": "Value"}
FEATURES = {"image_id": {"_type": "Image"}} | dict.fromkeys(("mode", "case_id", "question", "answer"), STRING)
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])),
        *(pa.field(name, pa.string()) for name in ("mode", "case_id", "question", "answer")),
    ]
)


@dataclass(frozen=True)
class Drawing:
    """The arguments of a set, as ``write_dataset`` takes them."""

    pictures: dict[str, int]
    seed: int
    size: int
    mistaken: float

    def mistaken_in(self, split: str) -> float:
        return self.mistaken if split == "train" else 0.0

    def identity(self, split: str) -> dict[str, object]:
        """What a split's file says of itself."""
        mistaken = self.mistaken_in(split)
        return {
            "version": DRAWING_VERSION,
            "split": split,
            "pictures": self.pictures[split],
            "seed": self.seed,
            "size": self.size,
            **({"mistaken": mistaken} if mistaken else {}),
        }

    def __str__(self) -> str:
        numbers = ", ".join(f"{split} {self.pictures[split]}" for split in SPLITS)
        mistaken = f", mistaken {self.mistaken:g}" if self.mistaken else ""
        return f"{numbers}, seed {self.seed}, size {self.size}{mistaken}, version {DRAWING_VERSION}"


def write_dataset(
    out: str | Path, *, pictures: Mapping[str, int], seed: int = 0, size: int = 128, mistaken: float = 0.0
) -> bool:
    """Draws a set into the folder ``out``, which appears when it is whole.

    ``pictures`` says how many pictures each of train, validation and test has.  A picture has five questions,
    so there are five times as many rows.  ``mistaken`` is the share of the short training answers that are those of
    another picture, as annotators err; the other splits have none.

    Returns  True; False where ``out`` already holds exactly this set, which is then left alone
    Raises   DataError  when an argument makes no sense, or ``out`` holds something else
    Holds    the same arguments give the same bytes; no case is in two splits
    """
    out = Path(out)
    _check(pictures, seed, size, mistaken)
    drawing = Drawing(dict(pictures), seed, size, mistaken)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if _holds(out, drawing):
            return False
        raise DataError(
            f"drawn set {out}: the path exists and does not hold the set asked for "
            f"({drawing}). Remove it, or draw into another folder."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.parent / f".{out.name}.{uuid.uuid4().hex}.tmp"
    unfinished.mkdir()
    try:
        for split in SPLITS:
            _write_split(unfinished / file_name(split), split, drawing)
        (unfinished / "README.md").write_text(_card(drawing), encoding="utf-8")
        os.rename(unfinished, out)
    except OSError:
        if not _holds(out, drawing):
            raise
        return False  # another process has drawn it meanwhile
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def is_drawn_otherwise(
    out: str | Path, *, pictures: Mapping[str, int], seed: int, size: int, mistaken: float
) -> bool:
    """Whether the folder holds a drawn set, and another one than these arguments give."""
    said = _said_in(Path(out))
    return said is not None and not _holds(Path(out), Drawing(dict(pictures), seed, size, mistaken))


def file_name(split: str) -> str:
    return f"{split}-00000-of-00001.parquet"


def split_pictures(seed: int, split: str, number: int) -> Iterator[Picture]:
    """The first ``number`` pictures of a split, case by case."""
    drawn = (picture for case in count() for picture in draw_case(seed, split, case))
    return (picture for _, picture in zip(range(number), drawn, strict=False))


def rows(
    picture: Picture, size: int, *, other: Picture | None = None, mistaken: float = 0.0
) -> list[dict[str, object]]:
    """A picture's rows, one for each question; ``mistaken`` as ``ask`` has it."""
    image = encode(draw(picture, size), picture.stream("store " + picture.modality))
    return [
        {
            "image_id": {"bytes": image, "path": picture.file_name},
            "mode": question.kind,
            "case_id": picture.case_id,
            "question": question.question,
            "answer": question.answer,
        }
        for question in ask(picture, other=other, mistaken=mistaken)
    ]


def _write_split(path: Path, split: str, drawing: Drawing) -> None:
    metadata = {
        "huggingface": json.dumps({"info": {"features": FEATURES}}),
        "phantom": json.dumps(drawing.identity(split)),
    }
    number, before = drawing.pictures[split], None
    # A picture's rows share its bytes: the dictionary holds them once, if its page may be large enough.
    with pq.ParquetWriter(
        path, SCHEMA.with_metadata(metadata), compression="zstd", dictionary_pagesize_limit=1 << 30
    ) as writer:
        group: list[dict[str, object]] = []
        for index, picture in enumerate(split_pictures(drawing.seed, split, number), 1):
            group += rows(picture, drawing.size, other=before, mistaken=drawing.mistaken_in(split))
            before = picture
            if index % PICTURES_PER_ROW_GROUP == 0 or index == number:
                writer.write_table(pa.Table.from_pylist(group, writer.schema))
                group = []


def _holds(out: Path, drawing: Drawing) -> bool:
    """Whether the folder says of itself that it was drawn with these arguments."""
    return _said_in(out) == [drawing.identity(split) for split in SPLITS]


def _said_in(out: Path) -> list[object] | None:
    """What the files of a drawn set say of themselves; None of any other folder."""
    try:
        return [json.loads(pq.read_schema(out / file_name(split)).metadata[b"phantom"]) for split in SPLITS]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, RecursionError):
        return None


def _check(pictures: Mapping[str, int], seed: int, size: int, mistaken: float) -> None:
    problems = []
    if set(pictures) != set(SPLITS):
        problems.append(f"splits {sorted(pictures)} given, {', '.join(SPLITS)} needed")
    problems += [f"{split} {n}: at least one picture is needed" for split, n in pictures.items() if n < 1]
    if seed < 0:
        problems.append(f"seed {seed}: a number from 0 is needed")
    if not MIN_SIZE <= size <= MAX_SIZE:
        problems.append(f"size {size}: {MIN_SIZE} to {MAX_SIZE} pixels are needed")
    if not 0 <= mistaken <= 1:
        problems.append(f"mistaken {mistaken}: a share from 0 to 1 is needed")
    if problems:
        raise DataError("drawn set: " + "; ".join(problems) + ".")


def _card(drawing: Drawing) -> str:
    pictures = drawing.pictures
    files = "\n".join(f"  - split: {split}\n    path: {split}-*.parquet" for split in SPLITS)
    features = "\n".join(
        f"  - name: {name}\n    dtype: {'image' if name == 'image_id' else 'string'}" for name in FEATURES
    )
    table = "\n".join(f"| {s} | {pictures[s]:,} | {pictures[s] * QUESTIONS_PER_PICTURE:,} |" for s in SPLITS)
    return f"""---
license: apache-2.0
task_categories:
- visual-question-answering
configs:
- config_name: default
  data_files:
{files}
dataset_info:
  features:
{features}
---

# A drawn visual question answering set

Pictures drawn by a program in the manner of CT, MR, ultrasound and radiographs, with questions whose answers
follow from them. No patient is shown and nothing here is of medical use: it exercises software that reads
medical sets with the columns of MedPix-VQA.

Drawn by `python -m shared.phantom`: {drawing}.

| split | pictures | rows |
| --- | --- | --- |
{table}

| column | content |
| --- | --- |
| `image_id` | the picture, PNG: 8-bit grey, RGB, RGBA or 16-bit grey |
| `mode` | `alignment`, a short question for one fact, or `from caption`, a question for a passage |
| `case_id` | the case; one has one picture, or two of MR; none is in two splits |
| `question` | with a leading blank now and then, as in MedPix-VQA |
| `answer` | 1 to about 60 words |

Sides are the patient's: the right side is at the left of the picture.
"""
