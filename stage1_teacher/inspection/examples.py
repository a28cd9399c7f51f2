"""Examples of a cache beside what it holds of them: pictures, kinds of questions, the teacher's likeliest tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from shared.cache import CacheReader, Row
from shared.capture.planning import open_rows
from shared.data.processing import ExampleProcessor
from shared.data.rows import Example
from shared.errors import DataError, TeachonceError
from shared.progress import progress
from shared.recipes import Recipe
from shared.reports.conversations import spoken
from shared.reports.figures import Drawing
from shared.reports.page import Section
from shared.reports.pieces import beside, card, cards, figure, figures, html_table, paragraph, table
from shared.reports.text import escape, shorten, token_text
from shared.same_prompts import open_processor_of
from stage1_teacher.inspection.pictures import by_kind_table, gains_of_answers
from stage1_teacher.inspection.plots import by_kind
from stage1_teacher.inspection.positions import positions_of, top_entries

NUM_LOOKED_AT = 512
NUM_SHOWN = 6  # at each end
NUM_SPELLED = 4  # examples shown token by token
MAX_SPELLED = 24  # tokens of one
NUM_TOP = 4  # tokens at a position
MAX_TOKEN = 24  # characters of one
NO_KIND = "(none)"


@dataclass(frozen=True)
class Shown:
    """A row of the data set beside what the cache holds of it."""

    example: Example
    row: Row

    @property
    def kind(self) -> str:
        return self.example.kind or NO_KIND

    @property
    def entropy(self) -> float:
        return float(self.row.entropy_sums[0]) / self.row.num_positions

    @property
    def cross_entropy(self) -> float:
        return self.row.ce_sum / self.row.num_positions


def example_sections(reader: CacheReader, recipe: Recipe, *, seed: int) -> list[Section]:
    """Raises   TeachonceError  when data or tokenizer are not there any more"""
    processor = open_tokenizer(recipe)
    found = look_at(reader, recipe, processor, seed=seed)
    if not found:
        return [Section("Examples", [paragraph("None of the rows that were looked at is in the cache.")])]
    surest, least = (
        cards([_card(one, recipe) for one in shown[:NUM_SHOWN]]) for shown in (found, found[::-1])
    )
    return [
        _composition(reader, found),
        _token_by_token(reader, recipe, processor, found),
        Section("Where the teacher is surest", [surest]),
        Section("Where it is least sure", [least]),
        *_by_gain(found, recipe),
    ]


def look_at(reader: CacheReader, recipe: Recipe, processor: ExampleProcessor, *, seed: int) -> list[Shown]:
    """Random rows of the data that the cache holds with positions, whose pictures can be shown; surest first."""
    rows = open_rows(recipe)
    total = sum(len(split) for split in rows.splits)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:NUM_LOOKED_AT].tolist()
    found: dict[bytes, Example] = {}
    for number in progress(order, desc="reading examples", unit="ex", leave=False):
        split, row = rows.find(number)
        try:
            example = split[row]
        except DataError:
            continue
        key = processor.key(example)
        if key in reader:
            found.setdefault(key, example)
    held = reader.rows(list(found))
    both = zip(found.values(), held, strict=True)
    shown = [Shown(example, row) for example, row in both if row.num_positions]
    return sorted(shown, key=lambda one: one.entropy)


def open_tokenizer(recipe: Recipe) -> ExampleProcessor:
    """The teacher's, or the student's where the teacher is gone: keys and tokens are the same."""
    assert recipe.teacher is not None
    try:
        return open_processor_of(recipe, recipe.teacher.model, revision=recipe.teacher.revision)
    except TeachonceError:
        if recipe.student.other_vocabulary:
            raise
        return open_processor_of(recipe, recipe.student.model, revision=recipe.student.revision)


def _composition(reader: CacheReader, found: list[Shown]) -> Section:
    kinds = Counter(one.kind for one in found)
    rows = []
    for kind, number in kinds.most_common():
        of_kind = [one for one in found if one.kind == kind]
        positions = sum(one.row.num_positions for one in of_kind)
        entropy = sum(float(one.row.entropy_sums[0]) for one in of_kind) / positions
        ce = sum(one.row.ce_sum for one in of_kind) / positions
        size = sum(len(one.row.payload) for one in of_kind) / positions
        rows.append([kind, str(number), f"{positions:,}", f"{entropy:.3f}", f"{ce:.3f}", f"{size:.1f}"])
    head = ["kind", "examples", "positions", "entropy (nats)", "cross-entropy (nats)", "bytes per position"]
    caption = f"{len(found)} random examples; means over positions"
    pieces = [table(head, rows, caption=caption)]
    drawing = _kinds_drawn(reader, found)
    if drawing is not None and len(kinds) > 1:
        pieces.append(figures([figure(drawing)]))
    return Section("Kinds of questions", pieces)


def _by_gain(found: list[Shown], recipe: Recipe) -> list[Section]:
    """Which answers need their pictures; nothing where the cache does not say."""
    seen = [one for one in found if one.row.label_gain is not None and one.example.images]
    if not seen:
        return []
    gains_R = gains_of_answers([one.row for one in seen])
    order = np.argsort(-gains_R, kind="stable")
    most, least = (
        cards([_card(seen[place], recipe) for place in places[:NUM_SHOWN]]) for places in (order, order[::-1])
    )
    return [
        Section(
            "Pictures by kind of question",
            [by_kind_table([one.kind for one in seen], [one.row for one in seen])],
        ),
        Section("Where the pictures matter most", [most]),
        Section("Where they matter least, or mislead", [least]),
    ]


def _kinds_drawn(reader: CacheReader, found: list[Shown]) -> Drawing | None:
    rows = [one.row for one in found]
    positions = positions_of(rows, reader.targets(rows))
    return None if positions is None else by_kind([one.kind for one in found], positions)


def _token_by_token(
    reader: CacheReader, recipe: Recipe, processor: ExampleProcessor, found: list[Shown]
) -> Section:
    """A few examples, from the surest to the least sure."""
    places = np.unique(np.linspace(0, len(found) - 1, NUM_SPELLED).round().astype(int))
    pieces = [
        paragraph(
            "Each line is a token of the answer, with the tokens that the teacher held likeliest in its place. "
            "Only kept tokens are known. \u2423 stands for a blank."
        )
    ]
    for place in places.tolist():
        one = found[place]
        pieces.append(beside(_card(one, recipe), _spelled(reader, processor, one)))
    return Section("Token by token", pieces)


def _spelled(reader: CacheReader, processor: ExampleProcessor, one: Shown) -> str:
    targets = reader.targets([one.row]).slice(0, min(one.row.num_positions, MAX_SPELLED))
    labels = one.row.answer_ids.tolist()

    def token(number: int) -> str:
        text = processor.tokenizer.decode([number], skip_special_tokens=False)
        return f'<bdi class="token">{escape(shorten(token_text(text), MAX_TOKEN))}</bdi>'

    lines = []
    for label, entries in zip(labels, top_entries(targets, targets.num_entries), strict=False):
        probs = dict(entries)
        is_first = bool(entries) and entries[0][0] == label
        mark = (
            '<span class="right">&#10003; first</span>' if is_first else '<span class="wrong">&#10007;</span>'
        )
        own = f"{mark} {probs[label]:.1%}" if label in probs else f"{mark} not kept"
        top = [
            f'<span class="share" style="--part:{prob:.0%}">{token(number)} {prob:.1%}</span>'
            for number, prob in entries[:NUM_TOP]
        ]
        lines.append([token(label), own, *top, *[""] * (NUM_TOP - len(top))])
    head = ["answer", "its probability", "likeliest", *(f"{place}." for place in range(2, NUM_TOP + 1))]
    cut = f", the first {MAX_SPELLED} of {len(labels)} tokens" if len(labels) > MAX_SPELLED else ""
    return html_table(head, lines, caption=f"What the teacher expected{cut}")


def _card(one: Shown, recipe: Recipe) -> str:
    values: dict[str, str] = {
        **spoken(one.example),
        "answer": one.example.answer,
        "teacher": f"entropy {one.entropy:.3f}, cross-entropy {one.cross_entropy:.3f} nats per position",
        "kept": f"{one.row.num_positions} positions, {len(one.row.payload)} bytes",
    }
    if one.row.label_gain is not None:
        values["pictures"] = f"gain {float(gains_of_answers([one.row])[0]):.2f} nats over the answer"
    return card(
        one.example.images, values, background=recipe.data.background, alt=picture_alt(one.example.question)
    )


def picture_alt(question: str) -> str:
    return f"The picture that was asked about: {shorten(question, 120)}"
