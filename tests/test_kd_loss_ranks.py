"""Two gloo ranks equal one: a vocabulary split over ranks, and a student sharded by FSDP2."""

from __future__ import annotations

import gc
import itertools
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from shared.errors import RecipeError
from shared.kd_loss import Divergence, KDLoss, fused_ce_kd
from shared.recipes.policies import Policy, Threshold, TopK
from shared.sparse import MixedTargets, SparseTargets, Targets, mix, position_seeds, sparsify
from tests.kd_loss_tail_cases import TAILS, assert_rows_agree, tail_case

NUM_IDS, NUM_POSITIONS, HIDDEN = 19, 11, 6
SPLIT = (12, 7)  # uneven on purpose


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All scenarios run in one pair of processes, as starting them takes longer than they do."""
    folder = tmp_path_factory.mktemp("ranks")
    gc.collect()  # a process group of this process, collected in a fork, would wait for threads that are not there
    mp.start_processes(_run_scenarios, args=(str(folder),), nprocs=2, start_method="fork")
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.failed"))}


def _run_scenarios(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    for scenario in SCENARIOS:
        try:
            scenario(rank)
        except Exception:
            Path(folder, f"{scenario.__name__}.failed").write_text(f"rank {rank}: {traceback.format_exc()}")
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, bias, labels, teacher logits: the same in every process."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = randn(NUM_POSITIONS, HIDDEN), randn(NUM_IDS, HIDDEN), randn(NUM_IDS)
    labels = torch.randint(NUM_IDS, (NUM_POSITIONS,), generator=generator)
    labels[3] = -100
    return hidden, weight, bias, labels, 2 * randn(NUM_POSITIONS, NUM_IDS)


def targets_of(teacher_logits: Tensor, policy: Policy) -> SparseTargets:
    seeds = position_seeds(0, b"key", len(teacher_logits))
    return sparsify(teacher_logits.float().log_softmax(-1), policy, temperatures=(1.0, 2.0), seeds=seeds)


def mixed_targets(teacher_logits: Tensor, policy: Policy) -> MixedTargets:
    """With those of another teacher of the same positions."""
    both = [targets_of(logits, policy) for logits in (teacher_logits, teacher_logits.flip(1))]
    return mix(both, shares=(0.7, 0.3))


def part(tensor: Tensor, rank: int, dim: int = 0) -> Tensor:
    return tensor.detach().split(SPLIT, dim)[rank].clone().requires_grad_()


class WholeVocabulary(TorchDispatchMode):
    """Whether any result had a row as long as the whole vocabulary."""

    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            self.seen |= isinstance(tensor, Tensor) and NUM_IDS in tensor.shape
        return out


CASES = [
    (Threshold(tau=0.1), "ghost", "forward_kl"),
    (TopK(k=3), "uniform", "forward_kl"),
    (TopK(k=3), "ghost", "forward_kl"),
    (TopK(k=3), "ghost", "jensen_shannon"),
]
MIXABLE = CASES[:2]


def vocab_parallel_fused(rank: int) -> None:
    compare_fused(rank, CASES, targets_of)


def vocab_parallel_mix(rank: int) -> None:
    compare_fused(rank, MIXABLE, mixed_targets)


def compare_fused(
    rank: int, cases: list[tuple[Policy, str, str]], targets_from: Callable[[Tensor, Policy], Targets]
) -> None:
    hidden, weight, bias, labels, teacher = problem()
    drawn = torch.where(torch.arange(NUM_POSITIONS) % 3 == 0, torch.nan, -torch.arange(NUM_POSITIONS) / 3)
    ratios = {1.0: 0.4, 2.0: torch.arange(NUM_POSITIONS) / NUM_POSITIONS}
    for policy, tail, kind in cases:
        for temperature in (1.0, 2.0):
            options = {
                "kd_ratio": ratios[temperature], "temperature": temperature, "chunk_size": 4, "softcap": 3.0,
                "tail": tail, "divergence": Divergence(kind), "weights_N": torch.arange(NUM_POSITIONS) / 4,
                "reverse_kl": 0.6, "label_logprobs_N": drawn,
            }  # fmt: skip
            targets = targets_from(teacher, policy)
            inputs = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias)]
            want = fused_ce_kd(inputs[0], inputs[1], labels, targets, bias_V=inputs[2], **options)
            want_grads = torch.autograd.grad(want.loss, inputs)
            mine = [hidden.detach().requires_grad_(), part(weight, rank), part(bias, rank)]
            with WholeVocabulary() as whole_vocabulary:
                got = fused_ce_kd(
                    mine[0], mine[1], labels, targets, bias_V=mine[2], tp_group=dist.group.WORLD, **options
                )
            assert not whole_vocabulary.seen
            for value, other in zip(got, want, strict=True):
                torch.testing.assert_close(value.detach(), other.detach())
            got_grads = torch.autograd.grad(got.loss, mine)
            torch.testing.assert_close(got_grads[0], want_grads[0])
            for got_grad, want_grad in zip(got_grads[1:], want_grads[1:], strict=True):
                torch.testing.assert_close(got_grad, want_grad.split(SPLIT)[rank])


def vocab_parallel_kd_loss(rank: int) -> None:
    _, _, _, labels, teacher = problem()
    student = teacher.roll(1, 0)
    for kind in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation"):
        for chunk_size in (0, 4):
            whole = student.clone().requires_grad_()
            want = KDLoss(temperature=2.0, divergence=Divergence(kind))(whole, teacher, labels)
            (want_grad,) = torch.autograd.grad(want, whole)
            loss = KDLoss(
                temperature=2.0, divergence=Divergence(kind), tp_group=dist.group.WORLD, chunk_size=chunk_size
            )
            for teacher_part in (part(teacher, rank, -1), teacher):
                mine = part(student, rank, -1)
                got = loss(mine, teacher_part, labels)
                torch.testing.assert_close(got, want)
                torch.testing.assert_close(
                    torch.autograd.grad(got, mine)[0], want_grad.split(SPLIT, -1)[rank]
                )
    targets = targets_of(teacher[labels != -100], TopK(k=4))
    whole, mine = student.clone().requires_grad_(), part(student, rank, -1)
    want = KDLoss(temperature=2.0)(whole, targets, labels)
    got = KDLoss(temperature=2.0, tp_group=dist.group.WORLD, chunk_size=4)(mine, targets, labels)
    torch.testing.assert_close(got, want)
    want_grad = torch.autograd.grad(want, whole)[0].split(SPLIT, -1)[rank]
    torch.testing.assert_close(torch.autograd.grad(got, mine)[0], want_grad)


def vocab_parallel_small_masses(rank: int) -> None:
    """A student that is sure, its kept ids on both ranks; and one whose bucket holds no finite logit."""
    for dtype, (tail, kind), temperature in itertools.product(
        (torch.float32, torch.bfloat16), TAILS, (1.0, 2.0)
    ):
        case = tail_case(dtype, temperature=temperature, teacher="unsure", small="outside")
        mine = case.logits.split((2, 4), -1)[rank].clone().requires_grad_()
        loss = KDLoss(
            temperature=temperature,
            divergence=Divergence(kind),
            tail=tail,
            tp_group=dist.group.WORLD,
            chunk_size=4,
        )
        kd = loss(mine, case.targets, case.labels, num_batch_labels=1)
        want_loss, want = case.expected(kd_ratio=1.0, tail=tail, kind=kind)
        assert float(kd.detach()) == pytest.approx(want_loss, rel=1e-6, abs=1e-6)
        got, columns = want.clone(), slice(2 * rank, 2 + 4 * rank)  # the other rank checks its own
        got[:, columns] = torch.autograd.grad(kd, mine)[0].double()
        assert_rows_agree(got, want, dtype, atol=0.0 if tail == "ghost" else 1e-7)
    excluded = case.logits.float().index_fill(-1, torch.tensor([1, 2, 4, 5]), -torch.inf)
    mine = excluded.split((2, 4), -1)[rank].clone().requires_grad_()
    reverse = KDLoss(divergence=Divergence("reverse_kl"), tp_group=dist.group.WORLD)
    kd = reverse(mine, case.targets, case.labels)
    assert bool(kd.detach().isfinite())
    assert bool(torch.autograd.grad(kd, mine)[0].isfinite().all())


def dtensors(rank: int) -> None:
    hidden, weight, _, labels, teacher = problem()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    targets = targets_of(teacher, Threshold(tau=0.1))
    head = weight.clone().requires_grad_()
    want = fused_ce_kd(hidden, head, labels, targets, kd_ratio=0.5)
    (want_grad,) = torch.autograd.grad(want.loss, head)
    split_head = nn.Parameter(dist_split(weight, mesh, 0))
    replicated = DTensor.from_local(hidden.clone(), mesh, [Replicate()]).requires_grad_()
    for states in (hidden, replicated):
        got = fused_ce_kd(states, split_head, labels, targets, kd_ratio=0.5, chunk_size=4)
        torch.testing.assert_close(got.loss, want.loss)
        (grad,) = torch.autograd.grad(got.loss, split_head)
        torch.testing.assert_close(grad.full_tensor(), want_grad)
    with pytest.raises(RecipeError, match="hidden states are split"):
        fused_ce_kd(dist_split(hidden, mesh, 0), split_head, labels, targets, kd_ratio=0.5)
    with pytest.raises(RecipeError, match="split along dimension 0"):
        fused_ce_kd(hidden, dist_split(weight, mesh, 1), labels, targets, kd_ratio=0.5)

    student = teacher.roll(1, 0).view(1, NUM_POSITIONS, NUM_IDS)
    split_logits, split_teacher = (
        dist_split(student, mesh, 2).requires_grad_(),
        dist_split(teacher[None], mesh, 2),
    )
    whole = student.clone().requires_grad_()
    want_kd = KDLoss()(whole, teacher[None], labels[None])
    got_kd = KDLoss(chunk_size=3)(split_logits, split_teacher, labels[None])
    torch.testing.assert_close(got_kd, want_kd)
    (grad,) = torch.autograd.grad(got_kd, split_logits)
    torch.testing.assert_close(grad.full_tensor(), torch.autograd.grad(want_kd, whole)[0])


def dist_split(tensor: Tensor, mesh: object, dim: int) -> DTensor:
    return torch.distributed.tensor.distribute_tensor(tensor.detach().clone(), mesh, [Shard(dim)])


def different_labels_are_refused(rank: int) -> None:
    """What a head that FSDP sharded would look like: each rank has its own positions."""
    hidden, weight, _, labels, teacher = problem()
    targets = targets_of(teacher, Threshold(tau=0.1))
    mine = labels if rank == 0 else labels.roll(1)
    with pytest.raises(RecipeError, match="do not have the same labels"):
        fused_ce_kd(hidden, part(weight, rank), mine, targets, kd_ratio=0.5, tp_group=dist.group.WORLD)
    empty = weight[: NUM_IDS * (1 - rank)]
    with pytest.raises(RecipeError, match="each rank needs at least one"):
        fused_ce_kd(hidden, empty, labels, targets, kd_ratio=0.5, tp_group=dist.group.WORLD)


class TiedStudent(nn.Module):
    """Embedding, one layer, and the loss with the embedding as head: a forward that returns losses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_IDS, HIDDEN, dtype=torch.float64)
        self.layer = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)

    def forward(self, tokens: Tensor, labels: Tensor, targets: SparseTargets) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(tokens)))
        return fused_ce_kd(hidden, self.embedding.weight, labels, targets, kd_ratio=0.5, chunk_size=2).loss


def fsdp_gathers_the_head_once(rank: int) -> None:
    _, _, _, labels, teacher = problem()
    tokens, labels = torch.arange(10), labels.roll(1)[:10]
    targets = targets_of(teacher[:10], Threshold(tau=0.1))
    torch.manual_seed(0)
    whole, sharded = TiedStudent(), TiedStudent()
    sharded.load_state_dict(whole.state_dict())
    fully_shard(sharded.layer)
    fully_shard(sharded)
    for module in (sharded, sharded.layer):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    whole(tokens, labels, targets).backward()
    mine = slice(5 * rank, 5 * rank + 5)
    with CommDebugMode() as comms:
        loss = sharded(tokens[mine], labels[mine], targets.slice(mine.start, mine.stop))
        loss.backward()
    gathers = sum(count for op, count in comms.get_comm_counts().items() if "gather" in str(op))
    assert gathers == 3  # the root with the head once, the layer once each way
    for (name, want), (_, got) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), want.grad, msg=name)
    del sharded, loss
    gc.collect()


SCENARIOS = [
    vocab_parallel_fused,
    vocab_parallel_mix,
    vocab_parallel_kd_loss,
    vocab_parallel_small_masses,
    dtensors,
    different_labels_are_refused,
    fsdp_gathers_the_head_once,
]


@pytest.mark.parametrize("scenario", [function.__name__ for function in SCENARIOS])
def test_two_ranks(scenario: str, failures: dict[str, str]) -> None:
    assert scenario not in failures, failures[scenario]
