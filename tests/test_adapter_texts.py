"""A student that is an adapter's folder has one tokenizer and one template: in training, evaluation and export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from stage2_runs import make_recipe, run_alone
from transformers import AutoTokenizer

from shared.data.processing import open_processor
from shared.data.processors import chat_template, load_processor
from shared.recipes import DataConfig
from shared.small_models import CHAT_TEMPLATE

OWN = CHAT_TEMPLATE.replace("'<|im_start|>'", "'<|im_start|> '")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, distillation_tree: dict[str, Any]) -> Path:
    """As peft writes it: settings and weights alone."""
    root = tmp_path_factory.mktemp("adapters")
    recipe = make_recipe(
        {name: part for name, part in distillation_tree.items() if name != "cache"},
        student__lora={"rank": 2},
        loss__kd_ratio=0.0,
        optimization__max_steps=1,
        run__name="first",
        run__root=str(root),
        run__num_workers=0,
    )
    assert run_alone(recipe) == 0
    bare = root / "bare"
    bare.mkdir()
    for path in (recipe.run.path / "export").glob("adapter_*"):
        shutil.copyfile(path, bare / path.name)
    return bare


def with_files(adapter: Path, student_folder: Path, where: Path, kind: str) -> Path:
    shutil.copytree(adapter, where)
    if kind == "jinja":
        (where / "chat_template.jinja").write_text(OWN)
    elif kind == "tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(student_folder)
        tokenizer.chat_template = OWN
        tokenizer.save_pretrained(where)
    elif kind == "inline":
        tokenizer = AutoTokenizer.from_pretrained(student_folder)
        tokenizer.chat_template = OWN
        tokenizer.save_pretrained(where, save_jinja_files=False)
        assert not (where / "chat_template.jinja").exists()
    return where


@pytest.mark.parametrize("kind", ["bare", "jinja", "tokenizer", "inline"])
@pytest.mark.parametrize("merge", [True, False])
def test_the_nearest_folder_with_texts_decides_everywhere(
    adapter: Path,
    student_folder: Path,
    tmp_path: Path,
    distillation_tree: dict[str, Any],
    kind: str,
    merge: bool,
) -> None:
    model = with_files(adapter, student_folder, tmp_path / "adapter", kind)
    expected = CHAT_TEMPLATE if kind == "bare" else OWN
    data = DataConfig(source="x", max_answer_tokens=64)
    assert chat_template(load_processor(str(model))) == expected
    recipe = make_recipe(
        {name: part for name, part in distillation_tree.items() if name != "cache"},
        student__model=str(model),
        student__lora={"rank": 2, "merge": merge} if not merge else None,
        loss__kd_ratio=0.0,
        optimization__max_steps=1,
        run__name="second",
        run__root=str(tmp_path),
        run__num_workers=0,
    )
    assert run_alone(recipe) == 0
    exported = recipe.run.path / "export"
    assert chat_template(load_processor(str(exported))) == expected
    trained, asked = open_processor(str(model), data), open_processor(str(exported), data)
    assert trained.prompt_fingerprint == asked.prompt_fingerprint
    assert AutoTokenizer.from_pretrained(exported).chat_template == expected
