"""Rounds as a user starts them: killed while they write, capture and train; and which weights they open."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from slurm_stand_ins import descendants
from stage2_runs import make_recipe

from shared.recipes import Recipe, recipe_text
from shared.rounds import Rounds
from shared.rounds.table import outcomes

ROOT = Path(__file__).resolve().parent.parent
# Every process that starts under this notes the files of weights that it opens.
TRACE = """
import os, safetensors
opened = safetensors.safe_open

def safe_open(filename, *arguments, **options):
    with open(os.environ["WEIGHTS_LOG"], "a") as log:
        log.write(f"{os.getpid()} {os.path.realpath(filename)}\\n")
    return opened(filename, *arguments, **options)

safetensors.safe_open = safe_open
"""


@pytest.fixture
def recipe(tmp_path: Path, vqa_folder: Path, teacher_folder: Path, student_folder: Path) -> Recipe:
    tree: dict[str, Any] = {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {
            "path": str(tmp_path / "cache"),
            "num_workers": 0,
            "examples_per_shard": 1,
            "batch_tokens": 1,
        },
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "optimization": {"global_batch_size": 2, "microbatch_size": 2, "max_steps": 6, "learning_rate": 1e-2},
        "run": {"name": "own", "root": str(tmp_path / "runs"), "num_workers": 0, "checkpoint_every": 1},
        "write": {"temperature": 1.0, "max_new_tokens": 60, "num_workers": 0, "batch_tokens": 1},
        "rounds": {"number": 1, "own_share": 1.0},
    }
    made = make_recipe(tree)
    (tmp_path / "recipe.yaml").write_text(recipe_text(made))
    return made


def number_of(folder: Path, pattern: str) -> int:
    return len(list(folder.glob(pattern)))


@pytest.mark.slow
def test_rounds_that_are_killed_go_on_and_no_process_opens_both_models(
    recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "sitecustomize.py").write_text(TRACE)
    log = tmp_path / "weights.log"
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path / 'trace'}:{ROOT}",
        "WEIGHTS_LOG": str(log),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "shared.pipeline", "rounds", str(tmp_path / "recipe.yaml")]
    answers, cache = tmp_path / "runs/own-rounds/round-1/answers", tmp_path / "cache"
    second = tmp_path / "runs/own-round-1/checkpoints"
    moments: list[Callable[[], bool]] = [
        lambda: any(path.stat().st_size for path in answers.glob(".partial/*.jsonl")),
        lambda: number_of(cache, "shards/*.arrow") > 17,  # 16 are round 0's
        lambda: number_of(second, "step-00000[23]") > 0,
    ]
    seen = []
    for has_come in moments:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while not has_come() and process.poll() is None:
            time.sleep(0.02)
        seen.append((answers / "written.json").exists())
        for pid in [process.pid, *descendants(process.pid)]:
            with suppress(ProcessLookupError):  # it went with the one before
                os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output
    assert seen == [False, True, True]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all 1 are finished" in done.stdout
    assert "stage2_student run" in done.stderr
    assert "--resume" in done.stderr
    assert "stage1_teacher" not in done.stderr  # that was done before
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "torchrun" not in again.stderr
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]
    found = list(outcomes(Rounds.of_recipe(recipe)))
    assert [one.own_rows for one in found] == [0, 12]
    assert [one.steps for one in found] == [6, 6]
    require_apart(log.read_text().splitlines(), recipe)


def require_apart(lines: list[str], recipe: Recipe) -> None:
    """No process has opened weights of the teacher and others."""
    assert recipe.teacher is not None
    of_teacher: dict[str, set[bool]] = {}
    for line in lines:
        pid, path = line.split(" ", 1)
        of_teacher.setdefault(pid, set()).add(
            path.startswith(os.path.realpath(recipe.teacher.model) + os.sep)
        )
    assert all(len(kinds) == 1 for kinds in of_teacher.values()), lines
    assert {True} in of_teacher.values()
    assert {False} in of_teacher.values()
