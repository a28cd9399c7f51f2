"""Models whose files are odd: faults are told before anything is paid for, and the rest does no harm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from shared.data.processing import ExampleProcessor
from shared.data.processors import load_processor
from shared.data.rows import Example
from shared.errors import RecipeError
from shared.model_check import check_model
from shared.models.vlm import last_hidden_states, load_vlm, split
from shared.models.weight_files import require_whole_weights
from shared.preflight import Report, describe_tokenizer
from shared.recipes import load_recipe


@pytest.fixture
def model_folder(tmp_path: Path, teacher_folder: Path) -> Path:
    return shutil.copytree(teacher_folder, tmp_path / "model")


def load(folder: Path) -> PreTrainedModel:
    return load_vlm(str(folder), revision=None, dtype=torch.float32, attn_implementation=None)


def set_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def set_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    changed = change(load_file(folder / "model.safetensors"))
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
@pytest.mark.parametrize(
    "asked", [{"output_attentions": True}, {"return_dict": False}, {"output_hidden_states": True}]
)
def test_what_config_json_asks_of_every_forward_does_not_matter(
    model_folder: Path, tmp_path: Path, part: str | None, asked: dict[str, bool]
) -> None:
    """Transformers takes such a folder, and refuses to save it once the student is trained."""
    expected = load(model_folder)
    set_config(model_folder, lambda config: (config if part is None else config[part]).update(asked))
    model = load(model_folder)
    inputs = {"input_ids": torch.arange(8)[None]}
    states = last_hidden_states(split(model)[0], inputs)
    assert torch.equal(states, last_hidden_states(split(expected)[0], inputs))
    assert torch.equal(model(**inputs).logits, split(model)[1].logits(states))
    model.save_pretrained(tmp_path / "saved")


def test_weights_of_another_shape_are_named(model_folder: Path) -> None:
    set_config(model_folder, lambda config: config["text_config"].update(vocab_size=500))
    with pytest.raises(RecipeError, match=r"lm_head\.weight is \(384, 128\) in the files, and \(500, 128\)"):
        load(model_folder)


def test_weights_without_a_place_are_told(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(model_folder)
    assert "not used" not in capsys.readouterr().err

    def one_layer_less(config: dict[str, Any]) -> None:
        text = config["text_config"]
        text["num_hidden_layers"] -= 1
        text["layer_types"].pop()

    set_config(model_folder, one_layer_less)
    load(model_folder)
    said = capsys.readouterr().err
    assert "weight(s) of its files are not used, model.language_model.layers.2." in said


def test_states_that_are_all_zero_are_called_so(
    model_folder: Path, processor: ExampleProcessor, examples: list[Example]
) -> None:
    set_weights(model_folder, lambda weights: {name: torch.zeros_like(one) for name, one in weights.items()})
    encoded = [processor.encode(one) for one in examples[:2]]
    with pytest.raises(RecipeError, match=r"are NaN, infinite or all 0\. Its weights may be damaged"):
        check_model(load(model_folder), processor, encoded, device=torch.device("cpu"))


@pytest.mark.parametrize("text", ["{nonsense", "[]", ""])
def test_settings_of_generation_that_cannot_be_read_are_told_at_once(model_folder: Path, text: str) -> None:
    """An export needs them, when all has been paid for."""
    (model_folder / "generation_config.json").write_text(text)
    with pytest.raises(RecipeError, match=r"generation_config\.json: is no JSON object"):
        require_whole_weights(str(model_folder), None)


def test_a_model_without_a_tokenizer_is_refused(model_folder: Path) -> None:
    """Transformers makes an empty one, to which every text is nothing."""
    for file in model_folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(RecipeError, match="it has no tokenizer"):
        load_processor(str(model_folder))
    with pytest.raises(RecipeError, match="it has no tokenizer"):
        describe_tokenizer(Report(), load_recipe("phantom"), str(model_folder), revision=None)
