"""Tables of benchmarks, from a measurement to the documents; and that the documents are what docs/measured says."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shared.recipes import load_recipe, recipe_text
from tests.benchmarks import bench_beyond, bench_order, bench_tokenizers, pages, seeds, tables
from tests.benchmarks.__main__ import main
from tests.benchmarks.tables import FIGURES, Bench, Source, Table, figure

SUMMARIES = {
    "method",
    "question",
    "to reach",
}  # first heads in docs/benchmarks.md of tables without figures of a run
PAGE = "# Order\n\nBefore.\n\n<!-- measured: order -->\n<!-- end -->\n\nBehind.\n"


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of documents, and one for what is kept, which are not those of the project."""
    monkeypatch.setattr(pages, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(tables, "KEPT", tmp_path / "kept")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "order.md").write_text(PAGE)
    return tmp_path / "docs"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    main()


@pytest.mark.parametrize("path", pages.documents(), ids=lambda path: path.name)
def test_the_documents_are_what_was_measured(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert pages.filled(text) == text, "run `python -m tests.benchmarks --page`"


def test_every_measured_table_is_shown_once() -> None:
    shown = [name for path in pages.documents() for name in pages.names(path.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(path.stem for path in (pages.DOCS / "measured").iterdir())


def test_no_table_of_the_benchmarks_is_copied_by_hand() -> None:
    text = pages.BLOCK.sub("", (pages.DOCS / "benchmarks.md").read_text(encoding="utf-8"))
    heads = re.findall(r"^\| *(.*?) *\|.*\n\|---", text, flags=re.MULTILINE)
    assert set(heads) == SUMMARIES


def test_a_benchmark_reaches_the_documents_when_it_is_asked_to(
    docs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_order", "--examples", "5000"])
    bench_order.main()
    assert "| examples that came | - | 5,000 |" in capsys.readouterr().out
    assert (docs / "order.md").read_text() == PAGE

    run(monkeypatch, "--record", "order")
    table = Table.read(docs / "measured" / "order.json")
    text = (docs / "order.md").read_text()
    assert "\n".join(table.lines()) in text
    assert "`python -m tests.benchmarks.bench_order --examples 5000`" in text
    assert text.startswith("# Order\n\nBefore.\n\n<!--")
    assert text.endswith("-->\n\nBehind.\n")
    source = table.source
    assert source.benchmark == "order"
    assert set(source.versions or {}) == {"Python", "torch", "transformers"}
    assert None not in (source.date, source.num_cores, source.seconds)

    monkeypatch.setattr(sys, "argv", ["bench_order", "--examples", "6000"])
    bench_order.main()
    run(monkeypatch, "--record", "order")
    assert "| 6,000 |" in (docs / "order.md").read_text()
    assert "| 5,000 |" not in (docs / "order.md").read_text()


def test_what_cannot_be_recorded_is_said(
    docs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--record", "loss")
    assert "nothing is kept of 'loss': run it first" in capsys.readouterr().err
    Bench("loss").show("unseen", "A table", ["a"], [["1"]])
    (docs / "order.md").write_text("# Nothing\n")
    run(monkeypatch, "--record", "loss")
    assert "unseen: left out, no document shows it" in capsys.readouterr().out
    assert not (docs / "measured").exists()


def test_a_comment_without_its_table_or_its_end_is_an_error(docs: Path) -> None:
    with pytest.raises(ValueError, match="is not in measured"):
        pages.filled(PAGE)
    with pytest.raises(ValueError, match="has no comment 'end' behind it"):
        pages.filled(PAGE.replace("<!-- end -->", "", 1) + PAGE)


def test_what_is_not_known_is_said_and_what_goes_on_too() -> None:
    assert Source().line() == "Measured on an unknown day, commit unknown, command unknown."
    known = Source(
        date="2026-11-29",
        commit="0123456789",
        is_clean=False,
        goes_on=True,
        command="python -m x",
        versions={"torch": "2.13"},
        num_cores=2,
        seconds=1234.5,
    )
    assert known.line() == (
        "Measured 2026-11-29, commit 0123456 with changes and those before it, `python -m x`, 1,234 s, 2 cores, "
        "torch 2.13."
    )


def test_a_table_is_of_the_days_and_commits_of_its_figures(docs: Path) -> None:
    """Not of the day on which it was made of what was kept."""
    stamps = [{"date": f"2026-11-{day}", "commit": commit * 40} for day, commit in ((28, "b"), (27, "a"))]
    bench = Bench("order", goes_on=True)
    bench.show("order", "A table", ["a"], [["1"]], stamps=stamps)
    source = Table.read(tables.KEPT / "order.json").source
    assert source.line().startswith("Measured 2026-11-27 to 2026-11-28, commit aaaaaaa, bbbbbbb, `python")
    bench.show("order", "A table", ["a"], [["1"]], stamps=stamps[:1])
    one = Table.read(tables.KEPT / "order.json").source
    assert (one.date, one.commit, one.goes_on, one.is_clean) == ("2026-11-28", "b" * 40, False, None)
    assert bench.source.of([tables.stamp()]).is_clean == bench.source.is_clean


def test_folders_of_a_machine_stay_there(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--root", "/somewhere/secret/seeds", "--rows", "3"])
    Bench("steady").show("steady", "A table", ["a"], [["1"]])
    tree = json.loads((tables.KEPT / "steady.json").read_text())
    assert tree["source"]["command"] == "python -m tests.benchmarks.bench_steady --root .../seeds --rows 3"


@pytest.mark.parametrize(
    ("given", "row"),
    [
        ({"value": 1.04, "most": 1.05}, ("1.05", "1.040")),
        ({"value": 1.06, "most": 1.05}, ("1.05", "1.060: **not reached**")),
        ({"value": 99_999.6, "form": ",.0f", "least": 100_000}, ("100,000", "100,000: **not reached**")),
        (
            {"value": 1.5, "form": ".1f", "unit": " %", "most": 2, "more": " (1 to 2)"},
            ("2 %", "1.5 % (1 to 2)"),
        ),
        ({"value": float("nan"), "most": 1.0}, ("1", "nan: **not reached**")),
        ({"value": 3.0}, ("-", "3.000")),
    ],
)
def test_a_figure_says_whether_its_goal_is_reached(given: dict, row: tuple[str, str]) -> None:
    assert len(FIGURES) == 3
    assert figure("name", **given)[1:] == row


def test_a_benchmark_of_hours_goes_on_with_the_seeds_that_are_recorded(
    docs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (docs / "order.md").write_text(PAGE.replace("order", "beyond-phantom"))
    measured: list[int] = []

    def make(seed: bench_beyond.Students, way: str) -> dict[str, float]:
        measured.append(seed.number)
        return dict.fromkeys(bench_beyond.SHOWN, float(seed.number))

    monkeypatch.setattr(bench_beyond.Students, "make", make)

    def measure(*arguments: str) -> str:
        measured.clear()
        words = ["--recipes", "phantom", "--ways", "given answers", *arguments]
        monkeypatch.setattr(sys, "argv", ["bench_beyond", *words])
        bench_beyond.main()
        return capsys.readouterr().out

    measure("--seeds", "1", "2")
    run(monkeypatch, "--record", "beyond")
    monkeypatch.setattr(seeds, "stamp", lambda: {"date": "2999-01-01", "commit": "c"})
    before = tables.stamp()["date"]
    assert "| given answers | 3 |" in measure("--seeds", "3")
    assert measured == [3]
    assert Table.read(tables.KEPT / "beyond-phantom.json").source.date == f"{before} to 2999-01-01"
    shown = measure("--seeds", "3", "--ways", "given answers", "labels alone")
    assert "| labels alone | 1 | 3.000 | 3.000 | 1.000 |" in shown
    measure("--seeds", "1", "2", "--set", "optimization.learning_rate=0.5")
    assert measured == [1, 2]


def finish(recipe: Any) -> None:
    """What a run leaves behind at its end."""
    folder = recipe.run.path
    (folder / "export").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    results = {"after": {"ce_loss": 0.5, "kl": 0.1}, "answers": {"accuracy": {"mean": 0.5}}}
    (folder / "results.json").write_text(json.dumps(results))


def test_a_finished_run_is_that_of_other_settings_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Sequence[str]] = []

    def make_student(recipe: str, options: Sequence[str], **_: Any) -> int:
        made.append(options)
        finish(load_recipe(recipe, overrides=tuple(options)))
        return 0

    def make(*extra: str) -> dict[str, float]:
        return bench_beyond.Students("phantom", 0, extra=extra).make(bench_beyond.GIVEN)

    monkeypatch.setattr(seeds, "FOLDER", tmp_path)
    monkeypatch.setattr(bench_beyond, "make_student", make_student)
    monkeypatch.setattr(bench_beyond.Students, "_along_own_answers", lambda *_: {bench_beyond.CUT: 0.0})
    assert make() == pytest.approx(make(), nan_ok=True)
    assert len(made) == 1
    for _ in range(2):
        make("optimization.learning_rate=0.5")
        assert len(made) == 2
    ways = {bench_beyond.GIVEN: bench_beyond.Way("", ("optimization.learning_rate=0.25",))}
    monkeypatch.setattr(bench_beyond, "WAYS", ways)
    with pytest.raises(SystemExit, match="begun with other settings than the recipe has now"):
        make()
    assert len(made) == 2


def test_a_students_tokenizer_does_not_see_what_is_recorded(docs: Path) -> None:
    before = bench_tokenizers.texts()
    Table("A table", ["a"], [["1"]], "", Source()).write(pages.measured("order"))
    pages.write_pages()
    assert "| 1 |" in (docs / "order.md").read_text()
    assert bench_tokenizers.texts() == before == [pages.BLOCK.sub("", PAGE)]


ROWS = [["a", "1.05", "1.08: **not reached**; 1.0 at night"], ["b", "-", "2: **not robust**"]]


@pytest.mark.parametrize(
    ("rows", "parts", "said"),
    [
        (ROWS, {"seed 0": {}}, "'seed 1'"),
        ([["a", "-", "1"], ROWS[1]], {"seed 0": {}, "seed 1": {}}, "the goal of 'a'"),
        (ROWS[1:], {"seed 0": {}, "seed 1": {}}, "the goal of 'a'"),
        ([["a", "1.05", "1"], ["b", "-", "2"]], {"seed 0": {}, "seed 1": {}}, r"\*\*not robust\*\*"),
        ([["a", "1.05", "1"], ROWS[1]], {"seed 0": {}, "seed 1": {}, "seed 2": {}}, None),
    ],
)
def test_to_record_loses_nothing(
    docs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rows: list,
    parts: dict,
    said: str | None,
) -> None:
    Table("A table", FIGURES, ROWS, "", Source(), {"seed 0": {}, "seed 1": {}}).write(pages.measured("order"))
    before = pages.measured("order").read_text()
    Bench("order").show("order", "A table", FIGURES, rows, parts=parts)
    if said is None:
        run(monkeypatch, "--record", "order")
        assert pages.measured("order").read_text() != before
        return
    with pytest.raises(SystemExit):
        run(monkeypatch, "--record", "order")
    assert re.search(f"order: to record this would lose .*{said}", capsys.readouterr().err)
    assert pages.measured("order").read_text() == before
