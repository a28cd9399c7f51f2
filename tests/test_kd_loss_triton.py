"""The Triton kernel: in Triton's interpreter on a CPU, on a GPU, and compiled without one.

Triton comes with the CUDA builds of PyTorch, and for other builds with the extra ``test``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("kd_loss_kernel_cases.py")


def run(arguments: list[str], **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_cases_in_the_interpreter() -> None:
    run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)], TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cases_on_the_gpu() -> None:
    run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)], TRITON_INTERPRET="0")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from shared.kd_loss.triton_kernel import _chunk_kernel as kernel

FLAGS = ["HAS_WEIGHTS", "HAS_TEACHER", "HAS_SPREAD", "HAS_SOFTCAP", "IS_SOFTENED", "WITH_GRAD"]
TYPES = {"labels_ptr": "*i64", "num_ids": "i32", "num_vocab_ids": "i32", "row_stride": "i32",
         "kd_ratio": "fp32", "temperature": "fp32", "softcap": "fp32"}
for logits in ("*bf16", "*fp32"):
    for on in ([1, 1, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]):
        constants = dict(zip(FLAGS, map(bool, on))) | {"BLOCK": 8192, "ENTRY_BLOCK": 128}
        entries = "*i64" if on[1] else "*fp32"
        types = TYPES | {"logits_ptr": logits, "offsets_ptr": entries, "ids_ptr": entries}
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
        source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()})
        for capability in (80, 90):
            triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16})
"""


@pytest.mark.slow
def test_compiles_without_a_gpu(tmp_path: Path) -> None:
    """For Ampere and Hopper, with the most and the fewest options."""
    run(["-c", COMPILE], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
