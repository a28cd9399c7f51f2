"""A student whose layers ranks share against the same on one rank: loss, every gradient, and losses after a resume.

    python -m tests.benchmarks.bench_parallel [--ranks 2 4 8] [--families qwen3_5 gemma3 ...]

Small random models of the real classes on gloo ranks.  Of each family and layout: the loss of the first step, the
gradient that is furthest off (as a share of its size), and the losses of a run that one rank begins, these ranks
go on with and one rank ends.  The rows with data ranks alone show what rounding does without a split.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shared.recipes import Recipe
from shared.runtime import World
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.train import train
from tests.benchmarks.tables import Bench

TWO = {"num_key_value_heads": 2}
FOUR = {"num_attention_heads": 4, "num_key_value_heads": 4}
ODD = {"vocab_size": 1025}  # two ranks have 513 and 512 rows of the head


class Student(NamedTuple):
    title: str
    family: str
    text: dict[str, Any]
    has_experts: bool = False
    is_tied: bool = False  # where the family's small model is not

    @property
    def heads(self) -> int:
        return int(self.text["num_key_value_heads"])


STUDENTS = [
    Student("Qwen3.5", "qwen3_5", FOUR),
    Student("Qwen3.5, V odd", "qwen3_5", FOUR | ODD),
    Student("Qwen3.5, tied, V odd", "qwen3_5", FOUR | ODD, is_tied=True),
    Student("Qwen3-VL", "qwen3_vl", FOUR),
    Student("Gemma 3, tied", "gemma3", FOUR),
    Student("Qwen2.5-VL", "qwen2_5_vl", TWO),
    Student("LLaVA", "llava", TWO),
    Student("Qwen3.5-MoE", "qwen3_5_moe", FOUR, has_experts=True),
    Student("Qwen3-VL-MoE", "qwen3_vl_moe", FOUR, has_experts=True),
]


class Layout(NamedTuple):
    data: int
    tensor: int
    expert: int

    @property
    def title(self) -> str:
        return f"{self.data * self.tensor}: {self.data} x {self.tensor}"

    def fits(self, student: Student) -> bool:
        return self.tensor <= student.heads and (self.expert == 1 or student.has_experts)


LAYOUTS = {
    2: [Layout(2, 1, 1), Layout(1, 2, 1), Layout(2, 1, 2)],
    4: [Layout(2, 2, 1), Layout(1, 4, 1), Layout(4, 1, 2), Layout(2, 2, 2)],
    8: [Layout(4, 2, 1), Layout(2, 4, 1), Layout(8, 1, 4)],
}


class Parity(NamedTuple):
    """Relative to one rank: the loss, the gradient that is furthest off, the losses of the resumed run."""

    student: Student
    layout: Layout
    figures: list[str]


def recipe_of(
    student: Student, root: Path, *, name: str, num_steps: int, layout: Layout | None = None
) -> Recipe:
    from stage2_runs import make_recipe

    folder = root / student.title
    parallel = {} if layout is None else {"tensor": layout.tensor, "expert": layout.expert}
    tree = {
        "data": {"source": str(root / "rows"), "max_answer_tokens": 64},
        "teacher": {"model": str(folder / "model"), "dtype": "float32"},
        "cache": {"path": str(folder / "cache"), "num_workers": 0},
        # Other weights than the teacher's, or there would be nothing to learn from it.
        "student": {"model": str(folder / "model"), "init": "random", "compute_dtype": "float32"},
        "optimization": {
            "global_batch_size": 8,
            "microbatch_size": 1,
            "max_steps": num_steps,
            "learning_rate": 1e-3,
            "schedule": "constant",
        },
        "parallel": parallel,
        "run": {"name": name, "root": str(folder / "runs"), "num_workers": 0, "export": False},
    }
    return make_recipe(tree)


def quietly(function: Any, *arguments: Any, **options: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments, **options)


def on_one_rank(students: list[Student], root: Path, world: World) -> list[tuple[Any, list[float]]]:
    """The first step, and the losses of three; a run of one step is left to go on with."""
    from parallel_steps import first_step
    from stage2_runs import step_records

    found = []
    for student in students:
        whole = recipe_of(student, root, name="one", num_steps=3)
        step = first_step(whole, world)
        quietly(train, whole, world, resume=False)
        quietly(train, recipe_of(student, root, name="begun", num_steps=1), world, resume=False)
        found.append((step, [record["loss"] for record in step_records(whole)]))
    return found


def on_ranks_of(layout: Layout, students: list[Student], root: Path, world: World) -> list[Any]:
    """The first step of each, and one more step of the run that was begun."""
    from parallel_steps import first_step

    found = []
    for student in students:
        recipe = recipe_of(student, root, name=str(layout), num_steps=2, layout=layout)
        if world.is_main:
            shutil.copytree(recipe.run.path.with_name("begun"), recipe.run.path)
        world.barrier()
        step = first_step(recipe, world)
        quietly(train, recipe, world, resume=True)
        found.append(step)
    return found


def ended_on_one_rank(layout: Layout, students: list[Student], root: Path, world: World) -> list[list[float]]:
    from stage2_runs import step_records

    found = []
    for student in students:
        recipe = recipe_of(student, root, name=str(layout), num_steps=3)
        quietly(train, recipe, world, resume=True)
        found.append([record["loss"] for record in step_records(recipe)])
    return found


def compare(students: list[Student], numbers: list[int], root: Path) -> list[Parity]:
    from families import make_family
    from parallel_steps import differences
    from samples import write_vqa_folder
    from stage2_runs import on_ranks

    write_vqa_folder(root / "rows", num_train=24)
    for student in students:
        config = make_family(student.family, root / student.title / "model", **student.text) / "config.json"
        if student.is_tied:
            config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    for student in students:  # each a group of its own, in which its units are claimed
        recipe = recipe_of(student, root, name="one", num_steps=3)
        on_ranks(1, lambda world: quietly(capture, recipe, world, StopRequest()))  # noqa: B023
    (alone,) = on_ranks(1, lambda world: on_one_rank(students, root, world))
    expected = {student.title: one for student, one in zip(students, alone, strict=True)}
    found = []
    for number in numbers:
        for layout in LAYOUTS[number]:
            some = [student for student in students if layout.fits(student)]
            steps, *_ = on_ranks(number, lambda world: on_ranks_of(layout, some, root, world))  # noqa: B023
            (ended,) = on_ranks(1, lambda world: ended_on_one_rank(layout, some, root, world))  # noqa: B023
            for student, step, losses in zip(some, steps, ended, strict=True):
                one, own_losses = expected[student.title]
                share, name = max((share, name) for name, share in differences(step, one).items())
                off = max(abs(a / b - 1) for a, b in zip(losses, own_losses, strict=True))
                figures = [f"{value:.0e}" for value in (abs(step.loss / one.loss - 1), share, off)]
                found.append(Parity(student, layout, figures))
                worst = name.rpartition("layers.")[2]
                told = f"  {student.title}, {layout}: {' / '.join(figures)}, worst of {worst}"
                print(told, file=sys.stderr, flush=True)
    return found


def by_layout(found: list[Parity]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of students without experts: a line for each, a column for each layout."""
    found = [one for one in found if not one.student.has_experts]
    layouts = list(dict.fromkeys(one.layout.title for one in found))
    cells = {(one.student.title, one.layout.title): " / ".join(one.figures) for one in found}
    students = dict.fromkeys(one.student.title for one in found)
    rows = [[name, *(cells.get((name, layout), "-") for layout in layouts)] for name in students]
    return ["family", *layouts], rows


def of_experts(found: list[Parity]) -> list[list[str]]:
    rows = []
    for student, layout, figures in found:
        if student.has_experts:
            data, tensor, expert = layout
            cells = [student.title, f"{data * tensor}", f"{data} x {tensor}", f"{max(tensor, expert)}"]
            rows.append([*cells, *figures])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=int, choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--families", nargs="+", choices=sorted({one.family for one in STUDENTS}))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # ranks are forks, which wait for ever for the threads of a pool that they lack
    bench = Bench("parallel")
    sys.path.append(str(Path(__file__).parents[1]))  # what the tests make their models with
    import stage2_runs

    stage2_runs.RANKS_TIMEOUT_S = 3600
    students = [one for one in STUDENTS if not arguments.families or one.family in arguments.families]
    with tempfile.TemporaryDirectory() as folder:
        found = compare(students, arguments.ranks, Path(folder))
    notes = (
        "Columns are ranks: data x tensor. Each cell: loss of the first step / worst gradient / losses of the "
        "resumed run. A dash: not run, or too few heads."
    )
    bench.show("parallel", "Ranks that share layers, against one rank", *by_layout(found), notes=notes)
    head = ("family", "ranks", "data x tensor", "experts among", "loss", "worst gradient", "resumed losses")
    bench.show("parallel-experts", "Ranks that share experts, against one rank", head, of_experts(found))


if __name__ == "__main__":
    main()
