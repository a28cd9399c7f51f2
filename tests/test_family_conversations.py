"""Conversations of every family: tokens and labels against the processor's own way of writing them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from families import FAMILIES, make_family, of_families
from test_conversation_prompts import example_of, messages_of, said, user

from shared.data.collation import Encoded
from shared.data.conversations import Turn
from shared.data.processing import open_processor
from shared.data.processors import chat_template, load_processor
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
