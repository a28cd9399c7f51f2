"""Quantised folders: never without their scales, refused where a package is missing, not left behind in exports."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from stage2_runs import make_recipe, on_ranks, run_alone, step_records
from transformers import AutoModelForImageTextToText

from shared.cache import CacheReader
from shared.errors import RecipeError
from shared.models.plans import has_plans
from shared.models.quantized import PACKAGES
from shared.models.sharding import fill
from shared.models.vlm import empty_vlm, load_config, load_vlm
from shared.recipes import Recipe
from shared.runtime import World
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage1_teacher.check import check_recipe as check_teacher
from stage2_student.__main__ import commands
from stage2_student.check import check_recipe as check_student
from stage2_student.train import train

BLOCK = 32
ORDINARY = ["lm_head", "visual", "linear_attn.conv1d", "linear_attn.in_proj_a", "linear_attn.in_proj_b"]


def fp8_of(folder: Path, out: Path) -> Path:
    """The folder with the linear layers of the language model in FP8, each block of 32 x 32 with its scale."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for name in list(tensors):
        if "proj" in name and name.endswith("weight") and not any(part in name for part in ORDINARY):
            tensors |= in_fp8(name, tensors.pop(name))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    say_quantized(
        out, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    )
    return out


def in_fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.float().reshape(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448  # the largest number of float8_e4m3fn
    packed = (blocks / scale).reshape(weight.shape).to(torch.float8_e4m3fn)
    return {name: packed, f"{name}_scale_inv": scale.reshape(rows, columns)}


def say_quantized(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings | {"modules_to_not_convert": ORDINARY}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def fp8_student(tmp_path_factory: pytest.TempPathFactory, student_folder: Path) -> Path:
    return fp8_of(student_folder, tmp_path_factory.mktemp("fp8") / "student")


@pytest.fixture(scope="module")
def fp8_teacher(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    return fp8_of(teacher_folder, tmp_path_factory.mktemp("fp8") / "teacher")


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, student_folder: Path, teacher_folder: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64, "limit": 4},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(tmp_path / "cache"), "num_workers": 0},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "loss": {"kd_ratio": 0.0},
        "optimization": {"global_batch_size": 4, "microbatch_size": 2, "max_steps": 1, "learning_rate": 1e-4},
        "run": {"name": "run", "root": str(tmp_path / "runs"), "num_workers": 0},
    }


def loaded(folder: Path, **options: Any) -> Any:
    return load_vlm(str(folder), revision=None, dtype=torch.float32, attn_implementation=None, **options)


def test_a_dequantised_model_is_near_the_ordinary_one(fp8_student: Path, student_folder: Path) -> None:
    found, ordinary = loaded(fp8_student, dequantize=True), loaded(student_folder)
    assert found.state_dict().keys() == ordinary.state_dict().keys()
    for name, weight in ordinary.state_dict().items():
        assert found.state_dict()[name].dtype == weight.dtype
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=0.07, atol=2e-3, msg=name)
    assert not hasattr(found.config, "quantization_config")
    stored = load_file(fp8_student / "model.safetensors")
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values()) > 5


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_quantised_student_is_trained_and_exported_as_an_ordinary_model(
    tree: dict[str, Any], fp8_student: Path, num_ranks: int
) -> None:
    ordinary = make_recipe(tree, run__name="ordinary")
    recipe = make_recipe(tree, student__model=str(fp8_student))
    assert run_alone(ordinary) == 0
    assert on_ranks(num_ranks, lambda world: train(recipe, world, resume=False)) == [0] * num_ranks
    (ours,), (theirs,) = step_records(recipe), step_records(ordinary)
    assert ours["ce_loss"] == pytest.approx(theirs["ce_loss"], rel=0.02)
    export = recipe.run.path / "export"
    assert "quantization_config" not in json.loads((export / "config.json").read_text())
    opened, info = AutoModelForImageTextToText.from_pretrained(export, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {p.dtype for p in opened.parameters()} == {torch.float32}


def test_a_quantised_teacher_answers_beside_its_student(
    tree: dict[str, Any], fp8_student: Path, fp8_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(
        tree,
        teacher__model=str(fp8_teacher),
        student__model=str(fp8_student),
        evaluation__max_examples=2,
        evaluation__max_new_tokens=4,
    )
    assert run_alone(recipe) == 0
    assert "are made ordinary ones as they are loaded" in capsys.readouterr().out
    done = CliRunner().invoke(
        commands, ["evaluate", str(recipe.run.path), "--json"], standalone_mode=False, catch_exceptions=False
    )
    assert [one["model"] for one in json.loads(done.stdout)] == ["student", "teacher", "untrained"]


@pytest.mark.parametrize(
    "shared",
    [{}, {"teacher__shard": True}, *([{"teacher__tensor": 2}] if has_plans() else [])],
    ids=lambda shared: next(iter(shared), "whole"),
)
def test_a_quantised_teacher_is_captured_alike_whole_and_shared(
    tree: dict[str, Any], tmp_path: Path, fp8_teacher: Path, shared: dict[str, Any]
) -> None:
    ordinary = make_recipe(tree)
    recipe = make_recipe(tree, teacher__model=str(fp8_teacher), cache__path=str(tmp_path / "fp8"), **shared)
    assert captured(ordinary, 1) == [0]
    assert captured(recipe, 2 if shared else 1) == [0] * (2 if shared else 1)
    assert ce_of(recipe) == pytest.approx(ce_of(ordinary), rel=0.02)


def captured(recipe: Recipe, num_ranks: int) -> list[int]:
    return on_ranks(num_ranks, lambda world: capture(recipe, world, StopRequest()))


def ce_of(recipe: Recipe) -> list[float]:
    assert recipe.cache is not None
    reader = CacheReader(recipe.cache.path)
    return [row.ce_sum for row in reader.rows(sorted(reader.keys()))]


def test_weights_without_their_scales_are_never_shared(fp8_student: Path) -> None:
    """On all ranks the same error, whatever the mistake was that led there."""

    def shared_out(world: World) -> str:
        model = empty_vlm(load_config(str(fp8_student)), dtype=torch.bfloat16, attn_implementation=None)
        model.to_empty(device="cpu")
        source = None
        if world.is_main:
            source = empty_vlm(load_config(str(fp8_student)), dtype=torch.bfloat16, attn_implementation=None)
            source.to_empty(device="cpu")
            layer = source.get_submodule("model.language_model.layers.0.mlp.up_proj")
            layer.register_parameter("weight_scale_inv", torch.nn.Parameter(torch.ones(2, 2)))
        fill(model, source, world)
        return "filled"

    found = on_ranks(2, shared_out, errors=True)
    assert all("up_proj.weight_scale_inv of shape (2, 2) has no place" in str(error) for error in found)


@pytest.mark.parametrize(
    ("settings", "hidden", "named"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "gptqmodel", "gptqmodel"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "optimum", "optimum"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes", "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed_tensors", "compressed-tensors"),
        ({"quant_method": "vptq"}, "vptq", "vptq"),  # of which Transformers alone knows what it needs
    ],
)
def test_a_missing_package_is_named(
    tree: dict[str, Any],
    tmp_path: Path,
    student_folder: Path,
    settings: dict[str, Any],
    hidden: str,
    named: str,
    hide: Callable[[str], None],
) -> None:
    """By ``check`` of both stages, by the capture and by training, each in one message."""
    hide(hidden)
    folder = tmp_path / "quantised"
    shutil.copytree(student_folder, folder)
    say_quantized(folder, settings)
    as_teacher = make_recipe(tree, teacher__model=str(folder))
    as_student = make_recipe(tree, student__model=str(folder))
    problems = [
        *check_teacher(as_teacher, num_ranks=1).problems,
        *check_student(as_student, num_ranks=1).problems,
    ]
    assert len(problems) == 2
    for problem in problems:
        assert "its weights are quantised" in problem
        assert named in problem.partition("quantised")[2]
        assert "pip install" in problem
    with pytest.raises(RecipeError, match=named):
        run_alone(as_student)
    with pytest.raises(RecipeError, match=named):
        captured(as_teacher, 1)


def test_weights_that_nothing_can_read_are_refused(
    tree: dict[str, Any], tmp_path: Path, fp8_teacher: Path
) -> None:
    """Transformers warns of a method that it does not know, and takes the weights without their scales."""
    folder = shutil.copytree(fp8_teacher, tmp_path / "unknown")
    say_quantized(folder, {"quant_method": "modelopt"})
    recipe = make_recipe(tree, teacher__model=str(folder), student__model=str(folder))
    refused = r"quantised \(modelopt\), which this version of Transformers does not know"
    for problems in (
        check_teacher(recipe, num_ranks=1).problems,
        check_student(recipe, num_ranks=1).problems,
    ):
        assert [one for one in problems if re.search(refused, one)]
    for dequantize in (False, True):
        with pytest.raises(RecipeError, match=refused):
            loaded(folder, dequantize=dequantize)


@pytest.mark.parametrize("stage", ["student", "teacher"])
def test_what_is_dequantised_is_told(
    tree: dict[str, Any], fp8_student: Path, fp8_teacher: Path, stage: str
) -> None:
    if stage == "student":
        facts = check_student(make_recipe(tree, student__model=str(fp8_student)), num_ranks=1).facts
    else:
        recipe = make_recipe(tree, teacher__model=str(fp8_teacher), teacher__shard=True)
        facts = check_teacher(recipe, num_ranks=2).facts
    assert [value for _, value in facts if "quantised (fp8)" in value and "made ordinary" in value]


def test_four_bits_of_bitsandbytes(tree: dict[str, Any], tmp_path: Path, student_folder: Path) -> None:
    """As a teacher whole, as a student dequantised; quantised by the library itself."""
    from transformers import BitsAndBytesConfig

    refused = tmp_path / "refused"
    shutil.copytree(student_folder, refused)
    AutoModelForImageTextToText.from_pretrained(
        student_folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.float32
    ).save_pretrained(refused)
    if not torch.cuda.is_available():  # kernels of some CPUs ask for wider layers than the tower's
        whole = make_recipe(tree, teacher__model=str(refused), cache__path=str(tmp_path / "whole"))
        (found,) = on_ranks(1, lambda world: capture(whole, world, StopRequest()), errors=True)
        assert found == 0 or "their library cannot run them on cpu" in str(found)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=["lm_head", "model.visual", "in_proj_a", "in_proj_b"]
    )
    folder = tmp_path / "four-bits"
    shutil.copytree(student_folder, folder)
    (folder / "model.safetensors").unlink()
    quantised = AutoModelForImageTextToText.from_pretrained(
        student_folder, quantization_config=four_bits, dtype=torch.float32
    )
    quantised.save_pretrained(folder)
    recipe = make_recipe(tree, teacher__model=str(folder), student__model=str(folder))
    assert captured(recipe, 1) == [0]
    assert run_alone(recipe) == 0
    ordinary = make_recipe(tree, run__name="ordinary")
    assert run_alone(ordinary) == 0
    (ours,), (theirs,) = step_records(recipe), step_records(ordinary)
    assert ours["ce_loss"] == pytest.approx(theirs["ce_loss"], rel=0.1)
    assert "quantization_config" not in json.loads((recipe.run.path / "export" / "config.json").read_text())


# --- four bits by other libraries, which a CPU can run too ------------------------------------------------

GROUP = 32  # inputs that share a scale
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "in_proj_qkv",
    "in_proj_z",
    "in_proj_a",
    "in_proj_b",
)
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # in which eight outputs lie in a number of 32 bits


@dataclass(frozen=True)
class Rounded:
    """A linear layer's weights in 16 steps: integers (in, out), for each group the scale, and what stands for 0."""

    steps_IO: torch.Tensor
    scales_GO: torch.Tensor
    zero: int = 8

    @classmethod
    def of(cls, weight_OI: torch.Tensor) -> Rounded:
        groups = weight_OI.T.reshape(-1, GROUP, len(weight_OI))
        scales_GO = (groups.abs().amax(1) / 7).half()
        steps = (groups / scales_GO.float()[:, None]).round().clamp(-8, 7) + 8
        return cls(steps.reshape(-1, len(weight_OI)).int(), scales_GO)

    @property
    def weight_OI(self) -> torch.Tensor:
        """As a plain layer has it."""
        scales_IO = self.scales_GO.float().repeat_interleave(GROUP, 0)
        return ((self.steps_IO - self.zero) * scales_IO).T.contiguous()

    @property
    def zeros_GO(self) -> torch.Tensor:
        return torch.full(self.scales_GO.shape, self.zero, dtype=torch.int32)


def eight_in_one(values: torch.Tensor, order: Sequence[int] = range(8)) -> torch.Tensor:
    """(R, 8 * C) of four bits as (R, C) of 32."""
    parts = values.reshape(len(values), -1, 8)[:, :, list(order)].long()
    packed = (parts << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def as_gptq(one: Rounded) -> dict[str, torch.Tensor]:
    return {
        "qweight": eight_in_one(one.steps_IO.T.contiguous()).T.contiguous(),
        "qzeros": eight_in_one(one.zeros_GO - 1),
        "scales": one.scales_GO,
        "g_idx": torch.arange(len(one.steps_IO), dtype=torch.int32) // GROUP,
    }


def as_awq(one: Rounded) -> dict[str, torch.Tensor]:
    return {
        "qweight": eight_in_one(one.steps_IO, AWQ_ORDER),
        "qzeros": eight_in_one(one.zeros_GO, AWQ_ORDER),
        "scales": one.scales_GO,
    }


def as_compressed(one: Rounded) -> dict[str, torch.Tensor]:
    return {
        "weight_packed": eight_in_one(one.steps_IO.T.contiguous()),
        "weight_scale": one.scales_GO.T.float().contiguous(),
        "weight_shape": torch.tensor(one.weight_OI.shape),
    }


FOUR_BITS: dict[str, tuple[Callable[[Rounded], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "gptq": (
        as_gptq,
        {"bits": 4, "group_size": GROUP, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
        | {"backend": "gptq_torch"}  # others are compiled when they are first used
        | {"block_name_to_quantize": "model.language_model.layers"}
        | {"modules_in_block_to_quantize": [[name] for name in MLP]},
    ),
    "awq": (
        as_awq,
        {"bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True, "backend": "torch_awq"}
        | {"modules_to_not_convert": ["lm_head", "model.visual", *ATTENTION]},
    ),
    "compressed-tensors": (
        as_compressed,
        {
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head", "re:.*visual.*", "re:.*_attn.*"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "type": "int", "symmetric": True}
                    | {"strategy": "group", "group_size": GROUP},
                }
            },
        },
    ),
}


def in_four_bits(folder: Path, out: Path, method: str | None) -> Path:
    """The folder with the layers behind attention rounded to 16 steps; None: as ordinary weights."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if name.endswith(tuple(f"{part}.weight" for part in MLP))]:
        one, layer = Rounded.of(tensors.pop(name).float()), name.removesuffix(".weight")
        if method is None:
            tensors[name] = one.weight_OI
        else:
            tensors |= {f"{layer}.{part}": value for part, value in FOUR_BITS[method][0](one).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    if method is not None:
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method} | FOUR_BITS[method][1]
        (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("method", FOUR_BITS)
def test_a_teacher_in_four_bits_is_captured_as_its_rounded_weights_are(
    tree: dict[str, Any], tmp_path: Path, teacher_folder: Path, method: str
) -> None:
    """Where the library is installed; it is not trained, sharded or merged unless it can be made ordinary."""
    missing = [package for package in PACKAGES[method] if importlib.util.find_spec(package) is None]
    if missing:  # not imported here: forks would wait for the locks of its threads
        pytest.skip(f"needs {' and '.join(missing)}")
    rounded = in_four_bits(teacher_folder, tmp_path / "rounded", None)
    folder = in_four_bits(teacher_folder, tmp_path / "packed", method)
    ordinary = make_recipe(tree, teacher__model=str(rounded))
    recipe = make_recipe(tree, teacher__model=str(folder), cache__path=str(tmp_path / "four"))
    with torch.compiler.set_stance("force_eager"):  # libraries compile their layers, for a minute
        assert captured(ordinary, 1) == [0]
        assert captured(recipe, 1) == [0]
    assert ce_of(recipe) == pytest.approx(ce_of(ordinary), rel=2e-3)
    if method == "compressed-tensors":
        found, wanted = (loaded(one, dequantize=True).state_dict() for one in (folder, rounded))
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    else:
        (error,) = on_ranks(1, lambda _: loaded(folder, dequantize=True), errors=True)
        assert re.search(r"quantised.*cannot be made ordinary ones", str(error))
