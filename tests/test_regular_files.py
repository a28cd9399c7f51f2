"""Pipes, devices, sockets and folders in a file's place are refused, and nothing waits for them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.cache import CacheReader
from shared.data.processing import open_processor
from shared.data.rows import open_split
from shared.errors import CacheFormatError, CheckpointError, DataError, NotAFileError, RecipeError
from shared.finished import run_is_finished
from shared.library_output import LibraryOutput, keep_library_output
from shared.models.vlm import load_config
from shared.recipes import DataConfig, load_recipe, recipe_text
from shared.regular_files import open_regular, read_regular, write_output
from stage2_student.runs.files import JsonLines
from stage2_student.runs.run_folder import RunFolder


def make_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))


MAKERS: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
}


@pytest.fixture(autouse=True)
def soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A wait that nothing would end becomes an error; and sockets need short paths."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it hangs")

    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@contextmanager
def refused(kind: str, error: type[ValueError]) -> Iterator[None]:
    with pytest.raises(error, match=f"is {kind}, not a file"):
        yield


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_no_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    MAKERS[kind](tmp_path / "thing")
    with refused(kind, NotAFileError):
        open_regular(tmp_path / "thing")
    (tmp_path / "file").write_bytes(b"bytes")
    assert read_regular(tmp_path / "file") == b"bytes"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing")


@pytest.mark.parametrize("kind", MAKERS)
def test_a_picture(tmp_path: Path, kind: str) -> None:
    row = {"image_id": "thing.png", "question": "What?", "answer": "That."}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    MAKERS[kind](tmp_path / "thing.png")
    split = open_split(DataConfig(source=str(tmp_path)), "train")
    with pytest.raises(DataError, match=rf"row 0: the picture .*thing\.png is {kind}, not a file"):
        split[0]


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.arrow"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_a_data_file(tmp_path: Path, name: str, as_folder: bool) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    os.mkfifo(folder / name)
    source = folder if as_folder else folder / name
    with refused("a named pipe", DataError):
        open_split(DataConfig(source=str(source)), "train")


@pytest.mark.parametrize("place", ["state.json", "dataset_dict.json", "train/data.arrow"])
def test_a_saved_data_set(tmp_path: Path, place: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / place).unlink(missing_ok=True)
    os.mkfifo(tmp_path / place)
    with refused("a named pipe", DataError):
        open_split(DataConfig(source=str(tmp_path)), "train")


def test_a_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "over.yaml").write_text("extends: pipe.yaml\n")
    for name in ("pipe.yaml", "over.yaml"):
        with refused("a named pipe", RecipeError):
            load_recipe(tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_models_file(tmp_path: Path, student_folder: Path, data_config: DataConfig, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(student_folder, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with refused("a named pipe", NotAFileError):
        load_config(str(folder))
    with refused("a named pipe", NotAFileError):
        open_processor(str(folder), data_config)


def test_a_caches_file(tmp_path: Path, teacher_cache: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(teacher_cache, folder)
    shard = next((folder / "shards").glob("*.arrow"))
    shard.unlink()
    os.mkfifo(shard)
    reader = CacheReader(str(folder))
    with pytest.raises((CacheFormatError, NotAFileError)):
        reader.targets(reader.rows([reader.index.keys[0].tobytes()]))
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(CacheFormatError, match=r"manifest\.json"):
        CacheReader(str(folder))


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl"])
def test_a_runs_file(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    folder = RunFolder(tmp_path)
    read = folder.read_results if name == "results.json" else folder.read_metrics
    with pytest.raises((CheckpointError, NotAFileError), match=r"is a named pipe, not a file"):
        read()


@pytest.mark.parametrize("name", ["results.json", "recipe.yaml"])
def test_whether_a_run_is_finished(tmp_path: Path, name: str) -> None:
    recipe = load_recipe("phantom", overrides=(f"run.root={tmp_path}", "run.name=run", "run.export=false"))
    recipe.run.path.mkdir()
    (recipe.run.path / "results.json").write_text("{}")
    (recipe.run.path / "recipe.yaml").write_text(recipe_text(recipe))
    assert run_is_finished(recipe)
    (recipe.run.path / name).unlink()
    os.mkfifo(recipe.run.path / name)
    assert not run_is_finished(recipe)


def test_an_output_is_replaced_at_once_and_a_pipe_or_a_device_is_written_to(tmp_path: Path) -> None:
    write_output(tmp_path / "new" / "page.html", b"one")
    write_output(tmp_path / "new" / "page.html", b"two")
    assert [path.read_bytes() for path in (tmp_path / "new").iterdir()] == [b"two"]
    for name, target in (("null", Path("/dev/null")), ("link", tmp_path / "new" / "page.html")):
        link = tmp_path / name
        link.symlink_to(target)
        write_output(link, b"three")
        assert link.is_symlink()
    assert (tmp_path / "new" / "page.html").read_bytes() == b"three"
    with pytest.raises(OSError, match=r"page\.html"):
        write_output(tmp_path / "new" / "page.html" / "x", b"four")


def test_standard_output_stays_where_it_is_also_where_it_is_a_file(tmp_path: Path) -> None:
    """To take the place of /dev/stdout would take it away from everybody."""
    code = """
import pathlib
from shared.regular_files import write_output
print("before")
write_output(pathlib.Path("stdout"), b"told\\n")
print("after")
"""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with open(tmp_path / "file", "wb") as file:
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=file, check=True)
    assert (tmp_path / "file").read_text() == "before\ntold\nafter\n"
    assert (tmp_path / "stdout").is_symlink()


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="full") as raised:
        JsonLines(full).append({"event": "x", "step": 1})
    assert raised.value.filename == str(full)


def test_the_log_of_what_libraries_say(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.log")
    with LibraryOutput.collected(native=False) as output:
        output.write("said before")
        keep_library_output(tmp_path / "run.log")
        assert output.text() == "said before"  # it stays where it was
        keep_library_output(tmp_path / "other.log")
    assert (tmp_path / "other.log").read_text() == "said before"
