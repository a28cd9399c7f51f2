"""From an example to what a model is fed.

    processor = open_processor("Qwen/Qwen3.5-4B", recipe.data)
    batch = processor.collate([processor.encode(example) for example in examples])
    hidden = model(**batch.inputs).last_hidden_state                    # (B, S, D)
    predicting = hidden.flatten(0, 1)[batch.position_index]             # (N, D), one row for each label

Prompt and pictures are never cut.  Labels are the answer's tokens and the end of the turn, nothing else; an
answer longer than ``max_answer_tokens`` keeps that many tokens, has no end of turn, and is marked
``truncated``.  Pictures always go through the PIL image processor, so that results do not depend on whether
torchvision is installed.

Legend: B examples, S padded length, N labels of the batch, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from shared.data.collation import IGNORE_INDEX, Batch, Encoded, collated
from shared.data.fingerprints import (
    digest,
    image_processor_fingerprint,
    template_fingerprint,
    tokenizer_fingerprint,
)
from shared.data.images import CONVERSION_VERSION, Background, decode_rgb, size_of
from shared.data.processors import chat_template, load_processor
from shared.data.prompts import PROMPT_VERSION, ChatPrompt
from shared.data.rows import Example
from shared.errors import DataError
from shared.recipes import DataConfig

KEY_BYTES = 16
CHARACTERS_PER_TOKEN = 4  # of English prose, roughly


class ExampleProcessor:
    """One model's way from example to tokens and pixels; picklable, so it can work in data-loader workers."""

    def __init__(
        self,
        processor: Any,
        *,
        max_answer_tokens: int,
        system_prompt: str | None = None,
        background: Background = "black",
    ) -> None:
        self._processor = processor
        self._background = background
        self._max_answer_tokens = max_answer_tokens
        template = chat_template(processor)
        named = (getattr(processor, name, None) for name in ("image_token", "boi_token"))
        self._prompt = ChatPrompt(
            processor.tokenizer,
            template,
            system_prompt=system_prompt,
            placeholders=[token for token in named if isinstance(token, str)],
        )
        self.tokenizer = processor.tokenizer
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
            }
        )

    @property
    def end_of_turn(self) -> int:
        """The id of the token that ends an answer."""
        return self._prompt.end_of_turn

    @property
    def num_token_ids(self) -> int:
        """One more than the largest id the tokenizer knows; a model's head may be wider."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def key(self, example: Example) -> bytes:
        """128 bits of the picture's bytes, the question, the answer, and what makes them tokens."""
        state = hashlib.blake2b(digest_size=KEY_BYTES)
        texts = (self.prompt_fingerprint, example.question, example.answer)
        for field in (example.image, *(text.encode() for text in texts)):
            state.update(len(field).to_bytes(8, "little"))
            state.update(field)
        return state.digest()

    def approximate_length(self, example: Example) -> int:
        """About how many tokens an example has, to put like with like: nothing is decoded or tokenized.

        A picture's tokens follow from its size, where the processor says how; text has one for four characters.
        """
        return (len(example.question) + len(example.answer)) // CHARACTERS_PER_TOKEN + self.picture_tokens(
            example
        )

    def picture_tokens(self, example: Example) -> int:
        """From the picture's header alone; 0 where the processor does not say, or there is no such header."""
        count = getattr(self._processor, "_get_num_multimodal_tokens", None)
        try:
            width, height = size_of(example.image)
            return 0 if count is None else sum(count(image_sizes=[(height, width)])["num_image_tokens"])
        except Exception:  # of many types; whoever decodes the picture says what is wrong with it
            return 0

    def encode(self, example: Example) -> Encoded:
        """Raises   DataError  naming the row, when its picture cannot be used."""
        answer = self._prompt.answer_ids(example.answer)
        truncated = len(answer) > self._max_answer_tokens
        answer = answer[: self._max_answer_tokens] if truncated else [*answer, self.end_of_turn]
        return self._encoded(example, torch.tensor(answer, dtype=torch.int64), truncated=truncated)

    def encode_prompt(self, example: Example) -> Encoded:
        """The prompt alone, without labels, to generate from."""
        return self._encoded(example, torch.empty(0, dtype=torch.int64), truncated=False)

    def collate(
        self, encoded: Sequence[Encoded], *, padding_side: Literal["left", "right"] = "right"
    ) -> Batch:
        """Pads and joins; what a model computes for an example does not depend on its companions or the side.

        Raises   DataError  when the pictures' tensors do not fit together.
        """
        pad_id = self.tokenizer.pad_token_id
        pad_id = self.end_of_turn if pad_id is None else pad_id
        return collated(encoded, pad_id=pad_id, padding_side=padding_side)

    def _encoded(self, example: Example, answer: Tensor, *, truncated: bool) -> Encoded:
        tokens, pictures = self._prompt_inputs(example)
        prompt = tokens.pop("input_ids")
        per_token = {k: torch.cat([v, v.new_zeros(len(answer))]) for k, v in tokens.items()}  # 0: plain text
        return Encoded(
            key=self.key(example),
            input_ids=torch.cat([prompt, answer]),
            labels=torch.cat([torch.full_like(prompt, IGNORE_INDEX), answer]),
            model_inputs=per_token | pictures,
            num_positions=len(answer),
            truncated=truncated,
        )

    def _prompt_inputs(self, example: Example) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What there is for each token, of shape (S,), and the rest."""
        where = (example.where or f"row {example.index}") + (
            f" (case {example.case})" if example.case else ""
        )
        image = decode_rgb(example.image, background=self._background, where=where)
        marked = self._prompt.holds_marker(example.question)
        text = self._prompt.stand_in_text() if marked else self._prompt.text(example.question)
        inputs = self._processed(text, image, where)
        inputs.pop("attention_mask", None)  # all ones; collation makes its own
        shape = inputs["input_ids"].shape
        tokens = {k: v for k, v in inputs.items() if v.shape == shape and not v.is_floating_point()}
        pictures = {k: v for k, v in inputs.items() if k not in tokens}
        tokens = self._prompt.without_appended(tokens)
        if marked:
            tokens = self._prompt.put_in(example.question, tokens)
        return {k: v[0] for k, v in tokens.items()}, pictures

    def _processed(self, text: str, image: Image.Image, where: str) -> dict[str, Tensor]:
        try:
            inputs = self._processor(
                text=[text],
                images=[image],
                return_tensors="pt",
                add_special_tokens=self._prompt.add_special_tokens,
                padding=False,
                truncation=False,
                input_data_format="channels_last",  # not to be guessed: a picture may be 3 pixels wide
            )
        except ValueError as error:
            raise DataError(f"{where}: the image processor refuses the picture ({error})") from error
        return dict(inputs)


def open_processor(model: str, data: DataConfig, *, revision: str | None = None) -> ExampleProcessor:
    """The processor of a local folder or a Hub model, set up as the recipe's data section says.

    Raises   RecipeError  when it cannot be opened, or is none for pictures and text.
    """
    return ExampleProcessor(
        load_processor(model, revision=revision, min_pixels=data.min_pixels, max_pixels=data.max_pixels),
        max_answer_tokens=data.max_answer_tokens,
        system_prompt=data.system_prompt,
        background=data.background,
    )
