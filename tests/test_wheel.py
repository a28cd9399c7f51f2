"""What ``pip install .`` gives: a wheel that holds everything, and runs where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from shared.cache import CacheReader

ROOT = Path(__file__).resolve().parent.parent
UNSET = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def packages() -> list[str]:
    """Top-level packages that are to be shipped."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return [pattern.removesuffix("*") for pattern in settings["packages"]["find"]["include"]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that nothing is written into the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in packages():
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheels")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source))
    (built,) = out.glob("teachonce-*.whl")
    return built


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_it_holds_every_module_and_every_recipe(wheel: Path) -> None:
    ours = {
        path.relative_to(ROOT).as_posix()
        for name in packages()
        for path in (ROOT / name).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    held = set(zipfile.ZipFile(wheel).namelist())
    assert ours <= held
    assert {name.split("/")[0] for name in held if ".dist-info" not in name} == set(packages())


@pytest.mark.slow
def test_a_folder_of_the_user_hides_no_package_of_an_editable_install(source: Path, tmp_path: Path) -> None:
    build = f"import setuptools.build_meta as build; build.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (built,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(built).extractall(tmp_path / "installed")
    (tmp_path / "mine/shared/data").mkdir(parents=True)
    ask = f"import site; site.addsitedir({str(tmp_path / 'installed')!r}); import shared.data as d; print(d.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", ask], cwd=tmp_path / "mine", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(source / "shared/data/__init__.py")


@pytest.mark.slow
def test_it_captures_where_there_is_no_checkout(
    wheel: Path, tmp_path: Path, vqa_folder: Path, teacher_folder: Path, student_folder: Path
) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    (own,) = environment.glob("lib/python*/site-packages")
    # The requirements, and of this environment nothing else: what is installed as editable is found by a .pth file,
    # and nothing reads these in a folder that is merely on the path.
    (own / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    tree = {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": "cache", "num_workers": 0},
        "student": {"model": str(student_folder)},
        "optimization": {"max_steps": 1},
        "run": {"name": "unused"},
    }
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.yaml").write_text(yaml.safe_dump(tree))
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    where = [str(python), "-c", "import shared; print(shared.__file__)"]
    found = subprocess.run(where, cwd=elsewhere, env=kept, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(environment)
    command = [str(environment / "bin" / "teacher-cache"), "capture", "mine.yaml"]
    done = subprocess.run(command, cwd=elsewhere, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert CacheReader(str(elsewhere / "cache")).manifest.totals.examples == 16
