"""The screen has our own lines alone; what libraries say is kept, once; an error of several ranks comes once."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shared.errors import DataError

PROGRAM = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
import click
from shared import cli
from shared.errors import DataError
from shared.library_output import keep_library_output, quiet_libraries

class HalfMade:
    def __del__(self):
        raise AttributeError("no attribute 'workers'")

@click.command()
def command():
    library = logging.getLogger("library")
    library.addHandler(logging.StreamHandler())
    library.propagate = False
    quiet_libraries()
    library.warning("falls back")
    library.warning("falls back")
    warnings.warn("is deprecated")
    os.write(2, b"[W socket.cpp:1] native\\n")
    subprocess.run([sys.executable, "-c", "import sys; print('of a child', file=sys.stderr)"])
    if "KEEP" in os.environ:
        keep_library_output(Path(os.environ["KEEP"]))
    library.error("breaks")
    HalfMade()
    os.write(2, b"native, later\\n")
    click.echo("our result")
    click.echo("our note", err=True)
    {ending}

cli.run(command)
"""
LIBRARIES = (
    "falls back",
    "is deprecated",
    "[W socket.cpp:1] native",
    "of a child",
    "breaks",
    "native, later",
    "no attribute 'workers'",
)


def run(ending: str = "pass", **environment: str) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(PROGRAM.replace("{ending}", ending))
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_screen_has_our_lines_and_the_file_the_others_once(tmp_path: Path) -> None:
    done = run(KEEP=str(tmp_path / "run.log"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "our result\n", "our note\n")
    kept = (tmp_path / "run.log").read_text()
    assert {words: kept.count(words) for words in LIBRARIES} == dict.fromkeys(LIBRARIES, 1)


def test_the_log_says_how_the_heads_gradient_is_summed(tmp_path: Path) -> None:
    """Once; libraries' records of that level are left out."""
    product = "add_product_(torch.zeros(4, 2), *(torch.ones(3, n, dtype=torch.bfloat16) for n in (4, 2)))"
    ending = f"import torch; from shared.kd_loss.gradients import add_product_; {product}; {product}"
    ending += "; logging.getLogger('a_library').info('chatter')"
    done = run(ending, KEEP=str(tmp_path / "run.log"))
    assert (done.returncode, done.stderr) == (0, "our note\n")
    kept = (tmp_path / "run.log").read_text()
    assert kept.count("the head's gradient on cpu: torch.bfloat16 summed in fp32 by fp32 copies") == 1
    assert "chatter" not in kept


def test_without_a_file_to_keep_it_in_nothing_is_left() -> None:
    done = run()
    assert (done.returncode, done.stdout, done.stderr) == (0, "our result\n", "our note\n")


def test_a_place_that_cannot_be_written_costs_nothing_else() -> None:
    done = run(KEEP="/nowhere/run.log")
    assert (done.returncode, done.stdout, done.stderr) == (0, "our result\n", "our note\n")


def test_a_user_s_error_is_one_message() -> None:
    done = run("raise DataError('row 3 is bad')")
    assert done.returncode == DataError.exit_status
    assert done.stderr == "our note\nerror: row 3 is bad\n"


def test_a_mistake_of_ours_keeps_its_traceback_and_shows_what_libraries_had_said() -> None:
    done = run("raise KeyError('oh')")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.rstrip().endswith("KeyError: 'oh'")
    assert "falls back" in done.stderr


def test_other_ranks_leave_warnings_to_the_first_and_add_errors(tmp_path: Path) -> None:
    assert run(KEEP=str(tmp_path / "run.log"), RANK="1").returncode == 0
    kept = (tmp_path / "run.log").read_text()
    assert "falls back" not in kept
    assert "breaks" in kept


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("raise DataError('row 3 is bad')", "raise DataError('row 3 is bad')"),
        ("raise DataError('row 3 is bad')", "raise RuntimeError('[gloo] Connection closed by peer')"),
    ],
)
def test_of_several_ranks_the_first_one_tells(tmp_path: Path, one: str, other: str) -> None:
    shown = []
    for rank, ending in enumerate((one, other)):
        folder = tmp_path / "attempt" / str(rank)
        folder.mkdir(parents=True)
        done = run(ending, RANK=str(rank), TORCHELASTIC_ERROR_FILE=str(folder / "error.json"))
        assert done.returncode != 0
        shown.append(done.stderr)
    assert shown == ["our note\nerror: row 3 is bad\n", "our note\n"]


BROKEN = """
import atexit, time
import click
from shared import cli
from shared.errors import DataError
from shared.runtime import distributed
import torch.distributed as dist

@click.command()
@click.argument("how")
def command(how):
    with distributed(device="cpu") as world:
        dist.barrier()
        if world.rank == 1:
            if how == "slow to leave":  # torchrun sees the other rank's end first, and ends this one by SIGTERM
                atexit.register(time.sleep, 3)
            if how == "slow to tell":
                echo, click.echo = click.echo, lambda *a, **k: (time.sleep(2), echo(*a, **k))
            raise KeyError("ours") if how == "mistake" else DataError("row 3 is bad")
        dist.barrier()

cli.run(command)
"""
LAUNCH = """
import click
from shared import cli
from shared.pipeline import run_torchrun

@click.command()
@click.argument("program", nargs=-1)
def command(program):
    return run_torchrun(["--standalone", "--nproc-per-node=2", *program])

cli.run(command, starts_ours=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one", "slow to leave", "slow to tell", "mistake"])
def test_nothing_follows_our_message_under_torchrun(tmp_path: Path, how: str) -> None:
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(program), how],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    if how == "mistake":
        assert done.stderr.count("Traceback") == 1
        assert done.stderr.rstrip().endswith("KeyError: 'ours'")
    else:
        assert (done.returncode, done.stderr) == (DataError.exit_status, "error: row 3 is bad\n")
