"""What a processor returns goes where it belongs: by what made it, not by its shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_family, of_families
from samples import make_examples

from shared.data.collation import Encoded, collated
from shared.data.model_inputs import answer_kinds, continued, sorted_inputs
from shared.data.processing import open_processor
from shared.data.processors import load_processor
from shared.errors import DataError, RecipeError
from shared.recipes import DataConfig


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")
    return cache(lambda family: make_family(family, root / family))


def encoded(length: int, per_picture: dict[str, torch.Tensor], **per_token: torch.Tensor) -> Encoded:
    """An example whose last token is a label."""
    ids = torch.arange(length)
    labels = torch.full((length,), -100)
    labels[-1] = ids[-1]
    return Encoded(b"", ids, labels, per_token, per_picture, num_positions=1, truncated=False)


@of_families(["gemma4"])
def test_a_pictures_tensor_may_have_the_shape_of_the_tokens(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    processor = load_processor(str(folder_of(family)))
    given = {
        "input_ids": torch.zeros(1, 630, dtype=torch.int64),
        "mm_token_type_ids": torch.zeros(1, 630, dtype=torch.int64),
        "attention_mask": torch.ones(1, 630, dtype=torch.int64),
        "image_position_ids": torch.zeros(1, 630, 2, dtype=torch.int64),
        "pixel_values": torch.zeros(1, 630, 48),
        "labels": torch.zeros(1, 630, dtype=torch.int64),
    }
    per_token, per_picture = sorted_inputs(processor, given)
    assert {name: value.shape for name, value in per_token.items()} == {
        "input_ids": (630,),
        "mm_token_type_ids": (630,),
    }
    assert set(per_picture) == {"image_position_ids", "pixel_values"}
    with pytest.raises(RecipeError, match="Gemma4Processor: its rows is a list"):
        sorted_inputs(processor, given | {"rows": [[1]]})


def test_an_answer_sees_the_pictures_of_its_prompt_and_is_a_suffix_where_there_is_one(
    folder_of: Callable[[str], Path],
) -> None:
    paligemma, gemma = (load_processor(str(folder_of(family))) for family in ("paligemma", "gemma3"))
    prompt = {
        "token_type_ids": torch.tensor([0, 1, 0]),
        "cross_attention_mask": torch.tensor([[[0, 0]], [[1, 1]], [[1, 0]]]),
    }
    found = continued(prompt, 2, answer_kinds(gemma))
    assert found["token_type_ids"].tolist() == [0, 1, 0, 0, 0]
    assert found["cross_attention_mask"].tolist() == [[[0, 0]], [[1, 1]], [[1, 0]], [[1, 0]], [[1, 0]]]
    assert continued(prompt, 2, answer_kinds(paligemma))["token_type_ids"].tolist() == [0, 1, 0, 1, 1]


def test_pictures_of_a_batch_are_padded_with_zeros_behind_them() -> None:
    small, large = torch.ones(1, 2, 3), torch.ones(2, 4, 3)
    batch = collated([encoded(3, {"pixel_values": small}), encoded(5, {"pixel_values": large})], pad_id=9)
    pixels = batch.inputs["pixel_values"]
    assert pixels.shape == (3, 4, 3)
    assert pixels[0].sum() == small.sum()
    assert torch.equal(pixels[0, :2], small[0])
    assert torch.equal(pixels[1:], large)
    with pytest.raises(DataError, match=r"pixel_values of \(2, 3\) and \(3,\)"):
        collated(
            [encoded(3, {"pixel_values": small}), encoded(3, {"pixel_values": torch.ones(1, 3)})], pad_id=9
        )


def test_masks_over_several_pictures_grow_and_rows_of_text_have_none() -> None:
    one = torch.ones(3, 1, 4, dtype=torch.int64)
    two = torch.ones(2, 2, 4, dtype=torch.int64)
    batch = collated(
        [
            encoded(3, {"pixel_values": torch.ones(1, 1, 5)}, cross_attention_mask=one),
            encoded(4, {}),
            encoded(2, {"pixel_values": torch.ones(1, 2, 5)}, cross_attention_mask=two),
        ],
        pad_id=9,
        padding_side="left",
    )
    mask, pixels = batch.inputs["cross_attention_mask"], batch.inputs["pixel_values"]
    assert mask.shape == (3, 4, 2, 4)
    assert mask.sum(dim=(2, 3)).tolist() == [[0, 4, 4, 4], [0, 0, 0, 0], [0, 0, 8, 8]]
    assert pixels.shape == (3, 2, 5)
    assert pixels.sum(dim=(1, 2)).tolist() == [5, 0, 10]


@of_families(["gemma3", "llava_onevision", "smolvlm", "qwen2_5_vl"])
def test_settings_may_lie_in_one_file(family: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """As newer releases of Transformers save a processor."""
    folder, made = tmp_path / family, folder_of(family)
    folder.mkdir()
    for path in made.iterdir():
        if path.name not in ("preprocessor_config.json", "processor_config.json", "model.safetensors"):
            (folder / path.name).symlink_to(path)
    images = json.loads((made / "preprocessor_config.json").read_text())
    settings = {"processor_class": FAMILIES[family].processor, "image_processor": images}
    (folder / "processor_config.json").write_text(json.dumps(settings | FAMILIES[family].settings))
    data = DataConfig(source="unused")
    one, other = (open_processor(str(place), data) for place in (folder, made))
    assert one.image_processor_fingerprint == other.image_processor_fingerprint
    for example in make_examples(2):
        ours, theirs = one.encode(example).model_inputs, other.encode(example).model_inputs
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
