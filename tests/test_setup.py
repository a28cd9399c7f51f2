"""``make setup``: what is installed when, with a Python that only writes down what pip was asked for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Makes an environment of itself; says nothing of what it is asked about itself but its age and its modules.
PYTHON = """#!/bin/sh
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && for name in python ruff mypy; do cp "$0" "$3/bin/$name"; done; [ ! -e no_pip ] ;;
    "-m pip") shift 2; echo "$@" >> pip.log; [ ! -e no_network ] ;;
    "-c import ensurepip"*) [ ! -e no_venv ] ;;
    "-c import sys"*) [ ! -e too_old ] ;;
    "--version "*) echo "Python 3.9.2" ;;
    *) echo "$@" >> ran.log ;;
esac
"""


class Checkout:
    """A folder with the real Makefile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        (folder / "python").write_text(PYTHON)
        (folder / "python").chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {
            name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ
        } | environment  # not an outer make's
        command = ["make", "PYTHON=./python", *arguments]
        return subprocess.run(command, cwd=self.folder, env=kept, capture_output=True, text=True, check=False)

    def installed_by(self, *arguments: str) -> list[set[str]]:
        """The extras of each pip that this goal ran."""
        log = self.folder / "pip.log"
        log.unlink(missing_ok=True)
        done = self.make(*arguments)
        assert done.returncode == 0, done.stderr
        lines = log.read_text().splitlines() if log.exists() else []
        assert all("-c constraints.txt" in line for line in lines)
        found = [re.search(r"-e \.(?:\[(.*)\])?$", line) for line in lines]
        return [set((one[1] or "").split(",")) for one in found if one is not None]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_what_was_asked_for_before_stays_and_is_not_installed_again(checkout: Checkout) -> None:
    assert checkout.installed_by("setup", "EXTRAS=report") == [{"report"}]
    assert checkout.installed_by("train-student") == [{"lora", "report"}]
    for goal in (["train-student"], ["setup", "EXTRAS=report"], ["setup", "EXTRAS="], ["bench"]):
        assert checkout.installed_by(*goal) == []


def test_goals_bring_what_they_need(checkout: Checkout) -> None:
    for_tests = {"test", "lora", "report", "s3", "tracking"}
    assert checkout.installed_by("test") == [for_tests]
    assert checkout.installed_by("setup", "EXTRAS=report,s3") == []
    assert checkout.installed_by("check") == [for_tests | {"dev"}]
    assert checkout.installed_by("lint") == checkout.installed_by("test") == []
    assert checkout.installed_by("bench-gpu") == [for_tests | {"dev", "peers"}]


def test_modules_are_compiled_at_once_where_python_keeps_nothing_that_it_compiles(checkout: Checkout) -> None:
    for environment, is_later in ({}, True), ({"PYTHONDONTWRITEBYTECODE": "1"}, False):
        shutil.rmtree(checkout.folder / ".venv", ignore_errors=True)
        assert checkout.make("setup", **environment).returncode == 0
        assert ("--no-compile" in (checkout.folder / "pip.log").read_text().splitlines()[-1]) == is_later


def test_who_only_trains_downloads_nothing_for_tests(checkout: Checkout) -> None:
    assert checkout.installed_by("train-student") == [{"lora"}]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_other_content_installs_everything_that_was_there(checkout: Checkout, name: str) -> None:
    checkout.installed_by("setup", "EXTRAS=report,s3")
    file = checkout.folder / name
    file.touch()
    assert checkout.installed_by("setup", "EXTRAS=s3") == [], "a newer date alone is no change"
    file.write_text(file.read_text() + "# another line\n")
    assert checkout.installed_by("setup", "EXTRAS=s3") == [{"report", "s3"}]


def test_an_install_that_failed_is_tried_again(checkout: Checkout) -> None:
    (checkout.folder / "no_network").touch()
    assert checkout.make("setup").returncode == 2
    (checkout.folder / "no_network").unlink()
    assert checkout.installed_by("setup") == [{"lora"}]


def test_an_environment_that_was_not_made_whole_is_made_again(checkout: Checkout) -> None:
    """``venv`` puts Python there first, and pip last."""
    (checkout.folder / "no_pip").touch()
    assert checkout.make("setup").returncode == 2
    (checkout.folder / "no_pip").unlink()
    assert not (checkout.folder / ".venv/bin/python").exists()
    assert checkout.installed_by("setup") == [{"lora"}]


@pytest.mark.parametrize(
    ("lack", "words"),
    [
        ("too_old", "error: Python 3.11 or later is needed, and ./python is Python 3.9.2."),
        ("no_venv", "error: ./python cannot make environments."),
    ],
)
def test_a_python_that_will_not_do_is_one_line(checkout: Checkout, lack: str, words: str) -> None:
    (checkout.folder / lack).touch()
    done = checkout.make("train-student")
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert said[0].startswith(words)
    assert "make setup PYTHON=" in said[0]
    assert not (checkout.folder / ".venv").exists()


def test_no_python_at_all_is_one_line(checkout: Checkout) -> None:
    done = checkout.make("setup", "PYTHON=no-such-python")
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert "no-such-python is missing" in said[0]


def test_make_says_the_status_of_the_command_that_failed(checkout: Checkout) -> None:
    """Make itself always ends with 2; its last line has the command's own status."""
    assert checkout.make("setup").returncode == 0
    (checkout.folder / ".venv/bin/python").write_text("#!/bin/sh\nexit 75\n")
    done = checkout.make("train-student")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("train-student] Error 75")


def test_the_tests_extra_brings_all_that_commands_can_need() -> None:
    """The makefile names them one by one, so that asking for one of them later installs nothing."""
    listed = re.search(r"^FOR_TESTS := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert listed is not None
    assert set(extras()) == {*listed[1].split(), "dev", "vision", "fuzz", "real-weights", "peers"}
    named = re.search(r"^teachonce\[(.*)\]$", extras()["test"][0])
    assert named is not None
    assert {*named[1].split(","), "test"} == set(listed[1].split())
    assert extras()["dev"][0] == "teachonce[test]"


def test_no_test_waits_for_a_package() -> None:
    """What a command lacks without its extra is tested by hiding the package.

    Teachers in four bits need libraries that ask for a newer torch than the constraints have.
    """
    outside = (Path(__file__), ROOT / "tests" / "test_quantized.py")
    files = [path for path in (ROOT / "tests").glob("*.py") if path not in outside]
    assert not [
        path.name for path in files if re.search(r"importorskip|find_spec\(.*is None", path.read_text())
    ]
