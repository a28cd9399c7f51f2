"""Twenty steps of distillation give the losses they always gave.

The losses are stored in full precision by version of torch.  On the kind of processor they were recorded on they
must come out to some last bits: two machines that describe their processor alike differed by 2.5e-7 nats, since
libraries also choose kernels by what they measure.  Another kind may round otherwise.  After a change that is meant
to move them:

    RENEW_GOLDEN_LOSSES=1 python -m pytest tests/test_stage2_golden.py
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from stage2_runs import make_recipe, run_alone, step_records, teacher_of

GOLDEN = Path(__file__).with_name("golden_losses.json")
NUM_STEPS = 20


def processor_kind() -> str:
    """Model, stepping and instruction sets: libraries choose their kernels by these, and so their rounding."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else [platform.platform()]
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
    facts = [line for line in lines if line.partition("\t")[0].rstrip() in names or len(lines) == 1]
    digest = hashlib.blake2b("\n".join(facts).encode(), digest_size=8).hexdigest()
    return f"{torch.backends.cpu.get_cpu_capability()}, {digest}"


def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def test_losses_of_twenty_steps(
    tmp_path: Path, vqa_folder: Path, student_folder: Path, teacher_cache: Path
) -> None:
    recipe = make_recipe(
        {
            "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
            "teacher": teacher_of(teacher_cache),
            "cache": {"path": str(teacher_cache), "temperatures": [1.0, 2.0]},
            "student": {"model": str(student_folder), "compute_dtype": "float32"},
            "loss": {"kd_ratio": 0.5, "chunk_size": 16},
            "optimization": {
                "global_batch_size": 4,
                "microbatch_size": 2,
                "max_steps": NUM_STEPS,
                "learning_rate": 3e-3,
                "num_warmup_steps": 4,
            },
            "run": {"name": "golden", "root": str(tmp_path), "num_workers": 0, "export": False},
        }
    )
    assert run_alone(recipe) == 0
    names = ("loss", "ce_loss", "kd_loss", "grad_norm")
    found = {name: [record[name] for record in step_records(recipe)] for name in names}
    stored, version = golden(), torch.__version__.partition("+")[0]
    if os.environ.get("RENEW_GOLDEN_LOSSES"):
        stored[version] = {"processor": processor_kind(), **found}
        GOLDEN.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
    if version not in stored:
        pytest.skip(f"no losses recorded for torch {version}; RENEW_GOLDEN_LOSSES=1 records them")
    expected = stored[version]
    tolerance = 1e-5 if expected["processor"] == processor_kind() else 1e-3
    for name in names:
        assert len(found[name]) == NUM_STEPS
        assert found[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
