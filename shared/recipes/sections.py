"""Recipes: one YAML file that describes a whole experiment, read strictly by both stages.

    recipe = load_recipe("phantom", overrides=["loss.kd_ratio=1.0", "run.name=soft"])

A recipe is a tree of frozen pydantic models, one a section; each part of the program is built from its own
section.  Unknown keys, wrong types and impossible combinations are all collected and shown at once.

Types are strict (``max_steps: true`` is not 1) and the YAML is read as YAML 1.2 reads it where 1.1 surprises:
``5e-5`` is a number, ``no`` is a word, and a key given twice is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.recipes.files import read_recipe_tree, validate_tree
from shared.recipes.policies import TAIL_MODES, Policy, Threshold

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # an int64: larger ones overflow, or are another one's alias
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0.01, le=100)]  # beyond, fp32 does not hold logits / T or T ** 2 well
Beta = Annotated[float, Field(ge=0, lt=1)]  # at 1 a moment never moves, and its bias correction divides by 0
Dtype = Literal["float32", "bfloat16"]
Split = Literal["train", "validation", "test"]


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ColumnsConfig(Section):
    """Names of the data set's columns; the defaults are those of MedPix-VQA."""

    image: str = "image_id"
    question: str = "question"
    answer: str = "answer"
    kind: str | None = "mode"  # where a question comes from; results are reported by it
    case: str | None = "case_id"


class SplitsConfig(Section):
    """Names of the data set's splits; ``null`` where it has none."""

    train: str = "train"
    validation: str | None = "validation"
    test: str | None = None


class DataConfig(Section):
    """A VQA data set, and how its rows become prompts and labels."""

    source: str  # Hub name, Parquet or Arrow folder, or JSONL file with image paths
    revision: str | None = None
    columns: ColumnsConfig = ColumnsConfig()
    splits: SplitsConfig = SplitsConfig()
    limit: PositiveInt | None = None  # of examples, for each split: the first ones
    max_answer_tokens: PositiveInt = 1024  # longer answers are cut, and counted
    max_dropped: NonNegativeInt = 0  # rows that may be left out because they cannot be used
    system_prompt: str | None = None
    background: Literal["black", "white"] = "black"  # what lies behind transparency
    min_pixels: PositiveInt | None = None  # of a picture given to the model; null: as its processor says
    max_pixels: PositiveInt | None = None


class TeacherConfig(Section):
    """The frozen teacher of stage one."""

    model: str  # Hub name or local folder
    revision: str | None = None
    trained_by: str | None = None  # the recipe whose export is this model, run when the folder is missing
    dtype: Dtype = "bfloat16"
    attn_implementation: str | None = None
    shard: bool = False  # over all ranks, for a teacher too large for one GPU; ranks then step together


class CacheConfig(Section):
    """Where the cache is, which targets it holds, and how it is captured."""

    path: str
    splits: tuple[Split, ...] = ("train", "validation")
    policy: Policy = Threshold()
    temperatures: tuple[Temperature, ...] = (1.0,)
    seed: Seed = 0
    examples_per_shard: PositiveInt = 512
    batch_tokens: PositiveInt = 16384  # tokens of a teacher's microbatch, padding counted
    chunk_size: PositiveInt = 512  # positions that pass the head together
    num_workers: NonNegativeInt = 2  # processes that decode pictures, for each rank

    @model_validator(mode="after")
    def _temperatures_differ(self) -> Self:
        if not self.temperatures or len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError("temperatures must be a list of one or more different values")
        return self


class FreezeConfig(Section):
    """Parts of the student that are not trained."""

    vision: bool = False
    audio: bool = False
    connector: bool = False
    language: bool = False


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) instead of the student's own weights; extra ``lora``."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0  # an adapter's output is multiplied by alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of an adapter's input
    # As peft's; null: all linear layers of the language model.
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    merge: bool = False  # the export is a whole model instead of an adapter


class StudentConfig(Section):
    """The student of stage two."""

    model: str
    revision: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"  # random: from the configuration alone, for trials
    param_dtype: Dtype = "float32"  # of the master weights and the optimizer
    compute_dtype: Dtype = "bfloat16"
    attn_implementation: str | None = None
    freeze: FreezeConfig = FreezeConfig()
    lora: LoraConfig | None = None
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile of each decoder layer
    compile_backend: str = "inductor"

    @model_validator(mode="after")
    def _adapters_are_trained(self) -> Self:
        if self.lora is not None and self.freeze.language:
            raise ValueError(
                "freeze.language beside lora: adapters are part of the language model. Leave the switch out: with "
                "lora all weights but the adapters' are frozen"
            )
        return self


class LossConfig(Section):
    """``(1 - kd_ratio) * ce + kd_ratio * kd``; kd carries the factor ``temperature ** 2``."""

    kd_ratio: Fraction = 0.5
    temperature: Temperature = 1.0
    chunk_size: PositiveInt = 512
    tail: Literal[TAIL_MODES] | None = None  # type: ignore[valid-type]  # deterministic policies only


class OptimizationConfig(Section):
    """Steps, optimizer and schedule."""

    global_batch_size: PositiveInt = 16  # examples a step, over all ranks
    microbatch_size: PositiveInt = 1  # examples a rank forwards at once
    max_steps: PositiveInt | None = None
    num_epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None  # steps must stay countable
    learning_rate: PositiveFloat = 5e-5
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    num_warmup_steps: NonNegativeInt = 0
    min_learning_rate_ratio: Fraction = 0.0
    max_grad_norm: PositiveFloat | None = 1.0
    max_skipped_steps: NonNegativeInt = 0  # with a loss or gradient that is not finite; one more ends the run

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.max_steps is None) == (self.num_epochs is None):
            raise ValueError("give either max_steps or num_epochs")
        if self.global_batch_size % self.microbatch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"microbatch_size {self.microbatch_size}"
            )
        return self


class ParallelConfig(Section):
    """How the student lies on the ranks."""

    dp_replicate: PositiveInt = 1  # hybrid sharding: groups that hold a whole copy each
    pipeline: PositiveInt = 1
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    @model_validator(mode="after")
    def _no_pipeline(self) -> Self:
        if self.pipeline != 1:
            raise ValueError(
                "pipeline parallelism is not supported: the loss needs the hidden states and the head on one "
                "rank. Set pipeline to 1; FSDP2 shards the student over all ranks"
            )
        return self


class RunConfig(Section):
    """One training run: its name, its folder, its rhythm."""

    name: str
    root: str = "work/runs"
    seed: Seed = 42
    validate_every: PositiveInt | None = None  # steps; always before the first step and after the last
    checkpoint_every: PositiveInt | None = None  # steps; always after the last
    keep_checkpoints: PositiveInt = 2  # the best one is kept beside these
    async_checkpoints: bool = True  # written behind training, from a copy in host memory
    num_workers: NonNegativeInt = 2
    export: bool = True  # a Hugging Face folder after the last step
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # beside metrics.jsonl; extra `tracking`

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

    max_examples: NonNegativeInt = 0  # 0: no generation
    max_new_tokens: PositiveInt = 64
    batch_size: PositiveInt = 16
    short_answer_words: PositiveInt = 3  # references up to this length count for the accuracy


class PhantomConfig(Section):
    """A drawn VQA set, made in ``data.source`` when that is missing; five questions for each picture."""

    train: PositiveInt = 240  # pictures
    validation: PositiveInt = 32
    test: PositiveInt = 32
    size: Annotated[int, Field(ge=64)] = 128
    seed: Seed = 0


class SmallModelConfig(Section):
    """A small instance of the Qwen3.5 classes with random weights."""

    path: str
    hidden_size: PositiveInt
    num_layers: PositiveInt
    vision_hidden_size: PositiveInt
    vision_depth: PositiveInt
    seed: Seed = 0


class SmallModelsConfig(Section):
    """Small models that share one tokenizer trained on the data set's texts; made when missing."""

    vocab_size: Annotated[int, Field(ge=300)] = 2048
    models: tuple[SmallModelConfig, ...]


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
        if self.cache is not None and self.teacher is None:
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
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def distils(self) -> bool:
        """Whether stage two needs the cache."""
        return self.loss.kd_ratio > 0


def load_recipe(name_or_path: str | Path, *, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """The validated recipe of that name (of those that come with the package) or file.

    Raises   RecipeError  when the file is missing or is not YAML, and for all its problems at once.
    """
    tree, origin = read_recipe_tree(name_or_path, overrides)
    return validate_tree(Recipe, tree, origin=origin)


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe, every default written out, as plain JSON types."""
    return recipe.model_dump(mode="json")
