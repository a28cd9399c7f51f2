"""Examples that tests share."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from shared.data.rows import Example

QUESTIONS = (
    "Which modality is shown?",
    "Which plane is this?",
    "What is the main finding?",
    "Describe the picture.",
)
ANSWERS = (
    "CT",
    "axial",
    "A mass of 3 cm in the liver,\nwith a dark rim.",
    "MR of the brain \u2013 T1W, no contrast.",
)

PLAIN_CHAT = (
    "{% for m in messages %}{{ m.role | upper }}:"
    "{% for p in m.content %}{{ ' <|image_pad|>' if p.type == 'image' else ' ' + p.text }}{% endfor %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def encoded_picture(seed: int, size: tuple[int, int] = (48, 40), format: str = "PNG") -> bytes:
    """A file of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def make_examples(count: int) -> list[Example]:
    return [
        Example.single(
            image=encoded_picture(index, size=(40 + 24 * (index % 3), 48)),
            question=QUESTIONS[index % 4],
            answer=f"{ANSWERS[index % 4]} {index}",
            kind=("alignment", "from caption")[index % 2],
            case=f"MPX{index // 2}",
            index=index,
        )
        for index in range(count)
    ]


def write_vqa_folder(folder: Path, *, num_train: int = 12, num_validation: int = 4) -> Path:
    """A Parquet folder with MedPix's columns."""
    rows = make_examples(num_train + num_validation)
    texts = {name: datasets.Value("string") for name in ("mode", "case_id", "question", "answer")}
    features = datasets.Features({"image_id": datasets.Image(), **texts})
    folder.mkdir(parents=True, exist_ok=True)
    for split, some in (("train", rows[:num_train]), ("validation", rows[num_train:])):
        table = {
            "image_id": [{"bytes": row.images[0], "path": None} for row in some],
            "mode": [row.kind for row in some],
            "case_id": [row.case for row in some],
            "question": [row.question for row in some],
            "answer": [row.answer for row in some],
        }
        data = datasets.Dataset.from_dict(table, features=features)
        data.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder
