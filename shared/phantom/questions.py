"""The questions about a picture, and their answers.

Two kinds, as in MedPix-VQA's column ``mode``: ``alignment`` asks for one fact and is answered in a few words,
``from caption`` asks for a passage.  A question has several phrasings.  As in MedPix-VQA, a third of the
short questions begin with a blank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shared.phantom import wording
from shared.phantom.anatomy import Picture
from shared.phantom.studies import STUDIES

Kind = Literal["alignment", "from caption"]
NUM_SHORT, NUM_LONG = 4, 1
QUESTIONS_PER_PICTURE = NUM_SHORT + NUM_LONG
PLANES = tuple(sorted({study.plane for study in STUDIES}))
MODALITIES = {"CT": "a CT", "T1": "an MR", "T2": "an MR", "US": "an ultrasound", "XR": "an X-ray"}


@dataclass(frozen=True)
class Question:
    kind: Kind
    question: str
    answer: str


Answer = Callable[[Picture, np.random.Generator], str | None]


@dataclass(frozen=True)
class Topic:
    """What can be asked: phrasings, and the answer, None where the question makes no sense.

    A phrasing may hold ``{value}``; then ``value`` draws it, and the answer is Yes where it is ``truth``.
    """

    phrasings: tuple[str, ...]
    answer: Answer | None = None
    value: Answer | None = None
    truth: Answer | None = None
    weight: float = 1.0


def ask(picture: Picture, *, other: Picture | None = None, mistaken: float = 0.0) -> list[Question]:
    """The questions about a picture, short and long, each topic at most once.

    mistaken  share of the short answers that are those of ``other``, as if its picture had been looked at; None: none
    """
    rng = picture.stream("questions " + picture.modality)
    mistakes = picture.stream("mistakes " + picture.modality)
    seen = [other if mistakes.random() < mistaken else None for _ in SHORT]
    short = [
        _asked("alignment", topic, picture, rng, seen=one) for topic, one in zip(SHORT, seen, strict=True)
    ]
    long = [_asked("from caption", topic, picture, rng) for topic in LONG]
    return _some(short, SHORT, NUM_SHORT, rng) + _some(long, LONG, NUM_LONG, rng)


def _asked(
    kind: Kind, topic: Topic, picture: Picture, rng: np.random.Generator, *, seen: Picture | None = None
) -> Question | None:
    """A question about the picture; where ``seen`` has an answer to it, that one."""
    phrasing = topic.phrasings[rng.integers(len(topic.phrasings))]
    value = None
    if topic.value is not None:
        value = topic.value(picture, rng)
        phrasing = phrasing.format(value=value)
    answer = _answer(topic, value, picture, rng)
    if seen is not None:
        answer = answer and (
            _answer(topic, value, seen, seen.stream("mistaken " + picture.case_id)) or answer
        )
    blank = " " if kind == "alignment" and rng.random() < 1 / 3 else ""
    return Question(kind, blank + phrasing, answer) if answer else None


def _answer(topic: Topic, value: str | None, picture: Picture, rng: np.random.Generator) -> str | None:
    """To a question that holds ``value``, if it has one; None where it makes no sense."""
    if topic.truth is not None:
        return "Yes" if value == topic.truth(picture, rng) else "No"
    assert topic.answer is not None
    return topic.answer(picture, rng)


def _some(
    questions: list[Question | None], topics: tuple[Topic, ...], number: int, rng: np.random.Generator
) -> list[Question]:
    weights = np.array([topic.weight if q else 0.0 for q, topic in zip(questions, topics, strict=True)])
    chosen = rng.choice(len(questions), number, replace=False, p=weights / weights.sum())
    return [question for i in chosen if (question := questions[i])]


def _side(picture: Picture, rng: np.random.Generator) -> str:
    return picture.lesion.site.side if picture.lesion else "No lesion"


def _organ(picture: Picture, rng: np.random.Generator) -> str | None:
    return picture.lesion.site.organ.capitalize() if picture.lesion else None


def _place(picture: Picture, rng: np.random.Generator) -> str | None:
    return wording.capital(picture.lesion.site.name) if picture.lesion else None


def _brightness(picture: Picture, rng: np.random.Generator) -> str | None:
    return {1: "Brighter", -1: "Darker"}.get(picture.sign)


def _margin(picture: Picture, rng: np.random.Generator) -> str | None:
    return picture.lesion.finding.margin.capitalize() if picture.lesion else None


def _diameter(picture: Picture, rng: np.random.Generator) -> str | None:
    return wording.centimetres(picture.lesion.diameter_cm) if picture.lesion else None


def _size_class(picture: Picture, rng: np.random.Generator) -> str | None:
    return wording.size_class(picture.lesion.diameter_cm).capitalize() if picture.lesion else None


def _diagnosis(picture: Picture, rng: np.random.Generator) -> str:
    return wording.capital(wording.diagnosis(picture, rng))


def _plane(picture: Picture, rng: np.random.Generator) -> str:
    return picture.study.plane.capitalize()


def _modality(picture: Picture, rng: np.random.Generator) -> str:
    return wording.MODALITY_NAMES[picture.modality]


def _examination(picture: Picture, rng: np.random.Generator) -> str:
    return f"{wording.capital(picture.study.shown)} {wording.MODALITY_NAMES[picture.modality]}"


def _either(truth: Callable[[Picture], str], options: tuple[str, ...]) -> Answer:
    """The truth, or as often another option."""

    def draw(picture: Picture, rng: np.random.Generator) -> str:
        right = truth(picture)
        others = [option for option in options if option != right]
        return right if rng.random() < 0.5 else others[rng.integers(len(others))]

    return draw


def _noted(picture: Picture, rng: np.random.Generator) -> str:
    return picture.study.extra.name


SHORT = (
    Topic(
        (
            "Which modality is this?",
            "What imaging technique was used?",
            "How was this picture obtained?",
            "Name the type of study.",
        ),
        _modality,
        weight=3.0,
    ),
    Topic(
        ("What is the plane of the image?", "In what plane is this image?", "Name the plane."),
        _plane,
        weight=3.0,
    ),
    Topic(
        ("Give modality and plane.", "What are the modality and the plane of this study?"),
        lambda picture, rng: f"{_modality(picture, rng)}, {picture.study.plane}",
        weight=2.0,
    ),
    Topic(
        ("Which examination is this?", "Name the examination.", "What was examined, and how?"),
        _examination,
        weight=3.0,
    ),
    Topic(
        ("Is this image {value}?", "Is the plane {value}?"),
        value=_either(lambda picture: picture.study.plane, PLANES),
        truth=lambda picture, rng: picture.study.plane,
        weight=0.2,
    ),
    Topic(
        ("Is this {value} study?", "Was {value} study performed?"),
        value=_either(lambda picture: MODALITIES[picture.modality], tuple(sorted(set(MODALITIES.values())))),
        truth=lambda picture, rng: MODALITIES[picture.modality],
        weight=0.2,
    ),
    Topic(
        ("Which region of the body is shown?", "What part of the body is this?", "Name the body region."),
        lambda picture, rng: picture.study.region.capitalize(),
        weight=3.0,
    ),
    Topic(
        ("Is there a focal lesion?", "Does the image show a focal lesion?"),
        lambda picture, rng: "Yes" if picture.lesion else "No",
        weight=0.7,
    ),
    Topic(
        (
            "On which side is the lesion?",
            "Which side of the patient is affected?",
            "Is the lesion on the right or on the left?",
        ),
        _side,
        weight=0.7,
    ),
    Topic(("Which organ or structure is affected?", "What does the lesion lie in?"), _organ, weight=2.0),
    Topic(
        ("Where is the lesion?", "Give the location of the lesion.", "Where does the abnormality lie?"),
        _place,
        weight=0.7,
    ),
    Topic(
        (
            "Is the lesion brighter or darker than its surroundings?",
            "How does the brightness of the lesion compare with the tissue around it?",
        ),
        _brightness,
        weight=0.7,
    ),
    Topic(
        ("Is the margin of the lesion smooth or irregular?", "What kind of margin does the lesion have?"),
        _margin,
        weight=0.5,
    ),
    Topic(
        (
            "What is the diameter of the lesion in centimetres?",
            "How many centimetres does the lesion measure?",
        ),
        _diameter,
        weight=0.3,
    ),
    Topic(
        (
            "Is the lesion small (under 2 cm), medium, or large (over 4 cm)?",
            "Small, medium or large: how big is the lesion?",
        ),
        _size_class,
        weight=0.5,
    ),
    Topic(
        ("What is the diagnosis?", "What is the likely diagnosis?", "Name the main condition."),
        _diagnosis,
        weight=0.4,
    ),
    Topic(
        ("Is there {value}?", "Does the image show {value}?"),
        value=_noted,
        truth=lambda picture, rng: picture.study.extra.name if picture.has_extra else None,
        weight=0.2,
    ),
)

LONG = (
    Topic(
        (
            "Describe the image.",
            "Describe what you see in this picture.",
            "Give a full description of this image.",
        ),
        wording.description,
        weight=0.3,
    ),
    Topic(("Write a legend for this figure.", "Caption this image.", "What is shown here?"), wording.caption),
    Topic(
        ("What are the findings?", "Describe the findings.", "Report the abnormal findings."),
        wording.finding,
    ),
    Topic(
        ("Report this study.", "Give technique, finding and impression.", "Write a brief radiology report."),
        wording.report,
        weight=0.3,
    ),
    Topic(
        (
            "What would you consider in the differential?",
            "Give a differential diagnosis.",
            "What else could this be?",
        ),
        wording.differential,
        weight=0.7,
    ),
    Topic(
        ("What is your opinion of this study?", "Interpret this image.", "What do the findings suggest?"),
        lambda picture, rng: f"{wording.finding(picture, rng)} {wording.opinion(picture, rng)}",
    ),
)
