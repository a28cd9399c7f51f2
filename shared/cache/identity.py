"""What makes two caches, or a cache and a student, belong together.

Everything is compared by content: fingerprints of weights, tokenizer mapping, chat template and image
processor.  Names are kept for people and compared only to tell them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from shared.cache.format import ROWS_VERSION, canonical_json
from shared.errors import CacheMismatchError
from shared.recipes.policies import Policy, VisualGain
from shared.sparse import sampling_version

ASKED = ("in the cache", "asked for")  # what the two sides of a difference are called


class Record(BaseModel):
    """Base of everything in a manifest: immutable, strict, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TeacherIdentity(Record):
    """The model whose targets are stored; ``weights_fingerprint`` is over the values of its weights."""

    name: str
    revision: str | None
    weights_fingerprint: str
    dtype: str

    @property
    def label(self) -> str:
        """What to call it on a screen."""
        return self.name if self.revision is None else f"{self.name} at {self.revision}"


class InputsIdentity(Record):
    """How an example becomes tokens and pictures: what a student must share with its teacher.

    ``vocab_size`` is the number of ids a target may have: those of the tokenizer, not the width of the head.
    """

    tokenizer_fingerprint: str
    template_fingerprint: str
    image_processor_fingerprint: str
    vocab_size: Annotated[int, Field(gt=0, lt=1 << 31)]  # ids are int32
    max_answer_tokens: Annotated[int, Field(gt=0)] | None


class PromptIdentity(Record):
    """What else decides what is written around the texts: to say what differs where examples are not found.

    Examples are known by their keys, which depend on all of this.
    """

    system_prompt: str | None
    date: str | None  # None where the template prints none
    thinking: bool | None  # None where the template has no such switch
    train_on: str
    rendered: str  # hex, over what is written around question and answer

    def contradicts(self, other: PromptIdentity) -> bool:
        """Whether another text is written though the settings are the same, as with other special tokens."""
        settings = {"rendered", "train_on"}
        return self.rendered != other.rendered and self.model_dump(exclude=settings) == other.model_dump(
            exclude=settings
        )

    def differences(self, other: PromptIdentity, *, sides: tuple[str, str] = ASKED) -> list[str]:
        """One line for each, with both sides; what is written is named only where nothing else explains it."""
        found = _differences("prompt", self, other, sides=sides)
        if self.contradicts(other):
            return found
        return [line for line in found if not line.startswith("prompt.rendered")]


class TargetsIdentity(Record):
    """What was kept of the teacher's distributions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    policy: Policy
    temperatures: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1)
    ]
    seed: int
    label_log_prob: bool = False  # of each position, as a column; False is not written down, as it was before
    visual_gain: VisualGain | None = None  # as label_log_prob: None is not written down
    sampling: Literal[1, 2] = 1  # of shared.sparse.sampling_version; 1 is not written down, as it was before

    @classmethod
    def of_capture(
        cls,
        policy: Policy,
        *,
        temperatures: tuple[float, ...],
        seed: int,
        label_log_prob: bool = False,
        visual_gain: VisualGain | None = None,
    ) -> Self:
        """What is captured now: drawn as ``sparsify`` draws."""
        return cls(
            policy=policy,
            temperatures=temperatures,
            seed=seed,
            label_log_prob=label_log_prob,
            visual_gain=visual_gain,
            sampling=sampling_version(policy, temperatures),
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the shards, those that not every cache has."""
        asked = {"label_log_prob": self.label_log_prob, "label_gain": self.visual_gain is not None}
        return tuple(name for name, is_there in asked.items() if is_there)

    @model_serializer(mode="wrap")
    def _without_what_older_caches_do_not_have(
        self, serialize: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        stored: dict[str, Any] = serialize(self)
        if stored.get("sampling") == 1:
            del stored["sampling"]
        if stored.get("label_log_prob") is False:
            del stored["label_log_prob"]
        if stored.get("visual_gain", self) is None:
            del stored["visual_gain"]
        return stored


class DataSource(Record):
    """A split whose rows were captured; ``rows`` counts all of them, with skipped and equal ones.

    ``written_by`` are the models that wrote answers in it, as its rows say.
    """

    name: str
    split: str
    fingerprint: str
    rows: Annotated[int, Field(ge=0)]
    written_by: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _without_nobody(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        stored: dict[str, Any] = serialize(self)
        if not self.written_by:
            stored.pop("written_by", None)
        return stored


@dataclass(frozen=True)
class Comparison:
    """What differs: ``refusals`` forbid the use, ``notices`` are worth a line on the screen."""

    refusals: tuple[str, ...]
    notices: tuple[str, ...] = ()

    def require(self, *, where: str, remedy: str) -> None:
        """Raises CacheMismatchError with every refusal, each with both sides."""
        if self.refusals:
            listed = "\n".join(f"  - {line}" for line in self.refusals)
            raise CacheMismatchError(f"{where}: {len(self.refusals)} difference(s):\n{listed}\n{remedy}")


class Identity(Record):
    """Whose targets these are, of which inputs and data, kept how."""

    teacher: TeacherIdentity
    inputs: InputsIdentity
    targets: TargetsIdentity
    data: tuple[DataSource, ...]
    prompt: PromptIdentity | None = None  # as the rows captured last have it; older caches do not say

    @model_serializer(mode="wrap")
    def _without_an_unknown_prompt(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        stored: dict[str, Any] = serialize(self)
        if stored.get("prompt", self) is None:
            del stored["prompt"]
        return stored

    def content(self) -> dict[str, Any]:
        """What a row depends on, beside its example: no names, no data.  Stored in every shard."""
        stored = self.model_dump(
            mode="json", exclude={"data": True, "prompt": True, "teacher": {"name", "revision"}}
        )
        return {"format_version": ROWS_VERSION, **stored}

    def digest(self) -> str:
        """Hex digest of :meth:`content`: equal for captures whose rows may lie in one cache."""
        return hashlib.sha256(canonical_json(self.content()).encode()).hexdigest()

    def compare_capture(self, other: Identity) -> Comparison:
        """Whether rows captured as ``other`` may join a cache captured as this one.  Data may differ."""
        refusals = [
            *_differences("teacher", self.teacher, other.teacher, skip={"name", "revision"}),
            *_differences("inputs", self.inputs, other.inputs),
            *_differences("targets", self.targets, other.targets),
            *self._prompts_apart(other, ASKED),
        ]
        names = _differences("teacher", self.teacher, other.teacher, skip={"weights_fingerprint", "dtype"})
        return Comparison(tuple(refusals), tuple(names))

    def compare_beside(
        self, other: Identity, *, sides: tuple[str, str], many_teachers: bool, same_rows: bool
    ) -> Comparison:
        """Whether a student may read caches captured as these together.

        sides          what the two are called, such as ``in caches/monday``
        many_teachers  they may be of different teachers, and these may see pictures differently, as a student may
        same_rows      their targets are added up: seeds may differ, and the other temperatures of each do not matter
        """
        weights, names = {"weights_fingerprint", "dtype"}, {"name", "revision"}
        pictures = {"image_processor_fingerprint"}
        others = set(InputsIdentity.model_fields) - pictures
        refusals, notices = [], []
        if many_teachers:
            notices += _differences("inputs", self.inputs, other.inputs, skip=others, sides=sides)
        else:
            refusals += _differences("teacher", self.teacher, other.teacher, skip=names, sides=sides)
            refusals += _differences("inputs", self.inputs, other.inputs, skip=others, sides=sides)
            notices += _differences("teacher", self.teacher, other.teacher, skip=weights, sides=sides)
        refusals += _differences("inputs", self.inputs, other.inputs, skip=pictures, sides=sides)
        free = {"temperatures", "seed", "sampling", "label_log_prob", "visual_gain"} if same_rows else set()
        refusals += _differences("targets", self.targets, other.targets, skip=free, sides=sides)
        return Comparison((*refusals, *self._prompts_apart(other, sides)), tuple(notices))

    def _prompts_apart(self, other: Identity, sides: tuple[str, str]) -> list[str]:
        """Other days would be other examples; the same settings with another text are other tokenizers."""
        if self.prompt is None or other.prompt is None:
            return []
        others = set(PromptIdentity.model_fields) - {"date"}
        found = _differences("prompt", self.prompt, other.prompt, skip=others, sides=sides)
        return found + (
            self.prompt.differences(other.prompt, sides=sides)
            if self.prompt.contradicts(other.prompt)
            else []
        )

    def compare_student(
        self,
        inputs: InputsIdentity,
        *,
        temperature: float,
        policy: Policy | None = None,
        seed: int | None = None,
        temperatures: Sequence[float] | None = None,
        label_log_prob: bool = False,
        visual_gain: VisualGain | None = None,
    ) -> Comparison:
        """Whether a student with these inputs may train on this cache.

        A student may see its pictures at another resolution than its teacher did, so a differing image
        processor is a notice.  ``policy``, ``seed`` and ``temperatures``: those that the recipe names, None
        where it names none; the cache may hold more temperatures than those, and columns that nobody needs.
        """
        refusals = _differences("inputs", self.inputs, inputs, skip={"image_processor_fingerprint"})
        captured = self.targets.temperatures
        if temperature not in captured:
            listed = ", ".join(map(str, captured))
            refusals.append(f"temperature: {listed} in the cache, {temperature} asked for")
        if policy is not None and policy != self.targets.policy:
            refusals.append(_both_sides("targets.policy", _plain(self.targets.policy), _plain(policy)))
        if seed is not None and seed != self.targets.seed:
            refusals.append(_both_sides("targets.seed", _plain(self.targets.seed), _plain(seed)))
        if temperatures is not None and not set(temperatures) <= set(captured):
            refusals.append(_both_sides("targets.temperatures", _plain(captured), _plain(list(temperatures))))
        if label_log_prob and not self.targets.label_log_prob:
            refusals.append(_both_sides("targets.label_log_prob", "false", "true"))
        if visual_gain not in (None, self.targets.visual_gain):
            refusals.append(
                _both_sides("targets.visual_gain", _plain(self.targets.visual_gain), _plain(visual_gain))
            )
        others = set(InputsIdentity.model_fields) - {"image_processor_fingerprint"}
        return Comparison(tuple(refusals), tuple(_differences("inputs", self.inputs, inputs, skip=others)))


def _differences(
    label: str,
    stored: BaseModel,
    other: BaseModel,
    *,
    skip: set[str] | None = None,
    sides: tuple[str, str] = ASKED,
) -> list[str]:
    names = [name for name in type(stored).model_fields if name not in (skip or set())]
    pairs = [(name, getattr(stored, name), getattr(other, name)) for name in names]
    return [
        _both_sides(f"{label}.{name}", _plain(ours), _plain(theirs), sides)
        for name, ours, theirs in pairs
        if ours != theirs
    ]


def _both_sides(label: str, stored: str, other: str, sides: tuple[str, str] = ASKED) -> str:
    return f"{label}: {stored} {sides[0]}, {other} {sides[1]}"


def _plain(value: Any) -> str:
    return canonical_json(value.model_dump(mode="json") if isinstance(value, BaseModel) else value)
