"""Paths and names of the Hub: a typo is a path, and the Hub is asked once."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub.constants as hub
import pytest

from shared.cache import CacheReader
from shared.data.processors import load_processor
from shared.data.rows import open_split
from shared.errors import CacheFormatError, DataError, RecipeError
from shared.models.vlm import load_config
from shared.places import nearest, require_no_typo, unreachable
from shared.recipes import DataConfig


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "alone" / "house"  # with nothing beside it that is called alike
    for folder in ("data/mine/train", "data/theirs", "models/large"):
        (place / folder).mkdir(parents=True)
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize(
    ("typo", "told"),
    [
        ("data/mien", "did you mean data/mine?"),
        ("./data/mien", "did you mean data/mine?"),
        ("data/mien/train", "did you mean data/mine/train?"),
        ("dta/mine/train", "did you mean data/mine/train?"),
        ("models/qwen", "models holds large"),
        ("../nowhere/at/all", "holds"),
        ("rows.jsonl", "this folder holds data, models"),
    ],
)
def test_a_mistyped_path_is_told_with_the_nearest_folder(house: Path, typo: str, told: str) -> None:
    with pytest.raises(DataError, match="no such file or folder") as caught:
        require_no_typo(typo, what=f"data.source {typo}", error=DataError)
    assert told in str(caught.value)


def test_a_mistyped_cache_is_told_with_the_nearest(house: Path) -> None:
    with pytest.raises(CacheFormatError, match=r"Run teacher-cache\. Or did you mean .*data/mine\?"):
        CacheReader("data/mien")


def test_an_absolute_path_is_told_as_one(house: Path) -> None:
    assert nearest(house / "data" / "mien") == f"did you mean {house / 'data' / 'mine'}?"


@pytest.mark.parametrize("name", ["lost", "lost/mine", "circle", "notes/mine"])
def test_a_link_to_nothing_and_what_lies_below_a_file_are_no_names_of_the_hub(house: Path, name: str) -> None:
    Path("lost").symlink_to("gone")
    Path("circle").symlink_to("circle")
    Path("notes").touch()
    with pytest.raises(DataError, match="no such file or folder"):
        require_no_typo(name, what=name, error=DataError)
    with pytest.raises(CacheFormatError, match=r"cache .*"):
        CacheReader(name)


@pytest.mark.parametrize("name", ["Qwen/Qwen3.5-4B", "squad", "data/mine", str(Path("/tmp"))])
def test_names_of_the_hub_and_paths_that_are_there_pass(house: Path, name: str) -> None:
    require_no_typo(name, what=name, error=DataError)


@pytest.fixture
def deaf_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A Hub that hangs up; one entry for each attempt."""
    attempts: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return
                attempts.append(1)

        threading.Thread(target=hang_up, daemon=True).start()
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        unreachable.cache_clear()
        yield attempts
        unreachable.cache_clear()
        server.shutdown(socket.SHUT_RDWR)


def test_without_a_network_one_attempt_and_one_line_say_so(
    deaf_hub: list[int], house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, opening in [
        (RecipeError, lambda: load_config("someone/a-model")),
        (RecipeError, lambda: load_processor("someone/a-model")),
        (DataError, lambda: open_split(DataConfig(source="someone/data"), "train")),
    ]:
        with pytest.raises(error, match=r"is not on this machine, and http://127\.0\.0\.1") as caught:
            opening()
        assert "\n" not in str(caught.value)
    assert len(deaf_hub) == 1
    assert capsys.readouterr().err.count("cannot be reached") == 1
