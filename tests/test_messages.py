"""Bad input of the kinds that ended in a traceback or in a page of text: one short message with a status."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from samples import PLAIN_CHAT

from shared.data.processing import open_processor
from shared.data.rows import Example, open_split
from shared.errors import CheckpointError, DataError, RecipeError, listed, shortened
from shared.model_check import check_model
from shared.models.vlm import empty_vlm, load_config, load_vlm
from shared.models.weight_files import require_whole_weights
from shared.recipes import DataConfig, TeacherConfig
from shared.runtime import distributed
from shared.vouched import vouched
from stage1_teacher.capturing.teacher import load_teacher
from stage2_student.__main__ import commands

MAX_MESSAGE = 800
COLUMNS = {"image": "image", "kind": None, "case": None}


def lines(*texts: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "train.jsonl").write_text("\n".join(texts)) and None


def no_rows(folder: Path) -> None:
    table = {name: pa.array([], pa.string()) for name in ("image", "question", "answer")}
    pq.write_table(pa.table(table), folder / "train.parquet")


LONG = base64.b64encode(bytes(100_000)).decode()  # of no picture
DATA = {
    "no rows": (no_rows, "split train: no rows; at least one is needed"),
    "no readable line": (lines("{'a': 1}", "nonsense"), "none of 2 line(s) can be read; the first: "),
    "base64 of no picture": (
        lines(json.dumps({"image": LONG, "question": "?", "answer": "a"})),
        f"the picture is a text of {len(LONG):,} characters",
    ),
    "a long path": (
        lines(json.dumps({"image": "x" * 4000, "question": "?", "answer": "a"})),
        "File name too long",
    ),
    "hundreds of columns": (
        lines(json.dumps({f"column-{number}": "x" * 100 for number in range(500)})),
        "(500 in all)",
    ),
}


@pytest.mark.parametrize("kind", DATA)
def test_bad_data_is_one_short_message(tmp_path: Path, kind: str) -> None:
    make, told = DATA[kind]
    make(tmp_path)
    with pytest.raises(DataError) as caught:
        open_split(DataConfig(source=str(tmp_path), columns=COLUMNS), "train")[0]
    assert told in str(caught.value)
    assert len(str(caught.value)) < MAX_MESSAGE * 4
    assert str(tmp_path) in str(caught.value)


def test_a_template_that_drops_the_picture_is_to_blame_and_not_each_picture(
    student_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(student_folder, tmp_path / "model")
    blind = PLAIN_CHAT.replace("' <|image_pad|>' if p.type == 'image' else ' ' + p.text", "' ' ~ p.text")
    (model / "chat_template.jinja").write_text(blind.replace("p.text }}", "p.text|default('') }}"))
    with pytest.raises(RecipeError, match="same text with and without a picture"):
        open_processor(str(model), DataConfig(source="unused"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_settings_of_an_export_that_changed_are_refused(
    student_folder: Path, tmp_path: Path, name: str
) -> None:
    """One other digit makes another model, which opens without a word."""
    folder = tmp_path / "export"
    shutil.copytree(student_folder, folder)
    sha256 = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "teachonce.json").write_text(json.dumps(vouched({"sha256": sha256, "step": 3})))
    require_whole_weights(str(folder), None)
    (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    with pytest.raises(RecipeError, match=rf"{name}: changed since it was exported .delete teachonce\.json"):
        require_whole_weights(str(folder), None)
    (folder / "teachonce.json").write_text((folder / "teachonce.json").read_text().replace(": 3", ": 4"))
    with pytest.raises(CheckpointError, match=r"teachonce\.json: damaged .its digest differs"):
        require_whole_weights(str(folder), None)


def test_weights_of_an_export_that_changed_are_refused(student_folder: Path, tmp_path: Path) -> None:
    """Most flipped bits of a safetensors file open without a word, with other weights."""
    folder = tmp_path / "export"
    shutil.copytree(student_folder, folder)
    weights = folder / "model.safetensors"
    sha256 = {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    (folder / "teachonce.json").write_text(json.dumps({"sha256": sha256}))
    require_whole_weights(str(folder), None)
    content = bytearray(weights.read_bytes())
    content[-100] ^= 4
    weights.write_bytes(content)
    with pytest.raises(RecipeError, match=r"model\.safetensors: changed since it was exported"):
        load_vlm(str(folder), revision=None, dtype=torch.float32, attn_implementation=None)
    (folder / "teachonce.json").unlink()  # of somebody else: nothing is known
    require_whole_weights(str(folder), None)


def test_code_that_a_model_brings_is_never_run(student_folder: Path, tmp_path: Path) -> None:
    folder, proof = tmp_path / "model", tmp_path / "proof"
    shutil.copytree(student_folder, folder)
    (folder / "theirs.py").write_text(f"open({str(proof)!r}, 'w')\n")
    for name, classes in (
        ("config.json", {"AutoConfig": "theirs.Config", "AutoModelForImageTextToText": "theirs.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["theirs.Tokenizer", None]}),
    ):
        settings = json.loads((folder / name).read_text())
        settings |= (
            {"auto_map": classes, "model_type": "theirs"} if name == "config.json" else {"auto_map": classes}
        )
        (folder / name).write_text(json.dumps(settings))
    for opened in (
        lambda: load_config(str(folder)),
        lambda: open_processor(str(folder), DataConfig(source="x")),
    ):
        with pytest.raises(RecipeError, match="brings code of its own, which is never run here"):
            opened()
    assert not proof.exists()


def test_a_teachers_head_narrower_than_the_tokenizer_is_refused(teacher_folder: Path) -> None:
    width = load_config(str(teacher_folder)).get_text_config().vocab_size
    with distributed(device="cpu") as world, pytest.raises(RecipeError, match="its head is") as caught:
        load_teacher(TeacherConfig(model=str(teacher_folder)), num_token_ids=width + 1, world=world)
    assert f"{width} wide, its tokenizer has {width + 1} ids" in str(caught.value)


def test_settings_that_do_not_fit_together_are_one_message(student_folder: Path) -> None:
    config = load_config(str(student_folder))
    config.get_text_config().pad_token_id = 10**6
    with pytest.raises(RecipeError, match=r"cannot be made: .*[Pp]adding"):
        empty_vlm(config, dtype=None, attn_implementation=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("runs/mien", "no such file or folder; did you mean runs/mine?"),
        ("elsewhere/mine", "there is no run, model or recipe of that name"),
        ("runs", "neither a run (no recipe.yaml) nor a model"),
        ("phantm", "did you mean 'phantom'?"),
    ],
)
def test_evaluating_a_run_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    shown = CliRunner().invoke(commands, ["evaluate", what])
    assert isinstance(shown.exception, RecipeError)
    assert told in str(shown.exception)


def test_quotes_and_lists_are_capped_with_a_count() -> None:
    assert len(shortened("x" * 10**6)) < 200
    assert shortened("short") == "short"
    shown = listed([f"row {number}" for number in range(1234)])
    assert len(shown.splitlines()) == 11
    assert shown.endswith("... and 1,224 more")


KINDS = {
    "config.json: a list where a number belongs": ("config.json", ("text_config", "hidden_size"), [[]]),
    "config.json: a mapping where a number belongs": (
        "config.json",
        ("text_config", "rope_parameters", "rope_theta"),
        {},
    ),
    "generation_config.json": ("generation_config.json", ("pad_token_id",), [1]),
    "preprocessor_config.json": ("preprocessor_config.json", ("patch_size",), {}),
    "tokenizer.json": ("tokenizer.json", ("model", "merges"), {"a": 1}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_setting_of_another_kind_is_one_message(
    name: str, student_folder: Path, tmp_path: Path, examples: list[Example]
) -> None:
    """Wherever a library notices: as it opens a model, makes it, runs it or prepares a picture for it."""
    file, keys, value = KINDS[name]
    folder = Path(shutil.copytree(student_folder, tmp_path / "model"))
    tree = json.loads((folder / file).read_text())
    place = tree
    for key in keys[:-1]:
        place = place[key]
    assert keys[-1] in place
    place[keys[-1]] = value
    (folder / file).write_text(json.dumps(tree))

    def use() -> None:
        model = load_vlm(str(folder), revision=None, dtype=torch.float32, attn_implementation=None)
        processor = open_processor(str(folder), DataConfig(source="unused"))
        some = [processor.encode(example) for example in examples[:2]]
        check_model(model, processor, some, device=torch.device("cpu"))

    with pytest.raises((RecipeError, DataError)) as caught:
        use()
    assert len(str(caught.value)) < MAX_MESSAGE


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


HEADERS = {
    "nested": "[" * 100_000,
    "a list": "[]",
    "three offsets": '{"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 0, 0]}}',
    "words": '{"x": {"dtype": "F32", "shape": [], "data_offsets": ["a", "b"]}}',
    "backwards": '{"x": {"dtype": "F32", "shape": [], "data_offsets": [4, 0]}}',
    "before the file": '{"x": {"dtype": "F32", "shape": [], "data_offsets": [-4, 0]}}',
    "no dtype": '{"x": {"shape": [], "data_offsets": [0, 0]}}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_of_weights_is_one_message(name: str, student_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student_folder, tmp_path / "model"))
    (folder / "model.safetensors").write_bytes(header(HEADERS[name]))
    with pytest.raises(RecipeError, match=r"model\.safetensors: is no safetensors file") as caught:
        require_whole_weights(str(folder), None)
    assert len(str(caught.value)) < MAX_MESSAGE


@pytest.mark.parametrize("name", ["adapter_config.json", "model.safetensors.index.json"])
def test_a_models_json_nested_without_end_is_one_message(
    name: str, student_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(student_folder, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(RecipeError, match=re.escape(name)):
        require_whole_weights(str(folder), None)
