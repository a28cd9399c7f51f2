"""Recipes: one YAML file that describes a whole experiment, read strictly by both stages.

    recipe = load_recipe("phantom", overrides=["loss.kd_ratio=1.0", "run.name=soft"])

A recipe is a tree of frozen pydantic models, one a section; each part of the program is built from its own
section.  Unknown keys, wrong types and impossible combinations are all collected and shown at once.

Types are strict (``max_steps: true`` is not 1) and the YAML is read as YAML 1.2 reads it where 1.1 surprises:
``5e-5`` is a number, ``no`` is a word, and a key given twice is an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from shared.errors import RecipeError
from shared.recipes import yaml12
from shared.recipes.files import read_recipe_tree, validate_tree
from shared.recipes.policies import (
    TAIL_MODES,
    TAILS_OF_ANOTHER_VOCABULARY,
    Policy,
    Threshold,
    VisualGain,
    ghost_of_several,
    tail_of_another_vocabulary,
)
from shared.recipes.schema import Section


def _iso_date(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ValueError(f"{text!r} is no date of the form 2026-01-31") from error


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NumWorkers = Annotated[int, Field(ge=0, le=1024)]  # each takes a process and some hundred MiB
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # an int64: larger ones overflow, or are another one's alias
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0.01, le=100)]  # beyond, fp32 does not hold logits / T or T ** 2 well
Beta = Annotated[float, Field(ge=0, lt=1)]  # at 1 a moment never moves, and its bias correction divides by 0
Dtype = Literal["float32", "bfloat16"]
Split = Literal["train", "validation", "test"]
Date = Annotated[str, AfterValidator(_iso_date)]
WEIGHT_SLACK = 1e-6  # of the sum of a mix's weights, as people type thirds
Place = Annotated[str, AfterValidator(expanduser)]  # a file or folder here, or a name or URL elsewhere


class ColumnsConfig(Section):
    """Names of the data set's columns; the defaults are those of MedPix-VQA."""

    image: str | None = "image_id"
    """Column of the pictures, one or a list in each row; null: rows of text alone. Unless it is named, `images` and
    `image` count as well."""
    question: str = "question"
    """Column of the questions."""
    answer: str = "answer"
    """Column of the reference answers."""
    messages: str = "messages"
    """Column of conversations in the form of OpenAI, TRL and Transformers."""
    conversations: str = "conversations"
    """Column of conversations in the form of LLaVA and ShareGPT."""
    kind: str | None = "mode"
    """Column that says where a question comes from; results are reported by it."""
    case: str | None = "case_id"
    """Column that names the case or patient; it is kept with the predictions."""
    answer_ids: str | None = "answer_ids"
    """Column of the last answer's token ids, where a model wrote it; null: texts alone count."""
    answer_end: str | None = "answer_end"
    """Column that says whether the last answer is whole; false: it was cut, and no end of the turn is learned."""
    written_by: str | None = "written_by"
    """Column that says which model wrote the last answer; the cache's manifest keeps it."""


class SplitsConfig(Section):
    """Names of the data set's splits; ``null`` where it has none."""

    train: str = "train"
    """Its rows train the student."""
    validation: str | None = "validation"
    """Its rows measure the student during training."""
    test: str | None = None
    """Its rows are for `evaluate --split test`; stage one captures it only when `cache.splits` names it."""


class DataConfig(Section):
    """A data set of questions and conversations about pictures, and how its rows become prompts and labels."""

    source: Place
    """Hub name, or a file or folder of Parquet, Arrow, JSONL or JSON."""
    written: Annotated[tuple[Place, ...], Field(min_length=1)] | None = None
    """Folders of written answers to rows of `source`, which are learned in place of the rows' own. Of several answers
    to a row the last folder's counts."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    config: str | None = None
    """Configuration of a Hub data set that has several, which its page calls subsets."""
    columns: ColumnsConfig = ColumnsConfig()
    format: Literal["question_answer", "messages", "conversations"] | None = None
    """Form of the rows; null: by their columns, of several forms each row by what it holds."""
    answers: Literal["one", "majority"] = "one"
    """Of a list of answers: refuse it, or take what most of them say."""
    text_only: bool = False
    """Rows with question and answer whose picture is null are of text alone; false: they are an error."""
    splits: SplitsConfig = SplitsConfig()
    limit: PositiveInt | None = None
    """The first rows of each split, at most so many; null: all."""
    max_answer_tokens: PositiveInt = 1024
    """Longer answers are cut, and counted."""
    train_on: Literal["all", "last"] = "all"
    """Of a conversation, learn every answer or the last one alone."""
    max_dropped: NonNegativeInt = 0
    """Rows that may be left out because they cannot be used."""
    system_prompt: str | None = None
    """Put before each question as the chat template says; a row's own system turn takes its place."""
    date: Date | None = None
    """Day that a chat template is told, as `2026-01-31`; null: that of the cache, or else today."""
    chat_template: Place | None = None
    """A Jinja file in place of the models' own chat template; null: theirs. An export gets it too."""
    background: Literal["black", "white"] = "black"
    """What lies behind transparent pixels."""
    min_pixels: PositiveInt | None = None
    """Smallest picture given to the model, in pixels; null: as its processor says."""
    max_pixels: PositiveInt | None = None
    """Largest picture given to the model, in pixels; null: as its processor says."""


class TeacherConfig(Section):
    """The frozen teacher of stage one."""

    model: Place
    """Hub name or local folder."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    trained_by: Place | None = None
    """The recipe whose export is this model; it is run when the folder is missing."""
    dtype: Dtype = "bfloat16"
    """Of the weights and the computation."""
    attn_implementation: str | None = None
    """As Transformers names it, such as `sdpa`; null: Transformers chooses."""
    shard: bool = False
    """FSDP2 over all ranks, for a teacher too large for one GPU; ranks then step together."""
    tensor: PositiveInt = 1
    """Ranks that share each layer of a copy of the teacher (tensor parallel); they work on the same batches."""
    expert: PositiveInt = 1
    """Ranks that share the experts of each layer (expert parallel); the same ranks as those of `tensor`."""

    @property
    def ranks_per_copy(self) -> int:
        """Ranks that hold one copy of the teacher together and work on the same batches."""
        return max(self.tensor, self.expert)

    @model_validator(mode="after")
    def _one_way_to_share(self) -> Self:
        if self.shard and self.ranks_per_copy > 1:
            raise ValueError(
                "shard beside tensor or expert: FSDP2 shards the teacher over all ranks, which share no batches. "
                "Choose one"
            )
        if 1 < self.tensor != self.expert > 1:
            raise ValueError(
                f"tensor {self.tensor} and expert {self.expert}: the same ranks share layers and experts. Make them "
                "equal, or leave one out"
            )
        return self


class MixedCache(Section):
    """One cache of a mix."""

    path: Place
    """Local folder or fsspec URL."""
    weight: Annotated[float, Field(gt=0, le=1)] | None = None
    """Its share of the targets; those of a mix sum to 1. null, for all of them: equal shares."""


class CacheConfig(Section):
    """Where the cache is, or several of them, which targets it holds, and how it is captured."""

    alternatives = (("path", "mix"),)

    path: Place | Annotated[tuple[Place, ...], Field(min_length=1)] | None = None
    """Local folder or fsspec URL. A list, for stage two: caches of different rows, captured alike."""
    mix: Annotated[tuple[MixedCache, ...], Field(min_length=1)] | None = None
    """Instead of `path`, for stage two: caches of the same rows by several teachers. The targets of a row are their
    weighted sum. All must be of `policy`; their `seed` may differ."""
    duplicates: Literal["refuse", "first"] = "refuse"
    """A row that several caches of a list hold is an error, or is taken from the first of them."""
    teachers: Literal["one", "many"] = "one"
    """`many`: the caches of a list may be of different teachers, each for its own rows."""
    splits: tuple[Split, ...] = ("train", "validation")
    """Splits whose rows are captured."""
    policy: Policy = Threshold()
    temperatures: tuple[Temperature, ...] = (1.0,)
    """Temperatures that a student may use."""
    seed: Seed = 0
    """Of the draws. It belongs to the cache's identity."""
    label_log_prob: bool = False
    """Also the teacher's log-prob of the written token, two bytes a position, for losses that need it. It belongs to
    the cache's identity."""
    visual_gain: VisualGain | None = None
    """Also what the pictures give each token of the answer, two bytes a position: its log-prob less that of a second
    pass with the pictures `blurred`, or `removed` from the prompt. null: no second pass. It belongs to the cache's
    identity."""
    examples_per_shard: PositiveInt = 512
    """Examples in one file."""
    batch_tokens: PositiveInt = 16384
    """Tokens of a teacher's microbatch, padding counted."""
    chunk_size: PositiveInt | Literal["auto"] = "auto"
    """Answer positions that pass the teacher's head together. `auto`: 512 on a CPU, up to 2048 as a GPU's memory
    allows."""
    num_workers: NumWorkers = 2
    """Processes that decode pictures, for each rank."""
    claim_timeout_s: Annotated[float, Field(ge=1, le=1e6)] = 180
    """Seconds after which a process that captures and is silent is taken to be dead: others capture its units. Longer
    than the network file system takes to show a change."""
    shuffle_window: NonNegativeInt | Literal["auto"] = "auto"
    """Shards whose examples a student mixes at a time, so that it needs no others meanwhile. 0: the order of an epoch
    does not look at shards. `auto`: 0, but for a remote cache that is larger than the staging folder."""

    @model_validator(mode="after")
    def _temperatures_differ(self) -> Self:
        if not self.temperatures or len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError("temperatures must be a list of one or more different values")
        return self

    @model_validator(mode="after")
    def _caches_differ(self) -> Self:
        twice = sorted({one for one in self.locations if self.locations.count(one) > 1})
        if twice:
            raise ValueError(f"{'mix' if self.mix else 'path'} names {', '.join(twice)} more than once")
        return self

    @model_validator(mode="after")
    def _a_mix_is_no_list(self) -> Self:
        of_lists = {"duplicates": self.duplicates == "first", "teachers": self.teachers == "many"}
        if self.mix and (given := [name for name, is_set in of_lists.items() if is_set]):
            raise ValueError(
                f"{' and '.join(given)} beside mix: only a list of caches has such a setting. Take it out"
            )
        return self

    @model_validator(mode="after")
    def _weights_sum_to_one(self) -> Self:
        given = [one.weight for one in self.mix or () if one.weight is not None]
        if given and len(given) < len(self.mix or ()):
            raise ValueError(
                "mix: some of its caches have a weight and some have none. Give all of them one, or none"
            )
        if given and abs(sum(given) - 1) > WEIGHT_SLACK:
            raise ValueError(
                f"mix: the weights {', '.join(f'{one:g}' for one in given)} sum to {sum(given):g}; they must sum to 1"
            )
        return self

    @property
    def locations(self) -> tuple[str, ...]:
        """Of all caches, in their order."""
        if self.mix is not None:
            return tuple(one.path for one in self.mix)
        return (self.path,) if isinstance(self.path, str) else self.path or ()

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the caches of a mix; they sum to 1 to rounding."""
        mixed = self.mix or ()
        return tuple(1 / len(mixed) if one.weight is None else one.weight for one in mixed)

    @property
    def is_one(self) -> bool:
        """Whether it names one cache, as a capture needs it."""
        return self.mix is None and len(self.locations) == 1

    @property
    def location(self) -> str:
        """Of the one cache.

        Raises   RecipeError  where the recipe names several, or a mix: a capture writes one
        """
        if not self.is_one:
            what = "cache.mix" if self.mix else "cache.path"
            raise RecipeError(
                f"{what} names {', '.join(self.locations)}: stage two reads these together, a capture writes one. "
                "Name the cache to capture: --set cache.path=FOLDER"
            )
        return self.locations[0]

    @property
    def has_many_teachers(self) -> bool:
        """Whether its targets may be of other teachers than the recipe's."""
        return self.mix is not None or self.teachers == "many"


class WriteConfig(Section):
    """Answers that a model writes to the prompts of splits, as a data set: `teacher-cache write`, `train-student
    write`."""

    path: Place | None = None
    """Folder of the teacher's answers. A student's go into its run's folder."""
    splits: Annotated[tuple[Split, ...], Field(min_length=1)] = ("train", "validation")
    """Splits whose prompts are answered."""
    prompts: PositiveInt | None = None
    """So many prompts of each split, in an order that `seed` decides; null: all."""
    part: NonNegativeInt = 0
    """Which part of so many prompts: part 1 begins where part 0 ends, and after the last prompt comes the first."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """0: the likeliest token each time; above: samples, of logits divided by it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Samples are of the likeliest tokens, so many that their probabilities sum to this."""
    per_prompt: PositiveInt = 1
    """Answers to each prompt."""
    max_new_tokens: PositiveInt | None = None
    """Longer answers are cut; null: `data.max_answer_tokens`."""
    seed: Seed = 0
    """Of the samples, and of the order of the prompts."""
    batch_tokens: PositiveInt = 16384
    """Tokens of a batch, answers at full length and padding counted."""
    prompts_per_file: PositiveInt = 512
    """Prompts whose answers are in one file."""
    num_workers: NumWorkers = 2
    """Processes that decode pictures, for each rank."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        problems = []
        if 0 < self.temperature < 0.01:
            problems.append(f"temperature {self.temperature}: 0, or at least 0.01, is needed")
        if self.temperature == 0 and self.per_prompt > 1:
            problems.append(
                f"per_prompt {self.per_prompt} at temperature 0: the likeliest answer is the same each time. Set a "
                "temperature, or per_prompt to 1"
            )
        if self.temperature == 0 and self.top_p < 1:
            problems.append(f"top_p {self.top_p} at temperature 0: nothing is sampled. Leave one of them out")
        if self.part and self.prompts is None:
            problems.append(f"part {self.part} without prompts: how many prompts a part has. Set prompts")
        if len(set(self.splits)) != len(self.splits):
            problems.append("splits names a split twice")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class RoundsConfig(Section):
    """Rounds of `make rounds`: the student writes, the teacher is captured on what it wrote, the student trains on
    the given answers and its own."""

    number: PositiveInt = 2
    """Rounds after the ordinary run on the given answers, which is round 0."""
    own_share: Fraction = 0.5
    """Share of a round's training rows that have the student's own answer in place of the given one. With `earlier:
    keep` it is the last round's. 0: the rounds only train on, to compare with."""
    prompts: PositiveInt | None = None
    """Training prompts that are answered in a round; null: as many as `own_share` asks for."""
    earlier: Literal["fresh", "keep"] = "fresh"
    """`fresh`: a round trains on its own round's answers. `keep`: on those of all rounds so far."""


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

    rank: PositiveInt = 16
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
        if chosen.ce == "all" and self.kd_ratio in (0, 1):
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
    num_warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises linearly from 0."""
    min_learning_rate_ratio: Fraction = 0.0
    """The last learning rate as a share of the peak."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are clipped to this norm; null: they are not."""
    max_skipped_steps: NonNegativeInt = 0
    """Steps with a loss or gradient that is not finite are skipped; one more ends the run."""


class ParallelConfig(Section):
    """How the student lies on the ranks."""

    dp_replicate: PositiveInt = 1
    """Hybrid sharding: so many groups of ranks hold a whole copy each."""
    tensor: PositiveInt = 1
    """Tensor parallel: so many ranks share the work of each layer and the head, on the same rows."""
    expert: PositiveInt = 1
    """Expert parallel: so many ranks share the experts of each layer. With `tensor`, the same ranks."""
    pipeline: PositiveInt = 1
    """Only 1: pipeline parallelism is not supported."""
    context: PositiveInt = 1
    """Only 1: context parallelism is not supported."""
    reshard_after_forward: bool = True
    """Free gathered parameters after the forward pass: less memory, more communication."""
    cpu_offload: bool = False
    """Keep parameters, gradients and moments in host memory."""
    collective_timeout_s: Annotated[float, Field(ge=1, le=1e6)] = 600
    """Seconds, in either stage. A rank that keeps the others waiting for longer is taken to hang, and the job ends.
    What a rank does alone (reading its part of the data, weights, an export) has no limit."""

    @model_validator(mode="after")
    def _what_there_is(self) -> Self:
        problems = []
        if self.pipeline != 1:
            problems.append(
                "pipeline parallelism is not supported: the loss needs the hidden states and the head on one "
                "rank. Set pipeline to 1; FSDP2 shards the student over all ranks, and tensor splits its layers"
            )
        if self.context != 1:
            problems.append(
                "context parallelism is not supported: it splits long sequences, and examples are a question and "
                "an answer of a few hundred tokens. Set context to 1; optimization.microbatch_tokens bounds what a "
                "rank forwards at once, tensor splits the work on one example"
            )
        if 1 < self.tensor != self.expert > 1:
            problems.append(
                f"tensor is {self.tensor}, expert {self.expert}: where both are more than 1 they are the same ranks. "
                "Give both the same number, or leave one out"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def is_split(self) -> bool:
        """Whether layers are split among ranks, and not only where their parameters lie."""
        return self.tensor > 1 or self.expert > 1

    def require_ranks(self, num_ranks: int) -> None:
        """Raises   RecipeError  when these sizes do not divide the number of ranks"""
        factor = self.dp_replicate * max(self.tensor, self.expert)
        if num_ranks % factor == 0:
            return
        expert = self.expert if self.tensor == 1 else 1  # else the same ranks
        sizes = {"dp_replicate": self.dp_replicate, "tensor": self.tensor, "expert": expert}
        told = " times ".join(f"parallel.{name} {size}" for name, size in sizes.items() if size > 1)
        raise RecipeError(
            f"{told} does not divide {num_ranks} ranks. Start a multiple of {factor} processes (NPROC), or choose "
            "other sizes"
        )


class RunConfig(Section):
    """One training run: its name, its folder, its rhythm."""

    name: str
    """Name of the run's folder."""
    root: Place = "work/runs"
    """Folder of all runs."""
    seed: Seed = 42
    """Of the order of rows, of dropout and of random weights."""
    validate_every: PositiveInt | None = None
    """Steps; validation always runs before the first step and after the last."""
    checkpoint_every: PositiveInt | None = None
    """Steps; a checkpoint is always written after the last."""
    checkpoint_minutes: PositiveFloat | None = 10
    """Minutes since the last checkpoint after which one is written, whatever the step."""
    keep_checkpoints: PositiveInt = 2
    """The newest ones are kept; the best one is kept beside these."""
    async_checkpoints: bool = True
    """Written behind training, from a copy in host memory."""
    num_workers: NumWorkers = 2
    """Processes that read rows and decode pictures, for each rank."""
    export: bool = True
    """Write a Hugging Face folder after the last step."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Beside `metrics.jsonl`; needs the extra `tracking`."""

    @model_validator(mode="after")
    def _name_is_a_folder_name(self) -> Self:
        if not self.name or self.name in {".", ".."} or "/" in self.name:
            raise ValueError(f"run.name {self.name!r} is not a folder name")
        return self

    @property
    def path(self) -> Path:
        return Path(self.root) / self.name


class EvaluationConfig(Section):
    """Answers generated over the validation split when training ends."""

    max_examples: NonNegativeInt = 0
    """Questions to answer; 0: none."""
    max_new_tokens: PositiveInt = 64
    """Longest answer, in tokens."""
    batch_size: PositiveInt = 16
    """Questions that are answered together."""
    short_answer_words: PositiveInt = 3
    """References up to this length count for the accuracy."""
    shuffled_pictures: bool = False
    """Ask the trained model once more, each question about the picture of another case: does it look at all?"""
    baseline: Place | None = None
    """The recipe of a run to compare with, such as one by labels alone. `make train-student` trains it first where it
    is missing, with the same settings but for `loss` and names; the final table shows it."""


class PhantomConfig(Section):
    """A drawn VQA set, made in ``data.source`` when that is missing; five questions for each picture."""

    train: PositiveInt = 240
    """Pictures of the training split."""
    validation: PositiveInt = 32
    """Pictures of the validation split."""
    test: PositiveInt = 32
    """Pictures of the test split."""
    size: Annotated[int, Field(ge=64)] = 128
    """Width and height in pixels."""
    seed: Seed = 0
    """Of the drawing."""
    mistaken: Fraction = 0.0
    """Share of the short training answers that are another picture's, as annotators err."""


class SmallModelConfig(Section):
    """A small instance of the Qwen3.5 classes with random weights."""

    path: Place
    """Folder to make."""
    hidden_size: PositiveInt
    """Width of the language model, a multiple of 32."""
    num_layers: PositiveInt
    """Layers of the language model."""
    vision_hidden_size: PositiveInt
    """Width of the vision tower, a multiple of 32."""
    vision_depth: PositiveInt
    """Layers of the vision tower."""
    seed: Seed = 0
    """Of the random weights."""


class SmallModelsConfig(Section):
    """Small models that share one tokenizer trained on the data set's texts; made when missing."""

    vocab_size: Annotated[int, Field(ge=300)] = 2048
    """Ids of the tokenizer, at most."""
    models: tuple[SmallModelConfig, ...]
    """One entry a model."""


class BootstrapConfig(Section):
    """What a trial recipe makes for itself before stage one; real recipes have none."""

    phantom: PhantomConfig | None = None
    small_models: SmallModelsConfig | None = None


class Recipe(Section):
    """A whole experiment."""

    bootstrap: BootstrapConfig = BootstrapConfig()
    data: DataConfig
    teacher: TeacherConfig | None = None
    cache: CacheConfig | None = None
    student: StudentConfig
    loss: LossConfig = LossConfig()
    optimization: OptimizationConfig
    parallel: ParallelConfig = ParallelConfig()
    run: RunConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    write: WriteConfig | None = None
    rounds: RoundsConfig | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        problems = []
        if self.loss.kd_ratio > 0 and self.cache is None:
            problems.append("loss.kd_ratio above 0 needs a cache section; kd_ratio 0 is plain fine-tuning")
        if self.cache is not None:
            wanted = [name for name in ("train", "validation") if getattr(self.data.splits, name) is not None]
            lacking = [name for name in wanted if name not in self.cache.splits]
            if lacking and self.loss.kd_ratio > 0:
                problems.append(f"cache.splits lacks {', '.join(lacking)}, which the student needs")
            if len(set(self.cache.splits)) != len(self.cache.splits):
                problems.append("cache.splits names a split twice")
        if self.loss.visual_weight:
            problems += self._problems_of_a_visual_weight()
        if self.cache is not None and self.teacher is None and not self.cache.has_many_teachers:
            problems.append("a cache section needs a teacher section: it says whose targets the cache holds")
        if self.cache is not None:
            if self.loss.kd_ratio > 0 and self.loss.temperature not in self.cache.temperatures:
                captured = ", ".join(map(str, self.cache.temperatures))
                problems.append(
                    f"loss.temperature {self.loss.temperature} is not among cache.temperatures ({captured}); "
                    "add it there and capture again, or use a captured one"
                )
            if self.cache.policy.is_sampled and self.loss.tail is not None:
                problems.append(
                    f"loss.tail is for top_k and top_p caches; {self.cache.policy.kind} targets have no tail"
                )
            if self.cache.mix and not self.cache.policy.is_sampled and self.loss.tail in (None, "ghost"):
                problems.append(ghost_of_several(self.cache.policy.kind))
        if self.loss.reverse_kl is not None:
            problems += self._problems_of_reverse_kl()
        if self.cache is not None and self.student.other_vocabulary:
            problems += self._problems_of_another_vocabulary(self.cache)
        if self.write is not None and (self.write.max_new_tokens or 0) > self.data.max_answer_tokens:
            problems.append(
                f"write.max_new_tokens {self.write.max_new_tokens} is above data.max_answer_tokens "
                f"{self.data.max_answer_tokens}: what is beyond would not be learned. Lower it, or raise the other"
            )
        if self.parallel.is_split:
            problems += self._problems_of_a_split()
        if self.rounds is not None:
            problems += self._problems_of_rounds()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems_of_a_visual_weight(self) -> list[str]:
        if self.loss.kd_ratio == 0:
            return [
                "loss.visual_weight beside loss.kd_ratio 0: by labels alone training reads no cache, which tells "
                "what pictures gave. Set kd_ratio above 0, or leave visual_weight out"
            ]
        if self.cache is not None and self.cache.visual_gain is None:
            return [
                "loss.visual_weight needs a cache that tells what pictures gave. Set cache.visual_gain to blurred or "
                "removed and capture again, or leave visual_weight out"
            ]
        if self.loss.reverse_kl is not None:
            return [
                "loss.visual_weight beside loss.reverse_kl: weights that depend on the drawn token change what its "
                "average is of. Leave one of them out"
            ]
        return []

    def _problems_of_reverse_kl(self) -> list[str]:
        problems = []
        if self.loss.kd_ratio == 0 or self.cache is None or not self.cache.label_log_prob:
            problems.append(
                "loss.reverse_kl needs the teacher's log-prob of each written token: set cache.label_log_prob to "
                "true, and kd_ratio above 0"
            )
        if self.cache is not None and self.cache.mix:
            problems.append(
                "loss.reverse_kl beside cache.mix: the log of a mean is no mean of logs. Leave one of them out"
            )
        write = self.write or WriteConfig()
        if self.rounds is not None and (write.temperature, write.top_p) != (1.0, 1.0):
            problems.append(
                f"loss.reverse_kl in rounds with write.temperature {write.temperature:g} and top_p {write.top_p:g}: "
                "its rows must be samples of the student. Set both to 1"
            )
        return problems

    def _problems_of_rounds(self) -> list[str]:
        problems = []
        if self.cache is not None and not self.cache.is_one:
            problems.append("rounds beside several caches: a round adds to one. Name one cache as cache.path")
        if self.loss.kd_ratio == 0:
            problems.append(
                "rounds with loss.kd_ratio 0: a student's own answers teach by what the teacher says of them. Set "
                "kd_ratio above 0"
            )
        if not self.run.export:
            problems.append(
                "rounds with run.export false: each round begins from the export before. Set it to true"
            )
        if self.write is not None and self.write.per_prompt > 1:
            problems.append(
                f"rounds with write.per_prompt {self.write.per_prompt}: a row learns one answer. Set it to 1"
            )
        if self.data.written is not None:
            problems.append("rounds beside data.written: the rounds set it. Leave it out")
        return problems

    def _problems_of_another_vocabulary(self, cache: CacheConfig) -> list[str]:
        problems = []
        if self.teacher is None and cache.has_many_teachers:
            problems.append(
                "student.other_vocabulary needs a teacher section: rows of the cache are known by its tokenizer and "
                "chat template. Name one of the caches' teachers"
            )
        if self.loss.reverse_kl is not None or self.rounds is not None:
            problems.append(
                "student.other_vocabulary beside loss.reverse_kl or rounds: a student's own answers are token ids, "
                "which its teacher's tokenizer does not have. Leave one of them out"
            )
        if self.loss.visual_weight is not None or self.loss.positions is not None:
            problems.append(
                "student.other_vocabulary beside loss.visual_weight or loss.positions: what these weigh are "
                "positions of the teacher, and the student's are others. Leave one of them out"
            )
        tail = self.loss.tail or "ghost"
        if not cache.policy.is_sampled and tail not in TAILS_OF_ANOTHER_VOCABULARY:
            problems.append(tail_of_another_vocabulary(cache.policy.kind, tail))
        return problems

    def _problems_of_a_split(self) -> list[str]:
        problems = []
        if self.student.compile:
            problems.append(
                "student.compile beside parallel.tensor or parallel.expert: layers that are split among ranks are "
                "not compiled. Leave one of them out"
            )
        if self.student.lora is not None and self.student.lora.target_parameters is not None:
            problems.append(
                "student.lora.target_parameters beside parallel.tensor or parallel.expert: adapters of split "
                "parameters are not supported, those of linear layers are. Leave one of them out"
            )
        return problems

    def of_day(self, date: str | None) -> Recipe:
        """The same, its prompts written for that day; None: as it is."""
        if date is None:
            return self
        return self.model_copy(update={"data": self.data.model_copy(update={"date": date})})

    def of_a_run(self) -> Recipe:
        """The same without what is for other commands than a run's."""
        return self.model_copy(update={"write": None, "rounds": None})

    def of_window(self, shards: int) -> Recipe:
        """The same, its cache read so many shards at a time."""
        if self.cache is None:
            return self
        return self.model_copy(update={"cache": self.cache.model_copy(update={"shuffle_window": shards})})

    def as_it_began(self, began: Recipe) -> Recipe:
        """With the day of its prompts and the window of its order that a run chose at its beginning, unless given."""
        recipe = self.of_day(began.data.date) if self.data.date is None else self
        if self.cache is None or began.cache is None or self.cache.shuffle_window != "auto":
            return recipe
        chosen = began.cache.shuffle_window
        return recipe if chosen == "auto" else recipe.of_window(chosen)

    @property
    def distils(self) -> bool:
        """Whether stage two needs the cache."""
        return self.loss.kd_ratio > 0


def load_recipe(name_or_path: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """The validated recipe of that name (of those that come with the package) or file.

    Raises   RecipeError  when the file is missing or is not YAML, and for all its problems at once.
    """
    tree, origin = read_recipe_tree(name_or_path, overrides, Recipe)
    return validate_tree(Recipe, tree, origin=origin)


def baseline_of(recipe: Recipe) -> Recipe | None:
    """The recipe of the run that this one's is compared with, under the same root; None where there is no other run.

    A run on other data is none to compare with: a recipe of one's own that extends another inherits its baseline.

    Raises   RecipeError  as ``load_recipe`` does
    """
    if recipe.evaluation.baseline is None:
        return None
    root = f"run.root={json.dumps(recipe.run.root)}"
    found = load_recipe(recipe.evaluation.baseline, overrides=[root])
    is_other = found.run.name == recipe.run.name or found.data.source != recipe.data.source
    return None if is_other else found


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe, every default written out, as plain JSON types."""
    return recipe.model_dump(mode="json")


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads to the same recipe."""
    return yaml12.dump(dump_recipe(recipe))
