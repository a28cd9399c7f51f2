"""The benchmark of other ways to distil: each method's own promises, and all of it with small random models."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.models.vlm import Head
from tests.benchmarks import bench_peers, student_runs, tables
from tests.benchmarks.bench_loss import status_bytes
from tests.benchmarks.peers.hidden_states import HiddenStates, ce_kd_with_head
from tests.benchmarks.peers.live import MODULES, Package, is_installed, liger_losses, trl_kd
from tests.benchmarks.peers.method import plain_weight
from tests.benchmarks.peers.polynomial import Polynomial, pack, unpack
from tests.benchmarks.peers.store import ONCE, Store
from tests.benchmarks.student_results import LABELS, LIVE, done
from tests.benchmarks.student_runs import Job, Memory, run

# --- log-probs on a polynomial ---------------------------------------------------------------------------


def logprobs_of(num_positions: int, num_ids: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(num_positions, num_ids, generator=generator)).log_softmax(-1)


@pytest.mark.parametrize(("num_bits", "num_ids"), [(1, 1), (11, 5), (11, 8), (18, 50)])
def test_packed_ids_come_back(num_bits: int, num_ids: int) -> None:
    ids = torch.randint(2**num_bits, (7, num_ids), generator=torch.Generator().manual_seed(0))
    ids[0] = 2**num_bits - 1
    packed = pack(ids, num_bits)
    assert packed.shape == (7, (num_bits * num_ids + 7) // 8)
    torch.testing.assert_close(unpack(packed, num_bits, num_ids), ids, rtol=0, atol=0)


@pytest.mark.parametrize(("make", "size"), [(Polynomial.budget, 114), (Polynomial.recommended, 312)])
def test_positions_take_the_bytes_that_distillkit_names(make: Any, size: int) -> None:
    """With ids of 16 bits: its "around 114", and its "~300"."""
    columns = make(2**16).compress(logprobs_of(3, 2**16))
    assert sum(column.element_size() * column[0].numel() for column in columns.values()) == size


def test_log_probs_on_such_a_curve_come_back() -> None:
    method = Polynomial(20, 4, (0, 1, 0.5), num_ids=100)
    places = np.arange(16)
    curve = -3 - 0.2 * places - 0.3 * np.sqrt(places)
    logprobs = torch.full((2, 100), -30.0)
    logprobs[:, 50:54] = torch.tensor([-0.5, -1.0, -1.5, -2.0])  # bf16 has these
    logprobs[:, 60:76] = torch.from_numpy(curve).float()
    ids, found = method.decompress(method.compress(logprobs))
    torch.testing.assert_close(ids, torch.tensor([*range(50, 54), *range(60, 76)]).repeat(2, 1))
    torch.testing.assert_close(found, logprobs.gather(1, ids), rtol=0, atol=1e-5)


def test_others_are_as_near_as_the_best_curve() -> None:
    """That of another least-squares solver; the exact ones are off by a rounding to bf16 at most."""
    method = Polynomial.recommended(500)
    logprobs = logprobs_of(6, 500)
    top, places = logprobs.topk(128)
    ids, found = method.decompress(method.compress(logprobs))
    torch.testing.assert_close(ids, places)
    torch.testing.assert_close(found[:, :16], top[:, :16], rtol=2**-8, atol=0)
    t = np.arange(112.0)
    terms = np.stack([np.ones_like(t), t, t**2, t**3, t**4, np.sqrt(t)], 1)
    rest = top[:, 16:].double().numpy().T
    best = terms @ np.linalg.lstsq(terms, rest, rcond=None)[0]
    np.testing.assert_allclose(found[:, 16:].numpy().T, best, atol=1e-4)


def test_targets_have_ascending_ids_and_their_log_probs() -> None:
    method = Polynomial(8, 2, (0, 1), num_ids=50)
    columns = method.compress(logprobs_of(3, 50))
    targets = method.targets(columns)
    ids, logprobs = method.decompress(columns)
    for position in range(3):
        rows = slice(int(targets.offsets[position]), int(targets.offsets[position + 1]))
        expected = dict(zip(ids[position].tolist(), logprobs[position].tolist(), strict=True))
        assert dict(zip(targets.ids[rows].tolist(), targets.logprobs[rows].tolist(), strict=True)) == expected
        assert targets.ids[rows].tolist() == sorted(expected)


# --- hidden states ---------------------------------------------------------------------------------------


class Case:
    """Two models' hidden states of 13 positions, their heads of 29 ids, and labels."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden, self.teacher = (torch.randn(13, size, generator=generator) for size in (6, 10))
        self.weight, self.teacher_weight = (torch.randn(29, size, generator=generator) for size in (6, 10))
        self.labels = torch.randint(29, (13,), generator=generator)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    def eager(self, kd_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.hidden @ self.weight.t()
        ce = F.cross_entropy(logits, self.labels, reduction="sum")
        p = (self.teacher @ self.teacher_weight.t()).softmax(-1)
        kd = (p * (p.log() - logits.log_softmax(-1))).sum()
        return (1 - kd_ratio) * ce + kd_ratio * kd, ce, kd

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss / 7, [self.hidden, self.weight])

    def require_equal(self, found: tuple[Tensor, Tensor, Tensor], kd_ratio: float) -> None:
        expected = self.eager(kd_ratio)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(self.gradients(found[0]), self.gradients(expected[0]))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight, self.labels, self.teacher, self.teacher_weight


@pytest.mark.parametrize("chunk_size", [1, 5, 13, 64])
@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
def test_hidden_states_in_fp32_give_the_live_loss(chunk_size: int, kd_ratio: float) -> None:
    case = Case()
    case.require_equal(ce_kd_with_head(*case.inputs, kd_ratio=kd_ratio, chunk_size=chunk_size), kd_ratio)


def test_what_is_stored_is_off_by_its_rounding() -> None:
    hidden = (
        torch.randn(40, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 40)[:, None]
    )
    hidden[0] = 0

    def back(form: Any) -> Tensor:
        method = HiddenStates(form)
        return method.targets(method.compress(hidden)).float()

    torch.testing.assert_close(back("fp32"), hidden, rtol=0, atol=0)
    torch.testing.assert_close(back("bf16"), hidden, rtol=2**-8, atol=0)
    half_a_step = hidden.abs().amax(1, keepdim=True) / 127 / 2
    assert ((back("int8") - hidden).abs() <= half_a_step * (1 + 1e-5)).all()


def test_a_head_that_is_more_than_a_matrix_is_refused() -> None:
    linear = torch.nn.Linear(3, 5, bias=False)
    assert plain_weight(Head(linear), 4).shape == (4, 3)
    for head in (Head(torch.nn.Linear(3, 5)), Head(linear, scale=2.0), Head(linear, softcap=30.0)):
        with pytest.raises(ValueError, match="bias, a scale or a softcap"):
            plain_weight(head, 5)


# --- packages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", MODULES)
def test_the_loss_of_a_package_is_the_live_loss_and_a_missing_one_is_named(
    package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_installed(package) == (f"{LIVE}, {package}" in dict(bench_peers.packages()))
    if not is_installed(package):
        assert f"left out: {MODULES[package]} is not installed" in capsys.readouterr().out
        return
    case = Case()
    if package == "liger":
        case.require_equal(liger_losses(*case.inputs, kd_ratio=0.3, chunk_size=4), 0.3)
    else:
        logits, teacher = case.hidden @ case.weight.t(), case.teacher @ case.teacher_weight.t()
        kd = trl_kd()(logits, teacher)
        case.require_equal((kd, *case.eager(1.0)[1:]), 1.0)


# --- the store -------------------------------------------------------------------------------------------


def test_positions_are_read_by_the_key_of_their_example(tmp_path: Path) -> None:
    keys = np.arange(48, dtype=np.uint8).reshape(3, 16)
    column = torch.arange(12).reshape(6, 2).bfloat16()

    def write(column: Tensor, **once: Tensor) -> Store:
        columns = {"hidden": column, "scale": torch.arange(6.0)}
        Store.write(tmp_path / "store", keys, [1, 3, 2], columns, once=once, identity={"teacher": "a"})
        return Store(tmp_path / "store")

    store = write(column, weight=torch.ones(2, 2))
    found = store.read(keys[[2, 0]])
    torch.testing.assert_close(found["hidden"], column[[4, 5, 0]], rtol=0, atol=0)
    assert found["scale"].tolist() == [4, 5, 0]
    assert store.identity == {"teacher": "a"}
    files = {path.name: path.stat().st_size for path in (tmp_path / "store").iterdir()}
    assert store.bytes_per_position == files["positions.safetensors"] / 6
    assert store.once_bytes == files["once.safetensors"]
    with pytest.raises(KeyError):
        store.read(keys[:1] + 1)
    assert write(-column).read(keys)["hidden"].tolist() == (-column).tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_what_is_stored_once_is_in_memory_from_the_start(tmp_path: Path) -> None:
    """Pages of a file that come with the first step would be counted as a part of that, beside ``held_bytes``."""
    keys, columns = np.zeros((1, 16), dtype=np.uint8), {"hidden": torch.zeros(1, 2)}
    Store.write(
        tmp_path / "store",
        keys,
        [1],
        columns,
        once={"weight": torch.ones(4096, 2)},
        identity={"teacher": "a"},
    )
    store = Store(tmp_path / "store")
    with (tmp_path / "store" / ONCE).open("r+b") as file:
        file.seek(-8 * 4096, os.SEEK_END)
        file.write(bytes(8 * 4096))
    assert store.once["weight"].eq(1).all()


def test_what_is_read_from_a_store_is_no_memory_that_a_training_needs(tmp_path: Path) -> None:
    """Its pages are those of a mapped file."""
    count, size = 512, 2**17  # 64 MiB
    keys = np.zeros((count, 16), dtype=np.uint8)
    keys[:, :2] = np.arange(count, dtype=np.uint16)[:, None].view(np.uint8)
    columns = {"hidden": torch.ones(count, size, dtype=torch.int8)}
    Store.write(tmp_path / "store", keys, [1] * count, columns, once={}, identity={"teacher": "a"})
    store = Store(tmp_path / "store")
    store.read(keys[:1])
    memory, mapped = Memory(), status_bytes("RssFile")
    for start in range(count):
        assert store.read(keys[start : start + 1])["hidden"].sum() == size
    assert status_bytes("RssFile") - mapped > 0.9 * count * size
    assert memory.peak_bytes() < 0.2 * count * size


# --- all of it -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_ways_run_and_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process, which is much faster, with two tails, and without packages, which take long to import."""

    def here(function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(bench_peers, "in_own_process", here)
    monkeypatch.setattr(student_runs, "in_own_process", here)
    monkeypatch.setattr(bench_peers, "MODULES", {})
    monkeypatch.setattr(bench_peers, "TAIL_MODES", ("ghost", "drop"))
    monkeypatch.setattr(bench_peers, "DISTILLKIT_TAILS", ("ghost",))
    monkeypatch.setattr(tables, "KEPT", tmp_path / "tables")
    monkeypatch.setattr(sys, "argv", ["bench_peers", "--tiny", "--folder", str(tmp_path)])
    bench_peers.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines}
    stored = {name for name, cells in rows.items() if cells[0].isdigit()}
    assert {"tau 1/512", "DistillKit 128, ghost", "DistillKit 50, ghost"} < stored
    assert {"hidden states bf16", "hidden states int8"} < stored
    assert {name.split(", ")[1] for name in stored if name.startswith("top ")} == {"ghost", "drop"}
    assert [rows[name][0] for name in (LABELS, LIVE)] == ["-", "-"]
    assert rows["hidden states bf16"][1] != "-"

    kept = done(tmp_path / "tiny" / "peers.jsonl")
    by_name = {record["key"][1]: record for record in kept.values() if "kl" in record}
    assert by_name["hidden states bf16"]["held_bytes"] < by_name[LIVE]["held_bytes"]
    assert by_name["hidden states bf16"]["kl"] == pytest.approx(by_name[LIVE]["kl"], rel=1e-2)
    exact = replace(job_of(tmp_path / "tiny"), variant="hidden states fp32", teaching=HiddenStates("fp32"))
    student_runs.capture_for(exact)
    assert run(exact)["kl"] == pytest.approx(by_name[LIVE]["kl"], rel=1e-5)

    monkeypatch.setattr(student_runs, "run", None)
    monkeypatch.setattr(student_runs, "time_steps", None)
    bench_peers.main()
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")] == lines


def job_of(folder: Path) -> Job:
    return Job(str(folder / "tiny.yaml"), LIVE, "1 epoch", 0, 0.5, None, folder)
