"""The benchmark of a GPU, on a CPU with tiny shapes: it must work on the day that it meets a GPU."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from shared.recipes import Recipe
from shared.stopping import INTERRUPTED_STATUS
from tests.benchmarks import bench_capture, bench_gpu, full_shapes, gpu_loss, gpu_models
from tests.benchmarks.bench_gpu import PARTS, main, measure
from tests.benchmarks.gpu_figures import Figure

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sweep one shape is enough here."""
    monkeypatch.setitem(PARTS, "loss", bench_gpu.of_shapes(gpu_loss.FIRST[:1]))


@pytest.mark.parametrize("part", ["loss", "student", "peers"])
def test_a_part_of_it_writes_its_figures(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(part, tmp_path, tiny=True)
    assert "argument" not in capsys.readouterr().out  # Liger may only want for a GPU
    assert_figures(tmp_path / f"{part}.json")


def assert_figures(path: Path) -> None:
    found = json.loads(path.read_text())
    assert found["figures"]
    assert all(figure["value"] >= 0 and figure["goal"] is None for figure in found["figures"])


def test_a_capture_is_measured_again_where_one_was_and_begins_every_other_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, timed = [], bench_capture.timed

    def noted(function: Any, device: torch.device) -> tuple[float, float]:
        order.append(function.func.__name__)
        return timed(function, device)

    monkeypatch.setattr(bench_capture, "timed", noted)
    for _ in range(2):
        measure("capture", tmp_path, tiny=True)
        assert_figures(tmp_path / "capture.json")
    assert order == ["bare", "captured", "captured", "bare", "bare", "captured"] * 2


def test_what_is_made_once_is_whole_or_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def make(new: Path, *, fails: bool) -> None:
        new.mkdir()
        (new / "first").touch()
        if fails:
            raise KeyboardInterrupt
        (new / "second").touch()

    with pytest.raises(KeyboardInterrupt):
        full_shapes.made_once(folder, partial(make, fails=True))
    assert not folder.exists()
    for fails in False, True:  # the second time nothing is made
        assert full_shapes.made_once(folder, partial(make, fails=fails)) == folder
    assert {path.name for path in folder.iterdir()} == {"first", "second"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_cache_that_is_not_whole_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_models, "capture", lambda *_: INTERRUPTED_STATUS)
    with pytest.raises(RuntimeError, match="the student's cache: status 75"):
        list(gpu_models.student(tmp_path, CPU, tiny=True))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_the_second_attempt_has_the_memory_of_the_first(
    error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[weakref.ref[torch.nn.Module]] = []

    def attempt(recipe: Recipe, device: torch.device) -> Iterator[Figure]:
        if recipe.student.param_dtype == "float32":
            model = torch.nn.Linear(1, 1)
            first.append(weakref.ref(model))
            raise type(error)(*error.args)  # anew: what is raised holds its frames
        assert first[0]() is None
        yield Figure("in bf16", 1.0, "")

    monkeypatch.setattr(gpu_models, "capture", lambda *_: 0)
    monkeypatch.setattr(gpu_models, "_student", attempt)
    assert list(gpu_models.student(tmp_path, CPU, tiny=True)) == [Figure("in bf16", 1.0, "")]


def test_a_broken_package_of_others_costs_its_own_figures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "liger_kernel"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('made for another Triton')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    figures = list(gpu_loss.compare(CPU, tiny=True))
    assert len(figures) == 4
    assert all(figure.name.startswith("V 7,760, D 80, 128 positions") for figure in figures)
    told = capsys.readouterr().out
    assert told.count("left out: Liger") == told.count("made for another Triton") == 2


@pytest.mark.parametrize(
    ("name", "tera_flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", None),
    ],
)
def test_the_peak_is_that_of_the_card(
    name: str, tera_flops: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    peak = gpu_models.peak_flops(torch.device("cuda"))
    assert peak == (None if tera_flops is None else tera_flops * 1e12)


@pytest.mark.parametrize(
    "folder", ["student_folder", "teacher_folder"]
)  # embeddings tied to the head, and apart
def test_the_head_counts_at_answer_positions_alone(folder: str, request: pytest.FixtureRequest) -> None:
    model = AutoModelForImageTextToText.from_pretrained(request.getfixturevalue(folder))
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    others = sum(p.numel() for p in model.parameters() if p is not head and p is not embeddings)
    found = gpu_models.step_flops(model, num_tokens=100, num_positions=10)
    assert found == 6 * (others * 100 + head.numel() * 10)
    head.requires_grad_(False)
    assert gpu_models.step_flops(model, num_tokens=100, num_positions=10) == 6 * others * 100


def figures_of(name: str, *, is_whole: bool = True, count: int = 1) -> dict[str, Any]:
    figures = [{"name": f"time of {name}", "value": 2.0, "unit": "ms", "goal": 1.0}] * count
    return {"date": "2026-01-01", "seconds": 1.0, "is_whole": is_whole, "figures": figures}


def test_it_goes_on_where_it_was_and_tells_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []
    broken: dict[str, dict[str, Any] | None] = {
        "student": None,
        "capture": figures_of("capture", is_whole=False, count=2),
    }

    def in_own_process(name: str, out: Path, *, tiny: bool, limit_s: float) -> dict[str, Any] | None:
        assert 0 < limit_s <= 25 * 60
        ran.append(name)
        return broken.get(name, figures_of(name))

    monkeypatch.setattr(bench_gpu, "in_own_process", in_own_process)
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--tiny", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="failed or cut short: student, capture"):
        main()
    assert ran == list(PARTS)
    told = capsys.readouterr().out
    assert "| time of loss | 2 ms | 1 ms **missed** |" in told
    assert told.count("| time of capture |") == 2
    assert "| `capture` is not whole | | |" in told

    broken["capture"] = figures_of("capture", is_whole=False)
    with pytest.raises(SystemExit, match="failed or cut short: student, capture"):
        main()
    assert capsys.readouterr().out.count("| time of capture |") == 2  # more is known from before
    assert ran[len(PARTS) :] == ["student", "capture"]

    broken.clear()
    main()
    path = tmp_path / "tiny" / "bench-gpu.json"
    assert list(json.loads(path.read_text())["parts"])[-2:] == ["student", "capture"]
    assert "not whole" not in capsys.readouterr().out
    del ran[:]
    main()
    assert ran == []

    inputs = tmp_path / "tiny" / bench_gpu.INPUTS
    (inputs / "data").mkdir(parents=True)
    main()
    assert (inputs / "data").exists()
    path.write_text(path.read_text().replace("tiny shapes", "another"))
    main()
    assert ran == list(PARTS)  # of another machine: all again
    assert path.with_suffix(".old.json").exists()
    assert not inputs.exists()  # models and rows, too


def test_inputs_of_another_machine_are_made_anew_though_it_had_no_figures(tmp_path: Path) -> None:
    """It was killed in its first part, which had made them."""
    path, data = tmp_path / bench_gpu.NAME, tmp_path / bench_gpu.INPUTS / "data"
    for here, is_kept in ({"device": "one"}, False), ({"device": "one"}, True), ({"device": "other"}, False):
        data.mkdir(parents=True, exist_ok=True)
        assert bench_gpu.load(path, here) == {"machine": here, "parts": {}}
        assert data.exists() == is_kept


def test_a_part_that_is_left_out_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def in_own_process(name: str, out: Path, *, tiny: bool, limit_s: float) -> dict[str, Any]:
        ran.append(name)
        return figures_of(name, count=0)

    monkeypatch.setattr(bench_gpu, "in_own_process", in_own_process)
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--tiny", "--only", "tests", "--out", str(tmp_path)])
    main()
    main()
    assert ran == ["tests", "tests"]


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("place", ["here", "another machine"])
def test_figures_of_a_part_survive_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_whole: bool, place: str
) -> None:
    """The command was killed while the part ran; this time it brings nothing."""
    ran = []

    def in_own_process(name: str, out: Path, *, tiny: bool, limit_s: float) -> None:
        ran.append(name)

    out = tmp_path / "tiny"
    out.mkdir()
    monkeypatch.setattr(bench_gpu, "in_own_process", in_own_process)
    monkeypatch.setattr(bench_gpu, "machine", lambda *, tiny: machine)
    monkeypatch.setattr(bench_gpu, "table", str)
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--tiny", "--only", "loss", "--out", str(tmp_path)])
    machine = {"device": place}
    (out / "loss.json").write_text(json.dumps(figures_of("loss", is_whole=is_whole) | {"machine": machine}))
    machine = {"device": "here"}
    is_kept = place == "here"
    with contextlib.ExitStack() as stack:
        if not (is_kept and is_whole):
            stack.enter_context(pytest.raises(SystemExit, match="cut short: loss"))
        main()
    assert ran == ([] if is_kept and is_whole else ["loss"])
    kept = json.loads((out / "bench-gpu.json").read_text())["parts"] if is_kept else {}
    assert kept == ({"loss": figures_of("loss", is_whole=is_whole)} if is_kept else {})
    assert not (out / "loss.json").exists()


def test_the_products_are_made_in_the_memory_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU its rows are padded, which is faster for odd vocabularies; here they are padded by hand."""
    inputs = gpu_loss.Inputs.make(gpu_loss.Shape(101, 8, 20, 8), CPU)
    strides = []

    def padded(num_rows: int, num_ids: int, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(num_rows, num_ids + 11)

    def add_to_pieces_(pieces: list[torch.Tensor], logits_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
        strides.append(logits_CV.stride())
        torch.testing.assert_close(logits_CV, hidden_CD @ inputs.weight_VD.detach().t())

    monkeypatch.setattr(gpu_loss, "logits_buffer", padded)
    monkeypatch.setattr(gpu_loss, "add_to_pieces_", add_to_pieces_)
    gpu_loss.products(inputs)
    assert strides == [(112, 1)] * 3


def test_a_shape_that_does_not_fit_costs_its_own_figures_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_shape = gpu_loss.measure
    first, second = (gpu_loss.Shape(101, 8, num_positions) for num_positions in (20, 30))

    def without_memory(shape: gpu_loss.Shape, device: torch.device) -> Iterator[Figure]:
        if shape.num_positions == 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        yield from measure_shape(shape, device)

    monkeypatch.setattr(gpu_loss, "measure", without_memory)
    figures = list(gpu_loss.sweep([first, second], CPU, tiny=False))
    assert len(figures) == 4
    assert figures[0].name.startswith(f"{second} ")
    assert f"left out: {first}: CUDA out of memory. Tried to allocate\n" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError("wrong"), RuntimeError("an illegal memory access")])
def test_a_shape_that_fails_is_no_shape_that_does_not_fit(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(shape: gpu_loss.Shape, device: torch.device) -> Iterator[Figure]:
        raise error

    monkeypatch.setattr(gpu_loss, "measure", fails)
    with pytest.raises(type(error)):
        list(gpu_loss.sweep([gpu_loss.Shape(101, 8, 20)], CPU, tiny=False))


def test_figures_of_changed_code_are_not_those_of_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are those of one change those of another."""
    said = {"rev-parse": "1" * 40, "diff": ""}
    monkeypatch.setattr("tests.benchmarks.tables._git", lambda *words: said[words[0]])
    clean = bench_gpu.machine(tiny=True)
    assert "commit 111111111111\n" in bench_gpu.table({"machine": clean, "parts": {}})
    found = [clean]
    for said["diff"] in "one line", "another line":
        found.append(bench_gpu.machine(tiny=True))
        assert "commit 111111111111 with changes\n" in bench_gpu.table({"machine": found[-1], "parts": {}})
    assert all(one != other for one, other in itertools.combinations(found, 2))
    monkeypatch.setattr("tests.benchmarks.tables._git", lambda *_: None)
    assert "commit unknown\n" in bench_gpu.table({"machine": bench_gpu.machine(tiny=True), "parts": {}})


def test_the_time_of_a_step_is_known_before_workers_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def data_wait(step: object) -> float:
        raise OSError("no memory for workers")

    monkeypatch.setattr(gpu_models, "data_wait", data_wait)
    figures = gpu_models.student(tmp_path, CPU, tiny=True)
    found = [next(figures).name.split(": ")[-1] for _ in range(4)]
    assert found == ["distilling", "- against fine-tuning", "- tokens", "- answer positions"]
    with pytest.raises(OSError, match="no memory for workers"):
        next(figures)


def test_a_failure_late_in_a_part_keeps_the_figures_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(root: Path, device: torch.device, tiny: bool) -> Iterator[Figure]:
        yield Figure("early", 1.0, "ms")
        raise torch.OutOfMemoryError

    monkeypatch.setitem(PARTS, "loss", part)
    with pytest.raises(torch.OutOfMemoryError):
        measure("loss", tmp_path, tiny=True)
    found = json.loads((tmp_path / "loss.json").read_text())
    assert [figure["name"] for figure in found["figures"]] == ["early"]
    assert not found["is_whole"]


def test_a_part_that_hangs_ends_with_all_that_it_started() -> None:
    """A pipe is at its end when the last process that could write has ended."""
    read_end, write_end = os.pipe()
    begin = time.monotonic()
    with open(write_end) as file:
        assert not bench_gpu.run_at_most(["sh", "-c", "sleep 300 & sleep 300"], 0.5, stdout=file)
    with open(read_end) as file:
        assert file.read() == ""
    assert time.monotonic() - begin < 60
    assert bench_gpu.run_at_most(["false"], 60)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", None])
def test_memory_is_one_segment_unless_it_is_set(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in bench_gpu.ALLOCATOR:
        monkeypatch.delenv(one, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "backend:native")
    found = bench_gpu.environment(tiny=False)
    told = {key: value for key, value in found.items() if key in bench_gpu.ALLOCATOR}
    assert told == {
        name or "PYTORCH_CUDA_ALLOC_CONF": "backend:native" if name else "expandable_segments:True"
    }


def test_tiny_models_are_never_those_of_a_full_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []

    def in_own_process(name: str, out: Path, *, tiny: bool, limit_s: float) -> None:
        folders.append(out)

    monkeypatch.setattr(bench_gpu, "in_own_process", in_own_process)
    monkeypatch.setattr(bench_gpu, "machine", lambda *, tiny: {"device": f"tiny {tiny}"})
    monkeypatch.setattr(bench_gpu, "table", str)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for more in ["--tiny"], []:
        monkeypatch.setattr(sys, "argv", ["bench_gpu", "--only", "loss", "--out", str(tmp_path), *more])
        with pytest.raises(SystemExit, match="failed or cut short: loss"):
            main()
    assert folders == [tmp_path / "tiny", tmp_path / "full"]


def test_the_core_does_without_what_models_need() -> None:
    """A machine with a GPU may have little more than torch and Transformers: see the page of benchmarks."""
    packages = "datasets xdist PIL pyarrow zstandard rouge_score click jinja2 fsspec tqdm"
    code = f"import sys; sys.modules |= dict.fromkeys('{packages}'.split()); import torch"
    code += "; from tests.benchmarks.bench_gpu import measure, Path"
    subprocess.run([sys.executable, "-c", code], cwd=bench_gpu.ROOT, check=True)


@pytest.mark.slow
def test_the_files_with_gpu_tests_are_all_that_have_some() -> None:
    """The kernel's cases, which one of them runs, are marked as well: else pytest hides the GPU from them."""
    cases = "tests/kd_loss_kernel_cases.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "-m", "gpu"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTEST_ADDOPTS": ""}
    command += ["--keep-duplicates", "tests", cases]  # else a file is left out beside its folder
    done = subprocess.run(command, cwd=bench_gpu.ROOT, env=environment, capture_output=True, text=True)
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == {f"tests/{Path(file).name}" for file in bench_gpu.files_with_gpu_tests()} | {cases}


def test_without_pytest_its_part_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.executable", "false")  # as a Python without that package ends
    assert list(bench_gpu.run_tests(tmp_path, CPU, True)) == []
    assert "left out: pytest wrote no report (status 1); is the extra `test`" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no NVIDIA GPU here.*--tiny"):
        main()


def test_no_part_begins_when_the_minutes_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--tiny", "--minutes", "-1", "--out", str(tmp_path)])
    main()
    assert "minutes are over. The same command goes on with loss" in capsys.readouterr().out


def test_the_full_shapes_are_those_of_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself is not made: 9 GB."""
    folder = full_shapes.make_tokenizer(tmp_path / "tokenizer", num_ids=full_shapes.NUM_IDS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == full_shapes.NUM_IDS
    words = " ".join(full_shapes.WORDS)
    assert tokenizer.decode(tokenizer(words).input_ids) == words

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(full_shapes.config_of("4B", folder))
    num_parameters = sum(p.numel() for p in model.parameters())
    assert num_parameters == pytest.approx(4.5e9, rel=0.05)
    assert model.get_input_embeddings().weight.shape == (gpu_loss.QWEN, 2560)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")


def test_a_figure_beyond_its_goal_is_marked() -> None:
    assert str(Figure("time", 1.5, "ms", 1.0)) == "| time | 1.5 ms | 1 ms **missed** |"
    assert str(Figure("time", float("nan"), "ms", 1.0)).endswith("**missed** |")
    assert str(Figure("ratio", 1.0, "", 1.0)) == "| ratio | 1 | 1 |"
