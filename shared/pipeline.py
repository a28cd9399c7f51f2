"""From a recipe to its commands: what is missing is made first, what is there is not touched.

    python -m shared.pipeline train-student phantom --nproc 2
    python -m shared.pipeline rounds mine.yaml

Works backwards, as make does: a student needs a cache that covers its data, a missing cache needs its
teacher, a missing teacher needs the recipe that trains it.  A cache that is there is never traced further, so
a second student needs nothing of the teacher.  Every step is an ordinary command, printed before it is run;
the stages meet only through what they leave on disk.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from shared.cli import EXIT_STATUS, load_recipe, recipe_arguments, require_resume, resume_options, run
from shared.errors import RecipeError, TrainingError, shortened
from shared.library_output import quiet_libraries
from shared.stopping import (
    GO_ON,
    INTERRUPTED_STATUS,
    NOTHING_TO_SAVE,
    STATUS_FILE,
    python_as_called,
    restored_handlers,
    status_left_in,
    stop_on_signals,
)
from shared.threads import share_cores

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from shared.recipes import Recipe, TeacherConfig
    from shared.recipes.sections import PhantomConfig

AUTO: Literal["auto"] = "auto"
Nproc = int | Literal["auto"]  # processes on this machine, as ``num_processes`` counts them
SETTINGS_A_TEACHER_SHARES = ("data.", "data=", "bootstrap.", "bootstrap=")
MISTAKES = "bootstrap.phantom.mistaken="  # of the students' data; how a teacher learns is its own recipe's
# Of torchrun, which kills after 30 s what still saves its work; a second signal ends it all the same.
PATIENCE_S = 7 * 24 * 3600
POLL_S = 0.2

WHAT = {
    "shared.phantom": "Draws the pictures and their questions",
    "shared.small_models": "Makes the small models, with random weights",
    "stage1_teacher": "Stage one, recipe {recipe}: the teacher's targets go into the cache",
    "stage2_student": "Stage two, recipe {recipe}: a student is trained",
}
FINE_TUNES = "Recipe {recipe}: a model is fine-tuned, to be a teacher or to stand alone"


class NprocType(click.ParamType):
    """A number from 1, or ``auto``."""

    name = "number|auto"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Nproc:
        return AUTO if value == AUTO else click.IntRange(min=1).convert(value, param, context)


nproc_option = click.option(
    "--nproc",
    default=1,
    show_default=True,
    type=NprocType(),
    help="Processes; auto: one for each GPU.",
)


@click.group()
def main() -> None:
    """Run a stage under torchrun, making first what it needs and lacks."""


@main.command("teacher-cache")
@recipe_arguments
@nproc_option
def teacher_cache(recipe: str, overrides: tuple[str, ...], nproc: Nproc) -> int:
    """Stage one: capture the teacher's targets."""
    os.environ[GO_ON] = typed("teacher-cache", recipe, overrides, nproc, ())
    return make_cache(recipe, overrides, nproc=nproc)


@main.command("train-student")
@recipe_arguments
@nproc_option
@resume_options
def train_student(
    recipe: str, overrides: tuple[str, ...], nproc: Nproc, resume: bool, accept_data_change: bool
) -> int:
    """Stage two: train a student, from the cache unless kd_ratio is 0."""
    require_resume(resume, accept_data_change)
    stage_arguments = ["--resume"] if resume else []
    stage_arguments += ["--accept-data-change"] if accept_data_change else []
    os.environ[GO_ON] = typed("train-student", recipe, overrides, nproc, stage_arguments)
    resumed = stage_arguments or ["--resume"]
    return make_student(
        recipe,
        overrides,
        nproc=nproc,
        stage_arguments=stage_arguments,
        go_on=typed("train-student", recipe, overrides, nproc, resumed),
    )


@main.command("rounds")
@recipe_arguments
@nproc_option
def rounds(recipe: str, overrides: tuple[str, ...], nproc: Nproc) -> int:
    """Train a student, let it write, capture the teacher on that, train on the mixture, and again."""
    os.environ[GO_ON] = typed("rounds", recipe, overrides, nproc, ())
    return make_rounds(recipe, overrides, nproc=nproc)


@main.command("torchrun", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def torchrun_command(arguments: tuple[str, ...]) -> int:
    """Run torchrun with ARGUMENTS; end with its processes' own status, which is 75 when they were stopped."""
    from torch.distributed.run import get_args_parser

    nproc = str(get_args_parser().parse_args(list(arguments)).nproc_per_node)
    if nproc.isdecimal():
        share_cores(os.environ, int(nproc))
    return run_torchrun(arguments)


def typed(
    verb: str, recipe: str, overrides: Sequence[str], nproc: Nproc, stage_arguments: Sequence[str]
) -> str:
    """The command line of this call, as it is given to make where make has called."""
    rest = [*_as_options(overrides), *stage_arguments]
    if "MAKELEVEL" not in os.environ:
        processes = ["--nproc", str(nproc)] if nproc != 1 else []
        return shlex.join([python_as_called(), "-m", "shared.pipeline", verb, recipe, *processes, *rest])
    words = ["make", verb, f"RECIPE={recipe}"]
    words += [f"NPROC={nproc}"] if nproc != AUTO else []
    words += [f"ARGS={shlex.join(rest).replace('$', '$$')}"] if rest else []
    return shlex.join(words)


def make_cache(recipe: str, overrides: Sequence[str], *, nproc: Nproc) -> int:
    """Runs stage one; returns its exit status."""
    plan = load_recipe(recipe, overrides=tuple(overrides))
    status = make_inputs(recipe, plan, overrides)
    if not status and is_missing(plan.teacher) and covers(plan):
        click.echo("the cache holds all of the data; nothing to capture, and the teacher is not needed")
        return 0
    status = status or make_teacher(plan, overrides, nproc=nproc)
    return status or launch("stage1_teacher", "capture", recipe, overrides, (), nproc=nproc)


def make_student(
    recipe: str,
    overrides: Sequence[str],
    *,
    nproc: Nproc,
    stage_arguments: Sequence[str] = (),
    go_on: str | None = None,
) -> int:
    """Runs stage two, after stage one where the cache does not cover the data; returns the exit status.

    The run that the recipe compares with comes before its own, so that the table at the end is whole.

    go_on  the command that goes on with this very run, where it is another one than what was typed
    """
    from shared.recipes import baseline_of

    plan = load_recipe(recipe, overrides=tuple(overrides))
    if not stage_arguments and is_finished(plan, overrides):  # to show its results, nothing is needed
        show = [sys.executable, "-m", "stage2_student", "run", recipe, *_as_options(overrides)]
        return subprocess.run(show, check=False).returncode
    baseline_of(plan, overrides, tell=note_once)  # it may be missing; before a capture that takes hours
    plan.parallel.require_ranks(num_processes(nproc))
    status = make_inputs(recipe, plan, overrides)
    if not status and plan.cache is not None and plan.distils and plan.cache.is_one and not covers(plan):
        status = make_cache(recipe, overrides, nproc=nproc)  # of several, stage two says what is missing
    status = status or make_baseline(plan, overrides, nproc=nproc)
    if go_on is not None:
        os.environ[GO_ON] = go_on
    what = None if plan.teacher else FINE_TUNES
    return status or launch(
        "stage2_student", "run", recipe, overrides, stage_arguments, nproc=nproc, what=what
    )


def make_rounds(recipe: str, overrides: Sequence[str], *, nproc: Nproc) -> int:
    """Runs the rounds that the recipe asks for, those that are not finished; returns the exit status."""
    from shared.rounds import (
        Rounds,
        go_through,
        require_possible,
        settings_of_round_0,
        table_of,
    )  # which loads what takes seconds

    plan = load_recipe(recipe, overrides=tuple(overrides))
    if plan.rounds is None:
        raise RecipeError(f"recipe {recipe}: it has no rounds section, which says how many there are to be")
    first = [*overrides, *settings_of_round_0(plan)]
    require_possible(plan)
    if is_missing(plan.teacher):
        require_makeable(plan, nproc=nproc)
    if not is_finished(load_recipe(recipe, overrides=tuple(first)), first):
        resume = ["--resume"] if plan.run.path.exists() else []
        status = make_student(recipe, first, nproc=nproc, stage_arguments=resume)
        if status:
            return status

    def command(module: str, verb: str, about: str, arguments: Sequence[str], *, what: str) -> int:
        status = make_teacher(plan, overrides, nproc=nproc) if module == "stage1_teacher" else 0
        return status or launch(module, verb, about, (), arguments, nproc=nproc, what=what)

    planned = Rounds.of_recipe(plan)
    status = go_through(planned, command, covers)
    if not status:
        click.echo(
            f"\nrounds of run {plan.run.name}: all {planned.config.number} are finished; {planned.folder}"
        )
        click.echo("\n".join(table_of(planned)))
    return status


def is_finished(plan: Recipe, overrides: Sequence[str]) -> bool:
    """Whether there is nothing left to do for this run and the one that it is compared with."""
    from shared.finished import baseline_is_finished, run_is_finished

    return run_is_finished(plan) and baseline_is_finished(plan, overrides)


def covers(plan: Recipe) -> bool:
    """Whether a committed cache holds all of the data."""
    from shared.completeness import cache_covers  # which loads what takes seconds

    return cache_covers(plan)


def is_missing(teacher: TeacherConfig | None) -> bool:
    """Whether the teacher is one that a recipe of ours trains, and not there."""
    return teacher is not None and teacher.trained_by is not None and not Path(teacher.model).exists()


def make_inputs(recipe: str, plan: Recipe, overrides: Sequence[str]) -> int:
    """Draws the data and makes the small models of a trial recipe, where their folders are missing."""
    phantom, small_models = plan.bootstrap.phantom, plan.bootstrap.small_models
    status = 0
    if phantom is not None and not Path(plan.data.source).exists():
        sizes = [f"--{name}={value}" for name, value in phantom.model_dump().items()]
        status = command("shared.phantom", plan.data.source, *sizes)
    elif phantom is not None and is_another_drawing(plan.data.source, phantom):
        note_once(
            f"recipe {recipe}: {plan.data.source} is there and is used as it is; it was drawn otherwise than "
            "bootstrap.phantom says. To draw that, remove the folder, or name another one as data.source"
        )
    named = {plan.student.model, plan.teacher.model if plan.teacher else None}
    made = (
        [] if small_models is None else [model.path for model in small_models.models if model.path in named]
    )
    if not status and any(not Path(path).exists() for path in made):
        status = command("shared.small_models", recipe, *_as_options(overrides))
    return status


def is_another_drawing(source: str, phantom: PhantomConfig) -> bool:
    """Whether a drawn set that is there is not the one that the recipe would draw."""
    from shared.phantom.dataset import SPLITS, is_drawn_otherwise  # which loads what takes a moment

    asked = phantom.model_dump()
    pictures = {split: asked.pop(split) for split in SPLITS}
    return is_drawn_otherwise(source, pictures=pictures, **asked)


def make_teacher(plan: Recipe, overrides: Sequence[str], *, nproc: Nproc) -> int:
    """Trains the teacher by the recipe that makes it, where its folder is missing."""
    teacher = plan.teacher
    if teacher is None or teacher.trained_by is None or not is_missing(teacher):
        return 0
    require_makeable(plan, nproc=nproc)
    shared_settings = settings_of_teacher(overrides)
    begun = load_recipe(teacher.trained_by, overrides=tuple(shared_settings)).run.path.exists()
    resume = ["--resume"] if begun else []
    return make_student(teacher.trained_by, shared_settings, nproc=nproc, stage_arguments=resume)


def require_makeable(plan: Recipe, *, nproc: Nproc) -> None:
    """Raises   RecipeError  for what would else be told when the missing teacher is trained: it fits nothing"""
    from shared.preflight import require_training_recipe  # which loads what takes seconds

    assert plan.teacher is not None
    require_training_recipe(plan)
    plan.teacher.require_ranks(num_processes(nproc))


def make_baseline(plan: Recipe, overrides: Sequence[str], *, nproc: Nproc) -> int:
    """Trains the run that the recipe's is compared with, where it is not finished; whoever has one keeps it."""
    from shared.finished import baseline_is_finished
    from shared.recipes import baseline_of, settings_of_baseline

    baseline = baseline_of(plan, overrides)
    if baseline is None or baseline_is_finished(plan, overrides):
        return 0
    assert plan.evaluation.baseline is not None
    settings = settings_of_baseline(plan, overrides)
    resume = ["--resume"] if baseline.run.path.exists() else []
    return make_student(plan.evaluation.baseline, settings, nproc=nproc, stage_arguments=resume)


def settings_of_teacher(overrides: Sequence[str]) -> list[str]:
    """Those of a student's recipe that the recipe of its teacher shares: which data, and what is made first."""
    return [
        item
        for item in overrides
        if item.startswith(SETTINGS_A_TEACHER_SHARES) and not item.startswith(MISTAKES)
    ]


def command(module: str, *arguments: str) -> int:
    """Runs ``python -m module`` and returns its exit status; what it makes appears whole, or not at all.

    To stop it, Ctrl-C's signal is sent, and once: in it that is an exception, which removes its scratch files.
    """
    announce(WHAT[module], f"python -m {module} {' '.join(arguments)}")
    told, at_death = False, contextlib.ExitStack()
    with stop_on_signals(before_death=at_death.close) as stop:
        # Within: where Ctrl-C is ignored (nohup, a script's &), a process that begins outside ignores it as well.
        process = subprocess.Popen([sys.executable, "-m", module, *arguments], process_group=0)
        at_death.callback(process.kill)
        while process.poll() is None:
            if stop.received and not told:
                process.send_signal(signal.SIGINT)
                told = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
    if stop.received:
        kept = "of this step nothing is kept" if process.returncode else "this step is done"
        click.echo(f"stopped; {kept}. To go on: {os.environ.get(GO_ON, 'start again')}")
        return INTERRUPTED_STATUS
    return process.returncode


def num_processes(nproc: Nproc) -> int:
    """What ``auto`` comes to here: one for each GPU; without one, one, whose threads are the cores' work."""
    if nproc != AUTO:
        return nproc
    from torch.cuda import device_count  # which loads what takes seconds

    return device_count() or 1


@cache
def note_once(text: str) -> None:
    """What several steps would say."""
    click.echo(f"note: {text}", err=True)


def announce(what: str, line: str) -> None:
    """A step in words, and the command that takes it."""
    click.echo(f"==> {what}\n    {line}", err=True)


def launch(
    module: str,
    verb: str,
    recipe: str,
    overrides: Sequence[str],
    stage_arguments: Sequence[str],
    *,
    nproc: Nproc,
    what: str | None = None,
) -> int:
    """Runs a stage's command in ``nproc`` processes under torchrun and returns the first bad exit status."""
    number = num_processes(nproc)
    arguments = [
        "--standalone",
        f"--nproc-per-node={number}",
        "-m",
        module,
        verb,
        recipe,
    ]
    arguments += [*_as_options(overrides), *stage_arguments]
    share_cores(os.environ, number)
    announce((what or WHAT[module]).format(recipe=recipe), f"torchrun {' '.join(arguments)}")
    return run_torchrun(arguments)


def run_torchrun(arguments: Sequence[str]) -> int:
    """The first bad exit status of torchrun's processes, which tell their errors themselves; its own table is not."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import main as torchrun

    quiet_libraries()
    option = "--shutdown-timeout"  # not of every release; without it a stop may last 30 s
    patience = [f"{option}={PATIENCE_S}"] if option in get_args_parser().format_help() else []
    status_file = Path(tempfile.mkdtemp()) / "status"
    os.environ[STATUS_FILE] = str(status_file)
    try:
        with restored_handlers():
            torchrun([*patience, *arguments])
    except ChildFailedError as error:
        rank, ended = _first_failure(error)
        if ended > 0:
            return ended
        number = -ended
        click.echo(
            f"error: rank {rank} was killed by signal {number} ({signal.Signals(number).name}), often because the "
            "memory did not suffice; the log in the run's or the cache's folder has what it wrote last",
            err=True,
        )
        return 128 + number
    except SignalException as error:  # torchrun has handed it on to the processes, and waited for them
        if error.sigval == signal.SIGTERM and not status_file.exists():  # they still imported, or were ready
            click.echo(NOTHING_TO_SAVE)
            return INTERRUPTED_STATUS
        status = status_left_in(status_file)
        # What was stopped at its very end is whole, but nothing may follow it.
        return 128 + error.sigval if status is None else status or INTERRUPTED_STATUS
    except RendezvousError as error:  # torchrun has stopped its processes, in order
        click.echo(
            f"error: this machine has lost the rendezvous of its job ({shortened(str(error))}): the machine that "
            "keeps it has ended, or cannot be reached. What is finished is kept: start again",
            err=True,
        )
        status = status_left_in(status_file)
        return TrainingError.exit_status if status is None else status
    finally:
        shutil.rmtree(status_file.parent)
    return 0


def _first_failure(error: ChildFailedError) -> tuple[int, int]:
    """Rank that ended the launch, and its exit status, or minus the signal that killed it.

    torchrun ends the other ranks by SIGTERM, often in the same second; also one that has told its error, and is
    slower to leave than another that has lost it.
    """
    statuses = {
        rank: int(one.error_file_data.get(EXIT_STATUS, one.exitcode)) for rank, one in error.failures.items()
    }
    first = min(
        statuses, key=lambda rank: (statuses[rank] == -signal.SIGTERM, error.failures[rank].timestamp)
    )
    return first, statuses[first]


def _as_options(overrides: Sequence[str]) -> list[str]:
    return [part for item in overrides for part in ("--set", item)]


if __name__ == "__main__":
    run(main, goes_on=main.commands, starts_ours=True)
