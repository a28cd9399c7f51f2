"""The benchmark with pretrained weights, with a small random model of the same classes and drawn rows."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from samples import encoded_picture

from shared.data.processing import open_processor
from shared.data.rows import Example
from shared.model_check import check_model
from shared.models.vlm import load_vlm
from shared.recipes import DataConfig
from stage1_teacher.__main__ import commands as teacher_cache
from stage2_student.__main__ import commands as train_student
from tests.benchmarks import bench_real_weights, pretrained_gemma, student_runs, tables
from tests.benchmarks.bench_real_weights import Plan
from tests.benchmarks.bench_targets import FP16
from tests.benchmarks.student_results import LABELS, LIVE, Results, done, keep

TEXTS = ["Which plane is this?\nIt is an axial scan of the chest. user model\n"] * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma") / "base"
    return pretrained_gemma.save_vlm(folder, *pretrained_gemma.tiny_model(TEXTS))


def add_package(folder: Path, *parts: bytes) -> None:
    for number, content in enumerate(parts, start=1):
        package = folder / f"{pretrained_gemma.PACKAGE}_part{number}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "data" / f"model.gguf.part{number - 1:02}").write_bytes(content)


def test_the_parts_of_the_package_are_joined_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, pretrained_gemma.NUM_PARTS + 1):  # the package itself may be installed
        monkeypatch.delitem(sys.modules, f"{pretrained_gemma.PACKAGE}_part{number}", raising=False)
    add_package(tmp_path / "site", b"GG", b"UF", b" and", b" more")
    monkeypatch.syspath_prepend(tmp_path / "site")
    out = tmp_path / "model.gguf"
    with pytest.raises(SystemExit, match=r"is not a5fd3b.*Install the package again"):
        pretrained_gemma.join_parts(out)
    assert not out.exists()

    monkeypatch.setattr(pretrained_gemma, "SHA256", hashlib.sha256(b"GGUF and more").hexdigest())
    assert pretrained_gemma.join_parts(out).read_bytes() == b"GGUF and more"


def test_without_the_package_its_extra_is_named(tmp_path: Path, hide: Any) -> None:
    hide(f"{pretrained_gemma.PACKAGE}_part1")
    with pytest.raises(SystemExit, match="EXTRAS=real-weights"):
        pretrained_gemma.join_parts(tmp_path / "model.gguf")


def test_the_model_passes_the_check_that_begins_both_stages(base: Path) -> None:
    processor = open_processor(str(base), DataConfig(source="unused"))
    model = load_vlm(str(base), revision=None, dtype=torch.float32, attn_implementation=None)
    examples = [
        processor.encode(Example.single(encoded_picture(seed), "Which plane\nis this?", "axial\nscan"))
        for seed in (0, 1)
    ]
    check_model(model, processor, examples, device=torch.device("cpu"))
    token = processor.tokenizer.convert_tokens_to_ids(pretrained_gemma.NAMED["image_token"])
    assert (examples[0].input_ids == token).sum() == pretrained_gemma.TOKENS_PER_PICTURE


def test_a_student_has_some_layers_of_its_teacher(base: Path, tmp_path: Path) -> None:
    shorter = pretrained_gemma.shorten(base, tmp_path / "student", num_layers=3)
    theirs, ours = (
        load_vlm(str(folder), revision=None, dtype=torch.float32, attn_implementation=None)
        for folder in (base, shorter)
    )
    layers, kept = theirs.model.language_model.layers, ours.model.language_model.layers
    for layer, same in zip(kept, (layers[0], layers[2], layers[3]), strict=True):
        for one, other in zip(layer.parameters(), same.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    kinds = theirs.config.text_config.layer_types
    assert ours.config.text_config.layer_types == [kinds[0], kinds[2], kinds[3]]
    torch.testing.assert_close(ours.lm_head.weight, theirs.lm_head.weight, rtol=0, atol=0)


def plan_of(root: Path, **settings: Any) -> Plan:
    asked: dict[str, Any] = {
        "tiny": True,
        "rows": None,
        "seeds": (0,),
        "lengths": ("1 epoch",),
        "kd_ratio": 0.5,
        "held_out": 4,
        "positions": 48,
        "num_turns": 2,
    }
    return Plan(root, **asked | settings)


def test_a_folder_goes_on_with_its_own_settings_alone(tmp_path: Path) -> None:
    plan_of(tmp_path).keep()
    plan_of(tmp_path, seeds=(0, 1), lengths=("1 epoch", "20 epochs")).keep()
    asked = "--rows was None, now it is 256; --held-out was 4, now it is 64. Give those again"
    with pytest.raises(SystemExit, match=asked):
        plan_of(tmp_path, rows=256, held_out=64).keep()
    plan_of(tmp_path).write_recipes()
    plan_of(tmp_path).keep()
    (tmp_path / "plan.json").unlink()
    with pytest.raises(SystemExit, match=r"begun without a plan\.json"):
        plan_of(tmp_path).keep()


def test_students_that_were_measured_on_other_rows_are_others(tmp_path: Path) -> None:
    jobs = [student_runs.Job("student", LABELS, "1 epoch", 0, 0.5, None, held_out=n) for n in (4, 64, None)]
    for number, job in enumerate(jobs):
        keep(job.key, {"kl": float(number)}, tmp_path / "students.jsonl", fingerprint="a")
    for number, job in enumerate(jobs):
        path = tmp_path / "students.jsonl"
        results = Results("student", 0.5, path, fingerprint="a", held_out=job.held_out)
        assert results.values(LABELS, "1 epoch", "kl") == {0: number}


def test_a_run_that_was_stopped_before_its_first_checkpoint_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder, asked = plan_of(tmp_path), tmp_path / "runs" / "teacher", []

    def command(*arguments: object) -> str:
        asked.append(arguments[3:])
        folder.mkdir(parents=True, exist_ok=True)
        if len(asked) == 2:
            (folder / "results.json").write_text('{"step": 4}')
        return ""

    monkeypatch.setattr(bench_real_weights, "command", command)
    with pytest.raises(FileNotFoundError):
        bench_real_weights.run_of(plan, "teacher")
    assert bench_real_weights.run_of(plan, "teacher") == {"step": 4}
    assert asked == [(), ("--resume",)]


@pytest.mark.slow
def test_all_parts_run_and_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process, which is much faster; with one threshold and what is of its size."""

    def command(module: str, *arguments: object) -> str:
        which = {"stage1_teacher": teacher_cache, "stage2_student": train_student}[module]
        found = CliRunner().invoke(which, [*map(str, arguments)], standalone_mode=False)
        if found.exception is not None:
            raise found.exception
        return found.stdout

    def here(function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(bench_real_weights, "command", command)
    monkeypatch.setattr(bench_real_weights, "in_own_process", here)
    monkeypatch.setattr(student_runs, "in_own_process", here)
    monkeypatch.setattr(bench_real_weights, "TAUS", (64,))
    monkeypatch.setattr(tables, "KEPT", tmp_path / "tables")
    arguments = ["--tiny", "--root", str(tmp_path), "--positions", "48", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", ["bench_real_weights", *arguments, "--held-out", "4"])
    bench_real_weights.main()
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in bench_real_weights.PARTS}
    assert found["teacher"]["ce"] < found["teacher"]["ce_before"]
    assert found["student"]["after"]["kl"] < found["student"]["before"]["kl"]
    families = {line["family"] for line in found["targets"]["lines"]}
    assert families == {"threshold", FP16, "random", "top_k"}
    assert dict(found["steps"]["table"])[LABELS] == "1.000 (1.000 to 1.000)"
    variants = [record["key"][1] for record in done(tmp_path / "students.jsonl").values()]
    assert {LABELS, LIVE, "tau 1/64"} < set(variants)
    assert found["targets"]["positions"] >= 48
    told = capsys.readouterr().out
    assert "| tau 1/64 |" in told
    parts = {path.stem.removeprefix("real_weights-tiny-") for path in (tmp_path / "tables").iterdir()}
    assert parts >= {"teacher", "targets-schemes", "further-ratios", "students", "steps"}

    monkeypatch.setattr(bench_real_weights, "command", None)
    monkeypatch.setattr(student_runs, "run", None)
    monkeypatch.setattr(student_runs, "time_steps", None)
    bench_real_weights.main()
    lines, again = (
        [line for line in text.splitlines() if line.startswith("| ")]
        for text in (told, capsys.readouterr().out)
    )
    assert again == lines
