"""Small models: ordinary folders of the real classes, the same every time, whole or not there."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import ANSWERS, QUESTIONS
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3_5ForConditionalGeneration,
)

from shared.data.processing import ExampleProcessor
from shared.data.rows import Example
from shared.errors import RecipeError
from shared.recipes import SmallModelConfig, SmallModelsConfig, load_recipe
from shared.small_models import (
    TOKENIZER_FILES,
    make_small_model,
    make_small_models,
    save_reference_config,
    train_tokenizer,
)

SIZES: dict[str, Any] = {"hidden_size": 64, "num_layers": 2, "vision_hidden_size": 32, "vision_depth": 1}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def models(tmp_path: Path, *names: str) -> SmallModelsConfig:
    made = tuple(SmallModelConfig(path=str(tmp_path / name), seed=len(name), **SIZES) for name in names)
    return SmallModelsConfig(vocab_size=384, models=made)


def test_plain_transformers_opens_everything_without_a_warning(
    student_folder: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    logging.getLogger("transformers").addHandler(caplog.handler)
    model, report = AutoModelForImageTextToText.from_pretrained(student_folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    images = Qwen2VLImageProcessorPil.from_pretrained(student_folder)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not any(report.values())
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert [str(w.message) for w in recwarn.list] == []
    assert type(model) is Qwen3_5ForConditionalGeneration
    assert set(model.config.text_config.layer_types) == {"linear_attention", "full_attention"}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template
    assert images.patch_size == model.config.vision_config.patch_size


def test_vocabulary_is_padded_and_ids_agree(student_folder: Path, tokenizer_folder: Path) -> None:
    config, tokenizer = (
        AutoConfig.from_pretrained(student_folder),
        AutoTokenizer.from_pretrained(student_folder),
    )
    assert config.text_config.vocab_size % 64 == 0
    assert len(tokenizer) <= config.text_config.vocab_size < len(tokenizer) + 64
    for name in ("image", "video", "vision_start", "vision_end"):
        token = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
        assert getattr(config, f"{name}_token_id") == tokenizer.convert_tokens_to_ids(token)
    text = "Which plane? \u00fcber \U0001f600 \t\n<think>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_learns_and_answers(
    student_folder: Path, processor: ExampleProcessor, examples: list[Example]
) -> None:
    """Gradients reach every parameter, and a few steps teach an answer by heart."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(student_folder)
    batch = processor.collate([processor.encode(example) for example in examples[:2]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        logits = model(**batch.inputs).logits.flatten(0, 1)[batch.position_index]
        loss = torch.nn.functional.cross_entropy(logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert missing == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    prompt = processor.collate([processor.encode_prompt(examples[0])])
    answer = model.eval().generate(**prompt.inputs, max_new_tokens=12, do_sample=False)
    text = processor.tokenizer.decode(answer[0, prompt.inputs["input_ids"].shape[1] :])
    assert text.startswith(examples[0].answer[:2])


def test_the_same_inputs_give_the_same_bytes(
    tmp_path: Path, tokenizer_folder: Path, student_folder: Path
) -> None:
    state = torch.random.get_rng_state()
    again = make_small_model(tmp_path / "again", tokenizer=tokenizer_folder, seed=1, **SIZES)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert contents(again) == contents(student_folder)
    other = make_small_model(tmp_path / "other", tokenizer=tokenizer_folder, seed=0, **SIZES)
    differing = {name for name, data in contents(other).items() if data != contents(again)[name]}
    assert differing == {"model.safetensors"}


@pytest.mark.slow
def test_another_process_trains_the_same_tokenizer(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Hash seeds and thread counts differ between processes."""
    script = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; from samples import *;"
        "from shared.small_models import train_tokenizer;"
        f"train_tokenizer([*QUESTIONS, *ANSWERS] * 4, Path({str(tmp_path)!r}), vocab_size=384)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
    assert contents(tmp_path) == contents(tokenizer_folder)


def test_vocab_size_is_a_bound_that_is_reached(tmp_path: Path) -> None:
    words = [f"{a}{b}{c} " for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]
    for size in (300, 400):
        folder = train_tokenizer(words, tmp_path / str(size), vocab_size=size)
        assert len(AutoTokenizer.from_pretrained(folder)) == size


def test_models_of_a_recipe_share_their_tokenizer_byte_for_byte(tmp_path: Path) -> None:
    texts = [*QUESTIONS, *ANSWERS]
    first = make_small_models(models(tmp_path, "a"), texts)
    both = models(tmp_path, "a", "bb")
    second = make_small_models(both, ["texts that would give another tokenizer"] * 50)
    assert (first, second) == ([tmp_path / "a"], [tmp_path / "bb"])
    for name in TOKENIZER_FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "bb" / name).read_bytes()
    assert make_small_models(both, []) == []


def test_a_failure_in_the_middle_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Qwen2VLImageProcessorPil, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        make_small_model(tmp_path / "model", tokenizer=tokenizer_folder, seed=1, **SIZES)
    assert list(tmp_path.iterdir()) == []


def test_another_process_makes_it_at_the_same_time(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Qwen2VLImageProcessorPil.save_pretrained

    def beside_another(*args: Any, **kwargs: Any) -> Any:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").touch()
        return save(*args, **kwargs)

    monkeypatch.setattr(Qwen2VLImageProcessorPil, "save_pretrained", beside_another)
    with pytest.raises(RecipeError, match="another process has made it meanwhile"):
        make_small_model(tmp_path / "model", tokenizer=tokenizer_folder, seed=1, **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_there_and_odd_sizes_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(RecipeError, match="is there already"):
        make_small_model(tmp_path / "model", tokenizer=tokenizer_folder, seed=1, **SIZES)
    with pytest.raises(RecipeError, match="hidden size 70 is not a multiple of 32"):
        make_small_model(tmp_path / "odd", tokenizer=tokenizer_folder, seed=1, **SIZES | {"hidden_size": 70})


@pytest.mark.parametrize("recipe", ["phantom", "medpix_sample"])
def test_the_recipes_students_have_at_most_two_fifths_of_their_teachers_weights(
    recipe: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    section = load_recipe(recipe).bootstrap.small_models
    assert section is not None
    counts = {}
    for model in section.models:
        sizes = model.model_dump(exclude={"path"})
        folder = make_small_model(tmp_path / Path(model.path).name, tokenizer=tokenizer_folder, **sizes)
        config = AutoConfig.from_pretrained(folder)
        config.text_config.vocab_size = section.vocab_size
        with torch.device("meta"):
            made = AutoModelForImageTextToText.from_config(config)
        counts[folder.name] = sum(p.numel() for p in made.parameters())
    assert 5 * counts["small"] <= 2 * counts["large"]


@pytest.mark.parametrize(("size", "billions"), [("9B", 9.41), ("4B", 4.54)])
def test_reference_configurations_have_the_full_shapes(tmp_path: Path, size: Any, billions: float) -> None:
    config = AutoConfig.from_pretrained(save_reference_config(tmp_path / size, size))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert (config.text_config.vocab_size, config.text_config.num_hidden_layers) == (248_320, 32)
    assert config.vision_config.out_hidden_size == config.text_config.hidden_size
    assert not list((tmp_path / size).glob("*.safetensors"))


@pytest.mark.slow
def test_the_command_makes_a_recipes_models(tmp_path: Path, vqa_folder: Path) -> None:
    sections = [
        f"bootstrap.small_models.models=[{{path: {tmp_path / 'm'}, hidden_size: 64, num_layers: 2, "
        "vision_hidden_size: 32, vision_depth: 1}]",
        f"data.source={vqa_folder}",
        "data.splits.test=null",
    ]
    command = [sys.executable, "-m", "shared.small_models", "phantom"]
    options = [part for section in sections for part in ("--set", section)]
    result = subprocess.run(command + options, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"made {tmp_path / 'm'}" in result.stdout
    assert (tmp_path / "m" / "model.safetensors").exists()
