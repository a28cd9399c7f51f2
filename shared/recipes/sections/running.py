"""Of a run: ranks, checkpoints, rounds, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.errors import RecipeError
from shared.recipes.schema import Section
from shared.recipes.sections.types import (
    FolderName,
    Fraction,
    LocalPlace,
    NonNegativeInt,
    NumWorkers,
    Place,
    PositiveFloat,
    PositiveInt,
    Seed,
)


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
    min_block_params: NonNegativeInt = 1_000_000
    """Parameters; a smaller block is sharded and gathered with the rest of the model. Each block of its own costs
    collectives: of the default recipe's small models 9 to 16 % of a step."""
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

    name: FolderName
    """Name of the run's folder."""
    root: LocalPlace = "work/runs"
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
    """The recipe of a run to compare with, such as one by labels alone; a file is looked for in the current folder.
    `make train-student` trains it first where it is missing, with the same `--set` options but for those of `loss`
    and names. The final table shows it, and in which settings the two differ."""


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
    round_epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Length of each of these rounds, in passes over the training rows; null: that of round 0."""
    one_schedule: bool = True
    """Round 0 and these rounds go through one schedule of the learning rate, each through its part. false: each has
    its own, so that round 0 can be a run that is there."""
    round_learning_rate: PositiveFloat | None = None
    """Its peak in these rounds; null: that of round 0. A lower one keeps more of what the student has learned."""
