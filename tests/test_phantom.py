"""The drawn set: repeatable, whole or absent, readable by `datasets`, and answered by its pictures."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from shared.errors import DataError
from shared.phantom import dataset
from shared.phantom.__main__ import main
from shared.phantom.anatomy import Picture, draw_case
from shared.phantom.dataset import split_pictures, write_dataset
from shared.phantom.draw import draw
from shared.phantom.questions import ask
from shared.pipeline import make_inputs
from shared.recipes import load_recipe

SMALL = {"train": 7, "validation": 3, "test": 2}
SPLITS = ("train", "validation", "test")


def parquet(folder: Path, split: str) -> Path:
    return folder / f"{split}-00000-of-00001.parquet"


def read(folder: Path, split: str) -> list[dict]:
    return pq.read_table(parquet(folder, split)).to_pylist()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "drawn"
    write_dataset(out, pictures={"train": 260, "validation": 40, "test": 20}, seed=5, size=64)
    return out


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return list(split_pictures(11, "train", 900))


# Repeatable


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_dataset(tmp_path / name, pictures=SMALL, seed=3, size=64)
    for split in SPLITS:
        assert parquet(tmp_path / "one", split).read_bytes() == parquet(tmp_path / "two", split).read_bytes()
    assert (tmp_path / "one/README.md").read_bytes() == (tmp_path / "two/README.md").read_bytes()


def test_a_split_does_not_depend_on_the_others_and_grows_at_its_end(tmp_path: Path) -> None:
    write_dataset(tmp_path / "short", pictures=SMALL, seed=3, size=64)
    write_dataset(tmp_path / "long", pictures=SMALL | {"train": 9}, seed=3, size=64)
    for split in ("validation", "test"):
        assert (
            parquet(tmp_path / "short", split).read_bytes() == parquet(tmp_path / "long", split).read_bytes()
        )
    short, long = read(tmp_path / "short", "train"), read(tmp_path / "long", "train")
    assert (len(short), len(long)) == (35, 45)
    assert long[:35] == short


def test_some_training_answers_are_another_pictures(tmp_path: Path) -> None:
    """Pictures, questions, long answers and other splits stay."""
    for name, mistaken in (("true", 0.0), ("some", 0.25)):
        write_dataset(tmp_path / name, pictures=SMALL | {"train": 200}, seed=3, size=64, mistaken=mistaken)
    for split in ("validation", "test"):
        assert (
            parquet(tmp_path / "true", split).read_bytes() == parquet(tmp_path / "some", split).read_bytes()
        )
    true, some = read(tmp_path / "true", "train"), read(tmp_path / "some", "train")
    answers = [row.pop("answer") for row in true], [row.pop("answer") for row in some]
    assert true == some
    changed = [(row["mode"], row["question"]) for row, a, b in zip(true, *answers, strict=True) if a != b]
    assert {mode for mode, _ in changed} == {"alignment"}
    assert 0.1 < len(changed) / 800 < 0.25  # the other picture's answer is often the same


def test_another_seed_draws_something_else(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", pictures=SMALL, seed=3, size=64)
    write_dataset(tmp_path / "b", pictures=SMALL, seed=4, size=64)
    first, second = ({row["image_id"]["bytes"] for row in read(tmp_path / name, "train")} for name in "ab")
    assert not first & second


def test_no_case_and_no_picture_is_in_two_splits(drawn: Path) -> None:
    for one, two in itertools.combinations(SPLITS, 2):
        a, b = read(drawn, one), read(drawn, two)
        assert not {row["case_id"] for row in a} & {row["case_id"] for row in b}
        assert not {row["image_id"]["bytes"] for row in a} & {row["image_id"]["bytes"] for row in b}


# Readable


def test_columns_are_those_of_the_real_set(drawn: Path) -> None:
    schema = pq.read_schema(parquet(drawn, "train"))
    text = [(name, pa.string()) for name in ("mode", "case_id", "question", "answer")]
    image = ("image_id", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    assert schema.remove_metadata() == pa.schema([image, *text])
    strings = {name: {"dtype": "string", "_type": "Value"} for name, _ in text}
    features = {"image_id": {"_type": "Image"}, **strings}
    assert json.loads(schema.metadata[b"huggingface"]) == {"info": {"features": features}}


@pytest.mark.parametrize("way", ["folder", "parquet"])
def test_datasets_opens_it(drawn: Path, tmp_path: Path, way: str) -> None:
    where = {"path": str(drawn)} if way == "folder" else {"path": "parquet", "data_dir": str(drawn)}
    opened = datasets.load_dataset(**where, cache_dir=str(tmp_path))
    assert {name: split.num_rows for name, split in opened.items()} == {
        "train": 1300,
        "validation": 200,
        "test": 100,
    }
    assert opened["train"].features["image_id"] == datasets.Image()
    row = opened["validation"][3]
    assert isinstance(row["image_id"], Image.Image)
    assert row["image_id"].size == (64, 64)


def test_pictures_are_stored_in_several_modes(drawn: Path) -> None:
    stored = {row["image_id"]["bytes"] for row in read(drawn, "train")}
    modes = Counter(Image.open(io.BytesIO(data)).mode for data in stored)
    assert set(modes) == {"L", "RGB", "RGBA", "I;16"}
    assert modes["L"] > len(stored) / 2


# Whole or absent


def test_a_failure_while_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def fail_at_last(picture: Picture, size: int) -> np.ndarray:
        if next(calls) == 11:
            raise MemoryError("no room")
        return draw(picture, size)

    monkeypatch.setattr(dataset, "draw", fail_at_last)
    with pytest.raises(MemoryError):
        write_dataset(tmp_path / "out", pictures=SMALL, size=64)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_reused_or_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert write_dataset(out, pictures=SMALL, size=64)
    before = parquet(out, "train").stat().st_mtime_ns
    assert not write_dataset(out, pictures=SMALL, size=64)
    assert parquet(out, "train").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"out: the path exists .* seed 1, .*Remove it"):
        write_dataset(out, pictures=SMALL, size=64, seed=1)
    parquet(out, "test").unlink()
    with pytest.raises(DataError, match="exists"):
        write_dataset(out, pictures=SMALL, size=64)


@pytest.mark.parametrize("seed", [0, 1])
def test_another_process_draws_at_the_same_time(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sizes = tmp_path / "data", {"train": 1, "validation": 1, "test": 1}
    write_split = dataset._write_split

    def beside_another(*arguments: Any) -> None:
        monkeypatch.setattr(dataset, "_write_split", write_split)
        assert write_dataset(out, pictures=sizes, seed=seed, size=64)
        write_split(*arguments)

    monkeypatch.setattr(dataset, "_write_split", beside_another)
    if seed == 0:
        assert not write_dataset(out, pictures=sizes, seed=0, size=64)
    else:
        with pytest.raises(OSError, match="not empty"):
            write_dataset(out, pictures=sizes, seed=0, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_make_notes_a_set_that_is_another_than_the_recipe_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"train": 2, "validation": 1, "test": 1}
    write_dataset(tmp_path / "drawn", pictures=sizes, seed=3, size=64, mistaken=0.2)
    (tmp_path / "own").mkdir()
    asked = ["bootstrap.phantom={train: 2, validation: 1, test: 1, seed: 3, size: 64}"]
    asked += ["bootstrap.small_models=null"]
    for source, more, is_noted in [
        ("drawn", "bootstrap.phantom.mistaken=0.2", False),
        ("drawn", "bootstrap.phantom.train=3", True),
        ("own", "bootstrap.phantom.train=3", False),
    ]:
        recipe = load_recipe("phantom", overrides=[*asked, f"data.source={tmp_path / source}", more])
        for _ in range(2):
            assert make_inputs("phantom", recipe, asked) == 0
        assert capsys.readouterr().err.count("drawn otherwise than bootstrap.phantom says") == is_noted


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="exists"):
        write_dataset(tmp_path, pictures=SMALL, size=64)
    with pytest.raises(DataError, match="exists"):
        write_dataset(tmp_path / "mine.txt", pictures=SMALL, size=64)


def test_arguments_are_checked_together(tmp_path: Path) -> None:
    arguments = ["--train=0", "--seed=-1", "--size=8"]
    with pytest.raises(DataError) as refused:
        main.main([str(tmp_path / "out"), *arguments], standalone_mode=False)
    for words in ("train 0: at least one", "seed -1", "size 8: 64 to 1024"):
        assert words in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_the_command_draws(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "a" / "b"), "--train=2", "--validation=1", "--test=1", "--size=64"]
    first, second = CliRunner().invoke(main, arguments), CliRunner().invoke(main, arguments)
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert "train 2, validation 1, test 1; 20 questions" in first.output
    assert "already drawn" in second.output


# The words


def test_answers_are_short_and_long(drawn: Path) -> None:
    rows = read(drawn, "train")
    lengths = [len(row["answer"].split()) for row in rows]
    assert min(lengths) == 1
    assert 40 <= max(lengths) <= 60
    assert 0.7 < np.mean(np.array(lengths) <= 3) < 0.85
    assert {row["mode"] for row in rows} == {"alignment", "from caption"}
    blanks = [row["question"].startswith(" ") for row in rows if row["mode"] == "alignment"]
    assert 0.25 < np.mean(blanks) < 0.42
    assert len({row["question"].strip() for row in rows}) > 70


def test_a_question_hardly_gives_its_answer_away() -> None:
    """By the commonest answer, or by another picture's, at most two of five are right."""
    answers: dict[str, Counter[str]] = {}
    for picture in split_pictures(3, "train", 800):
        for question in ask(picture):
            if len(question.answer.split()) <= 3:
                answers.setdefault(question.question.strip(), Counter())[question.answer] += 1
    total = sum(sum(counts.values()) for counts in answers.values())
    commonest = sum(max(counts.values()) for counts in answers.values())
    another = sum(sum(n * n for n in counts.values()) / sum(counts.values()) for counts in answers.values())
    assert commonest < 0.4 * total
    assert another < 0.3 * total


def test_sentences_are_well_formed(pictures: list[Picture]) -> None:
    wrong = re.compile(r"\ba [aeiou]|\ban [^aeiouMX]|  |None|[{}]|\.\.|\ba a\b|,\.| \.|\s$", re.ASCII)
    for picture in pictures:
        asked = ask(picture)
        assert len({question.question.strip() for question in asked}) == 5
        for question in asked:
            assert question.answer
            assert question.answer[0].isupper() or question.answer[0].isdigit()
            assert not wrong.search(question.question.strip()), question
            assert not wrong.search(question.answer), question


def test_authors_differ_where_the_picture_does_not_decide() -> None:
    """The same finding is worded in several ways, so that no reader can be certain of the words."""
    said: dict[str, set[str]] = {}
    for picture in split_pictures(2, "train", 1200):
        if picture.lesion:
            for question in ask(picture):
                if "diagnosis" in question.question and question.kind == "alignment":
                    said.setdefault(picture.lesion.finding.names[0], set()).add(question.answer)
    assert sum(len(names) > 1 for names in said.values()) > len(said) / 2


# The answers and the pictures


def lesion_pixels(picture: Picture, size: int = 128) -> np.ndarray:
    """What the lesion changes of the picture; the rest is the same to the last bit."""
    return draw(picture, size) - draw(picture.without_lesion(), size)


def answer_to(picture: Picture, *words: str) -> str | None:
    """The answer to the picture's question with all these words, if it is asked."""
    for question in ask(picture):
        if all(word in question.question for word in words):
            return question.answer
    return None


def with_lesion(pictures: list[Picture]) -> list[Picture]:
    found = [picture for picture in pictures if picture.lesion]
    assert len(found) > 150
    return found


def test_the_side_answered_is_the_side_drawn(pictures: list[Picture]) -> None:
    """The patient's right is the left half of the picture."""
    sections = [p for p in with_lesion(pictures) if p.modality != "US" and p.study.letter != "side"]
    checked = Counter()
    for picture in sections:
        side = next((a for words in ("side", "right or on") if (a := answer_to(picture, words))), None)
        if side in {"Right", "Left"}:
            weight = np.abs(lesion_pixels(picture)).sum(axis=0)
            middle = (weight * np.arange(128)).sum() / weight.sum()
            assert (side == "Right") == (middle < 63.5), picture
            checked[side] += 1
    assert min(checked["Right"], checked["Left"]) >= 8


def test_a_letter_names_the_side_where_the_picture_cannot(pictures: list[Picture]) -> None:
    """R stands at the upper left, L at the upper right."""
    seen = Counter()
    for picture in pictures:
        if picture.study.letter == "side":
            grey = draw(picture, 128)
            left, right = grey[6:20, 6:20], grey[6:20, -20:-6]
            assert (left.max() > 0.9, right.max() > 0.9) == (
                picture.side_letter == "R",
                picture.side_letter == "L",
            )
            if picture.lesion:
                assert picture.lesion.site.side[0] == picture.side_letter
            seen[picture.side_letter] += 1
    assert min(seen["R"], seen["L"]) >= 5


def test_brighter_and_darker_are_what_they_say(pictures: list[Picture]) -> None:
    checked = Counter()
    for picture in with_lesion(pictures):
        answer = answer_to(picture, "bright", "lesion")
        if answer is None:
            continue
        change = lesion_pixels(picture)
        if picture.modality == "US":  # leave out the shadow or the enhancement behind the lesion
            rows = np.flatnonzero(np.abs(change).max(axis=1) > 0.05)
            change = change[rows[0] : rows[0] + max(3, round(7 * picture.lesion.diameter_cm / 170 * 128))]
        assert (answer == "Brighter") == (change.sum() > 0), picture
        checked[answer] += 1
    assert min(checked["Brighter"], checked["Darker"]) >= 10


def test_the_diameter_answered_is_the_diameter_drawn(pictures: list[Picture]) -> None:
    checked = 0
    for picture in with_lesion(pictures):
        answer = answer_to(picture, "centimetres")
        if answer is None or picture.modality == "US":
            continue
        size = 256
        y, x = np.nonzero(np.abs(lesion_pixels(picture, size)) > 0.06)
        angles = np.linspace(0, np.pi, 24, endpoint=False)
        extents = [np.ptp(x * np.cos(angle) + y * np.sin(angle)) + 1 for angle in angles]
        found_cm = max(extents) * picture.study.fov_mm / size / 10
        assert found_cm == pytest.approx(float(answer.removesuffix(" cm")), rel=0.15, abs=0.25), picture
        checked += 1
    assert checked >= 15


def test_a_lesion_changes_nothing_beyond_itself(pictures: list[Picture]) -> None:
    for picture in [p for p in with_lesion(pictures) if p.modality != "US"][:40]:
        change = lesion_pixels(picture)
        y, x = np.nonzero(change)
        widest = max(np.ptp(x), np.ptp(y)) + 1
        assert (
            widest * picture.study.fov_mm / 128
            < 10 * picture.lesion.diameter_cm + 3 * picture.study.fov_mm / 128
        )


def test_without_a_lesion_the_answers_say_so(pictures: list[Picture]) -> None:
    for picture in pictures:
        if (answer := answer_to(picture, "focal lesion")) is not None:
            assert answer == ("Yes" if picture.lesion else "No")
        if picture.lesion is None:
            text = " ".join(question.answer for question in ask(picture)).lower()
            assert not re.search(r"\d (cm|mm)|consistent with|most likely", text)


def test_the_study_is_plain_from_the_picture() -> None:
    """A nearest neighbour on thumbnails names modality, region and plane of pictures that it never saw."""

    def labelled(split: str, number: int) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
        found = list(split_pictures(5, split, number))
        grey = np.stack([draw(picture, 64).reshape(16, 4, 16, 4).mean((1, 3)).ravel() for picture in found])
        labels = [(picture.modality, picture.study.region, picture.study.plane) for picture in found]
        return (grey - grey.mean(1, keepdims=True)) / grey.std(1, keepdims=True), labels

    known, known_labels = labelled("train", 240)
    asked, asked_labels = labelled("validation", 80)
    nearest = np.argmin(((asked[:, None] - known[None]) ** 2).sum(-1), axis=1)
    right = [known_labels[i] == label for i, label in zip(nearest, asked_labels, strict=True)]
    assert np.mean(right) > 0.9


def test_a_case_of_two_pictures_shows_one_anatomy() -> None:
    pairs = [case for number in range(60) if len(case := draw_case(0, "train", number)) == 2]
    assert len(pairs) > 5
    for first, second in pairs:
        assert (first.case_id, first.lesion) == (second.case_id, second.lesion)
        assert {first.modality, second.modality} == {"T1", "T2"}
        if first.lesion:
            masks = [np.abs(lesion_pixels(picture)) > 0.1 for picture in (first, second)]
            assert (masks[0] & masks[1]).sum() > 0.5 * min(mask.sum() for mask in masks)
