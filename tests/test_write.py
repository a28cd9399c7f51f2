"""A teacher, or a student, writes answers: a data set that stage one captures and stage two learns."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stage2_runs import make_recipe, on_ranks, run_alone
from test_conversation_prompts import DATED
from test_prompt_identity import on_day

from shared import answering
from shared.answering import GumbelNoise, answer, sampled
from shared.cache import CacheReader
from shared.data.processing import ExampleProcessor
from shared.data.rows import open_split
from shared.errors import CacheFormatError, DataError, RecipeError, TrainingError
from shared.models.vlm import load_vlm
from shared.recipes import DataConfig, Recipe, dump_recipe
from shared.runtime import distributed
from shared.stopping import INTERRUPTED_STATUS, StopRequest
from shared.writing import loop
from shared.writing.files import num_kept
from shared.writing.journal import REFUSED, Entry, Journal
from shared.writing.plan import Plan, SetFolder, Unit, _differences
from stage1_teacher.capture import capture
from stage1_teacher.write import write

ROOT = Path(__file__).resolve().parent.parent
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "per_prompt": 2, "seed": 3}


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, teacher_folder: Path, student_folder: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(tmp_path / "cache"), "num_workers": 0},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "optimization": {"global_batch_size": 4, "microbatch_size": 2, "max_steps": 2},
        "run": {"name": "run", "root": str(tmp_path), "num_workers": 0},
        "write": {
            "path": str(tmp_path / "set"),
            "max_new_tokens": 8,
            "num_workers": 0,
            "prompts_per_file": 5,
        },
    }


def written(tree: dict[str, Any], **overrides: Any) -> tuple[Recipe, Path]:
    """The set that the teacher writes."""
    recipe = make_recipe(tree, **overrides)
    assert recipe.write is not None
    assert recipe.write.path is not None
    with distributed(device="cpu") as world:
        assert write(recipe, world, StopRequest()) == 0
    return recipe, Path(recipe.write.path)


def rows_of(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """Of the files in order, as they are."""
    return [
        row for file in sorted(folder.glob(f"{split}-*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def ids_of(folder: Path) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(row["source_row"], row["draw"], tuple(row["answer_ids"])) for row in rows_of(folder)]


# --- the whole pass --------------------------------------------------------------------------------------


def test_a_teacher_writes_is_captured_and_a_student_learns_it(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe, folder = written(tree, write__temperature=1.0, write__per_prompt=2)
    assert recipe.teacher is not None
    rows = rows_of(folder)
    assert [(row["source_row"], row["draw"]) for row in rows] == [(n, d) for n in range(12) for d in range(2)]
    shown = datasets.load_dataset(str(folder), split="train")  # as others open it: with a card, and pictures
    assert (len(shown), shown[0]["image_id"][0].size) == (24, (40, 48))
    assert "| role | teacher |" in (folder / "README.md").read_text()
    # Only the source changes: the set has the columns that the recipe names.
    other = make_recipe(tree, data__source=str(folder), write__path=None)
    train = open_split(other.data, "train")
    assert len(train) == 24
    with distributed(device="cpu") as world:
        assert capture(other, world, StopRequest()) == 0
    manifest = CacheReader(str(tmp_path / "cache")).manifest
    (writer,) = {name for source in manifest.identity.data for name in source.written_by}
    told = json.loads(writer)
    assert (told["role"], told["model"]) == ("teacher", recipe.teacher.model)
    assert told["weights"] == manifest.identity.teacher.weights_fingerprint
    assert (told["temperature"], told["top_p"], told["max_new_tokens"], told["seed"]) == (1.0, 1.0, 8, 0)
    assert told["when"][:2] == "20"
    assert run_alone(other) == 0
    assert (other.run.path / "results.json").exists()


def test_rows_are_their_prompts_with_another_answer(
    tree: dict[str, Any], processor: ExampleProcessor
) -> None:
    recipe, folder = written(tree)
    source = open_split(recipe.data, "train")
    answers = open_split(recipe.data.model_copy(update={"source": str(folder)}), "train")
    model = load_vlm(tree["teacher"]["model"], revision=None, dtype=torch.float32, attn_implementation=None)
    for prompt, one, row in zip(source, answers, rows_of(folder), strict=True):
        assert (one.images, one.turns[:-1]) == (prompt.images, prompt.turns[:-1])
        assert (one.kind, one.case, one.form) == (prompt.kind, prompt.case, prompt.form)
        assert row["source_key"] == processor.key(prompt).hex()
        processor.require_usable(one)
        assert one.answer == processor.written.text(one.answer_ids or ())
        (expected,) = answer(
            model, processor, [processor.encode_prompt(prompt)], max_new_tokens=8, choose=[refused(processor)]
        )
        assert (list(one.answer_ids or ()), one.answer_end) == (expected.ids, expected.is_whole)
    told = json.loads((folder / "written.json").read_text())
    assert told["counts"]["answers"] == 12 + 4
    assert not list(folder.glob(".pl*")) + list(folder.glob(".pa*"))


def refused(processor: ExampleProcessor) -> Any:
    return loop.Refused(
        processor.written.refused - {processor.end_of_turn}, num_token_ids=processor.num_token_ids
    )


# --- samples ---------------------------------------------------------------------------------------------


def test_noise_makes_the_largest_logit_a_sample() -> None:
    """Against the probabilities themselves."""
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    seeds_B = torch.arange(20_000) * 7919
    drawn_B = GumbelNoise(seeds_B)(torch.zeros(1), logits_V.expand(20_000, 5)).argmax(-1)
    shares_V = drawn_B.bincount(minlength=5) / 20_000
    torch.testing.assert_close(shares_V, logits_V.softmax(-1), atol=0.01, rtol=0)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_noise_is_finite_so_that_what_is_refused_is_never_chosen(
    monkeypatch: pytest.MonkeyPatch, place: int, uniform: float
) -> None:
    """At the ends of what a uniform may be."""
    drawn_V = torch.full((2,), 0.5, dtype=torch.float64)
    drawn_V[place] = uniform
    monkeypatch.setattr(answering, "uniforms", lambda seeds, counters: drawn_V[None])
    found_V = GumbelNoise(torch.zeros(1, dtype=torch.int64))(
        torch.zeros(1), torch.tensor([[-torch.inf, 0.0]])
    )[0]
    assert found_V[0] == -torch.inf
    assert found_V[1].isfinite()


def test_top_p_and_temperature_keep_to_the_likeliest() -> None:
    scores = torch.tensor([[3.0, 2.0, 0.0, -1.0]]).repeat(2000, 1)
    for processor in sampled(torch.arange(2000), temperature=0.7, top_p=0.9):
        scores = processor(torch.zeros(2000, 1, dtype=torch.int64), scores)
    assert set(scores.argmax(-1).tolist()) == {0, 1}


def test_a_sample_depends_on_the_row_and_the_seed_alone(tree: dict[str, Any], tmp_path: Path) -> None:
    sampling = {f"write__{name}": value for name, value in SAMPLED.items()}
    _, whole = written(tree, **sampling)
    _, small = written(
        tree,
        **sampling | {"write__batch_tokens": 1, "write__prompts_per_file": 3, "write__path": f"{tmp_path}/b"},
    )
    _, other = written(tree, **sampling | {"write__seed": 4, "write__path": f"{tmp_path}/c"})
    assert ids_of(whole) == ids_of(small)
    assert ids_of(whole) != ids_of(other)
    by_row: dict[int, set[tuple[int, ...]]] = {}
    for row, _, ids in ids_of(whole):
        by_row.setdefault(row, set()).add(ids)
    assert max(map(len, by_row.values())) == 2  # two answers to a prompt differ


def test_a_prompt_that_is_asked_again_has_other_noise(tree: dict[str, Any], tmp_path: Path) -> None:
    sampling = {f"write__{name}": value for name, value in SAMPLED.items()}
    parts = []
    for part in range(2):
        here = {"write__prompts": 16, "write__part": part, "write__path": f"{tmp_path}/{part}"}  # all of them
        parts.append(ids_of(written(tree, **sampling | here)[1]))
    assert {(row, draw) for row, draw, _ in parts[0]} == {(row, draw) for row, draw, _ in parts[1]}
    assert not {ids for _, _, ids in parts[0]} & {ids for _, _, ids in parts[1] if len(ids) > 2}


# --- stopping and going on -------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def dying(monkeypatch: pytest.MonkeyPatch, *, after: int, how: Callable[[], None]) -> list[int]:
    """Does something when so many batches have been answered; counts the answered prompts."""
    counts: list[int] = []

    def answer_some(model: Any, processor: Any, prompts: Any, **options: Any) -> Any:
        if len(counts) == after:
            how()
        counts.append(len(prompts))
        return answer(model, processor, prompts, **options)

    monkeypatch.setattr(loop, "answer", answer_some)
    return counts


def test_a_killed_job_loses_the_batch_in_hand(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt a batch: what was answered is never asked again, and the answers are those of one go."""
    after = 7
    few = {"write__batch_tokens": 1}
    _, whole = written(tree, **few, write__path=str(tmp_path / "whole"))

    def die() -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        counts = dying(patch, after=after, how=die)
        with pytest.raises(StoppedError):
            written(tree, **few)
        assert sum(counts) == after
    with pytest.raises(DataError, match=r"is missing|is not there|no data file"):
        open_split(DataConfig(source=str(tmp_path / "set")), "validation")
    rest = dying(monkeypatch, after=-1, how=die)
    _, folder = written(tree, **few)
    assert sum(rest) == 16 - after
    assert ids_of(folder) == ids_of(whole)


@pytest.mark.parametrize("damaged", ["file", "digest", "none"])
def test_a_damaged_file_of_a_set_that_goes_on_is_written_again(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    """Its schema still names the plan; without a digest, as of an earlier release, that has to do."""
    few = {"write__batch_tokens": 1}

    def die() -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        dying(patch, after=7, how=die)
        with pytest.raises(StoppedError):
            written(tree, **few)
    folder = tmp_path / "set"
    (file,) = folder.glob("*.parquet")
    before = file.read_bytes()
    digest = folder / ".partial" / "train-00000.json"
    if damaged == "file":
        file.write_bytes(before[:200] + bytes([before[200] ^ 1]) + before[201:])
    elif damaged == "digest":
        digest.write_bytes(digest.read_bytes().replace(b"a", b"b"))
    else:
        digest.unlink()
    rest = dying(monkeypatch, after=-1, how=die)
    written(tree, **few)
    assert sum(rest) == 16 - 7 + 5 * (damaged != "none")
    assert file.read_bytes() == before
    assert not digest.exists()
    written(tree, **few)
    assert sum(rest) == 16 - 7 + 5 * (damaged != "none")


def test_sigterm_ends_in_order_with_its_own_status(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tree, write__batch_tokens=1)
    stop = StopRequest()
    with monkeypatch.context() as patch, distributed(device="cpu") as world:
        counts = dying(patch, after=4, how=lambda: setattr(stop, "received", True))
        assert write(recipe, world, stop) == INTERRUPTED_STATUS
    assert counts == [1] * 5  # the one in hand is given up at once
    assert "stopped: 4 answers are kept in" in capfd.readouterr().out
    rest = dying(monkeypatch, after=-1, how=lambda: None)
    with distributed(device="cpu") as world:
        assert write(recipe, world, StopRequest()) == 0
    assert sum(rest) == 12


def test_a_set_goes_on_with_the_day_on_which_it_began(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dated.jinja").write_text(DATED)
    few = {"write__batch_tokens": 1, "data__limit": 2, "data__chat_template": str(tmp_path / "dated.jinja")}
    on_day(monkeypatch, "2026-01-31")

    def die() -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        dying(patch, after=1, how=die)
        with pytest.raises(StoppedError):
            written(tree, **few)
    on_day(monkeypatch, "2026-02-01")
    _, folder = written(tree, **few)
    assert json.loads((folder / "written.json").read_text())["identity"]["date"] == "2026-01-31"


@pytest.mark.slow
def test_processes_that_are_stopped_and_killed_go_on(tree: dict[str, Any], tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL, each when something new has been written; the answers are those of one go."""
    long = {"write__batch_tokens": 1, "write__max_new_tokens": 40}
    _, whole = written(tree, **long, write__path=str(tmp_path / "whole"))
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(dump_recipe(make_recipe(tree, **long))))
    journals = tmp_path / "set" / ".partial"
    for number, expected in ((signal.SIGTERM, INTERRUPTED_STATUS), (signal.SIGKILL, -signal.SIGKILL)):
        before = num_lines(journals)
        process = subprocess.Popen(
            [sys.executable, "-m", "stage1_teacher", "write", str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline_s = time.monotonic() + 120
        while num_lines(journals) <= before and process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.02)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == expected, output
        assert "Traceback" not in output
        assert ("stopped: " in output) == (number == signal.SIGTERM)
        assert num_lines(journals) > before
    _, folder = written(tree, **long)
    assert ids_of(folder) == ids_of(whole)


def num_lines(journals: Path) -> int:
    return sum(len(path.read_bytes().split()) for path in journals.glob("*.jsonl"))


def test_a_set_that_is_whole_is_left_as_it_is(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _, folder = written(tree)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    counts = dying(monkeypatch, after=-1, how=lambda: None)
    written(tree)
    assert "holds all answers; nothing to write" in capfd.readouterr().out
    assert counts == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / ".plan.json").write_bytes(
        before["written.json"]
    )  # as a kill between the last two acts leaves it
    written(tree)
    assert {path.name for path in folder.iterdir()} == set(before)
    damaged = folder / "train-00001-of-00003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"123456789")
    written(tree)
    assert sum(counts) == 5
    assert (
        pq.read_table(damaged).to_pylist() == pq.read_table(pa.BufferReader(before[damaged.name])).to_pylist()
    )


def test_another_way_of_writing_needs_another_folder(tree: dict[str, Any], student_folder: Path) -> None:
    written(tree)
    for change, message in [
        ({"write__seed": 1}, r"how.seed: 0 there, 1 asked for"),
        ({"write__max_new_tokens": 7}, r"how.max_new_tokens: 8 there, 7 asked for"),
        ({"data__limit": 3}, r"data.0.prompts: 12 there, 3 asked for"),
        ({"teacher__model": str(student_folder)}, r"writer.weights: '"),
    ]:
        with pytest.raises(RecipeError, match=message):
            written(tree, **change)


def test_columns_of_other_names_need_another_folder() -> None:
    """They name those of the files; a plan of a release before does not tell them."""
    asked = {"columns": {"answer_ids": "tokens"}, "seed": 0}
    assert _differences({"seed": 0}, asked) == []
    assert _differences({"columns": {}, "seed": 0}, {"columns": {}, "seed": 0}) == []
    assert _differences({"columns": {}, "seed": 0}, asked) == [
        "columns.answer_ids: None there, 'tokens' asked for"
    ]


def test_no_set_is_begun_in_a_cache(tree: dict[str, Any], tmp_path: Path, teacher_cache: Path) -> None:
    shutil.copytree(teacher_cache, tmp_path / "cache")
    tree["write"]["path"] = str(tmp_path / "cache" / "set")
    with pytest.raises(CacheFormatError, match="lies in the cache"):
        written(tree)
    assert not (tmp_path / "cache" / "set").exists()


def test_a_folder_of_something_else_is_left_alone(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").touch()
    with pytest.raises(RecipeError, match="something is there that is no set of written answers"):
        written(tree)
    nowhere = make_recipe(tree, write__path=None)
    with (
        distributed(device="cpu") as world,
        pytest.raises(RecipeError, match=r"no folder for the answers. Set write.path, or give --out"),
    ):
        write(nowhere, world, StopRequest())


def test_lines_that_a_kill_has_cut_are_written_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / ".partial" / "train-00000.jsonl")
    journal.append([Entry(1, 0, (4, 5)), Entry(2, 0, (), is_whole=False)])
    journal.append([Entry(3, 0, (6,))])
    journal.path.write_bytes(journal.path.read_bytes()[:-5])
    again = Journal(journal.path)
    assert again.done == {(1, 0), (2, 0)}
    again.append([Entry(3, 0, (7,))])
    assert Journal(journal.path).found == [*again.found[:2], Entry(3, 0, (7,))]
    changed = journal.path.read_bytes().replace(b'"row":1', b'"row":9')
    journal.path.write_bytes(changed)
    assert Journal(journal.path).done == {(3, 0)}


def test_a_prompt_that_could_not_be_asked_is_no_answer_that_is_kept(tmp_path: Path) -> None:
    folder = SetFolder(tmp_path / "set")
    unit = Unit("train", 0, 1, np.arange(3), (b"a", b"b", b"c"))
    refused = Entry(row=1, draw=REFUSED, reason="no picture")
    Journal(folder.journal(unit)).append([Entry(row=0, draw=0, ids=(4,)), refused])
    assert num_kept(folder, Plan({"writer": {}}, "2026-01-31", (unit,))) == 1


def test_batches_that_do_not_fit_are_halved_for_good(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = written(tree, write__path=str(tmp_path / "whole"))
    sizes: list[int] = []

    def answer_few(model: Any, processor: Any, prompts: Any, **options: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("too many prompts")
        return answer(model, processor, prompts, **options)

    monkeypatch.setattr(loop, "answer", answer_few)
    _, folder = written(tree)
    assert max(sizes) == 5
    assert sum(size > 2 for size in sizes) <= 2
    assert ids_of(folder) == ids_of(whole)
    monkeypatch.setattr(
        loop, "answer", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("none"))
    )
    with pytest.raises(
        TrainingError, match=r"row \d+: one sequence of \d+ tokens .* or lower write.max_new_tokens"
    ):
        written(tree, write__path=str(tmp_path / "none"))


# --- ranks -----------------------------------------------------------------------------------------------


def test_ranks_claim_units_and_write_as_one(tree: dict[str, Any], tmp_path: Path) -> None:
    sampling = {f"write__{name}": value for name, value in SAMPLED.items()}
    _, alone = written(tree, **sampling)
    recipe = make_recipe(tree, **sampling, write__path=str(tmp_path / "two"))
    assert on_ranks(2, lambda world: write(recipe, world, StopRequest())) == [0, 0]
    assert ids_of(tmp_path / "two") == ids_of(alone)


@pytest.mark.parametrize("how", ["shard", pytest.param("tensor", marks=pytest.mark.slow)])
def test_ranks_that_share_the_teacher_answer_together(tree: dict[str, Any], tmp_path: Path, how: str) -> None:
    sampling = {f"write__{name}": value for name, value in SAMPLED.items()}
    _, alone = written(tree, **sampling)
    setting = {"teacher__shard": True} if how == "shard" else {"teacher__tensor": 2}
    recipe = make_recipe(tree, **sampling, **setting, write__path=str(tmp_path / "two"))
    assert on_ranks(2, lambda world: write(recipe, world, StopRequest())) == [0, 0]
    same = sum(one == other for one, other in zip(ids_of(tmp_path / "two"), ids_of(alone), strict=True))
    assert same >= 22  # of 24: sums over ranks round differently
