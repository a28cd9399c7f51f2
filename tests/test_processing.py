"""Prompts, labels, keys, fingerprints and batches, against transformers' own ways wherever it has one."""

from __future__ import annotations

import dataclasses
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example as hypothesis_example
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import PLAIN_CHAT, encoded_picture
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from shared.data.collation import IGNORE_INDEX, Encoded
from shared.data.conversations import question_answer
from shared.data.images import decode_rgb
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.processors import load_processor
from shared.data.prompts import ChatPrompt
from shared.data.rows import Example
from shared.errors import DataError, RecipeError
from shared.recipes import DataConfig
from shared.small_models import CHAT_TEMPLATE, END_OF_TURN, PAD, SPECIAL_TOKENS

MARKERS = [*SPECIAL_TOKENS, END_OF_TURN, PAD, "<think>", "</think>"]
# Hypothesis draws string constants of the project's modules too, and some of those are markers.
TEXTS = (
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=15)  # 60 bytes: no answer is cut
    .map(str.strip)
    .filter(lambda text: bool(text) and not any(marker in text for marker in MARKERS))
)
MARKED = st.lists(
    st.sampled_from([*MARKERS, "<|im_", "end|>", "a", " ", "\n", "\u00e9"]), min_size=1, max_size=4
).map("".join)
THINKING = CHAT_TEMPLATE.replace(
    "{{- '<|im_start|>assistant\\n' -}}",
    "{{- '<|im_start|>assistant\\n<think>\\n' + ('\\n</think>\\n\\n' if enable_thinking is false else '') -}}",
)


def example_of(question: str = "Which plane?", answer: str = "axial", **changes: Any) -> Example:
    image = changes.pop("image", encoded_picture(0))
    return dataclasses.replace(Example.single(image, question, answer), **changes)


def messages(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return [user] if answer is None else [user, turn]


def plain(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str | None = None, **options: Any
) -> list[int]:
    """transformers' own tokens of a conversation, one placeholder for the picture."""
    ask = answer is None
    text = tokenizer.apply_chat_template(
        messages(question, answer), tokenize=False, add_generation_prompt=ask, **options
    )
    return tokenizer(text)["input_ids"]


def with_template(folder: Path, template: str, **options: Any) -> ExampleProcessor:
    processor = load_processor(str(folder))
    processor.chat_template = template
    return ExampleProcessor(processor, **{"max_answer_tokens": 64} | options)


@pytest.fixture(scope="module")
def tokenizer(student_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(student_folder)


@pytest.fixture(scope="module")
def prompt(tokenizer: PreTrainedTokenizerBase) -> ChatPrompt:
    return ChatPrompt(tokenizer, CHAT_TEMPLATE)


# --- prompts and labels ---------------------------------------------------------------------------------


@given(question=TEXTS, answer=TEXTS)
@hypothesis_example(question="a\u0301 \u212b", answer="\u0301 combining first")
def test_ordinary_texts_get_the_tokens_of_the_plain_template(
    prompt: ChatPrompt, tokenizer: PreTrainedTokenizerBase, question: str, answer: str
) -> None:
    asked = plain(tokenizer, question)
    one = prompt.of(question_answer(question, answer, 1), where="here")
    assert tokenizer(one.text)["input_ids"] == asked
    assert not one.is_marked
    whole = plain(tokenizer, question, answer)
    turn = [*asked, *prompt.answer_ids(one, answer), prompt.end_of_turn]
    assert tokenizer.decode(turn) == tokenizer.decode(whole[: len(whole) - 1])
    if not unicodedata.combining(answer[0]):  # else it joins the template's line break, unseen by a generator
        assert turn == whole[:-1]  # the template's last line break is no label


@given(TEXTS)
def test_the_path_for_markers_agrees_on_texts_without(
    prompt: ChatPrompt, tokenizer: PreTrainedTokenizerBase, question: str
) -> None:
    one = prompt.of(question_answer(question, "answer", 1), where="here")
    marked = dataclasses.replace(one, is_marked=True, text=one.layout.text(["teachoncequestion"]))
    words = torch.tensor(tokenizer(marked.text)["input_ids"])
    put_in, _ = prompt.finished(marked, {"input_ids": words})
    assert put_in["input_ids"].tolist() == tokenizer(one.text)["input_ids"]


@settings(max_examples=40)
@given(question=MARKED, answer=MARKED)
def test_markers_in_the_data_stay_text(processor: ExampleProcessor, question: str, answer: str) -> None:
    tokenizer = processor.tokenizer
    added = set(tokenizer.added_tokens_decoder)
    of_template = [i for i in processor.encode(example_of("x", "y")).input_ids.tolist() if i in added]
    encoded = processor.encode(example_of(question, answer))
    ids = encoded.input_ids.tolist()
    assert [i for i in ids if i in added] == of_template
    text = tokenizer.decode(ids)
    pads = text.count("<|image_pad|>") - question.count("<|image_pad|>") - answer.count("<|image_pad|>")
    expected = (
        f"<|vision_start|>{'<|image_pad|>' * pads}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text == f"<|im_start|>user\n{expected}{answer}<|im_end|>"
    assert len(encoded.model_inputs["mm_token_type_ids"]) == len(ids)
    assert (
        encoded.model_inputs["mm_token_type_ids"] == (encoded.input_ids == _id(processor, "<|image_pad|>"))
    ).all()


def _id(processor: ExampleProcessor, token: str) -> int:
    return processor.tokenizer.convert_tokens_to_ids(token)


def test_the_inputs_are_those_of_the_plain_processor(
    student_folder: Path, processor: ExampleProcessor, examples: list[Example]
) -> None:
    plain_processor = load_processor(str(student_folder))
    for example in examples[:4]:
        text = plain_processor.apply_chat_template(
            messages(example.question), tokenize=False, add_generation_prompt=True
        )
        image = decode_rgb(example.images[0])
        expected = plain_processor(text=[text], images=[image], return_tensors="pt")
        encoded = processor.encode_prompt(example)
        assert torch.equal(encoded.input_ids, expected["input_ids"][0])
        assert torch.equal(encoded.model_inputs["mm_token_type_ids"], expected["mm_token_type_ids"][0])
        assert torch.equal(encoded.model_inputs["pixel_values"], expected["pixel_values"])
        assert torch.equal(encoded.model_inputs["image_grid_thw"], expected["image_grid_thw"])
        assert set(encoded.model_inputs) == {"mm_token_type_ids", "pixel_values", "image_grid_thw"}


def test_labels_are_the_answer_and_the_end_of_turn(processor: ExampleProcessor) -> None:
    encoded = processor.encode(example_of(answer="A mass of 3 cm"))
    labels = encoded.labels[encoded.labels != IGNORE_INDEX]
    assert processor.tokenizer.decode(labels) == "A mass of 3 cm<|im_end|>"
    assert torch.equal(labels, encoded.answer_ids)
    assert torch.equal(encoded.input_ids[-len(labels) :], labels)
    assert encoded.num_positions == len(labels)
    assert not encoded.truncated
    assert len(processor.encode_prompt(example_of()).answer_ids) == 0


@pytest.mark.parametrize("over", [-1, 0, 1, 5])
def test_long_answers_are_cut_and_marked(
    student_folder: Path, processor: ExampleProcessor, over: int
) -> None:
    example = example_of(question="why " * 300, answer="b c d e f g h " * 3)
    whole = processor.encode(example).answer_ids
    limit = len(whole) - 1 - over
    short = with_template(student_folder, CHAT_TEMPLATE, max_answer_tokens=limit).encode(example)
    assert short.truncated == (over > 0)
    assert torch.equal(short.answer_ids, whole[:limit] if over > 0 else whole)
    assert torch.equal(short.input_ids[: -short.num_positions], processor.encode_prompt(example).input_ids)


def test_the_system_prompt_comes_first_and_changes_the_key(student_folder: Path) -> None:
    told = with_template(student_folder, CHAT_TEMPLATE, system_prompt="Be brief.")
    text = told.tokenizer.decode(told.encode_prompt(example_of()).input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert told.key(example_of()) != with_template(student_folder, CHAT_TEMPLATE).key(example_of())


def test_thinking_is_switched_off(student_folder: Path) -> None:
    thinking = with_template(student_folder, THINKING)
    encoded = thinking.encode(example_of(answer="axial"))
    text = thinking.tokenizer.decode(encoded.input_ids)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\naxial<|im_end|>")
    assert thinking.tokenizer.decode(encoded.answer_ids) == "axial<|im_end|>"


def test_a_thought_that_the_template_always_writes_is_prompt_and_no_label(student_folder: Path) -> None:
    closed = "{{- '<|im_start|>' + message.role + '\\n' -}}"
    template = CHAT_TEMPLATE.replace(
        closed,
        closed + "{%- if message.role == 'assistant' -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}",
    )
    processor = with_template(student_folder, template)
    encoded = processor.encode(example_of(answer="axial"))
    assert processor.tokenizer.decode(encoded.answer_ids) == "axial<|im_end|>"
    assert processor.tokenizer.decode(encoded.input_ids).endswith("</think>\n\naxial<|im_end|>")


def test_without_markers_around_it_an_answer_ends_with_the_end_of_text(student_folder: Path) -> None:
    """A template such as LLaVA's first one: no end of turn, and a blank before the answer."""
    processor = with_template(student_folder, PLAIN_CHAT)
    encoded = processor.encode(example_of(answer="axial"))
    assert processor.tokenizer.decode(encoded.answer_ids) == " axial<|im_end|>"
    text = "USER: <|image_pad|> Which plane?\nASSISTANT: axial"
    expected = processor.tokenizer(text)["input_ids"]
    pad = _id(processor, "<|image_pad|>")
    ids = encoded.input_ids.tolist()
    first = ids.index(pad)
    assert [*ids[:first], *ids[first + ids.count(pad) - 1 : -1]] == expected
    marked = processor.encode(example_of("is <|im_end|> it", "a<|im_end|>b"))
    assert processor.tokenizer.decode(marked.answer_ids) == " a<|im_end|>b<|im_end|>"
    assert (marked.input_ids == _id(processor, "<|im_end|>")).sum() == 1


def test_a_picture_behind_the_question_is_found_too(student_folder: Path) -> None:
    behind = (
        "{% for m in messages %}<|im_start|>{{ m.content[-1].text }}{% if m.role == 'user' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    processor = with_template(student_folder, behind)
    encoded = processor.encode(example_of("is <|im_end|> it", "yes"))
    pads = int((encoded.input_ids == _id(processor, "<|image_pad|>")).sum())
    assert processor.tokenizer.decode(encoded.input_ids) == (
        f"<|im_start|>is <|im_end|> it<|vision_start|>{'<|image_pad|>' * pads}<|vision_end|><|im_end|>"
        "<|im_start|>yes<|im_end|>"
    )
    assert (encoded.input_ids == _id(processor, "<|im_end|>")).sum() == 2


@pytest.mark.parametrize("before", ["", "<|endoftext|>"])
def test_a_beginning_of_text_stands_once(student_folder: Path, before: str) -> None:
    processor = load_processor(str(student_folder))
    processor.tokenizer.bos_token = "<|endoftext|>"
    processor.tokenizer.add_bos_token = True
    processor.chat_template = before + CHAT_TEMPLATE
    encoded = ExampleProcessor(processor, max_answer_tokens=9).encode(example_of("is <|im_end|> it"))
    bos = processor.tokenizer.bos_token_id
    assert encoded.input_ids[0] == bos
    assert (encoded.input_ids == bos).sum() == 1


@pytest.mark.parametrize("question", ["is it", "is <|im_end|> it"])
@pytest.mark.parametrize(("before", "after"), [((), (PAD,)), (("<think>",), (PAD, END_OF_TURN))])
def test_what_a_tokenizer_appends_never_stands_before_the_answer(
    student_folder: Path, question: str, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    """Some tokenizers end every text with an end of text; a model that sees it has nothing left to say."""
    plain = ExampleProcessor(load_processor(str(student_folder)), max_answer_tokens=9)
    processor = load_processor(str(student_folder))
    tokens = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in (*before, *after)}
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=list(tokens.items())
    )
    appending = ExampleProcessor(processor, max_answer_tokens=9)
    prefix = [tokens[token] for token in before]
    for found, expected in (
        (appending.encode(example_of(question)), plain.encode(example_of(question))),
        (appending.encode_prompt(example_of(question)), plain.encode_prompt(example_of(question))),
    ):
        assert found.input_ids.tolist() == prefix + expected.input_ids.tolist()
        assert all(
            len(found.model_inputs[name]) == len(found.input_ids)
            for name, value in expected.model_inputs.items()
            if value.shape == expected.input_ids.shape
        )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ messages[0].role }}", "question and answer must each stand once in its text, found 0 and 0"),
        (CHAT_TEMPLATE + CHAT_TEMPLATE, "found 2 and 2"),
        ("{{ raise_exception('no pictures please') }}", "no pictures please"),
        ("{% for", "chat template of"),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "writes the parts of a turn as a list",
        ),
    ],
)
def test_unusable_templates_are_recipe_errors(
    student_folder: Path, template: str | None, message: str
) -> None:
    processor = load_processor(str(student_folder))
    processor.chat_template = processor.tokenizer.chat_template = template
    with pytest.raises(RecipeError, match=message):
        ExampleProcessor(processor, max_answer_tokens=9)


# --- pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (3, 90), (90, 3), (1, 200), (200, 1), (300, 200)])
def test_small_and_narrow_pictures_are_not_mistaken_for_channels(
    processor: ExampleProcessor, size: tuple[int, int]
) -> None:
    encoded = processor.encode(example_of(image=encoded_picture(1, size=size)))
    _, height, width = encoded.model_inputs["image_grid_thw"][0].tolist()
    assert encoded.model_inputs["pixel_values"].shape == (height * width, 3 * 16 * 16)  # one frame a picture
    assert (encoded.input_ids == _id(processor, "<|image_pad|>")).sum() == height * width // 4
    if size[0] != size[1]:
        assert (width > height) == (size[0] > size[1])


def test_pixel_bounds_are_the_recipes(student_folder: Path) -> None:
    few = open_processor(str(student_folder), DataConfig(source="x", max_pixels=4096))
    many = open_processor(str(student_folder), DataConfig(source="x", min_pixels=16384))
    example = example_of(image=encoded_picture(1, size=(128, 128)))
    assert len(few.encode(example).model_inputs["pixel_values"]) == 16
    assert len(many.encode(example_of()).model_inputs["pixel_values"]) >= 64
    with pytest.raises(RecipeError, match=r"min_pixels 9000 is above data\.max_pixels 8000"):
        open_processor(str(student_folder), DataConfig(source="x", min_pixels=9000, max_pixels=8000))


def test_bad_pictures_name_their_row(processor: ExampleProcessor) -> None:
    with pytest.raises(DataError, match=r"^row 7 \(case MPX9\): the picture cannot be decoded"):
        processor.encode(example_of(image=b"junk", index=7, case="MPX9"))


def test_a_processor_that_refuses_a_picture_names_its_row(
    processor: ExampleProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.data.images.MAX_ASPECT_RATIO", 1000)
    with pytest.raises(DataError, match=r"row 0: the image processor refuses the picture .*aspect ratio"):
        processor.encode(example_of(image=encoded_picture(1, size=(402, 2))))


# --- batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_holds_what_its_examples_hold(
    processor: ExampleProcessor, examples: list[Example], side: Any
) -> None:
    encoded = [processor.encode(example) for example in examples[:5]]
    batch = processor.collate(encoded, padding_side=side)
    mask = batch.inputs["attention_mask"].bool()
    for name in ("input_ids", "mm_token_type_ids"):
        assert batch.inputs[name].shape == mask.shape
    for row, one in enumerate(encoded):
        assert torch.equal(batch.inputs["input_ids"][row][mask[row]], one.input_ids)
        kinds = batch.inputs["mm_token_type_ids"][row]
        assert torch.equal(kinds[mask[row]], one.model_inputs["mm_token_type_ids"])
        start, stop = batch.example_offsets[row : row + 2].tolist()
        assert torch.equal(batch.labels[start:stop], one.answer_ids)
    assert batch.keys == [processor.key(example) for example in examples[:5]]
    assert (batch.inputs["input_ids"][~mask] == processor.tokenizer.pad_token_id).all()
    assert len(batch.inputs["image_grid_thw"]) == 5
    assert len(batch.inputs["pixel_values"]) == batch.inputs["image_grid_thw"].prod(1).sum()
    assert mask[:, -1 if side == "left" else 0].all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_shift_rule_is_that_of_the_models_own_loss(
    student_folder: Path, processor: ExampleProcessor, examples: list[Example], side: Any
) -> None:
    """Cross-entropy at ``position_index`` equals the loss that transformers computes from unshifted labels."""
    model = AutoModelForImageTextToText.from_pretrained(student_folder).eval()
    encoded = [processor.encode(example) for example in examples[:4]]
    batch = processor.collate(encoded, padding_side=side)
    mask = batch.inputs["attention_mask"].bool()
    labels = torch.full(mask.shape, IGNORE_INDEX)
    labels[mask] = torch.cat([one.labels for one in encoded])
    with torch.no_grad():
        output = model(**batch.inputs, labels=labels)
    logits = output.logits.flatten(0, 1)[batch.position_index]
    assert torch.nn.functional.cross_entropy(logits, batch.labels).item() == pytest.approx(
        output.loss.item(), rel=1e-5
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_companions_and_padding_do_not_change_hidden_states(
    student_folder: Path, processor: ExampleProcessor, examples: list[Example], side: Any
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(student_folder).eval().model

    def predicting(chosen: list[Encoded]) -> torch.Tensor:
        batch = processor.collate(chosen, padding_side=side)
        with torch.no_grad():
            return model(**batch.inputs).last_hidden_state.flatten(0, 1)[batch.position_index]

    encoded = [processor.encode(example) for example in [*examples[:4], example_of("why " * 40, "a")]]
    alone = torch.cat([predicting([one]) for one in encoded])
    assert torch.allclose(predicting(encoded), alone, atol=2e-5)


def test_a_batch_moves_as_a_whole(processor: ExampleProcessor, examples: list[Example]) -> None:
    batch = processor.collate([processor.encode(example) for example in examples[:2]]).to("meta")
    tensors = [*batch.inputs.values(), batch.position_index, batch.labels, batch.example_offsets]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert len(batch.keys) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_batch_is_pinned_as_a_whole(processor: ExampleProcessor, examples: list[Example]) -> None:
    batch = processor.collate([processor.encode(example) for example in examples[:2]]).pin_memory()
    tensors = [*batch.inputs.values(), batch.position_index, batch.labels, batch.example_offsets]
    assert all(tensor.is_pinned() for tensor in tensors)
    assert batch.to("cuda", non_blocking=True).labels.device.type == "cuda"


def test_prompts_alone_make_a_batch_to_generate_from(
    student_folder: Path, processor: ExampleProcessor, examples: list[Example]
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(student_folder).eval()
    prompts = [processor.encode_prompt(example) for example in examples[:3]]
    batch = processor.collate(prompts, padding_side="left")
    assert len(batch.labels) == len(batch.position_index) == 0
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch.inputs, **options)[:, -3:]
    for row, one in enumerate(prompts):
        alone = model.generate(**processor.collate([one]).inputs, **options)[:, -3:]
        assert torch.equal(together[row], alone[0])


class _Encoding:
    """A data set that encodes in its worker, as stage two's does."""

    def __init__(self, processor: ExampleProcessor, examples: list[Example]) -> None:
        self.processor, self.examples = processor, examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Encoded:
        return self.processor.encode(self.examples[index])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_make_the_same_batches(
    processor: ExampleProcessor, examples: list[Example], context: str
) -> None:
    expected = processor.collate([processor.encode(example) for example in examples[:4]])
    data: Any = _Encoding(processor, examples[:4])
    options = {"collate_fn": processor.collate, "num_workers": 1, "multiprocessing_context": context}
    (batch,) = list(DataLoader(data, batch_size=4, **options))
    assert batch.keys == expected.keys
    assert torch.equal(batch.position_index, expected.position_index)
    for name, value in expected.inputs.items():
        assert torch.equal(batch.inputs[name], value)


# --- another family -------------------------------------------------------------------------------------


def test_another_family_goes_through_its_own_processor(llava_folder: Path) -> None:
    processor = open_processor(str(llava_folder), DataConfig(source="x"))
    examples = [example_of(answer="axial"), example_of("is <image> or <|im_end|> it", "a <image>")]
    batch = processor.collate([processor.encode(example) for example in examples])
    assert batch.inputs["pixel_values"].shape == (2, 3, 28, 28)
    assert set(batch.inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert (batch.inputs["input_ids"] == _id(processor, "<image>")).sum(1).tolist() == [4, 4]
    assert processor.tokenizer.decode(batch.labels) == " axial<|im_end|> a <image><|im_end|>"
    with pytest.raises(RecipeError, match="CLIPImageProcessorPil has no such setting as max_pixels"):
        open_processor(str(llava_folder), DataConfig(source="x", max_pixels=4096))


def test_folders_that_are_no_vlm_are_recipe_errors(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(RecipeError, match="no such file or folder"):
        load_processor(str(tmp_path / "nowhere"))
    for folder in (tmp_path, tokenizer_folder):
        with pytest.raises(RecipeError, match=f"model {folder}: its processor cannot be opened"):
            open_processor(str(folder), DataConfig(source="x"))


def test_the_approximate_length_counts_the_picture_s_tokens(
    processor: ExampleProcessor, examples: list[Example]
) -> None:
    """Without decoding it; what is left is the text, the same for examples that differ in the picture alone."""
    small, large = (
        dataclasses.replace(examples[0], images=(encoded_picture(0, size=size),))
        for size in ((64, 64), (256, 192))
    )
    encoded = [processor.encode(one) for one in (small, large)]
    more = len(encoded[1].input_ids) - len(encoded[0].input_ids)
    assert more > 0
    assert processor.approximate_length(large) - processor.approximate_length(small) == more
    broken = dataclasses.replace(small, images=(b"no picture",))
    assert 0 < processor.approximate_length(broken) < processor.approximate_length(small)
