"""The Triton kernel: in Triton's interpreter on a CPU, on a GPU, and compiled without one.

Triton comes with the CUDA builds of PyTorch, and for other builds with the extra ``test``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

CASES = Path(__file__).with_name("kd_loss_kernel_cases.py")
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]


def run(arguments: list[str], **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def test_cases_in_the_interpreter() -> None:
    """The CUDA builds of torch 2.11 want Triton 3.6, so the extra `test` takes it."""
    import triton  # which not every machine has

    if release(triton.__version__) < (3, 7) and release(np.__version__) >= (2, 4):
        pytest.skip(
            "the interpreter of Triton 3.6 makes numbers of arrays in a way that NumPy 2.4 no longer knows"
        )
    run([*PYTEST, str(CASES)], TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cases_on_the_gpu() -> None:
    run([*PYTEST, "-m", "gpu", str(CASES)], TRITON_INTERPRET="0")


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from shared.kd_loss.triton_bucket import _bucket_kernel as bucket
from shared.kd_loss.triton_kernel import _chunk_kernel as linear

TYPES = {"labels_ptr": "*i64", "first": "i32", "num_ids": "i32", "row_width": "i32", "num_vocab_ids": "i32",
         "row_stride": "i32", "kd_ratio": "fp32", "temperature": "fp32", "softcap": "fp32", "reverse_kl": "fp32",
         "beta": "fp32"}
ALIGNED = ("logits_ptr", "row_stride", "row_width")  # num_ids need not be: a row is padded in memory
ASSEMBLERS = sorted(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*"))
BOTH = ["HAS_WEIGHTS", "HAS_DRAWN", "HAS_RATIOS"]
LINEAR = [*BOTH, "HAS_TEACHER", "HAS_SPREAD", "HAS_SOFTCAP", "IS_SOFTENED", "WITH_GRAD"]
BUCKET = [*BOTH, "HAS_FACTOR", "HAS_SOFTCAP", "IS_SOFTENED", "KIND", "WITH_GRAD"]

def assembled(ptx, capability):
    for assembler in ASSEMBLERS:
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            Path(file.name).write_text(ptx)
            target = re.search(r"\\.target (sm_\\w+)", ptx)[1]
            command = [assembler, "-v", "--gpu-name", target, file.name, "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout + done.stderr
    raise AssertionError(done.stderr)

def check(kernel, logits, flags, values, has_entries):
    constants = dict(zip(flags, values)) | {"BLOCK": 8192, "ENTRY_BLOCK": 128}
    with_grad = constants["WITH_GRAD"]
    entries = "*i64" if has_entries else "*fp32"
    types = TYPES | {"logits_ptr": logits, "offsets_ptr": entries, "ids_ptr": entries}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
    constants = {(names.index(n),): v for n, v in constants.items()}
    divided = {(names.index(n),): [["tt.divisibility", 16]] for n in ALIGNED}
    source = ASTSource(kernel, signature, constants, divided)
    for capability in (80, 90):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16})
        ptx = compiled.asm["ptx"]
        told = assembled(ptx, capability)
        registers = int(re.search(r"Used (\\d+) registers", told)[1])
        spilled = re.findall(r"([1-9]\\d*) bytes spill", told)
        print(kernel.__name__, capability, logits, values, registers, "registers", spilled, "spilled")
        assert not spilled, told
        # Of 65,536 registers two programs of bf16 rows, 512 threads each, have theirs at once; of fp32 rows one.
        assert registers <= (64 if logits == "*bf16" else 96), told
        passes = 1 + with_grad  # each goes over the row in pieces of 16 bytes
        assert len(re.findall(r"ld\\.global\\.v4", ptx)) >= 2 * passes, ptx
        assert len(re.findall(r"st\\.global\\.v4", ptx)) >= 2 * with_grad, ptx

for logits, ordinary, kinds in (("*bf16", ("10010001", "10000001"), range(4)), ("*fp32", (), ())):
    for on in (*ordinary, "11111111", "00000000"):
        check(linear, logits, LINEAR, [one == "1" for one in on], has_entries=on[3] == "1")
    for kind in kinds:
        check(bucket, logits, BUCKET, [True, False, False, False, False, False, kind, True], has_entries=True)
    check(bucket, logits, BUCKET, [True, True, True, True, True, True, 2, True], has_entries=True)
    check(bucket, logits, BUCKET, [False, False, False, False, False, False, 0, False], has_entries=True)
"""


@pytest.mark.slow
def test_compiles_without_a_gpu(tmp_path: Path) -> None:
    """For Ampere and Hopper, with the most and the fewest options: few registers, no spills, 16 bytes at once."""
    run(["-c", COMPILE], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


LAUNCH = """
import torch
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, create_function_from_signature
from shared.kd_loss import FORWARD_KL, triton_kernel
from shared.kd_loss.teacher import sparse_teacher
from shared.kd_loss.tile import LossSettings
from shared.recipes.policies import TopK
from shared.sparse import position_seeds, sparsify

BACKEND = backends["nvidia"].compiler(GPUTarget("cuda", 90, 32))
NUM_POSITIONS, NUM_IDS = 60, 32
kinds = []

def launch(kernel, *arguments, grid, warmup, **options):
    binder = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    kinds.append(str(binder(*arguments, **options)[1]))

JITFunction.run = launch
seeds_N = position_seeds(0, b"key", NUM_POSITIONS)
targets = sparsify(torch.randn(NUM_POSITIONS, NUM_IDS).log_softmax(-1), TopK(k=3), seeds=seeds_N)
labels_N, floats_N = torch.zeros(NUM_POSITIONS, dtype=torch.int64), torch.zeros(NUM_POSITIONS)
for tail in "uniform", "ghost":
    teacher = sparse_teacher(
        targets, temperature=1.0, divergence=FORWARD_KL, tail=tail, num_vocab_ids=NUM_IDS, dtype=torch.float32
    )
    del kinds[:]
    for size in 16, 7, 1:
        for start in range(0, NUM_POSITIONS - size, size):
            some = slice(start, start + size)
            logits_CV = torch.zeros(16, NUM_IDS, dtype=torch.bfloat16)[:size]
            triton_kernel.chunk_loss_(
                logits_CV, labels_N[some], floats_N[some], teacher, start, LossSettings(0.5, 1.0, NUM_IDS),
                with_grad=True, label_logprobs_C=floats_N[some], kd_ratios_C=floats_N[some],
            )
    assert len(kinds) > 50, len(kinds)
    assert len(set(kinds)) == 1, "\\n".join(sorted(set(kinds)))
"""


def test_no_chunk_s_size_or_start_compiles_anew() -> None:
    """Labels and weights of a chunk begin where its positions do, which need not be where 16 bytes do."""
    run(["-c", LAUNCH], TRITON_INTERPRET="0")
