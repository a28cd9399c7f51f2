"""Examples that tests share."""

from __future__ import annotations

import io

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
