"""The student, and how it learns."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.recipes.policies import DEFAULT_TAIL, TAIL_MODES
from shared.recipes.schema import Section
from shared.recipes.sections.types import (
    Beta,
    Dtype,
    Fraction,
    NonNegativeInt,
    Place,
    PositiveFloat,
    PositiveInt,
    Temperature,
)


class FreezeConfig(Section):
    """Parts of the student that are not trained."""

    vision: bool = False
    """The vision tower."""
    audio: bool = False
    """The audio tower."""
    connector: bool = False
    """What maps pictures into the language model's space."""
    language: bool = False
    """The language model and its head."""


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) instead of the student's own weights; extra ``lora``."""

    rank: Annotated[int, Field(gt=0, le=65536)] = 16
    """Inner width of an adapter."""
    alpha: PositiveFloat = 32.0
    """An adapter's output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on an adapter's input."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of layers, as peft takes them; null: all linear layers of the language model."""
    target_parameters: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of parameters that are in no linear layer, such as `experts.down_proj`; null: none."""
    merge: bool = False
    """The export is a whole model instead of an adapter."""

    @model_validator(mode="after")
    def _no_dropout_on_parameters(self) -> Self:
        if self.dropout and self.target_parameters:
            raise ValueError(
                "dropout beside target_parameters: peft drops inputs of linear layers alone. Set it to 0"
            )
        return self


class StudentConfig(Section):
    """The student of stage two."""

    model: Place
    """Hub name or local folder."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random`: weights from the configuration alone, for trials."""
    other_vocabulary: bool = False
    """The student may have another tokenizer and chat template than its teacher: targets are taken where both have a
    token boundary."""
    param_dtype: Dtype = "float32"
    """Of the master weights and the optimizer."""
    compute_dtype: Dtype = "bfloat16"
    """Of forward and backward."""
    attn_implementation: str | None = None
    """As Transformers names it, such as `sdpa`; null: Transformers chooses."""
    freeze: FreezeConfig = FreezeConfig()
    lora: LoraConfig | None = None
    """null: the student's own weights are trained."""
    activation_checkpointing: bool = False
    """Recompute layers in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile of each decoder layer."""
    compile_backend: str = "inductor"
    """As torch names it."""

    @model_validator(mode="after")
    def _adapters_are_trained(self) -> Self:
        if self.lora is not None and self.freeze.language:
            raise ValueError(
                "freeze.language beside lora: adapters are part of the language model. Leave the switch out: with "
                "lora all weights but the adapters' are frozen"
            )
        return self


class PositionsConfig(Section):
    """Training on the most uncertain positions of each answer alone."""

    keep: Annotated[float, Field(gt=0, le=1)]
    """Share of each row's positions that is kept, rounded up."""
    by: Literal["student_entropy", "teacher_entropy", "kl"] = "teacher_entropy"
    """The highest of these are kept: entropies, or the divergence that the loss takes. That of the teacher comes from
    the cache; the others cost one more product with the student's head."""
    ce: Literal["all", "kept"] = "kept"
    """Whether cross-entropy is over all positions or the kept ones. `all` saves nothing."""


class LossConfig(Section):
    """``(1 - kd_ratio) * ce + kd_ratio * kd``; kd carries the factor ``temperature ** 2``."""

    kd_ratio: Fraction = 0.5
    """Share of the distillation loss; 0 is plain fine-tuning and needs no cache."""
    own_kd_ratio: Fraction | None = None
    """`kd_ratio` at answers that the student itself wrote, as in rounds; null: the same. 1: these are no labels, and
    only what the teacher says of them is learned."""
    temperature: Temperature = 1.0
    """One of `cache.temperatures`."""
    chunk_size: PositiveInt | Literal["auto"] = "auto"
    """Answer positions that pass the student's head together; it bounds the memory of the loss. `auto`: as the
    cache's."""
    tail: Literal[TAIL_MODES] | None = None  # type: ignore[valid-type]
    """Where the mass goes that a `top_k` or `top_p` cache has cut off; null: the default, `ghost`."""
    reverse_kl: PositiveFloat | None = None
    """Factor of the sampled KL from student to teacher, at rows that the student wrote at temperature 1; null: none.
    It needs `cache.label_log_prob`."""
    visual_weight: Fraction | None = None
    """How much a position's weight in training depends on what the pictures gave the teacher there: 0, or null, all
    weigh the same; 1, a position that needs no picture weighs nothing. The mean weight is 1. Needs
    `cache.visual_gain`."""
    positions: PositionsConfig | None = None
    """null: all positions are trained on."""

    @property
    def tail_mode(self) -> str:
        """The one that counts where targets are cut off."""
        return self.tail or DEFAULT_TAIL

    @model_validator(mode="after")
    def _own_answers_have_a_teacher(self) -> Self:
        if self.own_kd_ratio is not None and self.kd_ratio == 0:
            raise ValueError(
                f"own_kd_ratio {self.own_kd_ratio:g} beside kd_ratio 0: training reads no cache, so there is no "
                "teacher. Set kd_ratio above 0, or leave own_kd_ratio out"
            )
        return self

    @model_validator(mode="after")
    def _positions_have_a_loss(self) -> Self:
        chosen = self.positions
        if chosen is None:
            return self
        if self.kd_ratio == 0 and chosen.by != "student_entropy":
            raise ValueError(
                f"positions.by {chosen.by} beside kd_ratio 0: by labels alone there is no teacher to choose by. Set "
                "it to student_entropy, or kd_ratio above 0"
            )
        has_ce = self.kd_ratio < 1 or self.own_kd_ratio not in (None, 1)
        if chosen.ce == "all" and (self.kd_ratio == 0 or not has_ce):
            what = "no KD, so all positions would count" if self.kd_ratio == 0 else "no CE"
            raise ValueError(
                f"positions.ce all beside kd_ratio {self.kd_ratio:g}: there is {what}. Set it to kept"
            )
        return self


class OptimizationConfig(Section):
    """Steps, optimizer and schedule; the length is given by `max_steps` or `num_epochs`."""

    alternatives = (("max_steps", "num_epochs"),)

    global_batch_size: PositiveInt = 16
    """Examples a step, over all ranks."""
    microbatch_tokens: PositiveInt | None = None
    """Tokens that a rank forwards at once, at most, padding counted. A longer example is a microbatch of its own.
    null: 4096, or no limit where `microbatch_size` is given."""
    microbatch_size: PositiveInt | None = None
    """Examples that a rank forwards at once, at most; null: no limit."""
    packing: bool = False
    """Examples that a rank forwards at once follow each other in one row, without padding. Only for models that are
    known to keep them apart; a check at the start proves it."""
    max_steps: PositiveInt | None = None
    """Length in steps."""
    num_epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Length in passes over the training rows; fractions are allowed."""
    learning_rate: PositiveFloat = 5e-5
    """Its peak, after warm-up."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Of AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Of AdamW."""
    eps: PositiveFloat = 1e-8
    """Of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after warm-up."""
    schedule_part: tuple[Fraction, Fraction] | None = None
    """The part of the schedule that this run goes through; null: all of it. A run that begins with another's export
    can go on where that has ended: [0, 0.5] and [0.5, 1]. Each has its own warm-up, as its optimizer begins anew."""
    first_step: NonNegativeInt | None = None
    """Where the run begins in the order of the training rows, in steps; null: at its first. A run that begins with
    another's export can go on where that has ended, and takes the rows that come next."""
    num_warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises linearly from 0."""
    min_learning_rate_ratio: Fraction = 0.0
    """The last learning rate as a share of the peak."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are clipped to this norm; null: they are not."""
    max_skipped_steps: NonNegativeInt = 0
    """Steps with a loss or gradient that is not finite are skipped; one more ends the run."""

    @model_validator(mode="after")
    def _part_is_one(self) -> Self:
        start, stop = self.schedule_part or (0, 1)
        if start >= stop:
            raise ValueError(
                f"schedule_part [{start:g}, {stop:g}] has no step: it must rise, from 0 to 1 at most"
            )
        return self

    def num_steps(self, num_examples: int) -> int:
        """Of a run over so many training rows."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_epochs is not None  # there is one of the two
        return max(1, round(self.num_epochs * -(-num_examples // self.global_batch_size)))
