"""A stop in order as users ask for it: Ctrl-C at a terminal, a scheduler's SIGTERM, alone and under torchrun."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.pipeline import run_torchrun
from shared.stopping import INTERRUPTED_STATUS
from stage2_student.runs.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
PYTHON = Path(sys.executable)
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name not in {"RANK", "MAKELEVEL", "LOCAL_RANK"}
} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
ACTIVATED = ENVIRONMENT | {"PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"}
NOT_ACTIVATED = ENVIRONMENT | {"PATH": os.defpath}
CTRL_C = b"\x03"
LIMIT_S = 600  # of what does not end at all; busy machines take minutes


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, student_folder: Path, teacher_folder: Path) -> dict[str, Any]:
    """A run that is longer than anybody waits, with loader workers; and a cache of many shards."""
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(tmp_path / "cache"), "examples_per_shard": 1, "num_workers": 1},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "loss": {"kd_ratio": 0.0},
        "optimization": {"global_batch_size": 4, "microbatch_size": 2, "max_steps": 100_000},
        "run": {"name": "one", "root": str(tmp_path), "num_workers": 1, "export": False},
    }


@pytest.fixture
def recipe(tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def at_a_terminal(command: list[str], is_time: Callable[[], bool], *, presses: int = 1) -> tuple[int, str]:
    """Runs a command as the foreground of a terminal, presses Ctrl-C when it is time; its status and output."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execvpe(command[0], command, ACTIVATED)
    os.set_blocking(terminal, False)
    output, deadline, status = b"", time.monotonic() + LIMIT_S, None
    while status is None:
        if presses and is_time():
            os.write(terminal, CTRL_C)
            presses -= 1
        output += _what_is_there(terminal)
        ended, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError(f"it did not stop; it said {output.decode(errors='replace')}")
        time.sleep(0.05)
    return status, (output + _what_is_there(terminal)).decode(errors="replace").replace("\r\n", "\n")


def _what_is_there(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # nothing, or nobody at the other end any more
        return b""


def has_stepped(folder: Path, step: int = 2) -> Callable[[], bool]:
    log = folder / "metrics.jsonl"
    return lambda: log.exists() and f'"step": {step},' in log.read_text()


def assert_stopped_in_order(output: str, run: Path) -> int:
    """Says at which step, which is on disk, and nothing else; returns it."""
    assert "Traceback" not in output, output
    (told,) = re.findall(r"stopped: (\d+) of 100000 steps are done, and saved in .*/checkpoints\. ", output)
    saved = RunFolder(run).checkpoints.latest()
    assert saved is not None
    assert saved.facts.step == int(told)
    return int(told)


@pytest.mark.slow
def test_ctrl_c_through_make_saves_and_says_how_to_go_on(recipe: Path, tmp_path: Path) -> None:
    """The terminal's signal reaches make and the pipeline, and through torchrun both ranks."""
    command = [
        "make",
        "-o",
        "setup",
        "train-student",
        f"RECIPE={recipe}",
        "NPROC=2",
        f"BIN={Path(sys.executable).parent}",
    ]
    _, output = at_a_terminal(command, has_stepped(tmp_path / "one"))
    assert_stopped_in_order(output, tmp_path / "one")
    assert f"To go on: make train-student RECIPE={recipe} NPROC=2 ARGS=--resume\n" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "environment", "python"),
    [(signal.SIGINT, ACTIVATED, PYTHON.name), (signal.SIGTERM, NOT_ACTIVATED, str(PYTHON))],
    ids=["Ctrl-C", "SIGTERM, the environment is not activated"],
)
def test_the_told_command_goes_on(
    recipe: Path, tmp_path: Path, number: signal.Signals, environment: dict[str, str], python: str
) -> None:
    stage = [sys.executable, "-m", "stage2_student", "run", str(recipe)]
    process = subprocess.Popen(
        stage, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    is_time, deadline = has_stepped(tmp_path / "one"), time.monotonic() + LIMIT_S
    while not is_time() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == INTERRUPTED_STATUS, output
    step = assert_stopped_in_order(output, tmp_path / "one")
    told = output.rpartition("To go on: ")[2].strip()
    assert told == f"{python} -m stage2_student run {recipe} --resume"
    shorter = f"{told} --set optimization.max_steps={step + 1}"
    again = subprocess.run(shorter, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"step-{step:06d}: {step} of {step + 1} steps are done" in again.stdout
    assert f"note: the run was planned for 100000 steps, and is for {step + 1} now" in again.stdout
    assert re.search(rf"the learning rate of step {step + 1} would have been \S+ and is ", again.stdout)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_is_no_stop_in_order(recipe: Path, tmp_path: Path) -> None:
    """Both while the ranks are at work; nothing is left running."""
    launcher = [sys.executable, "-m", "shared.pipeline", "train-student", str(recipe)]
    status, output = at_a_terminal(launcher, has_stepped(tmp_path / "one"), presses=2)
    assert status != 0
    if "stopped: " not in output:  # else the first one was quicker
        assert status != INTERRUPTED_STATUS


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_ctrl_c_during_a_capture_keeps_what_is_captured(recipe: Path, tmp_path: Path, nproc: int) -> None:
    shards = tmp_path / "cache" / "shards"
    launcher = [sys.executable, "-m", "shared.pipeline", "teacher-cache", str(recipe), "--nproc", str(nproc)]
    status, output = at_a_terminal(launcher, lambda: len(list(shards.glob("*.arrow"))) > 1)
    assert "Traceback" not in output, output
    assert status == INTERRUPTED_STATUS, output
    (kept,) = re.findall(r"stopped: (\d+) of 16 units of cache .* are captured and kept", output)
    assert int(kept) == len(list(shards.glob("*.arrow")))
    assert f"To go on: {PYTHON.name} -m shared.pipeline teacher-cache" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "begin"),
    [
        (signal.SIGINT, []),
        (signal.SIGTERM, []),
        # As in the background of a script, where Ctrl-C is ignored.
        (signal.SIGTERM, ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]),
    ],
)
def test_a_step_of_the_bootstrap_leaves_nothing_half_made(
    tmp_path: Path, number: signal.Signals, begin: list[str]
) -> None:
    settings = ["--set", "bootstrap.phantom={train: 100000, validation: 4, test: 1, size: 64, seed: 0}"]
    process = subprocess.Popen(
        [*begin, sys.executable, "-m", "shared.pipeline", "train-student", "phantom", *settings],
        cwd=tmp_path,
        env=ACTIVATED,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list(tmp_path.glob("work/phantom/.data.*/*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert "Traceback" not in output, output
    assert process.returncode == INTERRUPTED_STATUS, output
    told = f"To go on: {PYTHON.name} -m shared.pipeline train-student phantom"
    assert f"of this step nothing is kept. {told}" in output
    assert list((tmp_path / "work" / "phantom").iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_while_a_command_still_imports_is_one_word(recipe: Path) -> None:
    """``estimate`` has nothing to save; what is being imported when it comes does not matter."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "stage1_teacher", "estimate", str(recipe)]
    status, output = at_a_terminal(command, lambda: time.monotonic() - begun > 3)
    # A shell says 130 of both.  Python ends by the signal where an extension that was being imported ran code itself.
    assert status in (128 + signal.SIGINT, -signal.SIGINT), output
    assert "Traceback" not in output
    assert output.strip().endswith("aborted")


# A finder of modules before all others: what asks for one of them waits, as on a slow disk.
SLOW_IMPORT = """
import pathlib, runpy, sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == {awaited!r}:
            pathlib.Path({begun!r}).touch()
            time.sleep(60)
sys.meta_path.insert(0, Slow())
sys.argv = [{module!r}, *{words!r}]
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def stopped_at_an_import(
    folder: Path, number: signal.Signals, module: str, *words: str, awaited: str = "torch"
) -> tuple[int, str]:
    """Signals ``python -m module`` while it imports what it waits for; its status and output."""
    begun = folder / "begun"
    code = SLOW_IMPORT.format(begun=str(begun), module=module, words=words, awaited=awaited)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not begun.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, output


@pytest.mark.parametrize(
    ("module", "words", "awaited"),
    [
        ("shared.phantom", ["drawn"], "pyarrow"),
        ("shared.small_models", ["phantom"], "torch"),
    ],
)
def test_a_step_of_the_bootstrap_that_is_stopped_at_an_import_says_no_more_than_that(
    tmp_path: Path, module: str, words: list[str], awaited: str
) -> None:
    """The pipeline sends it Ctrl-C's signal, whatever it was told itself."""
    status, output = stopped_at_an_import(tmp_path, signal.SIGINT, module, *words, awaited=awaited)
    assert (status, output.strip()) == (128 + signal.SIGINT, "aborted")


@pytest.mark.parametrize(
    ("stage", "verb", "expected"),
    [
        ("stage1_teacher", "capture", INTERRUPTED_STATUS),
        ("stage2_student", "run", INTERRUPTED_STATUS),
        ("stage1_teacher", "estimate", -signal.SIGTERM),  # it goes on with nothing
    ],
)
def test_sigterm_while_a_command_still_imports_is_a_stop_in_order(
    tmp_path: Path, stage: str, verb: str, expected: int
) -> None:
    status, output = stopped_at_an_import(tmp_path, signal.SIGTERM, stage, verb, "phantom")
    assert status == expected, output
    assert ("stopped" in output) == (expected == INTERRUPTED_STATUS)
    assert "Traceback" not in output


# What a rank of ``run_torchrun`` begins with.
RANK = f"""
import click, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from shared.cli import run
from shared.stopping import leave_status, stop_on_signals
sys.argv = ['rank']
def tell(): os.kill(os.getppid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(
    ("doing", "expected"),
    [
        ("tell()\ntime.sleep(60)", INTERRUPTED_STATUS),
        ("with stop_on_signals():\n    pass\ntell()\ntime.sleep(60)", INTERRUPTED_STATUS),
        (
            "with stop_on_signals() as stop:\n    tell()\n    while not stop.received:\n        time.sleep(0.01)\n"
            "    os._exit(1)",
            128 + signal.SIGTERM,
        ),
        (
            "run(click.Command('evaluate', callback=lambda: (tell(), time.sleep(60))))",
            128 + signal.SIGTERM,
        ),
    ],
    ids=["it imports", "it has saved", "it dies while it saves", "it saves nothing"],
)
def test_ranks_that_end_by_sigterm_before_they_listen_are_stopped_in_order(
    tmp_path: Path, doing: str, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of ranks that had nothing to save the launcher says 75, so that Slurm's scripts queue them again."""
    script = tmp_path / "rank.py"
    script.write_text(RANK + doing)
    assert run_torchrun(["--standalone", "--nproc-per-node=1", str(script)]) == expected
    assert ("stopped" in capsys.readouterr().out) == (expected == INTERRUPTED_STATUS)


def test_a_sigterm_to_launcher_and_rank_is_one_request(tmp_path: Path) -> None:
    """As systemd and schedulers send it: the rank has it from them, and from its launcher."""
    script = tmp_path / "rank.py"
    script.write_text(
        RANK
        + "import shared.stopping\nshared.stopping.SAME_REQUEST_S = 60\n"  # on a machine that is busy, too
        + "with stop_on_signals() as stop:\n"
        + "    tell()\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(1)\n"
        + f"    open({str(tmp_path / 'saved')!r}, 'w').close()\n"
        + f"leave_status({INTERRUPTED_STATUS})\nsys.exit({INTERRUPTED_STATUS})\n"
    )
    assert run_torchrun(["--standalone", "--nproc-per-node=1", str(script)]) == INTERRUPTED_STATUS
    assert (tmp_path / "saved").exists()
