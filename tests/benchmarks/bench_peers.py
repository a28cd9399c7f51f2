"""Other ways to distil, side by side: the same teacher, student, order of examples and number of steps.

    python -m tests.benchmarks.bench_peers [--recipes phantom medpix_sample] [--seeds 0 1 2] [--tiny]

    labels alone, a live teacher, and live teachers with the losses of Liger and TRL where these are installed
    the default cache; ``random`` and ``top_k``, the latter with each tail, at no more bytes than it
    DistillKit's log-probs on a polynomial, in its two settings, with each of its two tails
    hidden states in bf16 and in int8, with the teacher's head in training

Every way but the live ones trains from files that it has stored, and bytes are the size of these.  KL is measured
against the teacher's whole distributions on held-out rows.  Memory counts the teacher's weights that a step needs.
Packages that are missing are named: ``make setup EXTRAS=peers`` installs them.

As in ``bench_students``, every run is a process of its own on one thread, and steps are timed apart, in turns.  What
is done is kept in work/benchmarks/peers.jsonl and peers.turns.jsonl, and not done again while recipe and teacher are
the same: delete both to begin anew.
``--tiny`` tries everything in a minute with small random models and drawn rows.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from shared.data.processing import open_processor
from shared.recipes import load_recipe
from shared.recipes.policies import TAIL_MODES, TopK
from shared.runtime import distributed
from tests.benchmarks import full_shapes
from tests.benchmarks.bench_real_weights import draw_rows
from tests.benchmarks.bench_students import TAUS, policies_of_equal_size, prepare
from tests.benchmarks.own_process import in_own_process
from tests.benchmarks.peers.hidden_states import HiddenStates
from tests.benchmarks.peers.live import MODULES, LiveTeacher, is_installed
from tests.benchmarks.peers.polynomial import Polynomial
from tests.benchmarks.pretrained_gemma import TINY_VISION, save_vlm, shorten, tiny_model
from tests.benchmarks.student_results import FOLDER, LABELS, LENGTHS, LIVE, TIMED, Results, mean
from tests.benchmarks.student_runs import (
    TIMED_STEPS,
    Job,
    Key,
    Teaching,
    fingerprint,
    require_all,
    run_missing,
    time_missing,
)
from tests.benchmarks.tables import Bench

DISTILLKIT_TAILS = ("renormalize", "ghost")  # its "zero" and "symmetric_uniform"
RESULTS_NAME = "peers.jsonl"
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What is asked for, of one recipe: a name, or a file.

    folder  of caches, stores and results
    """

    recipe: str
    folder: Path
    seeds: tuple[int, ...]
    lengths: tuple[str, ...]
    kd_ratio: float
    num_turns: int

    @property
    def results(self) -> Path:
        return self.folder / RESULTS_NAME


def packages() -> Iterator[tuple[str, LiveTeacher]]:
    """Live teachers with the loss of a package; one that is not installed is named."""
    for package, module in MODULES.items():
        if is_installed(package):
            yield f"{LIVE}, {package}", LiveTeacher(package)
        else:
            print(f"  left out: {module} is not installed (make setup EXTRAS=peers)", flush=True)


def variants(recipe_name: str) -> tuple[dict[str, tuple[Teaching, str | None]], dict[str, str]]:
    """How students are taught, and the tail of their loss; which were made to have at most which one's bytes."""
    recipe = load_recipe(recipe_name)
    num_ids = open_processor(recipe.student.model, recipe.data).num_token_ids
    found: dict[str, tuple[Teaching, str | None]] = {LABELS: (None, None), LIVE: (LiveTeacher(), None)}
    found |= {name: (teaching, None) for name, teaching in packages()}
    with distributed(device="cpu") as world:
        policies, at_most = policies_of_equal_size(recipe, world, taus=TAUS[:1], others_at=TAUS[:1])
    for name, policy in policies.items():
        if isinstance(policy, TopK):
            found |= {f"{name}, {tail}": (policy, tail) for tail in TAIL_MODES}
        else:
            found[name] = policy, None
    for method in (Polynomial.recommended(num_ids), Polynomial.budget(num_ids)):
        for tail in DISTILLKIT_TAILS:
            found[f"DistillKit {method.k}, {tail}"] = method, tail
    forms = {f"hidden states {form}": (HiddenStates(form), None) for form in ("bf16", "int8")}
    return found | forms, at_most


def measure(plan: Plan) -> tuple[list[list[str]], str, Results, list[Key]]:
    """Runs what is not done yet, seed by seed; the table's rows, its notes, what they are of, and what failed."""
    found: dict[str, tuple[Teaching, str | None]]
    found, at_most = in_own_process(variants, plan.recipe)

    def jobs_of(length: str, seed: int) -> list[Job]:
        return [
            Job(plan.recipe, name, length, seed, plan.kd_ratio, teaching, plan.folder, tail=tail)
            for name, (teaching, tail) in found.items()
        ]

    failed: list[Key] = []
    for seed in plan.seeds:
        for length in plan.lengths:
            failed += run_missing(jobs_of(length, seed), plan.results)
    timed = jobs_of(TIMED, plan.seeds[0])
    failed += time_missing(timed, plan.results, num_turns=plan.num_turns, but=failed)
    mark = fingerprint(plan.recipe)
    results = Results(Path(plan.recipe).stem, plan.kd_ratio, plan.results, fingerprint=mark)
    return table(results, list(found), plan.lengths), results.notes(at_most), results, failed


def head(lengths: tuple[str, ...]) -> list[str]:
    """once    MiB of what is stored once, whatever the number of positions
    memory  the student's weights, what training adds at its peak, and the teacher's weights that are held, against
            labels alone; of the last length
    """
    learned = [cell for one in lengths for cell in (f"KL, {one}", "/ live", "CE")]
    return ["taught by", "bytes", "once", "step", "memory", *learned]


def table(results: Results, names: list[str], lengths: tuple[str, ...]) -> list[list[str]]:
    """Under ``head``: what each way costs, and what its students learned."""
    lines = []
    for name in names:
        size, once = results.size(name), results.values(name, lengths[0], "once_bytes")
        cells = [
            name,
            f"{size:.0f}" if size else "-",
            f"{max(once.values()) / MIB:.2f}" if any(once.values()) else "-",
            results.step(name),
            mean(memory(results, name, lengths[-1]), ".3f"),
        ]
        for length in lengths:
            cells += [
                mean([*results.values(name, length, "kl").values()], ".3f"),
                mean(results.ratio(name, length, "kl", LIVE), ".3f") if name != LIVE else "1",
                mean([*results.values(name, length, "ce").values()], ".3f"),
            ]
        lines.append(cells)
    return lines


def memory(results: Results, name: str, length: str) -> list[float]:
    """Of each seed; labels alone hold nothing of a teacher."""
    peak, weights, held = (
        results.values(name, length, f"{field}_bytes") for field in ("peak", "weights", "held")
    )
    plain = results.values(LABELS, length, "peak_bytes")
    return [
        (its + peak[seed] + held[seed]) / (its + plain[seed])
        for seed, its in weights.items()
        if seed in plain
    ]


# --- a small one -----------------------------------------------------------------------------------------


def tiny_recipe(root: Path) -> str:
    """A recipe of small random models and drawn rows, made where it is missing."""
    path = root / "tiny.yaml"
    if not path.exists():
        in_own_process(_make_tiny, root)
        tree = {
            "data": {"source": str(root / "data"), "max_answer_tokens": 128},
            "teacher": {"model": str(root / "base"), "dtype": "float32"},
            "cache": {"path": str(root / "cache"), "num_workers": 0},
            "student": {"model": str(root / "half"), "compute_dtype": "float32"},
            "loss": {"kd_ratio": 0.0},  # of each run as it is asked for; no cache need be there
            "optimization": {"global_batch_size": 4, "num_epochs": 1, "learning_rate": 1e-3},
            "run": {"name": "tiny", "root": str(root / "runs"), "num_workers": 0},
        }
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)


def _make_tiny(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    draw_rows(root, train=8, validation=4)
    texts = [" ".join(full_shapes.WORDS), " ".join(map(str, range(200))), "user model\n"] * 4
    save_vlm(root / "base", *tiny_model(texts), vision=TINY_VISION)
    shorten(root / "base", root / "half", num_layers=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["phantom", "medpix_sample"])
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kd-ratio", type=float, default=0.5)
    parser.add_argument("--turns", type=int, default=TIMED_STEPS, help="timed steps of each")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of caches, stores and results")
    parser.add_argument(
        "--tiny", action="store_true", help="small random models, drawn rows, one epoch and seed"
    )
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    folder = (asked.folder / "tiny" if asked.tiny else asked.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench("peers", goes_on=(folder / RESULTS_NAME).exists())
    failed: list[Key] = []
    for name in [tiny_recipe(folder)] if asked.tiny else asked.recipes:
        if name == "medpix_sample" and not Path(load_recipe(name).data.source).exists():
            print(f"{name}: its records are not here, left out")
            continue
        if not asked.tiny:
            prepare(name)
        plan = Plan(
            name,
            folder,
            seeds=(0,) if asked.tiny else tuple(asked.seeds),
            lengths=("1 epoch",) if asked.tiny else tuple(asked.lengths),
            kd_ratio=asked.kd_ratio,
            num_turns=2 if asked.tiny else asked.turns,
        )
        stem = Path(name).stem
        rows, notes, results, its_failed = measure(plan)
        failed += its_failed
        bench.show(
            f"peers-{stem}-{plan.kd_ratio:g}",
            f"Ways to distil, `{stem}`, `kd_ratio: {plan.kd_ratio:g}`",
            head(plan.lengths),
            rows,
            notes=notes,
            stamps=results.stamps,
        )
    require_all(failed)


if __name__ == "__main__":
    main()
