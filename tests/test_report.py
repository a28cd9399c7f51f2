"""Reports: one HTML file with everything in it, that a browser shows at any width."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from samples import encoded_picture
from stage2_runs import make_recipe, run_alone, written_run

from shared.cache import CacheReader
from shared.cache.merge import merge
from shared.data.rows import open_split
from shared.errors import RecipeError
from shared.recipes import Recipe
from shared.reports.figures import Drawing
from shared.reports.page import Page, Section, write_page
from shared.reports.pieces import (
    Judged,
    card,
    facts,
    figure,
    folded,
    heading,
    html_table,
    key,
    paragraph,
    preformatted,
    table,
)
from shared.reports.text import visible
from shared.runtime import distributed
from shared.stopping import StopRequest
from stage1_teacher.__main__ import commands as teacher_commands
from stage1_teacher.capture import capture
from stage1_teacher.inspection.report import write_cache_report
from stage2_student.__main__ import commands as student_commands
from stage2_student.evaluation.answers import Generated, judge
from stage2_student.evaluation.evaluated import STUDENT, TEACHER, UNTRAINED, Evaluated
from stage2_student.evaluation.report import write_run_report
from stage2_student.evaluation.run_records import read_run
from stage2_student.evaluation.scores import keep
from stage2_student.runs.run_folder import RunFolder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (390, 1280)
LOOK = """<script>addEventListener("load", () => {
  const found = {}
  for (const frame of document.querySelectorAll("iframe")) {
    const inside = frame.contentDocument, pictures = [...inside.images]
    found[frame.width] = {
      overflow: inside.documentElement.scrollWidth - inside.documentElement.clientWidth,
      pictures: pictures.length,
      broken: pictures.filter(one => !one.naturalWidth).length,
    }
  }
  document.title = JSON.stringify(found)
})</script>"""
# What data, names and settings may hold.
HOSTILE = {
    "script": '"><script>alert("1")</script>',
    "style": "</style><style>body{display:none}",
    "comment": "<!-- </title></textarea></pre><svg onload=alert(1)>",
    "url": "javascript:alert(1)",
    "entities": "&lt;b&gt; &amp; &#x3c;img src=x onerror=alert(1)&#x3e;",
    "quotes": "a\"b'c` onmouseover=alert(1) x=",
    "controls": "a\x00b\x07c\x1b[31md\x7fe\r\nf\tg",
    "surrogate": "half \ud83d of a pair",
    "reordered": "safe\u202egnorw\u2066",
    "dollars": "$\\frac{1}{2$ and $_{x}$",
    "underscore": "_hidden",
    "long": "word " * 2000,
    "unbroken": "x" * 10_000,
}


class Outline(HTMLParser):
    """What a page is made of, for what must hold of every page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.attributes if name == tag]


def assert_sound(text: str) -> Outline:
    """Holds of every page: whole, self-contained, without scripts, readable by ear and by keyboard."""
    found = Outline(text)
    assert not found.open
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(found.tags)
    ids = [one["id"] for _, one in found.attributes if "id" in one]
    assert len(set(ids)) == len(ids)
    for tag, attributes in found.attributes:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert set(attributes) <= {
            *(
                "alt",
                "src",
                "class",
                "style",
                "id",
                "href",
                "aria-labelledby",
                "aria-label",
                "aria-hidden",
                "role",
            ),
            *("tabindex", "scope", "dir", "lang", "charset", "name", "content", "type"),
            *("viewbox", "fill", "stroke", "stroke-width", "stroke-dasharray", "d"),
        }, (tag, attributes)
    assert all((one["href"] or "").removeprefix("#") in ids for one in found.all("a"))
    assert all(one["alt"] and (one["src"] or "").startswith("data:image/") for one in found.all("img"))
    assert found.tags.count("h1") == found.tags.count("main") == found.tags.count("nav") == 1
    assert found.tags.count("caption") == found.tags.count("thead")  # each table of results has both
    assert all(one.get("scope") in ("row", "col") for one in found.all("th"))
    assert found.all("html") == [{"lang": "en"}]
    return found


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
        "entries per position",
        "from caption",
    ):
        assert words.lower() in text.lower()
    assert_sound(text)
    assert text.count("data:image/jpeg;base64,") == 12 + 4  # at both ends, and token by token
    assert text.count("data:image/svg+xml;base64,") == 7
    for words in (
        "By position in the answer",
        "Calibration",
        "By kind of question",
        "the whole recipe",
        "What the teacher expected",
    ):
        assert words in text


def test_everything_is_inside(cache_page: Path, run_page: Path) -> None:
    for page in (cache_page, run_page):
        sources = re.findall(r'(?:src|href)="([^"]{0,30})', page.read_text())
        assert sources
        assert all(source.startswith(("data:", "#")) for source in sources)


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
        "CE against loss.kd_ratio",
        "KL against loss.kd_ratio",
        "Cross-entropy with the labels",
        "KL from the teacher",
        "Calibration",
        "teacher: calibration error",
        "Learning rate",
        "run0.5: the whole recipe",
        "settings unlike the defaults",
        "The same by kind of question",
    ):
        assert words in text
    assert re.search("it (pays after|never pays)", text)  # which of both is a matter of this machine's time
    found = assert_sound(text)
    assert text.count("data:image/jpeg;base64,") == 4  # a question once, with the answers of all runs
    texts = [one for one in found.texts if one.strip()]
    first = texts.index("question")
    assert [one for one in texts[first:] if one in ("reference", "run0.5", "run1.0")][:3] == [
        "reference",
        "run0.5",
        "run1.0",
    ]
    began, ended = (
        re.search(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d", one) for one in re.findall("<td>(20[^<]*)", text)[:2]
    )
    assert began is not None
    assert ended is not None
    assert began[0] <= ended[0]


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
    assert '<th scope="row">teacher</th>' in page()

    settings = yaml.safe_load((recipe.run.path / "recipe.yaml").read_text())
    settings["data"] |= {"splits": {"train": "train", "validation": "train"}, "limit": 2}
    (recipe.run.path / "recipe.yaml").write_text(yaml.safe_dump(settings))  # other pictures, and fewer
    (recipe.run.path / "hashes.json").unlink()
    assert "data:image/jpeg" not in page()
    assert "4 picture(s) are not those of the data any more" in page()


def test_a_teacher_of_several_runs_is_shown_once_unless_it_answered_otherwise(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """Students come first, in their order, and data that say anything at all are shown as they are."""
    picture = encoded_picture(0)
    source = tmp_path / "hostile"
    source.mkdir()
    (source / "a.png").write_bytes(picture)
    question = HOSTILE["script"] + "\u202e"
    row = {"image_id": "a.png", "question": question, "answer": "CT", "mode": HOSTILE["style"]}
    (source / "train.jsonl").write_text(json.dumps(row) + "\n")
    data = {
        "source": str(source),
        "splits": {"train": "train", "validation": None},
        "columns": {"case": None},
    }
    runs = []
    for name, teacher in (("<b>", "CT"), ("_b", "CT"), ("$c", "MR")):
        recipe = make_recipe(tree | {"data": data}, run__name=name, loss__kd_ratio=0.0)
        folder = RunFolder(written_run(recipe))
        example = open_split(recipe.data, "train")[0]
        answers = {STUDENT: "javascript:alert(1)", TEACHER: teacher, UNTRAINED: "\x00"}
        judged = {
            model: judge(example, Generated(text, False), split="train", short_answer_words=3)
            for model, text in answers.items()
        }
        keep([Evaluated(model, model, (one,)) for model, one in judged.items()], folder.evaluation, "train")
        runs.append(read_run(folder.path))
    write_run_report(runs, tmp_path / "page.html")
    found = assert_sound((tmp_path / "page.html").read_text())
    texts = [text for text in found.texts if text.strip()]
    card_begins = texts.index("question")
    terms = ("reference", "<b>", "_b", "$c", "teacher", "untrained", "teacher of $c")
    assert [text for text in texts[card_begins:] if text in terms][: len(terms)] == list(terms)
    assert visible(question) in texts
    assert "wrong" in " ".join(texts)
    assert "(empty)" not in texts
    assert "\\x00" in texts
    assert HOSTILE["style"] in texts


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
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 16


def see_through_cache(tree: dict[str, Any], folder: Path, *, background: str) -> tuple[Recipe, Path]:
    """A cache of other data, whose pictures are transparent but for one white point."""
    stream = io.BytesIO()
    clear = Image.new("RGBA", (40, 48))
    clear.putpixel((0, 0), (255, 255, 255, 255))
    clear.save(stream, "PNG")
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
    assert len(found) == 3
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
def test_a_file_of_another_kind_is_not_written_over(commands: click.Group, tmp_path: Path) -> None:
    """As the last of ``report runs/*`` is, where the page was forgotten."""
    log = tmp_path / "sweep.log"
    log.write_text("kept")
    done = CliRunner().invoke(commands, ["report", str(tmp_path), str(log)])
    assert done.exit_code == 2
    assert "name the page that is to be written" in done.output
    assert log.read_text() == "kept"


@pytest.mark.parametrize("commands", [teacher_commands, student_commands])
def test_a_folder_is_not_written_over(commands: click.Group, tmp_path: Path) -> None:
    """As when the name of the page was forgotten, and the last run stands in its place."""
    done = CliRunner().invoke(commands, ["report", "something", str(tmp_path)])
    assert done.exit_code == 2
    assert "is a directory" in done.output


@pytest.mark.parametrize("name", HOSTILE)
def test_what_comes_from_data_is_escaped(name: str, tmp_path: Path) -> None:
    evil = HOSTILE[name]
    drawing = Drawing(evil, lambda axes: axes.plot([1, 2], label=evil) and axes.set(xlabel=evil), evil)
    values: dict[str, str | Judged] = {
        evil: evil,
        "right": Judged(evil, True),
        "near": Judged(evil, None, evil),
    }
    pieces = [
        *(
            paragraph(evil),
            heading(evil),
            facts({evil: evil}),
            key([evil]),
            folded(evil, []),
            preformatted(evil),
        ),
        table([evil], [[evil, evil]], caption=evil),
        card([encoded_picture(0)], values, alt=evil),
        figure(drawing),
    ]
    write_page(Page(evil, [Section(evil, pieces)], lead=evil), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    found = assert_sound(text)
    said = visible(evil)
    shown = " ".join("".join(found.texts).split())
    start = " ".join(said[:200].split())
    assert shown.count(start) >= 14  # each piece, the title, the link to the section
    assert not any(unicodedata.category(mark) in ("Cc", "Cs") for mark in text if mark not in "\n\t")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    picture = re.search(r'data:image/svg\+xml;base64,([^"]+)', text)
    assert picture is not None
    drawn = ElementTree.fromstring(base64.b64decode(picture[1]))
    assert "script" not in {element.tag.rpartition("}")[2] for element in drawn.iter()}
    axis_name = "".join(
        "".join(element.itertext()) for element in drawn.iter("{http://www.w3.org/2000/svg}text")
    )
    assert visible(evil)[:20].split()[0] in axis_name


def test_a_long_answer_is_folded_and_nothing_of_it_is_lost() -> None:
    long = "".join(f"{number} " for number in range(3000))
    found = Outline(card([encoded_picture(0)], {"answer": long}, alt="picture"))
    assert "summary" in found.tags
    assert "".join(found.texts).replace("... (all 13,890 characters)", "").endswith(long)
    assert "summary" not in Outline(card([encoded_picture(0)], {"answer": long[:500]}, alt="picture")).tags


def test_right_and_wrong_are_told_by_words_and_marks_as_well_as_by_colour() -> None:
    values: dict[str, str | Judged] = {
        "a": Judged("CT", True),
        "b": Judged("MR", False),
        "c": Judged("a mass", None, "F1 40%"),
    }
    text = html.unescape(card([encoded_picture(0)], values, alt="picture"))
    assert '<span class="right">\u2713 right</span>: <bdi>CT</bdi>' in text
    assert '<span class="wrong">\u2717 wrong</span>: <bdi>MR</bdi>' in text
    assert '<bdi>a mass</bdi> <span class="dim">F1 40%</span>' in text


def test_bars_and_line_ends_stay_within_their_cell() -> None:
    cell = "yes | no\nor | both"
    text = table(["a|b", "c"], [["row", cell], ["row", cell]], caption="t")
    assert (text.count("<tr>"), text.count("<th "), text.count("<td>")) == (3, 4, 2)
    assert text.count(f"<td>{cell}</td>") == 2
    assert text == html_table(["a|b", "c"], [["row", cell], ["row", cell]], caption="t")


def test_an_empty_answer_is_said_to_be_empty() -> None:
    text = card([encoded_picture(0)], {"student": ""}, alt="picture")
    assert '<dt>student</dt><dd dir="auto"><i>(empty)</i></dd>' in text


def test_a_picture_that_cannot_be_decoded() -> None:
    from shared.errors import DataError

    with pytest.raises(DataError):
        card([b"no picture"], {}, alt="none")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH, and pip has none")
@pytest.mark.parametrize("kind", ["cache", "runs"])
def test_a_browser_shows_it_at_both_widths(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    page: Path = request.getfixturevalue("cache_page" if kind == "cache" else "run_page")
    looked_at = tmp_path / "look.html"
    inside = html.escape(page.read_text())
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{inside}"></iframe>' for width in WIDTHS)
    looked_at.write_text(f"<title></title><body>{frames}{LOOK}</body>")
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
    found = json.loads(html.unescape(title[1]))
    for width in WIDTHS:
        assert found[str(width)] == {
            "overflow": 0,
            "pictures": page.read_text().count("<img"),
            "broken": 0,
        }
