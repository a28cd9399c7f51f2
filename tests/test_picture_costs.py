"""What pictures cost a student's tower: in the dealing of steps, by the sizes of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_family, of_families
from stage2_runs import make_recipe, records, run_alone, run_ranks

from shared.data.collation import Encoded
from shared.data.processing import open_processor
from shared.data.rows import open_split
from shared.models.vlm import load_config, load_vlm
from shared.recipes import DataConfig, FreezeConfig, LoraConfig, StudentConfig
from shared.surveying import survey_keys
from stage2_student.training.freezing import freeze
from stage2_student.training.picture_costs import tokens_per_pixel
from stage2_student.training.student import choose_trained, empty_model


def seen_by_the_tower(one: Encoded) -> int:
    """Pixels, of what the model is fed."""
    if "image_grid_thw" in one.per_picture:
        return int(one.per_picture["image_grid_thw"].prod(dim=1).sum()) * 8**2
    return one.per_picture["pixel_values"].numel() // 3


@of_families(["qwen3_vl", "smolvlm", "llava_next", "gemma3", "gemma4", "internvl"])
def test_the_pixels_that_a_tower_sees_are_known_from_a_picture_s_header(
    family: str, tmp_path: Path, vqa_folder: Path
) -> None:
    """Of all rows, when one of them has been encoded."""
    data = DataConfig(source=str(vqa_folder))
    processor, split = (
        open_processor(str(make_family(family, tmp_path / family)), data),
        open_split(data, "train"),
    )
    found = survey_keys(data, "train", processor)
    for row, pixels in zip(found.rows, found.pixels, strict=True):
        assert pixels == pytest.approx(seen_by_the_tower(processor.encode(split[int(row)])), rel=0.45)


def test_a_row_of_text_costs_the_tower_nothing(mixed_folder: Path, student_folder: Path) -> None:
    data = DataConfig(source=str(mixed_folder))
    found = survey_keys(data, "train", open_processor(str(student_folder), data))
    have_pictures = np.arange(12) % 2 == 1
    assert (found.pixels[have_pictures] > 0).all()
    assert (found.pixels[~have_pictures] == 0).all()


def test_lengths_are_those_of_what_is_fed(vqa_folder: Path, student_folder: Path) -> None:
    """The template's tokens among them, so that a budget of tokens holds."""
    data = DataConfig(source=str(vqa_folder))
    processor, split = open_processor(str(student_folder), data), open_split(data, "train")
    found = survey_keys(data, "train", processor)
    exact = [len(processor.encode(split[row]).input_ids) for row in range(len(split))]
    assert np.abs(found.lengths - exact).max() <= 2


def test_a_trained_tower_costs_three_times_a_frozen_one(student_folder: Path) -> None:
    model = load_vlm(str(student_folder), revision=None, dtype=torch.float32, attn_implementation=None)
    freeze(model, FreezeConfig(vision=True))
    frozen = tokens_per_pixel(model)
    freeze(model, FreezeConfig())
    assert tokens_per_pixel(model) == pytest.approx(3 * frozen)
    freeze(
        model, FreezeConfig(vision=True, language=True)
    )  # the connector alone: no gradient of those weights
    assert tokens_per_pixel(model) == pytest.approx(1.5 * frozen)


def test_costs_are_those_of_the_multiplications(student_folder: Path) -> None:
    """By hand: weights of the tower's matrices over those of the language model's, a patch being 16 x 16 pixels."""
    model = load_vlm(str(student_folder), revision=None, dtype=torch.float32, attn_implementation=None)
    model.requires_grad_(True)
    tower = language = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or ("embed" in name.split(".")[-2] and "patch" not in name):
            continue
        if ".visual." in name and ".merger." not in name and "pos_embed" not in name:
            tower += parameter.numel()
        elif ".language_model." in name:
            language += parameter.numel()
    assert tokens_per_pixel(model) == pytest.approx(tower / language / 16**2, rel=1e-6)


def test_adapters_and_experts(student_folder: Path, tmp_path: Path) -> None:
    """Frozen weights below adapters have no gradient of their own, and a token meets two experts of four."""
    plain = StudentConfig(model=str(student_folder))
    adapted = StudentConfig(model=str(student_folder), lora=LoraConfig(rank=1))
    config = load_config(str(student_folder))
    both = [empty_model(config, student) for student in (plain, adapted)]
    for model, student in zip(both, (plain, adapted), strict=True):
        choose_trained(model, student, seed=0)
    assert tokens_per_pixel(both[1]) == pytest.approx(tokens_per_pixel(both[0]) / 2, rel=0.1)
    folder = str(make_family("qwen3_vl_moe", tmp_path / "moe"))
    model = load_vlm(folder, revision=None, dtype=torch.float32, attn_implementation=None)
    some = tokens_per_pixel(model)
    model.config.get_text_config().num_experts_per_tok = 4
    assert tokens_per_pixel(model) < some


def test_a_step_s_record_counts_pictures_among_the_waiting(
    mixed_folder: Path, student_folder: Path, tmp_path: Path
) -> None:
    tree: dict[str, Any] = {
        "data": {"source": str(mixed_folder), "max_answer_tokens": 64},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "loss": {"kd_ratio": 0.0, "chunk_size": 16},
        "optimization": {"global_batch_size": 12, "max_steps": 1},
        "run": {"name": "one", "root": str(tmp_path), "num_workers": 0, "export": False},
    }
    one, two = make_recipe(tree), make_recipe(tree, run__name="two")
    assert run_alone(one) == 0
    assert run_ranks(two, 2) == [0, 0]
    (alone,), (together,) = ([r for r in records(x) if r["event"] == "step"] for x in (one, two))
    assert alone["waiting"] == 0
    assert 0 <= together["waiting"] < 0.2
    assert together["loss"] == pytest.approx(alone["loss"], rel=2e-5)
