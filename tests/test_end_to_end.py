"""The main job as a user starts it: from an empty folder to a student, then a second student without the teacher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForImageTextToText

from shared.data.processing import open_processor
from shared.data.rows import open_split
from shared.errors import CacheMismatchError, DataError
from shared.recipes import load_recipe
from shared.stopping import INTERRUPTED_STATUS
from stage1_teacher.__main__ import commands as stage1
from stage2_student.__main__ import commands as stage2

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TINY = [
    "bootstrap.phantom={train: 8, validation: 4, test: 1, size: 64, seed: 0}",
    "evaluation.max_examples=4",
    "run.validate_every=null",
]


def pipeline(
    folder: Path, verb: str, *settings: str, arguments: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command(verb, *settings), *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def command(verb: str, *settings: str) -> list[str]:
    return [sys.executable, "-m", "shared.pipeline", verb, *recipe(*settings)]


def recipe(*settings: str) -> list[str]:
    return ["phantom", *(part for setting in (*TINY, *settings) for part in ("--set", setting))]


def stage(group: click.Command, *words: str) -> Result:
    """A stage's own command, in this process."""
    return CliRunner().invoke(group, words, standalone_mode=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the default recipe, made tiny, has run from nothing."""
    folder = tmp_path_factory.mktemp("from_nothing")
    done = pipeline(folder, "train-student", "optimization.num_epochs=0.5")
    assert done.returncode == 0, done.stderr
    lines = ("teacher ", "teacher, shuffled pictures", "student, labels alone", "student, from the cache")
    for line in (*lines, "student before training", "Distance from the teacher", "bytes a position", "times"):
        assert line in done.stdout
    (folder / "screen").write_text(done.stdout + done.stderr)
    return folder


OURS = (
    *("==> ", "    python -m ", "    torchrun ", "work/phantom/", "made work/", "teacher work/"),
    *("cache work/", "run phantom", "step ", "note: ", "  "),
    *(
        "reading ",
        "training: ",
        "validating: ",
        "answering: ",
        "capture: ",
    ),  # of what takes over half a minute
)


@pytest.mark.slow
def test_every_line_of_a_first_run_is_ours(finished: Path) -> None:
    lines = (finished / "screen").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith(OURS)] == []
    assert [
        line for line in lines if "warn" in line.lower() or "it/s]" in line or "[transformers]" in line
    ] == []
    for log in ("work/runs/phantom/run.log", "work/caches/phantom/capture.log"):
        assert (finished / log).read_text().count("`chunk_gated_delta_rule` is falling back") == 1


@pytest.mark.slow
def test_the_second_student_needs_nothing_of_the_teacher(finished: Path) -> None:
    shutil.move(finished / "work/runs/phantom_teacher", finished / "away")
    shutil.move(finished / "work/phantom/models/large", finished / "away_too")
    try:
        settings = ("run.name=soft", "loss.kd_ratio=1.0", "optimization.num_epochs=0.2")
        done = pipeline(finished, "train-student", *settings)
        assert done.returncode == 0, done.stderr
        assert "stage1_teacher" not in done.stderr
        assert "run phantom_labels" not in done.stderr  # the first student's is there, and shown again
        assert "student, labels alone" in done.stdout
        assert not (finished / "work/runs/phantom_teacher").exists()
        assert not (finished / "work/phantom/models/large").exists()
        assert "nothing to capture" in pipeline(finished, "teacher-cache").stdout
    finally:
        shutil.move(finished / "away", finished / "work/runs/phantom_teacher")
        shutil.move(finished / "away_too", finished / "work/phantom/models/large")


@pytest.mark.slow
def test_shuffled_pictures_have_a_file_of_their_own(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    answers = finished / "work/runs/phantom/evaluation"
    before = (answers / "validation.parquet").read_bytes()
    done = stage(stage2, "evaluate", "work/runs/phantom", "--shuffle-pictures", "--no-references")
    assert done.exception is None, done.output
    assert "shuffled-pictures-validation.parquet" in done.stdout
    assert (answers / "shuffled-pictures-validation.parquet").exists()
    assert (answers / "validation.parquet").read_bytes() == before


@pytest.mark.slow
def test_a_run_of_the_same_name_is_refused_with_its_own_status(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = pipeline(finished, "train-student")
    assert done.returncode == 3
    assert "Add --resume" in done.stderr
    monkeypatch.chdir(finished)
    resumed = stage(stage2, "run", *recipe("optimization.num_epochs=0.5"), "--resume")
    assert resumed.exception is None, resumed.output
    assert resumed.return_value == 0


@pytest.mark.slow
def test_the_same_command_again_shows_the_results_of_the_finished_run(finished: Path) -> None:
    """And needs nothing for it: neither the data nor the cache, and no torchrun."""
    needed = ("phantom", "caches")
    for name in needed:
        shutil.move(finished / "work" / name, finished / f"{name} away")
    try:
        done = pipeline(finished, "train-student", "optimization.num_epochs=0.5")
    finally:
        for name in needed:
            shutil.move(finished / f"{name} away", finished / "work" / name)
    assert done.returncode == 0, done.stderr
    assert "run work/runs/phantom is finished" in done.stdout
    assert "short answers right" in done.stdout
    assert "torchrun" not in done.stderr


@pytest.mark.slow
def test_a_lost_export_is_made_again(finished: Path) -> None:
    export = finished / "work/runs/phantom/export"
    shutil.rmtree(export)
    done = pipeline(finished, "train-student", "optimization.num_epochs=0.5", arguments=("--resume",))
    assert done.returncode == 0, done.stderr
    assert (export / "model.safetensors").exists()


@pytest.mark.slow
def test_sigterm_to_the_pipeline_leaves_a_run_to_resume(finished: Path) -> None:
    run = finished / "work/runs/stopped"
    process = subprocess.Popen(
        command("train-student", "run.name=stopped", "optimization.num_epochs=200"),
        cwd=finished,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and '"step": 2' not in _text(run / "metrics.jsonl"):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == INTERRUPTED_STATUS
    assert list((run / "checkpoints").glob("step-*"))


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_a_capture_of_a_complete_cache_does_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    manifest = finished / "work/caches/phantom/manifest.json"
    before = manifest.read_bytes()
    done = stage(stage1, "capture", *recipe())
    assert done.exception is None, done.output
    assert "nothing to capture" in done.stdout
    assert manifest.read_bytes() == before


@pytest.mark.slow
def test_other_targets_for_the_same_cache_are_refused_with_their_own_status(finished: Path) -> None:
    done = pipeline(finished, "train-student", "run.name=other", "cache.policy={kind: top_k, k: 4}")
    assert done.returncode == CacheMismatchError.exit_status, done.stderr
    assert all(side in done.stderr for side in ("threshold", "top_k"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "sides"),
    [
        ("cache.seed=8", "targets.seed: 7 in the cache, 8 asked for"),
        ("cache.temperatures=[1.0, 3.0]", "in the cache, [1.0,3.0] asked for"),
    ],
)
def test_other_targets_for_the_same_cache_are_refused(
    finished: Path, other: str, sides: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    done = stage(stage2, "run", *recipe("run.name=other", other))
    assert isinstance(done.exception, CacheMismatchError), done.output
    assert sides in str(done.exception)


@pytest.mark.slow
def test_the_exported_student_answers_and_its_loss_is_the_trainers(finished: Path) -> None:
    planned = load_recipe("phantom").data
    data = planned.model_copy(update={"source": str(finished / planned.source)})
    export = finished / "work/runs/phantom/export"
    model = AutoModelForImageTextToText.from_pretrained(export).eval()
    processor = open_processor(str(export), data)
    split = open_split(data, "validation")
    total, count = 0.0, 0
    for example in split:
        batch = processor.collate([processor.encode(example)])
        with torch.no_grad():
            logits = model(**batch.inputs).logits.flatten(0, 1)[batch.position_index]
        total += torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum").item()
        count += len(batch.labels)
    results = json.loads((finished / "work/runs/phantom/results.json").read_text())
    assert total / count == pytest.approx(results["after"]["ce_loss"], rel=1e-5)
    prompt = processor.collate([processor.encode_prompt(split[0])])
    ids = model.generate(**prompt.inputs, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] > prompt.inputs["input_ids"].shape[1]


def test_medpix_sample_says_what_is_missing_where_the_data_are_not(tmp_path: Path) -> None:
    data = load_recipe("medpix_sample", overrides=[f"data.source={tmp_path / 'none'}"]).data
    with pytest.raises(DataError, match="none"):
        open_split(data, "train")
