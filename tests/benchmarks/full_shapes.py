"""Models of Qwen3.5's full shapes with random weights, a tokenizer of its full vocabulary, rows of the usual size.

What a step costs depends on shapes and not on what was learned; the last norm is sharpened, so that the distributions
are as sure as a trained model's and the targets as many.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3_5Config

from shared.recipes import Recipe
from shared.recipes.files import validate_tree
from shared.small_models import REFERENCE_SHAPES, TOKENIZER_FILES, make_small_model, train_tokenizer

NUM_IDS = 248_077  # that Qwen3.5's tokenizer knows; its head has 248,320
WORDS = [
    first + second for first in ("ba", "de", "ki", "lo", "mu", "ra") for second in ("n", "s", "t", "x", "lo")
]
SPECIAL = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
}
SHARPNESS = 7.0  # of logits whose standard deviation is about one


@dataclass(frozen=True)
class Rows:
    """How many rows, pixels of a picture's side, and words of question and answer."""

    count: int = 96
    side: int = 512
    question: int = 50
    answer: int = 100


TINY_ROWS = Rows(count=8, side=64, question=6, answer=10)


def make_tokenizer(folder: Path, *, num_ids: int | None) -> Path:
    """Of a few words.  With ``num_ids``, the rest of so many ids are tokens that no text has; others may move."""
    train_tokenizer([" ".join(WORDS)] * 4, folder, vocab_size=512)
    if num_ids is not None:
        path = folder / "tokenizer.json"
        tree = json.loads(path.read_text())
        first = len(tree["model"]["vocab"]) + len(tree["added_tokens"])
        tree["model"]["vocab"] |= {f"unused {number}": number for number in range(first, num_ids)}
        path.write_text(json.dumps(tree))
    return folder


def config_of(size: str, tokenizer: Path) -> Qwen3_5Config:
    """Of a name of ``REFERENCE_SHAPES``, with that tokenizer's ids."""
    id_of = AutoTokenizer.from_pretrained(tokenizer).convert_tokens_to_ids
    ids = {name: id_of(token) for name, token in SPECIAL.items()}
    return Qwen3_5Config(**REFERENCE_SHAPES[size], **ids)


def make_model(folder: Path, size: str, tokenizer: Path, *, device: torch.device) -> None:
    """Writes the model with random weights in bf16."""
    config = config_of(size, tokenizer)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(SHARPNESS - 1)  # this norm multiplies by 1 + weight
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": 65536, "longest_edge": 16777216}
    ).save_pretrained(folder)


def write_rows(folder: Path, rows: Rows) -> None:
    """Noise, and words at random: no two rows are alike."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def drawn() -> Iterator[dict[str, Any]]:
        for _ in range(rows.count):
            buffer = BytesIO()
            pixels = random.integers(0, 255, (rows.side, rows.side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG")
            yield {
                "image": {"bytes": buffer.getvalue()},
                "question": " ".join(random.choice(WORDS, rows.question)),
                "answer": " ".join(random.choice(WORDS, rows.answer)),
            }

    pq.write_table(pa.Table.from_pylist(list(drawn())), folder / "train-00000-of-00001.parquet")


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, which ``make`` writes where it is not there: beside it first, so that it is never half there."""
    if not folder.exists():
        new = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        make(new)
        new.rename(folder)
    return folder


def prepare(root: Path, size: str, *, device: torch.device, tiny: bool) -> Path:
    """Rows, tokenizer and the model of that size, each made if it is not there; returns the model's folder."""
    made_once(root / "data", partial(write_rows, rows=TINY_ROWS if tiny else Rows()))
    num_ids = None if tiny else NUM_IDS
    tokenizer = made_once(root / "tokenizer", partial(make_tokenizer, num_ids=num_ids))
    full = partial(make_model, size=size, tokenizer=tokenizer, device=device)
    small = partial(
        make_small_model,
        tokenizer=tokenizer,
        hidden_size=64,
        num_layers=2,
        vision_hidden_size=32,
        vision_depth=1,
        seed=0,
    )
    return made_once(root / size, small if tiny else full)


def make_recipe(root: Path, model: Path, *, tiny: bool, **student: Any) -> Recipe:
    """As ``qwen3_5_9b_to_4b_medpix`` has it; ``model`` is teacher and student, of which a benchmark uses one."""
    dtype = "float32" if tiny else "bfloat16"
    tree: dict[str, Any] = {
        "data": {
            "source": str(root / "data"),
            "splits": {"validation": None},
            "max_answer_tokens": 2048,
        },
        "teacher": {"model": str(model), "dtype": dtype},
        "cache": {
            "path": str(root / f"cache-{model.name}"),
            "num_workers": 0,
            "splits": ["train"],
        },
        "student": {
            "model": str(model),
            "compute_dtype": dtype,
            "freeze": {"vision": True, "connector": True, "audio": True},
            "activation_checkpointing": True,
        }
        | student,
        "loss": {"kd_ratio": 0.5},
        "optimization": {"global_batch_size": 4 if tiny else 16, "max_steps": 1, "learning_rate": 5e-5},
        "run": {"name": "bench", "root": str(root / "runs"), "num_workers": 2},
    }
    return validate_tree(Recipe, tree, origin="recipe of the benchmark")
