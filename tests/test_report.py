"""Reports: one HTML file with everything in it, that a browser shows at any width."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from samples import encoded_picture
from stage2_runs import make_recipe, run_alone

from shared.cache import CacheReader
from shared.cache.merge import merge
from shared.errors import RecipeError
from shared.recipes import Recipe
from shared.reports.page import Page, Section, card, facts, figure, paragraph, table, write_page
from shared.runtime import StopRequest, distributed
from stage1_teacher.__main__ import commands as teacher_commands
from stage1_teacher.capture import capture
from stage1_teacher.inspection.report import write_cache_report
from stage2_student.__main__ import commands as student_commands

pytest.importorskip("matplotlib")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """<script>addEventListener("load", () => {
  const pictures = [...document.images], found = {}
  for (const width of [390, 1280]) {
    document.body.style.width = document.body.style.maxWidth = width + "px"
    found[width] = document.body.scrollWidth
  }
  found.pictures = pictures.length
  found.broken = pictures.filter(one => !one.naturalWidth).length
  document.title = JSON.stringify(found)
})</script>"""


@pytest.fixture
def tree(tmp_path: Path, distillation_tree: dict[str, Any]) -> dict[str, Any]:
    return distillation_tree | {
        "run": {"name": "run", "root": str(tmp_path / "runs"), "num_workers": 0, "validate_every": 2},
        "evaluation": {"max_examples": 4, "max_new_tokens": 4, "batch_size": 3},
    }


@pytest.fixture
def cache_page(tree: dict[str, Any], tmp_path: Path, teacher_cache: Path) -> Path:
    write_cache_report(CacheReader(teacher_cache), make_recipe(tree), tmp_path / "cache.html")
    return tmp_path / "cache.html"


@pytest.fixture
def run_page(tree: dict[str, Any], tmp_path: Path) -> Path:
    folders = []
    for ratio in (0.5, 1.0):
        recipe = make_recipe(tree, run__name=f"run{ratio}", loss__kd_ratio=ratio)
        assert run_alone(recipe) == 0
        folders.append(str(recipe.run.path))
    shown = CliRunner().invoke(
        student_commands, ["report", *folders, str(tmp_path / "runs.html")], standalone_mode=False
    )
    assert shown.return_value == 0, shown.output
    return tmp_path / "runs.html"


def test_a_cache_with_its_examples(cache_page: Path) -> None:
    text = cache_page.read_text()
    for words in (
        "Where the teacher is surest",
        "Where it is least sure",
        "Kept mass",
        "entries a position",
        "from caption",
    ):
        assert words.lower() in text.lower()
    assert text.count("data:image/jpeg;base64,") == 12
    assert text.count("data:image/svg+xml;base64,") == 4


def test_everything_is_inside(cache_page: Path, run_page: Path) -> None:
    for page in (cache_page, run_page):
        sources = re.findall(r'(?:src|href)="([^"]{0,30})', page.read_text())
        assert sources
        assert all(source.startswith("data:") for source in sources)


def test_the_same_cache_gives_the_same_page(
    cache_page: Path, tree: dict[str, Any], teacher_cache: Path
) -> None:
    before = cache_page.read_bytes()
    write_cache_report(CacheReader(teacher_cache), make_recipe(tree), cache_page)
    assert cache_page.read_bytes() == before


def test_runs_with_curves_and_answers(run_page: Path) -> None:
    text = run_page.read_text()
    for words in (
        "run0.5",
        "run1.0",
        "loss.kd_ratio",
        "Divergence from the teacher",
        "Learning rate",
    ):
        assert words in text
    assert re.search("it (pays after|never pays)", text)  # which of both is a matter of this machine's time
    assert text.count("data:image/svg+xml;base64,") == 6
    assert text.count("data:image/jpeg;base64,") == 8  # four answers of each run


def test_answers_are_shown_with_the_pictures_they_were_given_for(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """And scores with those of the references; whatever else lies in the folder, and whatever became of the data."""
    recipe = make_recipe(tree)
    assert run_alone(recipe) == 0
    path = str(recipe.run.path)
    evaluated = CliRunner().invoke(student_commands, ["evaluate", path], standalone_mode=False)
    assert evaluated.return_value == 0, evaluated.output
    shutil.copy(
        recipe.run.path / "evaluation" / "validation.parquet",
        recipe.run.path / "evaluation" / "other.parquet",
    )

    def page() -> str:
        out = tmp_path / "page.html"
        assert (
            CliRunner()
            .invoke(student_commands, ["report", path, str(out)], standalone_mode=False)
            .return_value
            == 0
        )
        return out.read_text()

    assert page().count("data:image/jpeg") == 4
    assert "<td>teacher</td>" in page()

    settings = yaml.safe_load((recipe.run.path / "recipe.yaml").read_text())
    settings["data"] |= {"splits": {"train": "train", "validation": "train"}, "limit": 2}
    (recipe.run.path / "recipe.yaml").write_text(yaml.safe_dump(settings))  # other pictures, and fewer
    assert "data:image/jpeg" not in page()
    assert "4 picture(s) are not those of the data any more" in page()


def test_without_the_data_there_is_a_reason_instead_of_examples(
    tree: dict[str, Any], tmp_path: Path, teacher_cache: Path
) -> None:
    recipe = make_recipe(tree, data__source=str(tmp_path / "gone"))
    write_cache_report(CacheReader(teacher_cache), recipe, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "data:image/jpeg" not in text
    assert "gone" in text


def test_the_command_finds_the_recipe_of_the_capture(tmp_path: Path, teacher_cache: Path) -> None:
    shown = CliRunner().invoke(
        teacher_commands, ["report", str(teacher_cache), str(tmp_path / "page.html")], standalone_mode=False
    )
    assert shown.return_value == 0, shown.output
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 12


def see_through_cache(tree: dict[str, Any], folder: Path, *, background: str) -> tuple[Recipe, Path]:
    """A cache of other data, whose pictures are transparent throughout."""
    stream = io.BytesIO()
    Image.new("RGBA", (40, 48)).save(stream, "PNG")
    source = folder / "data"
    (source / "pictures").mkdir(parents=True)
    (source / "pictures" / "clear.png").write_bytes(stream.getvalue())
    row = {"image_id": "pictures/clear.png", "question": "What is shown?", "answer": "nothing"}
    (source / "train.jsonl").write_text(json.dumps(row) + "\n")
    data = {
        "source": str(source),
        "splits": {"train": "train", "validation": None},
        "columns": {"kind": None, "case": None},
        "background": background,
        "max_answer_tokens": 64,
    }
    recipe = make_recipe(tree | {"data": data, "cache": tree["cache"] | {"path": str(folder / "cache")}})
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0
    return recipe, folder / "cache"


def test_every_source_of_a_merged_cache_is_named(
    tree: dict[str, Any], tmp_path: Path, teacher_cache: Path
) -> None:
    """Two sources of one split stood under one name, and the last one alone was left."""
    recipe, other = see_through_cache(tree, tmp_path / "other", background="black")
    merge([str(teacher_cache), str(other)], str(tmp_path / "merged"), created_by={})
    write_cache_report(CacheReader(tmp_path / "merged"), None, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    for source, rows in ((tree["data"]["source"], 12), (recipe.data.source, 1)):
        assert f"{source}: {rows} rows" in text


def test_pictures_lie_on_the_background_that_the_model_sees(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe, cache = see_through_cache(tree, tmp_path / "other", background="white")
    write_cache_report(CacheReader(cache), recipe, tmp_path / "page.html")
    found = re.findall(r"data:image/jpeg;base64,([^\"]+)", (tmp_path / "page.html").read_text())
    assert len(found) == 2
    for encoded in found:
        assert Image.open(io.BytesIO(base64.b64decode(encoded))).getextrema() == ((255, 255),) * 3


def test_a_recipe_that_has_no_cache_shows_no_examples(
    tree: dict[str, Any], tmp_path: Path, teacher_cache: Path
) -> None:
    tuning = {name: tree[name] for name in ("data", "student", "optimization", "run")}
    (tmp_path / "tuning.yaml").write_text(yaml.safe_dump(tuning | {"loss": {"kd_ratio": 0.0}}))
    page = tmp_path / "page.html"
    found = CliRunner().invoke(
        teacher_commands,
        ["report", str(teacher_cache), str(page), "--recipe", str(tmp_path / "tuning.yaml")],
        standalone_mode=False,
    )
    assert isinstance(found.exception, RecipeError)
    assert "needs a teacher and a cache section" in str(found.exception)
    assert not page.exists()


@pytest.mark.parametrize("commands", [teacher_commands, student_commands])
def test_a_folder_is_not_written_over(commands: click.Group, tmp_path: Path) -> None:
    """As when the name of the page was forgotten, and the last run stands in its place."""
    done = CliRunner().invoke(commands, ["report", "something", str(tmp_path)])
    assert done.exit_code == 2
    assert "is a directory" in done.output


def test_what_comes_from_data_is_escaped(tmp_path: Path) -> None:
    evil = '"><script>alert("1")</script>'
    pieces = [
        paragraph(evil),
        facts({evil: evil}),
        table([evil], [[evil]]),
        card(encoded_picture(0), {evil: evil}),
        figure(lambda axes: axes.set(title=evil), evil),
    ]
    write_page(Page(evil, [Section(evil, pieces)], lead=evil), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert text.count("&quot;&gt;&lt;script&gt;") == text.count("alert(") > 9
    assert not (tmp_path / "page.html.partial").exists()


def test_bars_and_line_ends_stay_within_their_cell() -> None:
    cell = "yes | no\nor | both"
    text = table(["a|b", "c"], [[cell, "d"], [cell, "e"]])
    assert (text.count("<tr>"), text.count("<th>"), text.count("<td>")) == (3, 2, 4)
    assert text.count(f"<td>{cell}</td>") == 2


def test_an_empty_answer_is_said_to_be_empty() -> None:
    assert "<dt>student</dt><dd><i>(empty)</i></dd>" in card(encoded_picture(0), {"student": ""})


def test_a_picture_that_cannot_be_decoded() -> None:
    from shared.errors import DataError

    with pytest.raises(DataError):
        card(b"no picture", {})


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("kind", ["cache", "runs"])
def test_a_browser_shows_it_at_both_widths(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    page: Path = request.getfixturevalue("cache_page" if kind == "cache" else "run_page")
    looked_at = tmp_path / "look.html"
    looked_at.write_text(page.read_text().replace("</body>", LOOK + "</body>"))
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"),
            looked_at.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    found = json.loads(title[1])
    assert found["pictures"] == page.read_text().count("<img")
    assert found["broken"] == 0
    assert found["390"] <= 390
    assert found["1280"] <= 1280
