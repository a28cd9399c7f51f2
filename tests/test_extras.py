"""What is said without a package of an extra: which one is missing, and how to get it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.cache.storage import open_folder
from shared.errors import CacheFormatError, RecipeError
from shared.kd_loss import chunk
from shared.models.adapters import merged
from shared.recipes import LoraConfig
from shared.reports.figures import save_png
from stage1_teacher.__main__ import commands
from stage2_student.evaluation.curves import plot
from stage2_student.training.lora import add_adapters

Hide = Callable[[str], None]


@pytest.mark.parametrize("verb", ["inspect", "report"])
def test_plots_and_reports_of_a_cache(verb: str, teacher_cache: Path, tmp_path: Path, hide: Hide) -> None:
    hide("matplotlib")
    out = {"inspect": ["--plots", str(tmp_path / "plots")], "report": [str(tmp_path / "page.html")]}
    with pytest.raises(RecipeError, match=r"need matplotlib.*teachonce\[report\]"):
        commands.main([verb, str(teacher_cache), *out[verb]], standalone_mode=False)
    assert not list(tmp_path.iterdir())


def test_figures_of_runs(tmp_path: Path, hide: Hide) -> None:
    hide("matplotlib")
    for draw in (lambda: plot([], tmp_path / "plots"), lambda: save_png(print, tmp_path / "one.png")):
        with pytest.raises(RecipeError, match=r"teachonce\[report\]"):
            draw()
    assert not list(tmp_path.iterdir())


def test_adapters(hide: Hide) -> None:
    hide("peft")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(RecipeError, match=r"peft is not installed.*teachonce\[lora\]"):
        add_adapters(model, LoraConfig(rank=2), seed=0)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"an adapter.*teachonce\[lora\]"):
        merged(model, "folder")  # type: ignore[arg-type]


def test_a_cache_on_s3(hide: Hide, monkeypatch: pytest.MonkeyPatch) -> None:
    hide("s3fs")
    loaded = sys.modules["fsspec.registry"]._registry  # ``fsspec.registry`` is a view of it
    monkeypatch.delitem(loaded, "s3", raising=False)
    with pytest.raises(CacheFormatError, match="s3fs"):
        open_folder("s3://bucket/cache").names("")


def test_the_loss_does_without_triton(hide: Hide) -> None:
    hide("triton")
    assert chunk._kernel.__wrapped__(torch.device("cpu")) is None
