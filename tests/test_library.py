"""``import teachonce``: the page that shows it, run from top to bottom, and what the import promises."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from documents import ROOT, blocks, command_words
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import teachonce
from stage1_teacher.__main__ import commands as teacher_commands
from stage2_student.__main__ import commands as student_commands

PAGE = ROOT / "docs" / "library.md"


def documented() -> list[str]:
    """The first name of each row of the page's table of names."""
    _, _, table = PAGE.read_text().partition("## Names")
    return re.findall(r"^\| `(\w+)", table, flags=re.MULTILINE)


def python(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_offers_exactly_the_documented_names() -> None:
    assert documented() == teachonce.__all__
    assert len(set(documented())) == len(documented())
    for name in teachonce.__all__:
        value = getattr(teachonce, name)
        assert name == "__version__" or value.__doc__, name
    assert set(teachonce.__all__) <= set(dir(teachonce))
    with pytest.raises(AttributeError, match="no attribute 'KDLos'"):
        teachonce.KDLos  # noqa: B018


def test_type_checkers_see_what_is_offered() -> None:
    """The imports that only they read name the same things, from where these are found."""
    tree = ast.parse((ROOT / "teachonce" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == teachonce._HOME_OF
    assert {*seen, "__version__"} == set(teachonce.__all__)


def test_the_import_costs_nothing(tmp_path: Path) -> None:
    code = """
import sys
import teachonce
assert not {"torch", "transformers", "numpy", "shared"} & set(sys.modules)
teachonce.TeachonceError, teachonce.Threshold
assert "torch" not in sys.modules and "transformers" not in sys.modules
teachonce.KDLoss
assert "torch" in sys.modules
"""
    python(code, tmp_path)


def test_the_version_is_the_packages() -> None:
    assert teachonce.__version__ == importlib.metadata.version("teachonce")


@pytest.mark.parametrize(
    ("group", "name"), [(teacher_commands, "teacher-cache"), (student_commands, "train-student")]
)
def test_both_commands_print_it(group: object, name: str) -> None:
    shown = CliRunner().invoke(group, ["--version"], prog_name=name)  # type: ignore[arg-type]
    assert (shown.exit_code, shown.output) == (0, f"{name} (teachonce) {teachonce.__version__}\n")


def gradient_of_a_step(names: dict, batch_size: int, accumulated: int) -> float:
    """The norm, by the page's own trainer: of four rows whose answers differ in length."""
    settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
    arguments = dataclasses.replace(names["arguments"], max_steps=1, learning_rate=0.0, **settings)
    rows = [names["train"][number] for number in range(4)]
    assert len({len(row.answer) for row in rows}) == 4
    trainer = names["DistillationTrainer"](
        names["student"], arguments, train_dataset=rows, data_collator=names["collate"]
    )
    trainer.model_accepts_loss_kwargs = names["trainer"].model_accepts_loss_kwargs
    trainer.train()
    return next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)


@torch.no_grad()
def loss_of_rows(names: dict, rows: list) -> float:
    batch, model = names["collate"](rows), names["student"]
    states = model.base_model(**batch["inputs"]).last_hidden_state.flatten(0, 1)[batch["position_index"]]
    head = model.get_output_embeddings().weight
    sums = teachonce.fused_ce_kd(states, head, batch["labels"], batch["targets"], kd_ratio=0.5)
    return float(sums.loss / sums.num_positions)


@pytest.mark.slow
def test_the_page_from_top_to_bottom(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    distillation_tree: dict,
    student_folder: Path,
    teacher_folder: Path,
    teacher_cache: Path,
    tokenizer_folder: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name, folder in {"small": student_folder, "large": teacher_folder}.items():
        (tmp_path / "models" / name).symlink_to(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained("models/text")
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**tiny, vocab_size=len(tokenizer) + 3)).save_pretrained("models/text")
    tree = distillation_tree | {
        "teacher": {"model": "models/large", "dtype": "float32"},
        "student": {"model": "models/small", "compute_dtype": "float32"},
        "run": {"name": "mine", "root": "runs", "num_workers": 0},
        "evaluation": {"max_examples": 2, "max_new_tokens": 4},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    names: dict = {"__name__": "__main__"}
    for block in blocks(PAGE):
        if block.language == "python":
            exec(compile(block.text, str(PAGE), "exec"), names)
        if "trainer.train()" in block.text:
            whole, halves = gradient_of_a_step(names, 4, 1), gradient_of_a_step(names, 2, 2)
            assert halves == pytest.approx(whole, rel=1e-4)
            rows = [names["train"][number] for number in range(2)]
            evaluated = names["trainer"].evaluate(rows)["eval_loss"]
            assert evaluated == pytest.approx(loss_of_rows(names, rows), rel=1e-4)
        for line in block.lines if block.language == "sh" else ():
            done = CliRunner().invoke(student_commands, command_words(line)[1:], standalone_mode=False)
            assert (done.return_value, done.exception) == (0, None), done.output
    assert names["trainer"].state.global_step == 3
    assert (tmp_path / "runs" / "own" / "results.json").exists()
    assert len(teachonce.CacheReader("caches/own")) == len(teachonce.CacheReader(str(teacher_cache)))
