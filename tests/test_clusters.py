"""The scripts for Slurm, run on two played nodes of this machine; machines that are lost; the image's steps."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from image_steps import ROOT, Image, is_sent, steps
from slurm_stand_ins import SCRIPTS, Slurm, agents, descendants, end, kill_machine, wait_until
from stage2_runs import make_recipe, run_alone, step_records
from test_capture import files

from shared.cache.log import log_records
from shared.cache.storage import open_folder
from shared.errors import TrainingError
from shared.phantom.dataset import write_dataset
from shared.pipeline import run_torchrun
from shared.recipes import Recipe, dump_recipe
from shared.runtime import distributed
from shared.stopping import INTERRUPTED_STATUS, StopRequest
from stage1_teacher.capture import capture

NUM_UNITS, EXAMPLES = 200, 3  # of seconds: machines do not start at the same moment
ALL = sorted(SCRIPTS.glob("*.sbatch"))


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


@pytest.fixture(scope="module")
def tree(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> dict[str, Any]:
    """Two hundred units of three examples."""
    data = tmp_path_factory.mktemp("drawn") / "data"
    write_dataset(data, pictures={"train": 119, "validation": 1, "test": 1}, size=64)
    return {
        "data": {"source": str(data), "max_answer_tokens": 32},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": "cache", "num_workers": 0, "examples_per_shard": EXAMPLES, "batch_tokens": 128},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "optimization": {"global_batch_size": 4, "microbatch_size": 2, "max_steps": 12},
        "run": {"name": "two", "root": "runs", "num_workers": 0, "export": False, "checkpoint_every": 4},
    }


@pytest.fixture(scope="module")
def unbroken(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of one process."""
    path = tmp_path_factory.mktemp("unbroken") / "cache"
    with distributed(device="cpu") as world:
        assert capture(make_recipe(tree, cache__path=str(path)), world, StopRequest()) == 0
    assert num_shards(path) == NUM_UNITS
    return path


def write_recipe(tree: dict[str, Any], folder: Path, **settings: Any) -> Recipe:
    """As ``mine.yaml``, with its outputs in that folder."""
    paths = {"cache__path": str(folder / "cache"), "run__root": str(folder / "runs")}
    recipe = make_recipe(tree, **{**paths, **settings})
    (folder / "mine.yaml").write_text(yaml.safe_dump(dump_recipe(recipe)))
    return recipe


def num_shards(folder: Path) -> int:
    return len(list(folder.glob("shards/*.arrow")))


def num_captured(folder: Path) -> int:
    """Examples that the teacher was run over, by the last line of the log."""
    (*_, last) = (r for r in log_records(open_folder(str(folder))) if r["event"] == "captured")
    return int(last["examples"])


@pytest.mark.parametrize("script", ALL, ids=lambda path: path.name)
def test_a_script_is_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    checker = shutil.which("shellcheck")
    if checker is not None:
        found = subprocess.run([checker, str(script)], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout
    header = " ".join(re.findall(r"^#SBATCH (.*)$", script.read_text(), flags=re.MULTILINE)).split()
    assert {"--signal=B:TERM@120", "--requeue", "--ntasks-per-node=1"} <= set(header)


@pytest.mark.slow
def test_a_capture_is_stopped_and_queued_again_and_then_loses_a_machine(
    slurm: Slurm, tree: dict[str, Any], unbroken: Path
) -> None:
    """The lost machine costs its units in hand and nothing else; the other one finishes the cache."""
    write_recipe(tree, slurm.folder)
    cache = slurm.folder / "cache"
    job = slurm.start("capture.sbatch", "mine.yaml")
    wait_until(lambda: num_shards(cache) >= 3, job)
    job.send_signal(signal.SIGTERM)  # to the shell alone, as --signal=B says
    assert end(job) == INTERRUPTED_STATUS, slurm.said()
    assert len(slurm.requeued.read_text().split()) == 1
    assert "are captured and kept" in slurm.said()
    assert not (cache / "manifest.json").exists()
    assert not list(cache.glob("claims/*"))

    num_kept = num_shards(cache)
    job = slurm.start("capture.sbatch", "mine.yaml")
    wait_until(lambda: len(agents(job)) == 2, job)
    doomed = agents(job)[1]

    def is_at_work() -> bool:
        pids = {str(pid) for pid in descendants(doomed)}
        return any(p.name.split(".")[1] in pids for p in cache.glob("claims/*.json"))

    wait_until(lambda: num_shards(cache) > num_kept and is_at_work(), job)
    kill_machine(doomed)
    assert num_shards(cache) < NUM_UNITS
    assert end(job) == 128 + signal.SIGKILL, slurm.said()  # the lost one's; the other has ended well
    assert files(cache) == files(unbroken)
    assert num_captured(cache) <= EXAMPLES * (NUM_UNITS - num_kept) + EXAMPLES
    assert len(slurm.requeued.read_text().split()) == 1
    assert "Traceback" not in slurm.said()


@pytest.mark.slow
def test_the_script_of_stage_two_is_stopped_queued_again_and_goes_on(
    slurm: Slurm, tree: dict[str, Any], unbroken: Path
) -> None:
    recipe = write_recipe(tree, slurm.folder, cache__path=str(unbroken))
    job = slurm.start("train.sbatch", "mine.yaml")
    wait_until(lambda: (recipe.run.path / "metrics.jsonl").exists() and len(step_records(recipe)) >= 2, job)
    job.send_signal(signal.SIGTERM)
    assert end(job) == INTERRUPTED_STATUS, slurm.said()
    assert len(slurm.requeued.read_text().split()) == 1
    assert 2 <= len(step_records(recipe)) < 12
    assert end(slurm.start("train.sbatch", "mine.yaml")) == 0, slurm.said()
    alone = make_recipe(tree, cache__path=str(unbroken), run__root=str(slurm.folder), run__name="alone")
    run_alone(alone)
    for mine, other in zip(step_records(recipe), step_records(alone), strict=True):
        assert mine.pop("event") == other.pop("event")
        assert mine == pytest.approx(other, rel=2e-5)


def test_a_rendezvous_that_is_gone_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    away = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:1"]
    status = run_torchrun([*away, "--rdzv-conf=is_host=0,read_timeout=1", "-m", "stage1_teacher"])
    assert status == TrainingError.exit_status
    assert "has lost the rendezvous of its job" in capsys.readouterr().err


# --- the image ---------------------------------------------------------------------------------------------


def test_the_image_holds_no_secret_and_runs_as_no_root() -> None:
    names = [step.name for step in steps()]
    assert names.index("USER") < names.index("CMD")
    (user,) = (step.text for step in steps() if step.name == "USER")
    assert user not in ("root", "0")
    text = (ROOT / "Dockerfile").read_text()
    assert "--shm-size" in text
    (home,) = re.findall(r"^ENV HOME=(\S+)$", text, flags=re.MULTILINE)
    workdir = [step.text for step in steps() if step.name == "WORKDIR"][-1]
    assert f"chmod 1777 {home} {workdir}" in text, "docker run --user names any user, who writes there"
    assert not re.search(r"(?i)(token|secret|password|key)\s*=", text)
    sources = {word for step in steps() if step.name == "COPY" for word in step.text.split()[:-1]}
    assert all((ROOT / source).exists() and is_sent(source) for source in sources)
    assert not is_sent(".git")
    assert not is_sent("tests")
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} - {"tests"} <= sources


def test_what_the_image_fetches_outlives_a_container(tmp_path: Path) -> None:
    image = Image(tmp_path / "image")
    for step in steps():
        if step.name == "ENV":
            image.take(step)
    code = """
from huggingface_hub.constants import HF_HUB_CACHE
from shared.cache.staging import Staging
from shared.data.copies import copies_folder
print(HF_HUB_CACHE, Staging().folder, copies_folder())
"""
    own = ("HF_", "HUGGINGFACE_", "TEACHONCE_")
    outside = {name: value for name, value in image.environment().items() if not name.startswith(own)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=outside, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3
    assert all(Path(place).is_relative_to(image.inside("/work")) for place in done.stdout.split())


def test_an_index_for_torch_is_no_index_for_the_rest() -> None:
    """PyTorch's has few of the exact versions that torch's dependencies are to have."""
    (step,) = (step.text for step in steps() if "TORCH_INDEX:+" in step.text)
    assert '${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint' in step
    assert not any(re.search(r"(?<!extra)-index-url", step.text) for step in steps())


@pytest.mark.slow
def test_the_steps_of_the_image_give_both_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but downloads: what pip would bring is taken from here; ``python -m tests.image_steps`` takes all."""
    for name, value in {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}.items():
        monkeypatch.setenv(name, value)
    image = Image(tmp_path / "image")
    for step in steps():
        if step.text.endswith("constraints.txt torch"):
            (own,) = image.folder.glob("opt/venv/lib/python*/site-packages")
            (own / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
            for older in own.glob(
                "setuptools*"
            ):  # Python 3.11 brings one, which pip would not use for a build
                shutil.rmtree(older)
            continue
        image.take(step)
    for name in ("teacher-cache", "train-student"):
        program = shutil.which(name, path=image.environment()["PATH"])
        assert Path(str(program)).is_relative_to(image.folder)
        said = subprocess.run([str(program), "--help"], env=image.environment(), cwd=tmp_path, check=True)
        assert said.returncode == 0
    assert [text.split()[0] for text in image.left_out] == ["apt-get", "useradd"]
