"""Conversations of every family: tokens and labels against the processor's own way of writing them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from families import FAMILIES, make_family, of_families, spoken
from test_conversation_prompts import example_of, messages_of, said, user
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from shared.answering import Answered, Refused, answer, own_ends, sampled
from shared.data.collation import Encoded
from shared.data.conversations import Turn
from shared.data.processing import open_processor
from shared.data.processors import chat_template, load_processor
from shared.data.prompts import ChatPrompt
from shared.data.rows import Example
from shared.errors import DataError
from shared.models.vlm import in_dtype_of, last_hidden_states, load_vlm, split
from shared.recipes import DataConfig

SHAPES: dict[str, tuple[Turn, ...]] = {
    "turns": (user(None, "Which plane?"), said("axial"), user("And the modality?"), said("CT")),
    "text": (user("What is CT?"), said("X-rays.")),
    "two": (user(None, None, "Do they differ?"), said("Yes.")),
    "later": (user(None, "This?"), said("axial"), user(None, "And this?"), said("axial")),
    "system": (Turn("system", ("Be brief.",)), user(None, "Which plane?"), said("axial")),
}
REFUSALS = {  # of families that were trained on one question about pictures
    ("paligemma", "turns"): "refuses a conversation of user, assistant, user",
    ("paligemma", "later"): "refuses a conversation of user, assistant, user",
}


def own_ids(processor: Any, example: Example) -> list[int]:
    """As ``apply_chat_template(tokenize=True)`` makes them, which SmolVLM's processor cannot without its videos."""
    messages, pictures = messages_of(example)
    text = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, tokenize=False
    )
    bos = processor.tokenizer.bos_token
    found = processor(
        text=[text],
        images=[pictures] if pictures else None,
        add_special_tokens=bos is None or not text.startswith(bos),
    )
    ids: list[int] = torch.as_tensor(found["input_ids"]).flatten().tolist()
    if processor.__class__.__name__ != "SmolVLMProcessor":
        whole = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert ids == torch.as_tensor(whole["input_ids"]).flatten().tolist()
    return ids


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")
    return cache(lambda family: make_family(family, root / family))


@pytest.mark.parametrize("shape", SHAPES)
@of_families(FAMILIES)
def test_conversations_have_the_processor_s_own_tokens(
    folder_of: Callable[[str], Path], family: str, shape: str
) -> None:
    folder, example = folder_of(family), example_of(*SHAPES[shape])
    processor = open_processor(str(folder), DataConfig(source="x"))
    plain = load_processor(str(folder))
    plain.chat_template = chat_template(plain)
    if (family, shape) in REFUSALS:
        with pytest.raises(DataError, match=REFUSALS[family, shape]):
            processor.encode(example)
        return
    encoded = processor.encode(example)
    if (family, shape) == (
        "paligemma",
        "text",
    ):  # which its processor refuses: as it writes one behind a picture
        bos = processor.tokenizer.bos_token
        assert processor.tokenizer.decode(processor.encode_prompt(example).input_ids) == f"{bos}What is CT?\n"
    elif family == "paligemma":  # whose processor writes a line's end behind whatever it is given
        asked = replace(example, turns=example.turns[:-1])
        assert processor.encode_prompt(example).input_ids.tolist() == own_ids(plain, asked)
    else:
        ids, own = encoded.input_ids.tolist(), own_ids(plain, example)
        # Where a template has no end of turn, the tokenizer's stands for it.
        length = len(ids) if own[len(ids) - 1 : len(ids)] == ids[-1:] else len(ids) - 1
        assert ids[:length] == own[:length]
    answers = [turn.text for turn in example.turns if turn.role == "assistant"]
    labels = processor.tokenizer.decode(encoded.answer_ids, skip_special_tokens=True)
    assert "".join(labels.split()) == "".join("".join(answers).split())
    marked = processor.encode(example_of(*SHAPES[shape][:-1], said("a <image> <|im_end|> b")))
    prompt = processor.encode_prompt(example).input_ids
    assert torch.equal(marked.input_ids[: len(prompt)], prompt)


@of_families(FAMILIES)
def test_a_marker_in_one_turn_leaves_the_others_as_they_are(
    folder_of: Callable[[str], Path], family: str
) -> None:
    if (family, "turns") in REFUSALS:
        pytest.skip("knows no conversations")
    folder = folder_of(family)
    processor = open_processor(str(folder), DataConfig(source="x"))
    added = set(processor.tokenizer.added_tokens_decoder)
    marker = FAMILIES[family].end_of_turn
    turns = (user(None, "Which plane?"), said("axial, I think"), user("And the modality?"), said("CT"))
    harmless = processor.encode(example_of(*turns))
    for place, said_there in ((0, user(None, f"Which {marker} plane?")), (2, user(f"And {marker}?"))):
        changed = [*turns]
        changed[place] = said_there
        marked = processor.encode(example_of(*changed))
        assert torch.equal(marked.answer_ids, harmless.answer_ids)
        assert [i for i in marked.input_ids.tolist() if i in added] == [
            i for i in harmless.input_ids.tolist() if i in added
        ]
    marked = processor.encode(example_of(turns[0], said(f"a {marker} b"), *turns[2:]))
    assert [i for i in marked.answer_ids.tolist() if i in added] == [
        i for i in harmless.answer_ids.tolist() if i in added
    ]
    assert "".join(f"a {marker} b".split()) in "".join(processor.tokenizer.decode(marked.answer_ids).split())


NO, NORMAL = said("no"), user(None, "Is it normal?")
WHAT, AND = user(None, "What is this?"), user(None, "And this?")


@pytest.mark.parametrize(
    "turns",
    [
        (NORMAL, NO, NORMAL, NO, user("Sure?"), said("yes")),
        (WHAT, said("a dog"), AND, said("a cat"), user("What does {} mean?"), said("nothing")),
    ],
    ids=["alike", "marker"],
)
@of_families(FAMILIES)
def test_answers_about_pictures_are_found_though_their_turns_are_alike(
    folder_of: Callable[[str], Path], family: str, turns: tuple[Turn, ...]
) -> None:
    """Gemma's processor writes line breaks around pictures that join those of the template."""
    if (family, "later") in REFUSALS:
        pytest.skip("knows no conversations")
    processor = open_processor(str(folder_of(family)), DataConfig(source="x"))
    marker = FAMILIES[family].bos or FAMILIES[family].end_of_turn
    turns = tuple(
        replace(turn, parts=tuple(part and part.format(marker) for part in turn.parts)) for turn in turns
    )
    example = example_of(*turns)
    encoded = processor.encode(example)
    answers = "".join(turn.text for turn in turns if turn.role == "assistant")
    labels = processor.tokenizer.decode(encoded.answer_ids, skip_special_tokens=True)
    assert "".join(labels.split()) == "".join(answers.split())
    assert encoded.num_positions == processor.count(example).num_positions


BARE = (  # an answer right behind a token
    "{% for m in messages %}{% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}</s>{% endfor %}"
)


@pytest.mark.parametrize("template", [spoken("USER", "ASSISTANT", "</s>", "<image>"), BARE])
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_blanks_that_a_tokenizer_writes_before_texts_are_the_same_on_both_paths(
    folder_of: Callable[[str], Path], scheme: str, template: str
) -> None:
    """Such as ``first``, of Llama's tokenizers that are not legacy: before the whole text alone."""
    content = json.loads((folder_of("llava") / "tokenizer.json").read_text())
    content["normalizer"] = None
    content["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": scheme,
        "split": False,
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>"
    )
    prompts = ChatPrompt(tokenizer, template, placeholders=["<image>"])
    assert ("blank before a text" in prompts.changed_rules()) == (scheme == "first")
    turns = (user(None, "Which plane?"), said("axial"), user("Sure?"), said("yes"))
    prompt = prompts.of(turns, where="a row")
    text = prompt.layout.text(["teachoncequestion"] * len(prompt.texts))
    plain = {"input_ids": prompts.plain_ids(prompt)}
    tokens, answered = prompts.finished(prompt, plain)
    words = replace(prompt, text=text, is_marked=True)
    put_in, found = prompts.finished(words, {"input_ids": prompts.plain_ids(words)})
    assert torch.equal(put_in["input_ids"], tokens["input_ids"])
    assert found == answered
    whole = tokenizer(prompt.text + prompt.layout.lead + "yes", add_special_tokens=prompts.add_special_tokens)
    assert [*tokens["input_ids"].tolist(), *prompts.answer_ids(prompt, "yes")] == whole["input_ids"]


@pytest.mark.parametrize("side", ["right", "left"])
@of_families(FAMILIES)
def test_rows_of_all_shapes_share_a_batch(
    folder_of: Callable[[str], Path], family: str, side: Literal["right", "left"]
) -> None:
    folder = folder_of(family)
    processor = open_processor(str(folder), DataConfig(source="x"))
    body, head = split(load_vlm(str(folder), revision=None, dtype=torch.float32, attn_implementation=None))
    encoded = [
        processor.encode(example_of(*turns, size=(48 + 20 * number, 40)))
        for number, (shape, turns) in enumerate(SHAPES.items())
        if (family, shape) not in REFUSALS
    ]

    @torch.no_grad()
    def states(some: list[Encoded]) -> torch.Tensor:
        batch = processor.collate(some, padding_side=side)
        return last_hidden_states(body, in_dtype_of(head, batch.inputs)).flatten(0, 1)[batch.position_index]

    for rows in (encoded, encoded[::-1]):
        torch.testing.assert_close(
            states(rows), torch.cat([states([one]) for one in rows]), rtol=1e-4, atol=1e-4
        )


@of_families(FAMILIES)
def test_ids_of_an_answer_are_its_labels(folder_of: Callable[[str], Path], family: str) -> None:
    """Those of its own text give the same example; any others that say the same text are taken as they are."""
    processor = open_processor(str(folder_of(family)), DataConfig(source="x"))
    example = example_of(*SHAPES["two" if family != "paligemma" else "text"])
    example = replace(example, turns=(*example.turns[:-1], said("axial, CT")))
    plain = processor.encode(example)
    own = tuple(plain.answer_ids.tolist()[:-1])
    assert processor.written.text(own) == "axial, CT"
    again = processor.encode(replace(example, answer_ids=own))
    assert torch.equal(again.input_ids, plain.input_ids)
    assert torch.equal(again.labels, plain.labels)
    assert again.per_token.keys() == plain.per_token.keys()
    assert all(torch.equal(again.per_token[name], plain.per_token[name]) for name in plain.per_token)
    letters = [processor.tokenizer(one, add_special_tokens=False)["input_ids"] for one in "axial,"]
    pieces = tuple(one for letter in letters for one in letter)
    if processor.written.text(pieces) == "axial,":  # a tokenizer of sentences puts blanks before words
        cut = replace(
            example, turns=(*example.turns[:-1], said("axial,")), answer_ids=pieces, answer_end=False
        )
        assert processor.encode(cut).answer_ids.tolist() == list(pieces)
    picture = sorted(processor.written.refused - {processor.end_of_turn})[0]
    for wrong in (processor.end_of_turn, picture, 10**6):
        with pytest.raises(DataError, match=f"answer_ids holds {wrong} at place {len(own)}"):
            processor.encode(replace(example, answer_ids=(*own, wrong)))


@of_families(FAMILIES)
def test_answers_do_not_depend_on_their_batch(folder_of: Callable[[str], Path], family: str) -> None:
    """Prompts of other lengths beside them, or none; and no token is written that an answer may not hold."""
    folder = str(folder_of(family))
    model = load_vlm(folder, revision=None, dtype=torch.float32, attn_implementation=None)
    processor = open_processor(folder, DataConfig(source="x"))
    examples = [
        example_of(user(None, text), said("axial")) for text in ("Which plane?", "CT or MR, and where?")
    ]
    prompts = [processor.encode_prompt(one) for one in examples]
    ends = own_ends(model, processor)
    refused = processor.written.refused - set(ends)

    def answers(rows: list[int]) -> list[Answered]:
        noise = sampled(torch.tensor(rows) * 7919, temperature=1.0, top_p=0.95)
        choose = [Refused(refused, num_token_ids=processor.num_token_ids), *noise]
        some = [prompts[row] for row in rows]
        return answer(model, processor, some, max_new_tokens=6, ends=ends, choose=choose)

    together = answers([0, 1])
    assert together == [*answers([0]), *answers([1])]
    for example, said_ids in zip(examples, together, strict=True):
        text = processor.written.text(said_ids.ids)
        if processor.written.why_unusable(text) is None:
            turns = (*example.turns[:-1], said(text))
            processor.encode(replace(example, turns=turns, answer_ids=tuple(said_ids.ids)))
