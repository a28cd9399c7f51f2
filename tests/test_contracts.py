"""The walls of the house: who may import whom, and what must not happen on import."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from shared import pipeline

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"stage1_teacher", "stage2_student"}

# A room imports only rooms of earlier floors, or of its own package.
FLOORS = [
    {"arrow_messages", "dealing", "errors", "library_output", "machine", "permutation", "threads", "vouched"},
    {"batching", "shard_order", "temporaries"},
    {"regular_files"},
    {"recipes", "runtime", "progress"},
    {"stopping"},
    {"cli"},
    {"sparse", "phantom", "places", "finished"},
    {"models"},
    {"codec", "data"},
    {"answering", "reports", "kd_loss", "cache", "other_vocabulary"},
    {"surveying", "same_prompts"},
    {"completeness", "small_models", "same_teacher", "split_check", "model_check", "model_notes"},
    {"preflight", "rounds"},
    {"pipeline", "capture"},
    {"writing"},
]
# The rooms of a stage, in the same order; its commands and its story stand above them all.
ROOMS = {
    "stage1_teacher": ["capturing", "inspection"],
    "stage2_student": ["runs", "publishing", "training", "evaluation"],
}


def imports_of(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "shared").parts[0].removesuffix(".py")


def shared_files() -> list[Path]:
    return [path for path in sorted((ROOT / "shared").rglob("*.py")) if room_of(path) != "__init__"]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("stage1_teacher", {"stage2_student"}),
        ("stage2_student", {"stage1_teacher"}),
        ("shared", STAGES | {"teachonce"}),
        ("teachonce", STAGES),
    ],
)
def test_the_stages_meet_only_on_disk(package: str, forbidden: set[str]) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        crossing = {name for name in imports_of(path) if name.split(".")[0] in forbidden}
        assert not crossing, f"{path.relative_to(ROOT)} imports {crossing}"


def test_every_room_of_shared_has_a_floor() -> None:
    known = set().union(*FLOORS)
    assert {room_of(path) for path in shared_files()} <= known


def test_no_room_of_shared_imports_a_higher_one() -> None:
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    for path in shared_files():
        room = room_of(path)
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] != "shared" or len(parts) < 2 or parts[1] == room:
                continue
            assert floor[parts[1]] < floor[room], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_no_room_of_a_stage_imports_a_higher_one(stage: str) -> None:
    rooms = ROOMS[stage]
    folders = {path.name for path in (ROOT / stage).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(rooms)
    for level, room in enumerate(rooms):
        for path in sorted((ROOT / stage / room).rglob("*.py")):
            for name in imports_of(path):
                parts = name.split(".")
                if parts[0] == stage and len(parts) > 1:
                    allowed = parts[1] in rooms[: level + 1]
                    assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_importing_changes_nothing(tmp_path: Path) -> None:
    """No files, no threads, no process group, no default dtype or seed from an import."""
    code = """
import threading, os, torch
state = torch.random.get_rng_state()
import teachonce
import shared.recipes, shared.cache, shared.kd_loss, shared.pipeline, stage1_teacher.__main__, stage2_student.__main__
import torch.distributed as dist
assert not dist.is_initialized() and threading.active_count() == 1
assert torch.equal(torch.random.get_rng_state(), state) and torch.get_default_dtype() == torch.float32
assert os.listdir() == []
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_commands_need_no_name_that_linux_alone_has() -> None:
    code = """
import errno, os
del errno.EREMOTEIO, os.memfd_create, os.posix_fallocate, os.sched_getaffinity
from shared.threads import set_threads
import shared.pipeline, stage1_teacher.__main__, stage2_student.__main__
set_threads()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["stage1_teacher", "stage2_student", "shared.pipeline"])
def test_command_lines_explain_themselves(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Commands:" in done.stdout


@pytest.mark.parametrize("module", ["stage1_teacher", "stage2_student"])
def test_a_users_error_is_one_message_with_a_status_of_its_own(module: str) -> None:
    command = [sys.executable, "-m", module, "check", "phantm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("error: recipe 'phantm': unknown; did you mean 'phantom'?")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train-student", "phantom", "--resum"], "No such option"),
        (["train-student", "phantom", "run.name=soft"], "unexpected extra argument (run.name=soft)"),
        (["train-student", "phantom", "--accept-data-change"], "--accept-data-change goes with --resume"),
        (["teacher-cache", "phantom", "--resume"], "No such option"),
        (["teacher-cache", "phantom", "--sett", "run.name=soft"], "No such option"),
        (["rounds", "phantom", "--resume"], "No such option"),
    ],
)
def test_a_typo_is_told_before_anything_is_made(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(pipeline.main, words)
    assert said.exit_code == 2
    assert message in said.output
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = f"{tmp_path}/file/x"
    code = f"""
import click
from shared.cli import run
run(click.Command("write", callback=lambda: open({place!r}, "w")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (74, f"error: {place}: not a directory\n")


def test_a_full_disk_of_which_the_system_tells_no_name_is_one_message() -> None:
    code = """
import click
from shared.cli import run
run(click.Command("write", callback=lambda: open("/dev/full", "w").write("x" * 100_000)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 74
    assert done.stderr.startswith("error: no space left on device: the system does not say of which file. ")


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (
            "os.mkdir('x'); os.chdir('x'); os.rmdir('../x')",
            "error: the folder that this was started in is gone.",
        ),
        (
            "tempfile._candidate_tempdir_list = lambda: ['/proc/no']",
            "error: no usable temporary directory found in",
        ),
    ],
)
def test_a_place_that_is_gone_is_one_message(before: str, message: str, tmp_path: Path) -> None:
    code = f"""
import os, tempfile
import click
from shared.cli import run
{before}
def work():
    os.getcwd()
    tempfile.gettempdir()
run(click.Command("look", callback=work))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 74
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_memory_that_does_not_suffice_is_one_message_wherever_it_happens() -> None:
    code = """
import click, torch
from shared.cli import run
run(click.Command("load", callback=lambda: torch.empty(1 << 60, dtype=torch.uint8)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 8
    assert done.stderr.startswith("error: the memory does not suffice. Take a smaller model")
    assert done.stderr.count("\n") == 1
