"""What runs were asked: scores by split and kind, and each question with the answers of all side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from shared.data.rows import Example, VqaSplit, open_split
from shared.errors import DataError, TeachonceError
from shared.recipes import Recipe, Split, load_recipe
from shared.reports.conversations import spoken
from shared.reports.page import Section
from shared.reports.pieces import Judged, card, cards, heading, paragraph, table
from shared.reports.text import shorten
from stage2_student.evaluation.answer_metrics import Interval
from stage2_student.evaluation.evaluated import LABELS, STUDENT, UNTRAINED
from stage2_student.evaluation.run_records import RunRecord, labels
from stage2_student.evaluation.scores import read_predictions, read_scores
from stage2_student.runs.run_folder import RunFolder

NUM_SPREAD = 12  # questions, spread evenly over those asked
NUM_DISPUTED = 6  # and some that the models answer differently
CLEARLY = 0.3  # difference of token F1 between answers that are not short

Line = dict[str, Any]  # what one model answered, or its scores


@dataclass
class Question:
    """Asked of one or more models, with its picture's split and row in the data of one of the runs."""

    asked: Line
    run: RunRecord
    answers: dict[str, Line] = field(default_factory=dict)

    @property
    def is_disputed(self) -> bool:
        """Whether one model is right, or clearly nearer, and another is not; untrained ones do not count."""
        lines = [line for name, line in self.answers.items() if not name.startswith(UNTRAINED)]
        if self.asked["is_short"]:
            return len({line["is_right"] for line in lines}) > 1
        scores = [line["token_f1"] for line in lines]
        return max(scores, default=0.0) - min(scores, default=0.0) > CLEARLY


def answer_sections(runs: Sequence[RunRecord]) -> list[Section]:
    """One for each split of which questions were asked, at the end of training or later by ``evaluate``."""
    sections = []
    for split in get_args(Split):
        pieces = _split_pieces(runs, split)
        if pieces:
            sections.append(Section(f"Answers, {split} split", pieces))
    none = [paragraph("None were asked: `train-student evaluate` does.")]
    return sections or [Section("Answers", none)]


def _split_pieces(runs: Sequence[RunRecord], split: Split) -> list[str]:
    found: dict[tuple[Any, ...], Question] = {}
    scores: dict[str, dict[str, Any]] = {}
    for name, run in zip(labels(runs), runs, strict=True):
        path = RunFolder(run.path).predictions(split)
        if not path.exists():
            continue
        for one in read_scores(path):
            _add(scores, name if one["model"] == STUDENT else one["model"], name, one)
        for line in read_predictions(path):
            key = tuple(line[part] for part in ("row", "image_sha256", "question", "reference"))
            question = found.setdefault(key, Question(line, run))
            _add(question.answers, name if line["model"] == STUDENT else line["model"], name, line)
    if not found:
        return []
    listed = _students_first(scores)
    tables = [_scores(listed), *_scores_by_kind(listed)]
    return tables + _shown(list(found.values()), split)


def _add(known: dict[str, Line], name: str, run: str, new: Line) -> None:
    """References are named once where runs share them, and by their run where they differ."""
    if known.setdefault(name, new) != new:
        known[f"{name} of {run}"] = new


def _students_first(lines: dict[str, Line]) -> list[tuple[str, Line]]:
    return sorted(lines.items(), key=lambda pair: pair[1]["model"] != STUDENT)


def _scores(scores: Sequence[tuple[str, Line]]) -> str:
    head = ["model", "questions", *LABELS.values(), "CE", "KL"]
    rows = [
        [
            name,
            str(one["num_examples"]),
            *_intervals(one),
            *("-" if one[loss] is None else f"{one[loss]:.4f}" for loss in ("ce", "kl")),
        ]
        for name, one in scores
    ]
    return table(
        head, rows, caption="Scores, with 95 % intervals over pictures. CE and KL in nats per position"
    )


def _scores_by_kind(scores: Sequence[tuple[str, Line]]) -> list[str]:
    """A table; none where the data have no kinds."""
    kinds = dict.fromkeys(kind for _, one in scores for kind in one.get("by_kind", {}))
    rows = []
    for kind in kinds:
        for name, one in scores:
            if (of_kind := one.get("by_kind", {}).get(kind)) is not None:
                count = (of_kind["exact_match"] or {}).get("count", 0)
                rows.append([kind, name, str(count), *_intervals(of_kind)])
    head = ["kind of question", "model", "questions", *LABELS.values()]
    return [table(head, rows, caption="The same by kind of question")] if rows else []


def _intervals(scores: dict[str, Any]) -> list[str]:
    return [Interval(**scores[name]).text() if scores[name] else "-" for name in LABELS]


def _shown(questions: list[Question], split: Split) -> list[str]:
    """Some spread evenly over all, then some on which models do not agree."""
    questions = sorted(questions, key=lambda one: one.asked["row"])
    spread = spread_evenly(questions, NUM_SPREAD)
    disputed = [one for one in questions if one.is_disputed and one not in spread][:NUM_DISPUTED]
    pictures = _Pictures(split)
    pieces = []
    parts = {"Some questions, spread evenly": spread, "Where the models disagree": disputed}
    for title, chosen in parts.items():
        shown = [found for one in chosen if (found := pictures.card(one)) is not None]
        if shown:
            pieces += [heading(title), cards(shown)]
    return pieces + [paragraph(note) for note in pictures.notes()]


def spread_evenly(questions: Sequence[Question], number: int) -> list[Question]:
    """So many of them, from the beginning to the end; all where there are no more."""
    number = min(number, len(questions))
    return [questions[place * len(questions) // number] for place in range(number)]


class _Pictures:
    """Of one split, from the data of the runs, as long as these still have them."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._opened: dict[Any, tuple[Recipe, VqaSplit] | TeachonceError] = {}
        self._num_missing = 0

    def card(self, question: Question) -> str | None:
        """None where the picture is not there, or not the one that was asked about."""
        opened = self._open(question.run)
        if isinstance(opened, TeachonceError):
            return None
        recipe, examples = opened
        example = self._example(examples, question.asked)
        if example is None:
            self._num_missing += 1
            return None
        asked = question.asked
        values: dict[str, str | Judged] = {**spoken(example), "reference": asked["reference"]}
        values |= {name: _judged(line) for name, line in _students_first(question.answers)}
        alt = f"The picture that was asked about: {shorten(asked['question'], 120)}"
        return card(example.images, values, background=recipe.data.background, alt=alt)

    def notes(self) -> list[str]:
        """Why pictures are missing."""
        found = [str(error) for error in self._opened.values() if isinstance(error, TeachonceError)]
        if self._num_missing:
            found.append(f"{self._num_missing} picture(s) are not those of the data any more.")
        return list(dict.fromkeys(found))

    def _open(self, run: RunRecord) -> tuple[Recipe, VqaSplit] | TeachonceError:
        if run.path not in self._opened:
            try:
                recipe = load_recipe(RunFolder(run.path).recipe)
                self._opened[run.path] = (recipe, open_split(recipe.data, self._split))
            except TeachonceError as error:
                self._opened[run.path] = error
        return self._opened[run.path]

    def _example(self, examples: VqaSplit, asked: Line) -> Example | None:
        if not asked["row"] < len(examples):
            return None
        try:
            example = examples[asked["row"]]
        except DataError:
            return None
        return example if example.pictures_sha256 == asked["image_sha256"] else None


def _judged(line: Line) -> Judged:
    """Right or wrong, where there is one way to say it; else how near the words are."""
    cut = ["cut"] if line.get("is_cut") else []  # at max_new_tokens
    if line["is_short"] or line["is_right"]:
        return Judged(line["answer"], line["is_right"], *cut)
    return Judged(line["answer"], None, ", ".join([f"token F1 {line['token_f1']:.0%}", *cut]))
