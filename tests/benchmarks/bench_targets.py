"""Figures of the targets: bytes against error for every policy, and the speed of the codec.

    python -m tests.benchmarks.bench_targets                           the synthetic teacher; twenty minutes, 4 GB
    python -m tests.benchmarks.bench_targets --distributions FILE      a real one, see ``_read_positions``

Bytes are those of a shard with everything in it (keys, answer ids, sums, Arrow's own), over its positions.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.cache import Identity, InputsIdentity, Row, TargetsIdentity, TeacherIdentity
from shared.cache.shard import encode_shard
from shared.codec import decode, encode_many
from shared.recipes.policies import Policy, Random, Threshold, TopK
from shared.sparse import SparseTargets, position_seeds, sparsify
from shared.sparse.draws import Systematic, draw, padded_width, uniforms
from tests.benchmarks.gradient_error import MEAN_COSINE, TAILS, GradientError, features
from tests.benchmarks.synthetic_teacher import STUDENT, Positions, Student, synthetic_positions
from tests.benchmarks.tables import FIGURES, Bench, figure

TAUS = (8, 16, 24, 32, 48, 64, 96, 128, 256, 512)  # their reciprocals
DRAWS = (12, 25, 50, 100, 200, 400, 800, 1200)
KS = (4, 8, 16, 32, 64, 128, 256)
STEP_TAUS = (16, 64, 256)
SHARD_ROWS = 512
NUM_POSITIONS, V = 4096, 248_320
SCHEMES = ("scheme", "entries", "payload", "all, rows of 16", "all, rows of 64", "error", "error, cosine 0")
FP16 = "threshold, fp16"  # values as ``top_k`` stores them: threshold's own are rounded to fewer bits
RATIOS = (
    "error",
    "threshold, bytes",
    "random / threshold",
    "top_k with its best tail / threshold",
    f"the same / {FP16}",
)
GOAL = 0.035  # the error at which sizes are to reach something
STUDENTS = (
    "student",
    "mean cosine",
    "threshold, bytes",
    "random / threshold",
    "top_k with its best tail / threshold",
)
OTHER_STUDENT = Student(taste=0.5, noise=1.0)


@dataclass
class Scheme:
    """One way of making targets, and what came of it."""

    name: str
    family: str
    policy: Policy
    make: Callable[[Tensor, Tensor], tuple[SparseTargets, Tensor]]  # (log-probs, seeds) -> targets, weights
    parts: list[SparseTargets] = field(default_factory=list)

    @property
    def targets(self) -> SparseTargets:
        return SparseTargets.concat(self.parts)


def schemes() -> list[Scheme]:
    found = [scheme(f"threshold 1/{n}", "threshold", Threshold(tau=1 / n)) for n in TAUS]
    for n in STEP_TAUS:
        policy = Threshold(tau=1 / n, values="fp16")
        found.append(scheme(f"threshold 1/{n}, fp16", FP16, policy))
        found.append(Scheme(f"equal steps 1/{n}, fp16", "equal steps", policy, _equal_steps(policy)))
    found += [scheme(f"random {n}", "random", Random(draws=n)) for n in DRAWS]
    return found + [scheme(f"top-{n}", "top_k", TopK(k=n)) for n in KS]


def scheme(name: str, family: str, policy: Policy) -> Scheme:
    def make(logprobs: Tensor, seeds: Tensor) -> tuple[SparseTargets, Tensor]:
        targets = sparsify(logprobs, policy, seeds=seeds)
        return targets, targets.weights()

    return Scheme(name, family, policy, make)


def _equal_steps(policy: Threshold) -> Callable[[Tensor, Tensor], tuple[SparseTargets, Tensor]]:
    """The alternative to one step for all positions: n = max(1, floor(tail / tau)) steps of tail / n.

    The step is not stored: what the kept tokens leave of one, over n, is what a reader would take.
    """

    def make(logprobs_NV: Tensor, seeds_N: Tensor) -> tuple[SparseTargets, Tensor]:
        tau, (num_positions, vocab_size) = math.exp(policy.log_tau), logprobs_NV.shape
        is_kept_NV = logprobs_NV >= policy.log_tau
        mass_NV = torch.zeros(num_positions, padded_width(vocab_size))
        mass_NV[:, :vocab_size] = logprobs_NV.exp().masked_fill_(is_kept_NV, 0)
        tail_N = mass_NV.sum(-1, dtype=torch.float64)
        num_steps_N = (tail_N / tau).floor().clamp_min(1)
        mass_NV = (mass_NV.double() * (num_steps_N / tail_N)[:, None]).nan_to_num_()
        drawn_position, drawn_ids, _ = draw(mass_NV, Systematic(uniforms(seeds_N, 0), step=1.0))
        position, ids = is_kept_NV.nonzero(as_tuple=True)
        weights = torch.cat(
            [logprobs_NV[position, ids].exp(), (tail_N / num_steps_N).float()[drawn_position]]
        )
        logprobs = torch.cat([logprobs_NV[position, ids], torch.full((len(drawn_ids),), policy.log_tau)])
        position, ids = torch.cat([position, drawn_position]), torch.cat([ids, drawn_ids])
        order = ((position << 32) | ids).argsort()
        counts = torch.bincount(position, minlength=num_positions)
        targets = SparseTargets(
            offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
            ids=ids[order].int(),
            logprobs=logprobs[order].half() + 0.0,
            policy=policy,
            temperatures=(1.0,),
            log_normalizers=torch.zeros(num_positions, 0),
            entropy=torch.zeros(num_positions, 1),
            draw_counts=torch.zeros(0, dtype=torch.int32),
        )
        return targets, weights[order]

    return make


@torch.inference_mode()
def measure(positions: Iterable[Positions], everything: list[Scheme]) -> tuple[GradientError, Tensor]:
    """Sums for the errors, and two answers (2, N) drawn from the teacher; targets go into the schemes."""
    error: GradientError | None = None
    answers, start = [], 0
    for chunk in positions:
        num_positions, vocab_size = chunk.logprobs.shape
        error = error or GradientError(vocab_size)
        probs, student, features_NC = (
            chunk.logprobs.exp(),
            chunk.student_logprobs.exp(),
            features(chunk.hidden),
        )
        error.add_dense("teacher", features_NC, probs)
        error.add_dense("student", features_NC, student)
        seeds = position_seeds(0, b"bench_targets", start + num_positions)[start:]
        answers.append(sparsify(chunk.logprobs, Random(draws=1), seeds=seeds + 1).ids)
        answers.append(sparsify(chunk.logprobs, Random(draws=1), seeds=seeds + 2).ids)
        for scheme in everything:
            targets, weights = scheme.make(chunk.logprobs, seeds)
            scheme.parts.append(targets)
            if scheme.family == "top_k":
                error.add_tails(scheme.name, features_NC, targets, student)
            else:
                error.add_entries(scheme.name, features_NC, targets, weights)
        start += num_positions
    assert error is not None
    return error, torch.stack([torch.cat(answers[::2]), torch.cat(answers[1::2])])


def bytes_per_position(targets: SparseTargets, answers: Tensor, row_positions: int) -> tuple[float, float]:
    """Of the payloads, and of a whole shard with ``SHARD_ROWS`` rows (payloads used again as far as needed)."""
    offsets = list(range(0, targets.num_positions + 1, row_positions))
    payloads = encode_many(targets.slice(0, offsets[-1]), offsets)
    ids = answers[:, : offsets[-1]].reshape(-1, row_positions).numpy()
    rows = [
        Row(
            key=hashlib.blake2b(str(i).encode(), digest_size=16).digest(),
            answer_ids=ids[i % len(ids)],
            num_entries=1,
            ce_sum=1.0,
            entropy_sums=np.ones(1),
            payload=payloads[i % len(payloads)],
        )
        for i in range(SHARD_ROWS)
    ]
    metadata = {"unit": "0" * 32, "identity": _identity(targets.policy).content(), "skipped": []}
    shard = encode_shard(rows, num_temperatures=1, metadata=metadata)
    return sum(map(len, payloads)) / offsets[-1], shard.size / (SHARD_ROWS * row_positions)


def _identity(policy: Policy) -> Identity:
    return Identity(
        teacher=TeacherIdentity(name="t", revision=None, weights_fingerprint="0" * 64, dtype="bfloat16"),
        inputs=InputsIdentity(
            tokenizer_fingerprint="0" * 64,
            template_fingerprint="0" * 64,
            image_processor_fingerprint="0" * 64,
            vocab_size=248_320,
            max_answer_tokens=1024,
        ),
        targets=TargetsIdentity(policy=policy, temperatures=(1.0,), seed=0),
        data=(),
    )


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    family: str
    entries: float
    payload: float
    total: float  # rows of 16
    total_long: float  # rows of 64
    error: float
    error_isotropic: float


def table(everything: list[Scheme], error: GradientError, answers: Tensor) -> list[Line]:
    lines = []
    for scheme in everything:
        targets = scheme.targets
        payload, total = bytes_per_position(targets, answers, 16)
        _, total_long = bytes_per_position(targets, answers, 64)
        sizes = (targets.num_entries / targets.num_positions, payload, total, total_long)
        names = [scheme.name]
        if scheme.family == "top_k":
            names = [f"{scheme.name}, {tail}" for tail in TAILS]
        for name in names:
            errors = error.relative(name), error.relative(name, mean_cosine=0.0)
            lines.append(Line(name, scheme.family, *sizes, *errors))
    return lines


def show_errors(
    bench: Bench, name: str, lines: Sequence[Line], *, notes: str, stamps: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Sizes and errors of every scheme, and sizes at equal errors."""
    errors, ratios = "Bytes a position, and the gradient's error", "Bytes a position at equal errors"
    rows = []
    for x in lines:
        sizes = [f"{value:.1f}" for value in (x.entries, x.payload, x.total, x.total_long)]
        rows.append([x.name, *sizes, f"{x.error:.4f}", f"{x.error_isotropic:.4f}"])
    bench.show(f"{name}-schemes", errors, SCHEMES, rows, notes=notes, stamps=stamps)
    bench.show(f"{name}-ratios", ratios, RATIOS, ratios_at_errors(lines), stamps=stamps)


def bytes_at(lines: Sequence[Line], family: str, error: float) -> float | None:
    """Bytes (all, rows of 16) that a family takes for an error, between its lines; None beyond them."""
    points = sorted((x.error, x.total) for x in lines if x.family == family)
    if not points:
        return None
    best = [(e, b) for e, b in points if b <= min(c for d, c in points if d <= e)]  # the best tail
    errors, sizes = zip(*best, strict=True)
    if not errors[0] <= error <= errors[-1]:
        return None
    return float(np.exp(np.interp(math.log(error), np.log(errors), np.log(sizes))))


def ratios_at_errors(lines: Sequence[Line]) -> list[list[str]]:
    """Under ``RATIOS``."""
    rows = []
    for error in (0.1, 0.07, 0.05, 0.035, 0.025):
        threshold, in_fp16 = (bytes_at(lines, family, error) for family in ("threshold", FP16))
        if threshold is None:
            continue
        random, top_k = (_against(lines, family, error, threshold) for family in ("random", "top_k"))
        alike = "-" if in_fp16 is None else _against(lines, "top_k", error, in_fp16)
        rows.append([f"{error}", f"{threshold:.1f}", random, top_k, alike])
    return rows


def of_students(lines: Mapping[Student, Sequence[Line]]) -> list[list[str]]:
    """Under ``STUDENTS``: sizes at the error of ``GOAL``; of the first student also where states share no mean."""
    rows = []
    for place, (student, its) in enumerate(lines.items()):
        isotropic = [replace(one, error=one.error_isotropic) for one in its]
        for cosine, some in ((MEAN_COSINE, its), (0.0, isotropic))[: 1 + (place == 0)]:
            threshold = bytes_at(some, "threshold", GOAL)
            if threshold is None:
                continue
            random, top_k = (_against(some, family, GOAL, threshold) for family in ("random", "top_k"))
            name = f"{student.taste:g} b + {student.noise:g} e"
            rows.append([name, f"{cosine:g}", f"{threshold:.1f}", random, top_k])
    return rows


def _against(lines: Sequence[Line], family: str, error: float, other_bytes: float) -> str:
    """A family's bytes at an error, in parts of another one's."""
    found = bytes_at(lines, family, error)
    if found is not None:
        return f"{found / other_bytes:.2f}"
    its = [x for x in lines if x.family == family]
    # Beyond its range: its largest is still worse.
    is_worse = bool(its) and min(x.error for x in its) > error
    return f"over {max(x.total for x in its) / other_bytes:.1f}" if is_worse else "-"


def speeds(everything: list[Scheme], vocab_size: int) -> dict[str, tuple[float, float]]:
    """Positions encoded and decoded a second of one core, rows of 16, batches of 256 rows; the best of five."""
    torch.set_num_threads(1)
    found = {}
    for scheme in everything:
        if scheme.name not in {"threshold 1/64", "threshold 1/512", "random 50", "top-16"}:
            continue
        targets = scheme.targets.slice(0, min(4096, scheme.targets.num_positions) // 16 * 16)
        offsets = list(range(0, targets.num_positions + 1, 16))
        payloads = encode_many(targets, offsets)
        encoding = min(_seconds(lambda: encode_many(targets, offsets)) for _ in range(5))  # noqa: B023
        decoding = min(
            _seconds(lambda: decode(payloads, policy=targets.policy, vocab_size=vocab_size))  # noqa: B023
            for _ in range(5)
        )
        found[scheme.name] = targets.num_positions / encoding, targets.num_positions / decoding
    return found


def figures(lines: Sequence[Line], rates: dict[str, tuple[float, float]]) -> list[tuple[str, str, str]]:
    """Under ``FIGURES``: those that have a goal."""
    families = ("threshold", FP16, "random", "top_k")
    threshold, in_fp16, random, top_k = (bytes_at(lines, family, GOAL) for family in families)
    rows = []
    if threshold is not None:
        rows.append(figure(f"bytes a position at an error of {GOAL}", threshold, ".1f", most=24))
        if random is not None:
            rows.append(
                figure("`random` against threshold at that error", random / threshold, ".2f", least=1.6)
            )
        if top_k is not None:
            rows.append(figure("`top_k` with its best tail against it", top_k / threshold, ".2f", least=4))
            if in_fp16 is not None:
                rows.append(figure(f"`top_k` against {FP16}, as it stores values", top_k / in_fp16, ".2f"))
    for name, (encoded, decoded) in rates.items():
        goals = (100_000, 300_000) if name.startswith("threshold") else (None, None)
        for what, rate, goal in zip(("encoded", "decoded"), (encoded, decoded), goals, strict=True):
            rows.append(figure(f"positions {what} a second and core, {name}", rate, ",.0f", least=goal))
    return rows


def _seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _read_positions(path: str, chunk: int = 256) -> Iterator[Positions]:
    """``torch.save``d dictionary: logprobs and student_logprobs (N, V), hidden (N, D) of the student, any dtype.

    Hidden states are taken as they are, their mean along with them: read the error of cosine 0.
    """
    stored = torch.load(path, mmap=True)
    for start in range(0, len(stored["logprobs"]), chunk):
        part = {name: values[start : start + chunk].float() for name, values in stored.items()}
        yield Positions(part["logprobs"], part["student_logprobs"], part["hidden"])


def name_of(arguments: argparse.Namespace) -> str:
    """Of the table; one of other sizes does not take the place of the documents'."""
    if arguments.distributions:
        return "targets-real"
    return "targets" if (arguments.positions, arguments.vocab) == (NUM_POSITIONS, V) else "targets-other"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=NUM_POSITIONS)
    parser.add_argument("--vocab", type=int, default=V)
    parser.add_argument("--distributions", help="torch file of a real teacher's and student's log-probs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    bench = Bench("targets")
    is_synthetic = arguments.distributions is None
    synthetic = partial(
        synthetic_positions, arguments.positions, vocab_size=arguments.vocab, seed=arguments.seed
    )
    everything = schemes()
    positions = synthetic() if is_synthetic else _read_positions(arguments.distributions)
    error, answers = measure(positions, everything)
    lines = table(everything, error, answers)
    name = name_of(arguments)
    notes = f"V = {error.vocab_size:,}. All bytes count: of keys, answer ids, sums and Arrow's own."
    show_errors(bench, name, lines, notes=notes)
    rates = speeds(everything, error.vocab_size)
    bench.show(name, "The targets: bytes at an error, and the codec's speed", FIGURES, figures(lines, rates))
    if is_synthetic:
        others = schemes()
        of_another = table(others, *measure(synthetic(student=OTHER_STUDENT), others))
        rows = of_students({STUDENT: lines, OTHER_STUDENT: of_another})
        bench.show(f"{name}-students", f"Bytes at an error of {GOAL}, by student", STUDENTS, rows)


if __name__ == "__main__":
    main()
