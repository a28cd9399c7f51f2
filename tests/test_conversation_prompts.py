"""Tokens, labels and keys of conversations, against the processor's own way of writing them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import PLAIN_CHAT, encoded_picture
from test_processing import MARKERS, TEXTS, with_template
from transformers import AutoTokenizer

from shared.data.alignment import aligned
from shared.data.collation import IGNORE_INDEX
from shared.data.conversations import Turn
from shared.data.images import decode_rgb
from shared.data.processing import ExampleProcessor
from shared.data.processors import load_processor
from shared.data.prompts import ChatPrompt
from shared.data.rows import Example
from shared.data.templates import Template
from shared.errors import DataError
from shared.small_models import CHAT_TEMPLATE

# As those of Qwen3: thoughts of answers before the last question are dropped, later ones are written anew.
THOUGHTS = """\
{%- set found = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set found.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
    {%- set text = namespace(all='') -%}
    {%- if m.content is string -%}{%- set text.all = m.content -%}{%- else -%}
        {%- for p in m.content -%}
            {%- set text.all = text.all + (
                '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text) -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_start|>' + m.role + '\\n' -}}
    {%- if m.role == 'assistant' -%}
        {%- set thought = '' -%}{%- set said = text.all -%}
        {%- if '</think>' in said -%}
            {%- set thought = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {%- if loop.index0 > found.last -%}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said -}}
        {%- else -%}{{- said -}}{%- endif -%}
    {%- else -%}{{- text.all -}}{%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '<think>\\n' -}}
{%- endif -%}
"""
ALTERNATING = (
    "{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/...') -}}{%- endif -%}{%- endfor -%}"
    + CHAT_TEMPLATE
)
TEMPLATES = {"chat": CHAT_TEMPLATE, "plain": PLAIN_CHAT, "thoughts": THOUGHTS}


def user(*parts: str | None) -> Turn:
    return Turn("user", parts)


def said(text: str) -> Turn:
    return Turn("assistant", (text,))


def example_of(*turns: Turn, size: tuple[int, int] = (48, 40)) -> Example:
    number = sum(turn.num_pictures for turn in turns)
    return Example(tuple(encoded_picture(n, size=(size[0] + 16 * n, size[1])) for n in range(number)), turns)


def messages_of(example: Example) -> tuple[list[dict[str, Any]], list[Any]]:
    """As Transformers takes a conversation, and its pictures in order."""
    decoded = [decode_rgb(image) for image in example.images]
    pictures = iter(decoded)
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "image", "image": next(pictures)} if part is None else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in example.turns
    ]
    return messages, decoded


def own_ids(processor: Any, example: Example, **options: Any) -> list[int]:
    """The processor's own tokens of the whole conversation."""
    messages, _ = messages_of(example)
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    ids: list[int] = torch.as_tensor(found["input_ids"]).flatten().tolist()
    return ids


def labelled(processor: ExampleProcessor, example: Example) -> str:
    return processor.tokenizer.decode(processor.encode(example).answer_ids)


SHAPES: list[tuple[Turn, ...]] = [
    (user(None, "Which plane?"), said("axial"), user("And the modality?"), said("CT")),
    (user("What is CT?"), said("X-rays.")),
    (user(None, None, "Do they differ?"), said("Yes.")),
    (user("Look at ", None, " and ", None, ": same?"), said("No."), user(None, "This?"), said("No.")),
    (Turn("system", ("Be brief.",)), user("a"), said("b"), user(None, "c"), said("d"), user("e"), said("f")),
    (user(None), said("A dog.")),
    (user("Which plane?", None), said("axial")),
    (user(None, "a"), user("b"), said("c")),
    (user(None, "Yes"), said("Yes"), user(None, "Yes"), said("Yes"), user(None, "Yes"), said("Yes")),
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", SHAPES, ids=range(len(SHAPES)))
def test_the_tokens_are_the_processor_s_own(student_folder: Path, name: str, turns: tuple[Turn, ...]) -> None:
    processor, example = with_template(student_folder, TEMPLATES[name]), example_of(*turns)
    plain = load_processor(str(student_folder))
    plain.chat_template = TEMPLATES[name]
    own = own_ids(plain, example, enable_thinking=False)
    encoded = processor.encode(example)
    ids = encoded.input_ids.tolist()
    if name == "plain":  # this template has no end of turn; the tokenizer's takes the last line break's place
        assert ids[-1] == processor.end_of_turn
        ids, own = ids[:-1], own[: len(ids) - 1]
    assert ids == own[: len(ids)]
    assert processor.tokenizer.decode(own[len(ids) :]).strip() == ""
    asked = processor.encode_prompt(example).input_ids.tolist()
    assert asked == encoded.input_ids.tolist()[: len(asked)]
    assert processor.tokenizer.decode(encoded.input_ids[len(asked) :]).strip().startswith(example.answer)
    for name_, value in encoded.model_inputs.items():
        if name_ == "mm_token_type_ids":
            assert len(value) == len(encoded.input_ids)


@pytest.mark.parametrize("turns", SHAPES, ids=range(len(SHAPES)))
def test_every_answer_and_its_end_of_turn_are_labels(student_folder: Path, turns: tuple[Turn, ...]) -> None:
    processor, example = with_template(student_folder, CHAT_TEMPLATE), example_of(*turns)
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    assert labelled(processor, example) == "".join(f"{answer}<|im_end|>" for answer in answers)
    encoded = processor.encode(example)
    assert encoded.num_positions == len(encoded.answer_ids)
    is_label = encoded.labels != IGNORE_INDEX
    assert torch.equal(encoded.labels[is_label], encoded.input_ids[is_label])
    last = with_template(student_folder, CHAT_TEMPLATE, train_on="last")
    assert labelled(last, example) == f"{answers[-1]}<|im_end|>"
    assert torch.equal(last.encode(example).input_ids, encoded.input_ids)


@settings(max_examples=60)
@given(texts=st.lists(TEXTS, min_size=4, max_size=4))
def test_ordinary_texts_of_any_kind(
    processor: ExampleProcessor, student_folder: Path, texts: list[str]
) -> None:
    example = example_of(user(None, texts[0]), said(texts[1]), user(texts[2]), said(texts[3]))
    encoded = processor.encode(example)
    plain = _plain(student_folder)
    if not any(ord(text[0]) in range(0x300, 0x370) for text in texts):
        assert encoded.input_ids.tolist() == own_ids(plain, example)[: len(encoded.input_ids)]
    assert (encoded.answer_ids == processor.end_of_turn).sum() == 2


_opened: dict[Path, Any] = {}


def _plain(folder: Path) -> Any:
    return _opened.setdefault(folder, load_processor(str(folder)))


MARKED = st.lists(st.sampled_from([*MARKERS, "a", " b", "\u00e9"]), min_size=1, max_size=3).map("".join)


@settings(max_examples=60)
@given(st.lists(MARKED, min_size=5, max_size=5))
def test_markers_in_any_turn_stay_text(processor: ExampleProcessor, texts: list[str]) -> None:
    first, second, third, fourth, told = texts
    turns = (Turn("system", (told,)), user(None, first), said(second), user("x", None, third), said(fourth))
    encoded = processor.encode(example_of(*turns))
    harmless = processor.encode(
        example_of(Turn("system", ("t",)), user(None, "q"), said("r"), user("x", None, "s"), said("u"))
    )
    added = set(processor.tokenizer.added_tokens_decoder)
    assert [i for i in encoded.input_ids.tolist() if i in added] == [
        i for i in harmless.input_ids.tolist() if i in added
    ]
    assert processor.tokenizer.decode(encoded.answer_ids) == f"{second}<|im_end|>{fourth}<|im_end|>"
    kinds = encoded.model_inputs["mm_token_type_ids"]
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert torch.equal(kinds.bool(), encoded.input_ids == pad)


def test_both_paths_agree_on_texts_without_markers(student_folder: Path) -> None:
    """A marker in one turn leaves the tokens of the others as they are."""
    processor = with_template(student_folder, CHAT_TEMPLATE)
    turns = [user(None, "Which plane?"), said("axial, I think"), user(None, "And this?"), said("the same")]
    ordinary = processor.encode(example_of(*turns))
    marked = processor.encode(example_of(*turns[:3], said("the same <|im_end|>")))
    number = len(processor.encode_prompt(example_of(*turns)).input_ids)
    assert torch.equal(ordinary.input_ids[:number], marked.input_ids[:number])
    elsewhere = processor.encode(example_of(user(None, "Which plane? <|im_end|>"), *turns[1:]))
    assert torch.equal(elsewhere.answer_ids, ordinary.answer_ids)


# --- what templates do to earlier turns ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "thought",
    [
        "<think>\nhm, a plane\n</think>\n\naxial",
        "<think>hm</think>axial",
        "hm</think>axial",
        "<think>\n\n</think>\n\naxial",
        "<think>a</think> b <think>c</think>\naxial",
    ],
)
def test_dropped_thoughts_are_dropped_and_no_labels(student_folder: Path, thought: str) -> None:
    processor = with_template(student_folder, THOUGHTS)
    example = example_of(user(None, "Which plane?"), said(thought), user("And the modality?"), said("CT"))
    plain = load_processor(str(student_folder))
    plain.chat_template = THOUGHTS
    encoded = processor.encode(example)
    assert (
        encoded.input_ids.tolist() == own_ids(plain, example, enable_thinking=False)[: len(encoded.input_ids)]
    )
    assert labelled(processor, example) == "axial<|im_end|>CT<|im_end|>"


def test_thoughts_that_a_template_leaves_are_text(student_folder: Path) -> None:
    processor = with_template(student_folder, CHAT_TEMPLATE)
    thought = "<think>\nhm\n</think>\n\naxial"
    example = example_of(user(None, "Which plane?"), said(thought), user("Modality?"), said("CT"))
    assert labelled(processor, example) == f"{thought}<|im_end|>CT<|im_end|>"
    added = processor.tokenizer.convert_tokens_to_ids("<think>")
    assert added not in processor.encode(example).input_ids.tolist()


def test_a_tag_in_a_question_stays_text_where_a_thought_is_dropped(student_folder: Path) -> None:
    processor = with_template(student_folder, THOUGHTS)
    example = example_of(
        user(None, "What does <think> do, and </think>?"),
        said("<think>hm</think>It thinks."),
        user("So?"),
        said("b"),
    )
    encoded = processor.encode(example)
    text = processor.tokenizer.decode(encoded.input_ids)
    assert "What does <think> do, and </think>?<|im_end|>" in text
    assert "assistant\nIt thinks.<|im_end|>" in text
    think = processor.tokenizer.convert_tokens_to_ids("<think>")
    assert encoded.input_ids.tolist().count(think) == 1  # the template's, before the last answer


def test_what_cannot_be_followed_is_refused_with_its_row(student_folder: Path) -> None:
    reversing = CHAT_TEMPLATE.replace("{{- part.text -}}", "{{- part.text | replace('z', 'y') -}}")
    processor = with_template(student_folder, reversing)
    example = Example((), (user("xyz"), said("x"), user("w"), said("v")), where="here, row 3")
    with pytest.raises(DataError, match=r"^here, row 3: the chat template of .* cannot be followed"):
        processor.encode(example)


def test_a_refused_order_of_turns_names_row_and_roles(student_folder: Path) -> None:
    processor = with_template(student_folder, ALTERNATING)
    example = Example((), (user("a"), user("b"), said("c")), where="here, row 3")
    for use in (processor.encode, processor.encode_prompt, processor.require_usable):
        with pytest.raises(
            DataError, match=r"^here, row 3: .*refuses a conversation of user, user.*must alternate"
        ):
            use(example)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHAT_TEMPLATE.replace(
                "for message in messages", "for message in messages if message.role != 'system'"
            ),
            r"writes the text of turn 1, the system's, 0 times",
        ),
        (
            CHAT_TEMPLATE.replace(
                "{%- if part.type == 'image' -%}", "{%- if part.type == 'image' and loop.first -%}"
            ),
            "refuses|writes 1 of 2 picture",
        ),
    ],
)
def test_a_template_that_drops_something_is_refused(
    student_folder: Path, template: str, message: str
) -> None:
    processor = with_template(student_folder, template)
    turns = (Turn("system", ("t",)), user(None, "a"), said("c"))
    if "loop.first" in template:
        turns = (user(None, "a"), said("b"), user("c", None), said("d"))
    with pytest.raises(DataError, match=message):
        processor.encode(example_of(*turns))


def test_a_template_that_takes_plain_texts_alone_gets_them(student_folder: Path) -> None:
    textual = (
        "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}{%- if m.content is string -%}"
        "{{- m.content -}}{%- elif m.role == 'user' -%}{%- for p in m.content -%}{{- "
        "'<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text -}}{%- endfor -%}"
        "{%- else -%}{{- m.content -}}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )
    ours, expected = (with_template(student_folder, one) for one in (textual, CHAT_TEMPLATE))
    for turns in SHAPES:
        assert torch.equal(
            ours.encode(example_of(*turns)).input_ids, expected.encode(example_of(*turns)).input_ids
        )


# As Llama 3.2 Vision's: a system turn's content is taken for a text, and one before pictures is refused.
TRIMMED_SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{%- set told = messages[0].content | trim -%}"
    "{%- set messages = messages[1:] -%}{%- else -%}{%- set told = '' -%}{%- endif -%}"
    "{{- '<|im_start|>system\n' + told + '<|im_end|>\n' if told else '' -}}" + CHAT_TEMPLATE
)
# As Pixtral's: text is joined to a system turn's content.
JOINED_SYSTEM = TRIMMED_SYSTEM.replace("messages[0].content | trim", "messages[0].content").replace(
    "else '' -}}", "else '' -}}{%- set none_of_it = told + 'a text' -%}"
)


@pytest.mark.parametrize("template", [TRIMMED_SYSTEM, JOINED_SYSTEM], ids=["trimmed", "joined"])
def test_a_template_that_takes_system_turns_for_texts_gets_them_so(
    student_folder: Path, template: str
) -> None:
    ours, expected = (with_template(student_folder, one) for one in (template, CHAT_TEMPLATE))
    system = Turn("system", ("Be 'brief'.",))
    for turns in (*SHAPES, (system, user("a"), said("b")), (system, user(None, "a"), said("b"))):
        assert torch.equal(
            ours.encode(example_of(*turns)).input_ids, expected.encode(example_of(*turns)).input_ids
        )


def test_where_a_list_was_once_written_the_keys_are_others(student_folder: Path) -> None:
    """Caches of such prompts must not be taken for those of today's."""
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    rules = [ChatPrompt(tokenizer, one).changed_rules() for one in (TRIMMED_SYSTEM, JOINED_SYSTEM)]
    assert [list(one) for one in rules] == [["turns without pictures"], []]
    assert not any(ChatPrompt(tokenizer, one).changed_rules() for one in TEMPLATES.values())


def test_a_system_turn_of_the_row_takes_the_recipe_s_place(student_folder: Path) -> None:
    processor = with_template(student_folder, CHAT_TEMPLATE, system_prompt="The recipe's.")
    told, untold = (
        example_of(Turn("system", ("The row's.",)), user("a"), said("b")),
        example_of(user("a"), said("b")),
    )
    assert processor.tokenizer.decode(processor.encode(told).input_ids).startswith(
        "<|im_start|>system\nThe row's.<|im_end|>\n<|im_start|>user"
    )
    assert processor.tokenizer.decode(processor.encode(untold).input_ids).startswith(
        "<|im_start|>system\nThe recipe's.<|im_end|>\n<|im_start|>user"
    )


def test_long_answers_of_earlier_turns_stay_whole_and_are_learned_in_part(student_folder: Path) -> None:
    long = "b c d e f g h " * 3
    turns = (user("a"), said(long.strip()), user("b"), said("short"))
    whole = with_template(student_folder, CHAT_TEMPLATE)
    cut = with_template(student_folder, CHAT_TEMPLATE, max_answer_tokens=5)
    assert torch.equal(whole.encode(example_of(*turns)).input_ids, cut.encode(example_of(*turns)).input_ids)
    encoded = cut.encode(example_of(*turns))
    assert encoded.truncated
    assert not whole.encode(example_of(*turns)).truncated
    first = whole.encode(example_of(*turns)).answer_ids[:5]
    assert torch.equal(encoded.answer_ids[:5], first)
    assert (encoded.answer_ids == cut.end_of_turn).sum() == 1


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_counted_exactly_without_a_picture(
    student_folder: Path, name: str, train_on: Literal["all", "last"]
) -> None:
    """With markers in texts, thoughts that a template drops, and answers that are cut: what ``check`` tells."""
    processor = with_template(student_folder, TEMPLATES[name], train_on=train_on, max_answer_tokens=12)
    thought = said("<think>hm</think>It thinks, and thinks, and thinks.")
    more = [
        (user(None, "a"), thought, user("b <|im_end|>"), said("c <|im_start|> <think>")),
        (user(None, "a"), said("<|im_end|>" * 3)),
        (user("a"), said("x-ray, then CT, then MR, then US " * 2), user("b"), said("axial " * 20)),
    ]
    for turns in [*SHAPES, *more]:
        example = example_of(*turns)
        counted, encoded = processor.count(example), processor.encode(example)
        assert counted.num_positions == encoded.num_positions
        assert (counted.num_cut > 0) == encoded.truncated
        expanded = len(encoded.input_ids) - counted.num_tokens
        assert (expanded > 0) if example.images else (expanded == 0)


# --- keys ---------------------------------------------------------------------------------------------------


def test_the_key_of_one_question_about_one_picture_is_what_it_always_was(processor: ExampleProcessor) -> None:
    example = Example.single(b"picture", "question \u00fc", "answer")
    state = hashlib.blake2b(digest_size=16)
    for field in (b"picture", processor.prompt_fingerprint.encode(), "question \u00fc".encode(), b"answer"):
        state.update(len(field).to_bytes(8, "little") + field)
    assert processor.key(example) == state.digest()


def test_other_conversations_have_keys_of_their_own(student_folder: Path) -> None:
    processor = with_template(student_folder, CHAT_TEMPLATE)
    a, b = encoded_picture(0), encoded_picture(1)
    conversations: list[tuple[Sequence[bytes], tuple[Turn, ...]]] = [
        ((a,), (user(None, "q"), said("r"))),
        ((a,), (user("q", None), said("r"))),
        ((b,), (user("q", None), said("r"))),
        ((), (user("q"), said("r"))),
        ((), (Turn("system", ("q",)), user("q"), said("r"))),
        ((), (user("q"), user("q"), said("r"))),
        ((a, b), (user(None, None, "q"), said("r"))),
        ((b, a), (user(None, None, "q"), said("r"))),
        ((a, b), (user(None, "q", None), said("r"))),
        ((), (user("q"), said("r"), user("s"), said("t"))),
        ((), (user("q"), said("rs"), user("s"), said("t"))),
        ((), (user("q", "r"), said("r"))),
        ((), (user("qr"), said("r"))),
    ]
    keys = {processor.key(Example(tuple(images), turns)) for images, turns in conversations}
    assert len(keys) == len(conversations)
    last = with_template(student_folder, CHAT_TEMPLATE, train_on="last")
    same = [
        processor.key(Example(tuple(images), turns)) == last.key(Example(tuple(images), turns))
        for images, turns in conversations
    ]
    assert [index for index, one in enumerate(same) if not one] == [9, 10]  # those of several answers


# --- dates --------------------------------------------------------------------------------------------------

DATED = (
    "{%- if strftime_now is defined -%}{%- set today = strftime_now('%d %b %Y') -%}"
    "{%- else -%}{%- set today = 'no day' -%}{%- endif -%}"
    "{{- '<|im_start|>system\\nToday: ' + today + '<|im_end|>\\n' -}}" + CHAT_TEMPLATE
)


def test_a_template_is_told_the_date_that_the_recipe_fixes(student_folder: Path) -> None:
    first, again, other = (
        with_template(student_folder, DATED, date=day) for day in ("2026-01-31", "2026-01-31", "2025-12-01")
    )
    example = Example.single(encoded_picture(0), "q", "a")
    assert "Today: 31 Jan 2026<|im_end|>" in first.tokenizer.decode(first.encode(example).input_ids)
    assert first.key(example) == again.key(example) != other.key(example)
    today = with_template(student_folder, DATED)
    assert date.today().strftime("%d %b %Y") in today.tokenizer.decode(today.encode(example).input_ids)
    assert today.date == date.today().isoformat()


def test_a_template_that_prints_no_date_keeps_its_fingerprint(student_folder: Path) -> None:
    plain = with_template(student_folder, CHAT_TEMPLATE)
    assert (
        with_template(student_folder, CHAT_TEMPLATE, date="2026-01-31").prompt_fingerprint
        == plain.prompt_fingerprint
    )
    unused = "{%- set day = strftime_now('%d') if strftime_now is defined else '' -%}" + CHAT_TEMPLATE
    one, other = (with_template(student_folder, unused, date=day) for day in ("2026-01-31", "2025-12-01"))
    assert one.prompt_fingerprint == other.prompt_fingerprint
    assert one.date is None


def test_a_date_in_the_system_turn_alone_is_found(student_folder: Path) -> None:
    template = (
        "{%- if messages[0].role == 'system' -%}{{- strftime_now('%Y') -}}{%- endif -%}" + CHAT_TEMPLATE
    )
    assert with_template(student_folder, template, date="2026-01-31").date == "2026-01-31"


def test_llama_s_date_string_is_given_where_the_recipe_says_one(student_folder: Path) -> None:
    template = (
        "{%- if not date_string is defined -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}"
        "{{- 'Today: ' + date_string + '\\n' -}}" + CHAT_TEMPLATE
    )
    example = Example.single(encoded_picture(0), "q", "a")
    plain, told = (with_template(student_folder, template, date=day) for day in (None, "2026-01-31"))
    assert plain.date is None
    assert "26 Jul 2024" in plain.tokenizer.decode(plain.encode(example).input_ids)
    assert "31 Jan 2026" in told.tokenizer.decode(told.encode(example).input_ids)
    assert plain.key(example) != told.key(example)


@pytest.mark.parametrize("head", ["", "\n", "  \n", "  {% if true %}x{% endif %}\n"])
def test_telling_the_date_changes_nothing_else(student_folder: Path, head: str) -> None:
    """Blanks at the beginning of a template are treated as before."""
    source = head + "{{ strftime_now('%Y') }}" + CHAT_TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    written = Template(tokenizer, source, date=date.today()).first.fixed[0]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "QQ"}]}],
        chat_template=source,
        tokenize=False,
    )
    assert asked.startswith(written)


# --- alignment ----------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(data=st.data())
def test_stretches_are_found_around_expanded_pictures(data: st.DataObject) -> None:
    stretch = st.lists(st.integers(10, 14), max_size=6)
    stretches = data.draw(st.lists(stretch.map(lambda ids: [*ids, 7]), min_size=1, max_size=4))
    counts = data.draw(st.lists(st.integers(1, 5), min_size=len(stretches) - 1, max_size=len(stretches) - 1))
    plain, given_ids, expected = list(stretches[0]), list(stretches[0]), list(range(len(stretches[0])))
    for count, part in zip(counts, stretches[1:], strict=True):
        plain += [1, *part]
        expected += [-1, *range(len(given_ids) + count, len(given_ids) + count + len(part))]
        given_ids += [*[1] * count, *part]
    places = aligned(plain, given_ids, {1})
    assert [-1 if token == 1 else place for token, place in zip(plain, places, strict=True)] == expected


def test_a_processor_may_write_a_beginning_and_an_end_of_its_own() -> None:
    assert aligned([1, 5, 6], [1, 1, 1, 9, 5, 6, 8], {1}) == [None, 4, 5]
    assert aligned([5, 6], [9, 5, 6, 8], {1}) == [1, 2]


def test_tokens_that_join_a_picture_s_blanks_are_left_out() -> None:
    places = aligned([5, 6, 1, 7, 8], [5, 66, 2, 2, 77, 8], {1})
    assert places == [0, None, None, None, 5]


@settings(max_examples=200)
@given(data=st.data())
def test_stretches_that_are_alike_are_found_where_they_are(data: st.DataObject) -> None:
    """Blanks around a picture join the token before it; the same texts come again without a picture behind them."""
    turn = [*data.draw(st.lists(st.integers(10, 12), min_size=1, max_size=3)), 9, 5]
    counts = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=5))
    stretches = [[9, 5], *(turn * count for count in counts[1:]), [*(turn * counts[0]), 6]]
    plain, given_ids, expected = [], [], []
    for stretch in stretches[:-1]:
        expected += [*range(len(given_ids), len(given_ids) + len(stretch) - 1), None, None]
        plain += [*stretch, 1]
        given_ids += [*stretch[:-1], 55, 1, 1, 1, 44]
    expected += range(len(given_ids), len(given_ids) + len(stretches[-1]))
    assert aligned([*plain, *stretches[-1]], [*given_ids, *stretches[-1]], {1}) == expected


@settings(max_examples=200)
@given(st.lists(st.integers(1, 3), max_size=12), st.lists(st.integers(1, 3), max_size=20), st.booleans())
def test_the_only_way_is_the_one_that_the_search_finds(
    plain: list[int], others: list[int], expanded: bool
) -> None:
    given_ids = [n for token in plain for n in [token] * (4 if token == 1 else 1)] if expanded else others
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shared.data.alignment._only_way", lambda *_: None)
        searched = aligned(plain, given_ids, {1})
    assert aligned(plain, given_ids, {1}) == searched


def test_hundreds_of_pictures_are_aligned_at_once() -> None:
    """The search alone would take a minute."""
    plain, given_ids = [5], [5]
    for _ in range(200):
        plain += [10, 1, 11]
        given_ids += [10, *[1] * 8, 11]
    end = [20, 10, 11, 21]
    places = aligned(plain + end, given_ids + end, {1})
    assert [token == 1 for token in plain] == [place is None for place in places[: len(plain)]]
    assert places[-4:] == [len(given_ids) + n for n in range(4)]


def test_two_pictures_side_by_side_have_nothing_between_them() -> None:
    assert aligned([5, 1, 1, 6, 1, 5], [5, 2, 1, 1, 2, 2, 1, 3, 6, 2, 1, 5], {1}) == [
        *(0, None, None),
        *(8, None, 11),
    ]
