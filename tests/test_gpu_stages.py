"""Both stages on an NVIDIA GPU, with small models in fp32: what they make is the CPU's, but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stage2_runs import make_recipe, step_records

from shared.cache import CacheReader
from shared.runtime import distributed
from shared.sparse import SparseTargets
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICE = "cuda"
FEW = 0.01  # of the drawn pairs: a draw near the edge of a token falls on the next one


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tower's convolution is computed in TF32."""
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)


def pairs(targets: SparseTargets) -> dict[tuple[int, int], float]:
    """The weight of each position's ids."""
    names = zip(targets.position_index.tolist(), targets.ids.tolist(), strict=True)
    return dict(zip(names, targets.weights(2.0).tolist(), strict=True))


def test_a_capture_is_the_cpus(
    distillation_tree: dict[str, Any], teacher_cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cache"
    tree = distillation_tree | {"cache": distillation_tree["cache"] | {"path": str(path), "num_workers": 0}}
    recipe = make_recipe(tree, run__name="unused")
    with distributed(device=DEVICE) as world:
        assert capture(recipe, world, StopRequest()) == 0
    there, here = CacheReader(str(path)), CacheReader(str(teacher_cache))
    keys = sorted(here.keys())
    assert sorted(there.keys()) == keys
    rows, wanted = there.rows(keys), here.rows(keys)
    assert [row.ce_sum for row in rows] == pytest.approx([row.ce_sum for row in wanted], rel=1e-3)
    found, want = pairs(there.targets(rows)), pairs(here.targets(wanted))
    assert len(found.keys() ^ want.keys()) <= FEW * len(want)
    differing = [
        pair for pair in found.keys() & want.keys() if found[pair] != pytest.approx(want[pair], rel=0.05)
    ]
    assert len(differing) <= FEW * len(want)


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_a_step_is_the_cpus(distillation_tree: dict[str, Any], cpu_offload: bool, tmp_path: Path) -> None:
    options = {"root": str(tmp_path), "num_workers": 0, "export": False}
    records = []
    for device in ("cpu", DEVICE):
        recipe = make_recipe(
            distillation_tree | {"run": options | {"name": device}},
            optimization__max_steps=1,
            parallel__cpu_offload=cpu_offload and device == DEVICE,
        )
        with distributed(device=device) as world:
            assert train(recipe, world, resume=False) == 0
        records += step_records(recipe)
    here, there = records
    for name in ("loss", "ce_loss", "kd_loss", "grad_norm"):
        assert there[name] == pytest.approx(here[name], rel=1e-3), name
