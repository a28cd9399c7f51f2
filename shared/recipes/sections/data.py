"""What is asked and answered: columns, splits, written answers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.recipes.schema import Section
from shared.recipes.sections.types import Date, NonNegativeInt, NumWorkers, Place, PositiveInt, Seed, Split


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
    system: str | None = "system"
    """Column of the system's turn of rows that have none among their turns. Beside questions and answers of texts it
    counts where it has another name than the default: such a column `system` may hold anything."""
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
    steps: tuple[NonNegativeInt, PositiveInt] | None = None
    """Only prompts of training rows that a run takes in these steps of its order, from the first up to, but without,
    the second. The order is that of `run.seed` and `optimization.global_batch_size`. null: of all rows."""
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
        if self.steps is not None and self.steps[0] >= self.steps[1]:
            problems.append(f"steps [{self.steps[0]}, {self.steps[1]}]: none. The second is the larger one")
        if self.steps is not None and self.splits != ("train",):
            problems.append(
                f"steps beside splits {list(self.splits)}: training rows alone are in steps. Set splits to train"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self
