"""An export replaces an export, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from stage2_runs import files_of, make_recipe, run_alone
from transformers import AutoModelForImageTextToText, AutoTokenizer

from shared.data.processing import ExampleProcessor, open_processor
from shared.data.processors import chat_template, load_processor
from shared.data.rows import open_split
from shared.errors import CacheFormatError, RecipeError
from shared.models.vlm import load_vlm
from shared.models.weight_files import weight_files
from stage2_student.__main__ import commands
from stage2_student.publishing.push import plan_push


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, distillation_tree: dict[str, Any]) -> Path:
    settings = {"name": "run", "root": str(tmp_path_factory.mktemp("runs")), "num_workers": 0}
    recipe = make_recipe(distillation_tree | {"run": settings}, optimization__max_steps=1)
    assert run_alone(recipe) == 0
    return recipe.run.path


def export(run: Path, *options: str) -> Result:
    return CliRunner().invoke(commands, ["export", str(run), *options], standalone_mode=False)


def test_it_says_where_it_came_from(run: Path) -> None:
    facts = json.loads((run / "export" / "teachonce.json").read_text())
    assert (facts["step"], facts["recipe"]["run"]["name"]) == (1, "run")
    assert facts["torch"]


def test_a_new_folder_an_empty_one_and_an_earlier_export_are_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "new", tmp_path / "empty", tmp_path / "new"):
        assert export(run, "--out", str(place)).return_value == 0
        assert (place / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_what_is_no_export_is_not_replaced(
    run: Path, tmp_path: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more")
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "texts", tmp_path / "file", run, student_folder, Path(".")):
        found = export(run, "--out", str(place))
        assert isinstance(found.exception, RecipeError), place
        assert "no export of a run" in str(found.exception)
    assert (tmp_path / "texts" / "thesis.txt").read_text() == "years of work"
    assert (run / "checkpoints").exists()


def test_no_student_is_exported_into_a_cache(run: Path, tmp_path: Path, teacher_cache: Path) -> None:
    shutil.copytree(teacher_cache, tmp_path / "cache")
    found = export(run, "--out", str(tmp_path / "cache" / "student"))
    assert isinstance(found.exception, CacheFormatError)
    assert not (tmp_path / "cache" / "student").exists()


def test_another_run_keeps_its_own_student(run: Path, tmp_path: Path) -> None:
    """`evaluate` and `push` would take this student for that run's."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    before = files_of(other)
    found = export(run, "--out", str(other / "export"))
    assert isinstance(found.exception, RecipeError)
    assert "the place of another run's student" in str(found.exception)
    assert files_of(other) == before
    shutil.rmtree(other / "export")
    assert isinstance(export(run, "--out", str(other / "export")).exception, RecipeError)
    assert export(other, "--out", str(other / "export")).return_value == 0


def test_two_choices_of_a_checkpoint(run: Path) -> None:
    assert "give one of them" in str(export(run, "--step", "1", "--best").exception)


def changed_student(folder: Path, out: Path, settings: dict[str, Any] | None) -> Path:
    """The small student with other settings for generating, or none."""
    shutil.copytree(folder, out)
    (out / "generation_config.json").unlink()
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 1  # of documents, not of turns
    (out / "config.json").write_text(json.dumps(config))
    if settings is not None:
        (out / "generation_config.json").write_text(json.dumps(settings))
    return out


@pytest.fixture
def tree(tmp_path: Path, distillation_tree: dict[str, Any]) -> dict[str, Any]:
    settings = {"name": "run", "root": str(tmp_path / "runs"), "num_workers": 0}
    return distillation_tree | {"run": settings, "loss": {"kd_ratio": 0.0}}


def test_an_export_of_a_base_that_never_stops_stops(
    tree: dict[str, Any], tmp_path: Path, student_folder: Path, processor: ExampleProcessor
) -> None:
    base = changed_student(student_folder, tmp_path / "base", {"eos_token_id": 1, "temperature": 0.7})
    tree["data"] = tree["data"] | {"limit": 4}
    recipe = make_recipe(tree, student__model=str(base), optimization__max_steps=60)
    assert run_alone(recipe) == 0
    rows = open_split(recipe.data, "train")
    batch = processor.collate(
        [processor.encode_prompt(rows[index]) for index in range(4)], padding_side="left"
    )
    model = AutoModelForImageTextToText.from_pretrained(recipe.run.path / "export")
    length = batch.inputs["input_ids"].shape[1]
    new = model.generate(**batch.inputs, max_new_tokens=64, do_sample=False)[:, length:].tolist()
    assert all(processor.end_of_turn in row for row in new)
    assert len(new[0]) < 64
    said = json.loads((recipe.run.path / "export" / "generation_config.json").read_text())
    assert said == {"eos_token_id": [1, processor.end_of_turn], "temperature": 0.7}


@pytest.mark.parametrize(
    ("settings", "ends"), [(None, [1]), ({}, []), ({"eos_token_id": [1, 2]}, [1, 2])], ids=str
)
def test_the_end_of_turn_joins_other_ends(
    tree: dict[str, Any],
    tmp_path: Path,
    student_folder: Path,
    processor: ExampleProcessor,
    settings: dict[str, Any] | None,
    ends: list[int],
) -> None:
    base = changed_student(student_folder, tmp_path / "base", settings)
    recipe = make_recipe(tree, student__model=str(base), optimization__max_steps=1)
    assert run_alone(recipe) == 0
    said = json.loads((recipe.run.path / "export" / "generation_config.json").read_text())["eos_token_id"]
    assert said == ([*ends, processor.end_of_turn] if ends else processor.end_of_turn)


def test_it_opens_with_the_template_and_the_size_of_pictures_of_its_training(
    tree: dict[str, Any], tmp_path: Path, student_folder: Path
) -> None:
    """Wherever the base had its own: Transformers looks into older files first."""
    base = Path(shutil.copytree(student_folder, tmp_path / "base"))
    own = (base / "chat_template.jinja").read_text()
    images = json.loads((base / "preprocessor_config.json").read_text())
    (base / "chat_template.json").write_text(json.dumps({"chat_template": own}))
    (base / "processor_config.json").write_text(json.dumps({"chat_template": own, "image_processor": images}))
    mine = own.replace("<|im_end|>", "<|endoftext|>")
    (tmp_path / "mine.jinja").write_text(mine)
    asked = {"chat_template": str(tmp_path / "mine.jinja"), "max_pixels": 4096, "limit": 4}
    tree["data"] = tree["data"] | asked
    recipe = make_recipe(tree, student__model=str(base), optimization__max_steps=1)
    assert run_alone(recipe) == 0
    path = recipe.run.path / "export"
    trained, exported = (open_processor(str(folder), recipe.data) for folder in (base, path))
    assert exported.image_processor_fingerprint == trained.image_processor_fingerprint
    opened = load_processor(str(path))
    assert chat_template(opened) == mine
    ends = json.loads((path / "generation_config.json").read_text())["eos_token_id"]
    assert trained.end_of_turn == opened.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert trained.end_of_turn in (ends if isinstance(ends, list) else [ends])
    sizes = [
        one.image_processor(images=[Image.new("RGB", (200, 120))])["image_grid_thw"].tolist()
        for one in (opened, load_processor(str(base), max_pixels=4096), load_processor(str(base)))
    ]
    assert sizes[0] == sizes[1] != sizes[2]
    for name, settings in (("preprocessor_config.json", ()), ("processor_config.json", ("image_processor",))):
        told = json.loads((path / name).read_text())
        for key in settings:
            told = told[key]
        assert (told["max_pixels"], told["size"]["longest_edge"]) == (4096, 4096)


def test_templates_beside_the_default_are_in_the_export(
    tree: dict[str, Any], tmp_path: Path, student_folder: Path
) -> None:
    base = shutil.copytree(student_folder, tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages[0].content }}")
    recipe = make_recipe(tree, student__model=str(base), optimization__max_steps=1)
    assert run_alone(recipe) == 0
    path = recipe.run.path / "export"
    template = AutoTokenizer.from_pretrained(path).chat_template
    assert template["tool_use"] == "{{ messages[0].content }}"
    listed = json.loads((path / "teachonce.json").read_text())["sha256"]
    assert "additional_chat_templates/tool_use.jinja" in listed
    plan = plan_push(path, "me/mine", revision=None)
    assert "additional_chat_templates/tool_use.jinja" in plan.files
    (path / "additional_chat_templates" / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"additional_chat_templates/notes\.txt"):
        plan_push(path, "me/mine", revision=None)


def test_an_adapter_finds_its_base_from_anywhere(
    tree: dict[str, Any], tmp_path: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe's path is relative; later both are moved together, and then the adapter alone."""
    house = tmp_path / "house"
    shutil.copytree(student_folder, house / "models" / "base")
    monkeypatch.chdir(house)
    recipe = make_recipe(
        tree,
        student__model="models/base",
        student__lora={"rank": 2},
        run__root="runs",
        optimization__max_steps=1,
    )
    assert run_alone(recipe) == 0
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"revision": None, "dtype": torch.float32, "attn_implementation": None}
    path = house / "runs" / "run" / "export"
    assert json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        house / "models" / "base"
    )
    assert (
        "GenerationConfig.from_pretrained" in (path / "README.md").read_text()
    )  # Transformers takes the base's
    assert (path / "generation_config.json").exists()
    before = load_vlm(str(path), **options).state_dict()
    AutoModelForImageTextToText.from_pretrained(path)
    house.rename(tmp_path / "new-house")
    path = tmp_path / "new-house" / "runs" / "run" / "export"
    after = load_vlm(str(path), **options).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    files = weight_files(str(path), None)
    assert files is not None
    assert files.faults() == []
    alone = path.rename(tmp_path / "alone")
    with pytest.raises(RecipeError, match=r"house/models/base: no such file or folder"):
        load_vlm(str(alone), **options)
