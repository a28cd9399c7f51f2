"""From an example to what a model is fed.

    processor = open_processor("Qwen/Qwen3.5-4B", recipe.data)
    batch = processor.collate([processor.encode(example) for example in examples])
    hidden = model(**batch.inputs).last_hidden_state                    # (B, S, D)
    predicting = hidden.flatten(0, 1)[batch.position_index]             # (N, D), one row for each label

Prompt and pictures are never cut.  Labels are the answer's tokens, or the ids that its row has, and the end of the
turn, nothing else; an answer longer than ``max_answer_tokens`` keeps that many tokens, has no end of turn, and is
marked ``truncated``.  Pictures always go through the PIL image processor, so that results do not depend on whether
torchvision is installed.

Legend: B examples, S padded length, N labels of the batch, D hidden size.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date as Date
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from shared.data.answer_ids import WrittenIds
from shared.data.collation import IGNORE_INDEX, Batch, Encoded, collated
from shared.data.conversations import question_answer
from shared.data.fingerprints import (
    digest,
    image_processor_fingerprint,
    template_fingerprint,
    tokenizer_fingerprint,
)
from shared.data.images import CONVERSION_VERSION, NO_SIZE, Background, decode_rgb, size_by_header
from shared.data.model_inputs import PREFIX_LM, answer_kinds, continued, sorted_inputs
from shared.data.processors import chat_template, load_processor
from shared.data.prompts import PROMPT_VERSION, Answered, ChatPrompt, Prompt
from shared.data.rows import Example
from shared.data.templates import is_single
from shared.errors import DataError, is_out_of_memory, shortened
from shared.recipes import DataConfig

KEY_BYTES = 16
CONVERSATION = b"teachonce conversation 1"  # in keys, of what a conversation is made of
WRITTEN = b"teachonce written answer 1"  # in keys, of an answer that ids say, or that has no end
BLANK_SIZE = (32, 32)  # pixels, before the image processor makes of it what its model takes
NUM_COLOURS = 3
NO_TOKENS = -1
PLACEHOLDERS = ("image_token", "boi_token")  # of a processor, of which a template writes one
OTHER_PLACEHOLDERS = ("eoi_token", "video_token", "audio_token")
SIZE_STEP = 64  # pixels: sizes are rounded up to it where tokens of a picture have to be counted


@dataclass(frozen=True)
class Counted:
    """Of an example's texts.

    num_positions  tokens that are labels, ends of turns among them
    num_cut        answers that are learned in part
    num_tokens     of the whole example, a picture's placeholder in the place of its tokens
    """

    num_positions: int
    num_cut: int
    num_tokens: int


@dataclass(frozen=True)
class Learned:
    """Labels of one answer: its tokens, and whether the end of its turn is learned behind them."""

    ids: tuple[int, ...]
    is_ended: bool

    @property
    def num_positions(self) -> int:
        return len(self.ids) + self.is_ended

    def labels(self, end_of_turn: int) -> list[int]:
        """With the id that ends the turn, where that is learned."""
        return [*self.ids, *([end_of_turn] if self.is_ended else [])]


class ExampleProcessor:
    """One model's way from example to tokens and pixels; picklable, so it can work in data-loader workers."""

    def __init__(
        self,
        processor: Any,
        *,
        max_answer_tokens: int,
        system_prompt: str | None = None,
        date: str | None = None,
        train_on: Literal["all", "last"] = "all",
        background: Background = "black",
    ) -> None:
        self._processor = processor
        self._background = background
        self._max_answer_tokens = max_answer_tokens
        self._tokens_of_size: dict[tuple[int, int], int] = {}
        self._blanks: dict[bool, Encoded] = {}  # by whether they have a picture; text alone asks for many
        self._train_on = train_on
        template = chat_template(processor)
        self._prompt = ChatPrompt(
            processor.tokenizer,
            template,
            system_prompt=system_prompt,
            date=None if date is None else Date.fromisoformat(date),
            placeholders=_tokens(processor, PLACEHOLDERS),
        )
        self.tokenizer = processor.tokenizer
        self.written = WrittenIds(
            processor.tokenizer,
            end_of_turn=self._prompt.end_of_turn,
            placeholders=_tokens(processor, (*PLACEHOLDERS, *OTHER_PLACEHOLDERS)),
            spelled=self._prompt.spelled,
        )
        self.tokenizer_fingerprint = tokenizer_fingerprint(processor.tokenizer)
        self.template_fingerprint = template_fingerprint(template)
        self.image_processor_fingerprint = image_processor_fingerprint(
            processor, version=CONVERSION_VERSION, background=background
        )
        self.prompt_fingerprint = digest(
            {
                "version": PROMPT_VERSION,
                "tokenizer": self.tokenizer_fingerprint,
                "template": self.template_fingerprint,
                "system_prompt": system_prompt,
                "max_answer_tokens": max_answer_tokens,
                **self._prompt.changed_rules(),
                **self._prompt.template.dated(),
            }
        )

    @property
    def of_keys(self) -> ExampleProcessor:
        """Whose tokenizer and template the examples' keys are made of: its own."""
        return self

    @property
    def end_of_turn(self) -> int:
        """The id of the token that ends an answer."""
        return self._prompt.end_of_turn

    @property
    def background(self) -> Background:
        """What lies behind transparent pixels."""
        return self._background

    @property
    def thinking(self) -> bool | None:
        """What the template is told of thoughts; None where it has no such switch."""
        return self._prompt.template.thinking

    @property
    def rendered(self) -> str:
        """Hex, over what the template writes around question and answer."""
        return self._prompt.template.rendered

    @property
    def date(self) -> str | None:
        """The day that prompts are written for; None where the template prints none."""
        found = self._prompt.template.date
        return None if found is None else found.isoformat()

    @property
    def num_token_ids(self) -> int:
        """One more than the largest id the tokenizer knows; a model's head may be wider."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def num_answer_ids(self) -> int:
        """As many ids a model's head must have: Llama 3.2 Vision has no logit for its pictures' placeholder."""
        return self.written.num_answer_ids

    def key(self, example: Example) -> bytes:
        """128 bits of the pictures' bytes, the texts, and what makes them tokens."""
        state = hashlib.blake2b(digest_size=KEY_BYTES)
        for field in self._identifying(example):
            state.update(len(field).to_bytes(8, "little"))
            state.update(field)
        return state.digest()

    def _identifying(self, example: Example) -> Iterator[bytes]:
        """One question about one picture as it always was; other conversations by turns, each with its parts.

        Ids take the place of the text that they say.
        """
        answer = example.turns[-1].parts[0] if example.answer_ids is None else ""
        if example.answer_ids is not None or not example.answer_end:
            yield WRITTEN
            yield json.dumps([example.answer_ids, example.answer_end], separators=(",", ":")).encode()
        if is_single(example.turns):
            texts = (self.prompt_fingerprint, example.turns[0].parts[1], answer)
            yield from (example.images[0], *(str(text).encode() for text in texts))
            return
        turns = [[turn.role, list(turn.parts)] for turn in example.turns]
        if example.answer_ids is not None:
            turns[-1][1] = []
        num_answers = sum(turn.role == "assistant" for turn in example.turns)
        learned = self._train_on if num_answers > 1 else "last"
        yield from (CONVERSATION, self.prompt_fingerprint.encode(), learned.encode())
        yield json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode()
        yield from example.images

    def require_usable(self, example: Example) -> None:
        """Raises   DataError  naming the row, when the chat template refuses its conversation, or for wrong ids"""
        self._prompt.template.follow(example.turns, where=_where(example))
        self._written_ids(example)

    def _written_ids(self, example: Example) -> tuple[int, ...] | None:
        """Of the last answer, where its row has them and they are this tokenizer's."""
        if example.answer_ids is not None:
            self.written.require(example.answer_ids, example.answer, where=_where(example))
        return example.answer_ids

    def approximate_length(self, example: Example) -> int:
        """About how many tokens an example has, without the template's, to put like with like: nothing is decoded."""
        (num_text,) = self.text_tokens([text_of(example)])
        return num_text + len(example.answer_ids or ()) + self.picture_tokens(example)

    def text_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each of the texts by itself."""
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def picture_tokens(self, example: Example) -> int:
        """From the pictures' sizes, as their headers say; 0 where there is no such header."""
        counts = [self.tokens_of_size(size_by_header(image)) for image in example.images]
        return 0 if NO_TOKENS in counts else sum(counts)

    def tokens_of_size(self, size: tuple[int, int]) -> int:
        """About how many a picture of that width and height has; ``NO_TOKENS`` where that cannot be said."""
        width, height = size
        count = getattr(self._processor, "_get_num_multimodal_tokens", None)
        if size == NO_SIZE:
            return NO_TOKENS
        try:
            if count is None:
                return self._counted_tokens(size)
            return int(sum(count(image_sizes=[(height, width)])["num_image_tokens"]))
        except Exception:  # of many types; whoever encodes the picture says what is wrong with it
            return NO_TOKENS

    def pixels(self, one: Encoded) -> int:
        """That a tower sees of an example's pictures, resized and cut as they are."""
        images = [value for value in one.per_picture.values() if value.is_floating_point()]
        repeats = getattr(self._processor.image_processor, "temporal_patch_size", 1)
        return max((value.numel() for value in images), default=0) // NUM_COLOURS // repeats

    def _counted_tokens(self, size: tuple[int, int]) -> int:
        """Of a blank picture of about that size, in pixels, where the processor does not tell; counted once."""
        width, height = (-(-pixels // SIZE_STEP) * SIZE_STEP for pixels in size)
        if (width, height) not in self._tokens_of_size:
            stream = io.BytesIO()
            Image.new("L", (width, height)).save(stream, "PNG")
            blank = self.encode_prompt(Example.single(stream.getvalue(), ".", ".", kind="", case="", index=0))
            self._tokens_of_size[width, height] = len(blank.input_ids)
        return self._tokens_of_size[width, height]

    def encode(self, example: Example) -> Encoded:
        """Raises   DataError  naming the row, when its pictures or its conversation cannot be used."""
        prompt = self._prompt.of(example.turns, where=_where(example))
        answer, is_cut = self._last_answer(example, prompt)
        return self._encoded(example, prompt, torch.tensor(answer, dtype=torch.int64), is_cut=is_cut)

    def count(self, example: Example) -> Counted:
        """What ``encode`` will make of the texts; no picture is decoded.

        Raises   DataError  naming the row, when its conversation cannot be used
        """
        prompt = self._prompt.of(example.turns, where=_where(example))
        answer, is_cut = self._last_answer(example, prompt)
        ids, answered = self._plain_prompt(prompt)
        labels, num_short = self._earlier_labels(ids, answered)
        return Counted(
            num_positions=int((labels != IGNORE_INDEX).sum()) + len(answer),
            num_cut=num_short + is_cut,
            num_tokens=len(labels) + len(answer),
        )

    def spelled_out(self, example: Example) -> list[str]:
        """Added tokens that its answers say and that are learned as pieces of text; none of an answer with ids."""
        turns = example.turns if self._train_on == "all" else example.turns[-1:]
        written = turns if example.answer_ids is None else turns[:-1]
        answers = [turn.text for turn in written if turn.role == "assistant"]
        return [token for answer in answers for token in self._prompt.spelled_out(answer)]

    def learned(self, example: Example) -> list[Learned]:
        """Each answer that is learned, in the order of the labels; no picture is decoded.

        Raises   DataError  naming the row, when its conversation cannot be used
        """
        prompt = self._prompt.of(example.turns, where=_where(example))
        answer, _ = self._last_answer(example, prompt)
        ids, answered = self._plain_prompt(prompt)
        found = [
            Learned(tuple(ids[one.begin : one.end].tolist()), one.end_of_turn is not None)
            for one in self._learned_of(answered)
        ]
        is_ended = answer[-1:] == [self.end_of_turn]
        return [*found, Learned(tuple(answer[: len(answer) - is_ended]), is_ended)]

    def _plain_prompt(self, prompt: Prompt) -> tuple[Tensor, list[Answered]]:
        """Its ids, placeholders of pictures not expanded, and where earlier answers are."""
        tokens, answered = self._prompt.finished(prompt, {"input_ids": self._prompt.plain_ids(prompt)})
        return tokens["input_ids"], answered

    def _last_answer(self, example: Example, prompt: Prompt) -> tuple[list[int], bool]:
        """Its labels, and whether it has more tokens than are learned."""
        written = self._written_ids(example)
        if written is None:
            answer = self._prompt.answer_ids(prompt, example.turns[-1].parts[0] or "")
        else:
            answer = list(written)
        if len(answer) > self._max_answer_tokens:
            return answer[: self._max_answer_tokens], True
        return [*answer, *([self.end_of_turn] if example.answer_end else [])], False

    def encode_prompt(self, example: Example) -> Encoded:
        """The conversation up to its last answer, without labels, to generate that from."""
        prompt = self._prompt.of(example.turns, where=_where(example))
        return self._encoded(example, prompt, torch.empty(0, dtype=torch.int64), is_cut=False)

    def blank(self, *, with_picture: bool = True) -> Encoded:
        """A prompt with a small white picture and no labels: a row for a batch that must have one.

        A model whose blocks are sharded gathers each of them on all ranks at once.  A rank whose rows have no picture
        would not run its tower, and leave the others waiting.
        """
        if with_picture not in self._blanks:
            stream = io.BytesIO()
            Image.new("RGB", BLANK_SIZE, "white").save(stream, "PNG")
            images = (stream.getvalue(),) if with_picture else ()
            turns = question_answer(".", ".", len(images))
            self._blanks[with_picture] = self.encode_prompt(Example(images, turns, where="a blank picture"))
        return self._blanks[with_picture]

    def collate(
        self, encoded: Sequence[Encoded], *, padding_side: Literal["left", "right"] = "right"
    ) -> Batch:
        """Pads and joins; what a model computes for an example does not depend on its companions or the side.

        Raises   DataError  when the pictures' tensors do not fit together.
        """
        pad_id = self.tokenizer.pad_token_id
        pad_id = self.end_of_turn if pad_id is None else pad_id
        return collated(encoded, pad_id=pad_id, padding_side=padding_side)

    def _encoded(self, example: Example, prompt: Prompt, answer: Tensor, *, is_cut: bool) -> Encoded:
        tokens, pictures, answered = self._prompt_inputs(example, prompt)
        ids = tokens.pop("input_ids")
        labels, num_short = self._earlier_labels(ids, answered if len(answer) else [])
        labels = torch.cat([labels, answer])
        return Encoded(
            key=self.key(example),
            input_ids=torch.cat([ids, answer]),
            labels=labels,
            per_token=continued(tokens, len(answer), answer_kinds(self._processor)),
            per_picture=pictures,
            num_positions=int((labels != IGNORE_INDEX).sum()),
            truncated=is_cut or num_short > 0,
            num_last=len(answer),
        )

    def _earlier_labels(self, ids: Tensor, answered: Sequence[Answered]) -> tuple[Tensor, int]:
        """Labels of the prompt, (S,), and how many answers have more tokens than are learned.

        Such an answer stays whole, as what follows it needs it; the tokens beyond are no labels.
        """
        labels, learned = torch.full_like(ids, IGNORE_INDEX), self._learned_of(answered)
        for one in learned:
            labels[one.begin : one.end] = ids[one.begin : one.end]
            if one.end_of_turn is not None:
                labels[one.end_of_turn] = ids[one.end_of_turn]
        whole = answered if learned else []
        return labels, sum(one.end < all_of_it.end for one, all_of_it in zip(learned, whole, strict=True))

    def _learned_of(self, answered: Sequence[Answered]) -> list[Answered]:
        """What is learned of earlier answers, none of it where only the last one is."""
        found = []
        for one in answered if self._train_on == "all" else []:
            end = min(one.end, one.begin + self._max_answer_tokens)
            begin = max(one.begin, 1)  # nothing stands before the first token that could predict it
            found.append(Answered(begin, end, one.end_of_turn if end == one.end else None))
        return found

    def _prompt_inputs(
        self, example: Example, prompt: Prompt
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Answered]]:
        """What there is for each token, (S, ...) each, for the pictures, and where earlier answers are."""
        where = _where(example)
        images = [
            decode_rgb(image, background=self._background, where=_where(example, number))
            for number, image in enumerate(example.images, start=1)
        ]
        inputs = self._processed(prompt.text, images, where)
        tokens, pictures = sorted_inputs(self._processor, inputs)
        tokens, answered = self._prompt.finished(prompt, self._prompt.without_appended(tokens))
        return tokens, pictures, answered

    def _processed(self, text: str, images: list[Image.Image], where: str) -> dict[str, Tensor]:
        pictures: dict[str, Any] = {}
        process = self._processor
        if not images and type(process).__name__ in PREFIX_LM:
            # Its processor takes no row without a picture, its models do: the prompt is what it writes behind one.
            process, text = process.tokenizer, f"{process.tokenizer.bos_token}{text}\n"
            pictures = {"return_token_type_ids": True}
        if images:  # nothing is to be guessed of their axes: a picture may be 3 pixels wide
            given = images if len(images) == 1 else [images]  # of one text
            pictures = {"images": given, "input_data_format": "channels_last"}
        try:
            inputs = process(
                text=[text],
                return_tensors="pt",
                add_special_tokens=self._prompt.add_special_tokens,
                padding=False,
                truncation=False,
                **pictures,
            )
        except (
            Exception
        ) as error:  # of texts and pictures that do not fit together, and of settings of another kind
            if is_out_of_memory(error):
                raise
            reason = (
                shortened(str(error)) or "the prompt has more picture placeholders than there are pictures"
            )
            if not isinstance(error, ValueError | IndexError | StopIteration):
                reason = (
                    f"{type(error).__name__}: {reason}; are the settings in preprocessor_config.json sound?"
                )
            if not images:
                raise DataError(
                    f"{where}: this model's processor refuses a row without a picture ({reason}). Take such rows out"
                ) from error
            what = "the picture" if len(images) == 1 else f"the {len(images)} pictures"
            raise DataError(f"{where}: the image processor refuses {what} ({reason})") from error
        return dict(inputs)


def text_of(example: Example) -> str:
    """All that is said in an example, but for an answer whose ids are given: its tokens are nearly its parts'."""
    turns = example.turns if example.answer_ids is None else example.turns[:-1]
    return " ".join(part for turn in turns for part in turn.parts if part is not None)


def _where(example: Example, picture: int | None = None) -> str:
    """How messages name an example, and of several pictures one."""
    case = f" (case {example.case})" if example.case else ""
    several = f", picture {picture}" if picture is not None and len(example.images) > 1 else ""
    return f"{example.where or f'row {example.index}'}{case}{several}"


def _tokens(processor: Any, names: Sequence[str]) -> list[str]:
    """Those that the processor has under these names."""
    found = (getattr(processor, name, None) for name in names)
    return [token for token in found if isinstance(token, str)]


def open_processor(model: str, data: DataConfig, *, revision: str | None = None) -> ExampleProcessor:
    """The processor of a local folder or a Hub model, set up as the recipe's data section says.

    Raises   RecipeError  when it cannot be opened, or is none for pictures and text.
    """
    processor, settings = processor_parts(model, data, revision=revision)
    return ExampleProcessor(processor, **settings)


def processor_parts(
    model: str, data: DataConfig, *, revision: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """The Hugging Face processor of a model, and the settings of an ``ExampleProcessor``.  Raises as above."""
    processor = load_processor(
        model,
        revision=revision,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        template=data.chat_template,
    )
    return processor, {
        "max_answer_tokens": data.max_answer_tokens,
        "system_prompt": data.system_prompt,
        "date": data.date,
        "train_on": data.train_on,
        "background": data.background,
    }
