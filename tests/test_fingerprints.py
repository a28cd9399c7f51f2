"""Keys and fingerprints: equal content gives equal ones, however stored; one changed setting gives others."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AddedToken, AutoTokenizer

from shared.data.fingerprints import digest, template_fingerprint, tokenizer_fingerprint
from shared.data.processing import KEY_BYTES, ExampleProcessor, open_processor
from shared.data.processors import load_processor
from shared.data.rows import Example
from shared.recipes import DataConfig

EXAMPLE = Example.single(b"picture", "question", "answer", kind="k", case="c", index=0)
ALL = ("tokenizer_fingerprint", "template_fingerprint", "image_processor_fingerprint", "prompt_fingerprint")


def fingerprints(processor: ExampleProcessor) -> dict[str, str]:
    return {name: getattr(processor, name) for name in ALL}


def reopened(folder: Path, **data: Any) -> ExampleProcessor:
    return open_processor(str(folder), DataConfig(source="x", max_answer_tokens=64, **data))


# --- keys -----------------------------------------------------------------------------------------------


def test_a_key_is_128_bits_of_content_alone(processor: ExampleProcessor, student_folder: Path) -> None:
    key = processor.key(EXAMPLE)
    assert len(key) == KEY_BYTES == 16
    elsewhere = dataclasses.replace(EXAMPLE, kind="other", case="other", index=5)
    assert processor.key(elsewhere) == key
    assert pickle.loads(pickle.dumps(processor)).key(EXAMPLE) == key
    assert reopened(student_folder).key(EXAMPLE) == key


@given(st.lists(st.tuples(st.binary(max_size=3), st.text(max_size=3), st.text(max_size=3)), unique=True))
def test_different_fields_give_different_keys(
    processor: ExampleProcessor, fields: list[tuple[bytes, str, str]]
) -> None:
    """Also where the fields, written one after the other, look the same."""
    keys = {processor.key(Example.single(*field)) for field in fields}
    assert len(keys) == len(fields)


def test_fields_do_not_run_into_each_other(processor: ExampleProcessor) -> None:
    moved = [("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", "")]
    keys = {processor.key(Example.single(b"i", *texts)) for texts in moved}
    assert len(keys) == 4


@pytest.mark.parametrize("change", [{"max_answer_tokens": 63}, {"system_prompt": "Be brief."}])
def test_what_makes_the_tokens_is_part_of_the_key(student_folder: Path, change: dict[str, Any]) -> None:
    data = {"source": "x", "max_answer_tokens": 64}
    keys = [open_processor(str(student_folder), DataConfig(**d)).key(EXAMPLE) for d in (data, data | change)]
    assert keys[0] != keys[1]


def test_a_background_changes_pixels_and_not_keys(student_folder: Path) -> None:
    black, white = reopened(student_folder), reopened(student_folder, background="white")
    assert black.key(EXAMPLE) == white.key(EXAMPLE)
    assert black.image_processor_fingerprint != white.image_processor_fingerprint


# --- fingerprints ---------------------------------------------------------------------------------------


def test_saving_and_loading_changes_none(
    processor: ExampleProcessor, student_folder: Path, tmp_path: Path
) -> None:
    folder, again = student_folder, fingerprints(processor)
    for step in range(2):
        loaded = load_processor(str(folder))
        folder = tmp_path / str(step)
        shutil.copytree(student_folder, folder, ignore=shutil.ignore_patterns("tok*", "*.jinja", "pre*"))
        loaded.tokenizer.save_pretrained(folder)
        loaded.image_processor.save_pretrained(folder)
        assert fingerprints(reopened(folder)) == again


def test_teacher_and_student_agree(student_folder: Path, teacher_folder: Path) -> None:
    assert fingerprints(reopened(student_folder)) == fingerprints(reopened(teacher_folder))


def test_settings_that_change_no_token_do_not_count(student_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.name_or_path = "elsewhere"
    tokenizer.model_max_length = 17
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before


def _swap_two_ids(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def _swap_two_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def _drop_normalizer(content: dict[str, Any]) -> None:
    content["normalizer"] = None


def _blank_before_a_marker(content: dict[str, Any]) -> None:
    content["added_tokens"][0]["lstrip"] = True


def _rename_a_marker(content: dict[str, Any]) -> None:
    content["added_tokens"][-1]["content"] += "x"


@pytest.mark.parametrize(
    "change", [_swap_two_ids, _swap_two_merges, _drop_normalizer, _blank_before_a_marker, _rename_a_marker]
)
def test_one_changed_mapping_gives_another_tokenizer(
    student_folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads((student_folder / "tokenizer.json").read_text())
    before, after = json.dumps(content), None
    change(content)
    after = json.dumps(content)
    first, second = (
        tokenizer_fingerprint(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text)))
        for text in (before, after)
    )
    assert first != second


def test_a_token_more_gives_another_tokenizer(student_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.add_tokens([AddedToken("<new>")])
    more = tokenizer_fingerprint(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    assert len({before, more, tokenizer_fingerprint(tokenizer)}) == 3


def test_one_character_gives_another_template() -> None:
    assert template_fingerprint("{{ a }}") != template_fingerprint("{{ a }} ")


@pytest.mark.parametrize(
    "change",
    [
        *({"image_mean": [0.5, 0.5, 0.4]}, {"resample": 2}, {"do_rescale": False}, {"merge_size": 1}),
        {"size": {"shortest_edge": 4096, "longest_edge": 25601}},
    ],
)
def test_one_setting_gives_another_image_processor(
    student_folder: Path, tmp_path: Path, processor: ExampleProcessor, change: dict[str, Any]
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(student_folder, folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | change
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    changed = reopened(folder)
    assert changed.image_processor_fingerprint != processor.image_processor_fingerprint
    assert changed.prompt_fingerprint == processor.prompt_fingerprint


@pytest.mark.parametrize(
    "name", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil"]
)
def test_the_backend_that_a_folder_names_does_not_matter(
    student_folder: Path, tmp_path: Path, processor: ExampleProcessor, name: str
) -> None:
    folder = tmp_path / "named"
    shutil.copytree(student_folder, folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"image_processor_type": name, "processor_class": "Qwen3VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    assert fingerprints(reopened(folder)) == fingerprints(processor)
    assert type(load_processor(str(folder)).image_processor).__name__ == "Qwen2VLImageProcessorPil"


def test_pixel_bounds_count_as_image_settings(student_folder: Path, processor: ExampleProcessor) -> None:
    bounded = reopened(student_folder, max_pixels=4096)
    assert bounded.image_processor_fingerprint != processor.image_processor_fingerprint
    assert bounded.prompt_fingerprint == processor.prompt_fingerprint


def test_digests_ignore_the_order_of_names_and_nothing_else() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    contents = [
        {"a": 1},
        {"a": "1"},
        {"a": [1]},
        {"a": None},
        {"a": 1.5},
        {"a": True},
        {"a": [2, 1]},
        {"a": [1, 2]},
    ]
    assert len({digest(content) for content in contents}) == len(contents)
