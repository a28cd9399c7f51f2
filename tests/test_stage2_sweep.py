"""``train-student sweep`` and ``compare``: many students, one cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from stage2_runs import make_recipe, relog, run_alone, written_run

from shared.errors import CheckpointError, RecipeError
from shared.recipes import dump_recipe, load_recipe
from shared.stopping import INTERRUPTED_STATUS
from stage2_student.__main__ import commands
from stage2_student.evaluation.cache_uses import cache_uses, captured_times
from stage2_student.evaluation.compare import differing, save, table
from stage2_student.evaluation.run_records import labels, points, read_run, read_runs
from stage2_student.runs.identity import flat
from stage2_student.sweep import Job, plan_jobs
from stage2_student.sweep import sweep as run_sweep


@pytest.fixture
def tree(tmp_path: Path, distillation_tree: dict[str, Any]) -> dict[str, Any]:
    return distillation_tree | {
        "run": {"name": "grid", "root": str(tmp_path / "runs"), "num_workers": 0, "validate_every": 2},
    }


@pytest.fixture
def recipe(tree: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(commands, list(arguments), standalone_mode=False)


# --- planning --------------------------------------------------------------------------------------------


def test_every_combination_is_a_run_of_its_own(recipe: str) -> None:
    jobs = plan_jobs(
        recipe, ["loss.chunk_size=64"], ["loss.kd_ratio=0,0.5", "optimization.betas=[0.9, 0.95],[0.8, 0.9]"]
    )
    assert [(job.plan.loss.kd_ratio, job.plan.optimization.betas) for job in jobs] == [
        (0.0, (0.9, 0.95)),
        (0.0, (0.8, 0.9)),
        (0.5, (0.9, 0.95)),
        (0.5, (0.8, 0.9)),
    ]
    assert jobs[0].name == "grid-kd_ratio=0-betas=_0.9_0.95_"
    assert len({job.plan.run.path for job in jobs}) == 4
    assert all(job.plan.loss.chunk_size == 64 for job in jobs)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["loss.kd_ratio"], "needs the form"),
        (["loss.kd_ratio=0,,1"], "needs the form"),
        (["loss.kd_ratio=0", "loss.kd_ratio=1"], "there already"),
        (["loss.kd_ratio=0,0"], "there twice"),
        (["loss.kd_rato=0,1"], "did you mean 'kd_ratio'"),
        (["loss.kd_ratio=0,2"], "less than or equal to 1"),
        (["run.name=a,b"], "named by its settings"),
        (["data.source=a/b,a_b"], "share a run's folder"),
    ],
)
def test_a_wrong_grid_is_refused_before_any_run(recipe: str, grid: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_jobs(recipe, [], grid)


def test_a_long_value_makes_a_name_that_the_file_system_takes(recipe: str) -> None:
    names = [
        job.name
        for job in plan_jobs(
            recipe, [], [f"data.system_prompt={'long ' * 60}one,{'long ' * 60}two", "loss.kd_ratio=0,1"]
        )
    ]
    assert len(set(names)) == 4
    assert all(len(name) <= 120 and name.startswith("grid-system_prompt=long_long_") for name in names)


def test_keys_that_share_their_last_word_do_not_share_a_folder(recipe: str) -> None:
    names = {
        key: plan_jobs(recipe, [], [f"{key}={value}"])[0].name
        for key, value in [
            ("loss.chunk_size", 64),
            ("cache.chunk_size", 64),
            ("optimization.learning_rate", 64),
            ("student.lora.rank", 64),
        ]
    }
    assert list(names.values()) == [
        "grid-loss.chunk_size=64",
        "grid-cache.chunk_size=64",
        "grid-learning_rate=64",
        "grid-rank=64",
    ]


# --- running ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script(Job):
    """A job that is a few lines of Python instead of a run."""

    code: str

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.code]


@pytest.fixture
def script(recipe: str) -> Callable[..., Script]:
    def make(code: str, name: str = "grid") -> Script:
        return Script(recipe, (), load_recipe(recipe, overrides=(f"run.name={name}",)), code)

    return make


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


def test_a_job_that_is_told_to_stop_before_it_listens_is_stopped(
    script: Callable[..., Script], capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that still imports torch: SIGTERM ends it, and that is no failure."""
    job = script("import time; print('begun', flush=True); time.sleep(60)")

    def stop_once_begun() -> None:
        while not (job.log.exists() and "begun" in job.log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop_once_begun, daemon=True)
    stopping.start()
    outcome = run_sweep([job], num_parallel=1)
    stopping.join()
    assert outcome.statuses == {"grid": INTERRUPTED_STATUS}
    assert outcome.failed == []
    assert "stopped grid" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_job_that_something_else_kills_has_failed(
    script: Callable[..., Script], capsys: pytest.CaptureFixture[str], number: int
) -> None:
    outcome = run_sweep(
        [script(f"import os; print('error: no reason'); os.kill(os.getpid(), {int(number)})")], num_parallel=1
    )
    assert outcome.statuses == {"grid": 128 + number}
    assert f"FAILED  grid: killed by signal {int(number)} " in capsys.readouterr().out


def test_the_reason_is_of_this_attempt(
    script: Callable[..., Script], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (
        script("import sys; sys.exit('an error: old')"),
        script("import sys; sys.exit('out of disk')"),
    )
    for job in (first, second):
        assert run_sweep([job], num_parallel=1).statuses == {"grid": 1}
    old, new = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED"))
    assert "status 1, an error: old" in old
    assert "status 1, out of disk" in new
    assert "an error: old" in second.log.read_text()


@pytest.mark.usefixtures("no_gpu")
def test_cores_are_shared_by_the_jobs_there_are(
    script: Callable[..., Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("shared.threads.num_cores", lambda: 16)
    jobs = [script("import os; print(os.environ['OMP_NUM_THREADS'])", name) for name in ("one", "two")]
    run_sweep(jobs[:1], num_parallel=8)
    assert jobs[0].log.read_text().split() == ["15"]
    run_sweep(jobs, num_parallel=8)
    assert [job.log.read_text().split()[-1] for job in jobs] == ["7", "7"]


@pytest.mark.parametrize(("num_gpus", "at_once"), [(0, 1), (1, 1), (2, 2)])
def test_as_many_at_once_as_there_are_gpus(
    script: Callable[..., Script],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_gpus: int,
    at_once: int,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    jobs = [script("import time; time.sleep(0.5)", name) for name in ("one", "two", "three")]
    run_sweep(jobs)
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown.index("done") == at_once


@pytest.mark.slow
def test_a_failed_run_is_reported_and_the_others_are_finished(
    recipe: str, tmp_path: Path, student_folder: Path
) -> None:
    grid = ["--grid", f"student.model={student_folder},{tmp_path}/missing", "--grid", "loss.kd_ratio=0,1"]
    shown = command("sweep", recipe, *grid, "--jobs", "2")
    assert shown.return_value == RecipeError.exit_status
    assert shown.output.count("done    ") == shown.output.count("FAILED  ") == 2
    assert "2 of 4 failed" in shown.output
    assert "| loss.kd_ratio |" in shown.output
    finished = [read_run(path.parent) for path in (tmp_path / "runs").glob("*/results.json")]
    assert sorted(run.settings["loss.kd_ratio"] for run in finished) == [0, 1]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/results.json")}
    again = command(
        "sweep", recipe, "--grid", "loss.kd_ratio=0,1", "--set", f"student.model={student_folder}"
    )
    assert again.return_value == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_sigterm_stops_the_runs_in_order_and_the_same_command_goes_on(recipe: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "stage2_student", "sweep", recipe, "--grid", "loss.kd_ratio=0.25,0.75"]
    long = [*arguments, "--set", "optimization.max_steps=400"]
    process = subprocess.Popen(
        long, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    metrics = tmp_path / "runs" / "grid-kd_ratio=0.25" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"step"' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED_STATUS
    assert "stopped grid-kd_ratio=0.25" in output
    assert "grid-kd_ratio=0.75" not in output
    done = max(json.loads(line)["step"] for line in metrics.read_text().splitlines())
    ended = command(
        "sweep", recipe, "--grid", "loss.kd_ratio=0.25,0.75", "--set", f"optimization.max_steps={done + 2}"
    )
    assert ended.return_value == 0, ended.output
    assert read_run(metrics.parent).num_steps == done + 2


# --- comparing -------------------------------------------------------------------------------------------


def test_the_table_shows_what_differs_and_what_came_out(tree: dict[str, Any], tmp_path: Path) -> None:
    recipes = [
        make_recipe(tree, run__name=f"run{ratio}", loss__kd_ratio=ratio, loss__temperature=2.0)
        for ratio in (0.0, 1.0)
    ]
    for recipe in recipes:
        assert run_alone(recipe) == 0
    runs = [read_run(recipe.run.path) for recipe in recipes]
    assert differing(runs) == ["loss.kd_ratio"]
    head, _, plain, distilled, teacher = table(runs)
    assert head.startswith("| run | loss.kd_ratio | steps | epochs | CE | KL |")
    assert "| run0.0 | 0 | 4 | 1.33 |" in plain
    for line, run in ((plain, runs[0]), (distilled, runs[1])):
        assert f"| {run.losses['ce_loss']:.4f} | {run.losses['kl']:.4f} |" in line
    ce = f"{runs[0].teacher_ce:.4f}"
    assert re.match(rf"\| teacher \S*/teacher \| - \| - \| - \| {ce} \| - \|", teacher)
    assert runs[0].teacher_ce == runs[1].teacher_ce

    assert runs[1].num_epochs == pytest.approx(4 / 3)  # three steps an epoch
    (use,) = cache_uses(runs)
    assert (use.num_students, use.num_epochs) == (1, runs[1].num_epochs)
    assert use.costs.capture_s > 0
    # The live teacher costs what the teacher cost in the capture, of which 12 of 16 examples are seen in an epoch.
    captured = captured_times(use.cache)
    assert captured is not None
    assert use.costs.capture_s == captured.seconds
    assert 0.5 < use.costs.live_epoch_s / captured.teacher_s < 1.0

    shown = command(
        *("compare", *(str(run.path) for run in runs)),
        *("--json", str(tmp_path / "found.json"), "--plots", str(tmp_path / "plots")),
    )
    assert shown.return_value == 0, shown.output
    assert use.line() in shown.output  # whether it pays depends on how busy the machine is
    assert "KL to the teacher, at temperature 1 for all" in shown.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["run0.0", "run1.0"]
    assert found["caches"][0]["break_even_epochs"] == use.costs.to_json()["break_even_epochs"]
    assert (tmp_path / "plots" / "kl.png").read_bytes().startswith(b"\x89PNG")


def test_kl_is_at_temperature_one_whatever_that_of_the_loss(tree: dict[str, Any]) -> None:
    """kd_loss carries the factor temperature ** 2, and KL at another temperature is another measure."""
    recipe = make_recipe(tree, loss__kd_ratio=1.0, loss__temperature=2.0)
    assert run_alone(recipe) == 0
    run = read_run(recipe.run.path)
    shown = command("evaluate", str(run.path), "--no-references", "--json").stdout
    (evaluated,) = json.loads(shown[shown.index("[\n") :])
    assert run.losses["kl"] == pytest.approx(evaluated["kl"], rel=1e-4)
    assert run.to_json()["losses"]["kl"] == run.losses["kl"]
    assert points(run, "validation", "kl")[-1] == (4, run.losses["kl"])
    assert points(run, "step", "kl") == []  # a step has its own temperature's alone


def test_kl_of_old_logs_is_what_their_loss_had_at_temperature_one(tree: dict[str, Any]) -> None:
    for temperature, known in ((1.0, True), (2.0, False)):
        recipe = make_recipe(tree, run__name=f"T{temperature}", loss__temperature=temperature)
        path = written_run(recipe)
        validation = {"event": "validation", "step": 2, "loss": 1.5, "ce_loss": 1.0, "kd_loss": 2.0}
        with open(path / "metrics.jsonl", "a") as log:
            log.write(json.dumps(validation) + "\n")
        run = read_run(path)
        assert points(run, "validation", "kl") == ([(2, 2.0)] if known else [])
        assert run.losses["kl"] == (2.0 if known else None)


def test_a_part_of_an_epoch_is_no_whole_one(tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree, optimization__max_steps=1)  # of three
    assert run_alone(recipe) == 0
    run = read_run(recipe.run.path)
    assert run.num_epochs == pytest.approx(1 / 3)
    (use,) = cache_uses([run])
    (step,) = (record for record in run.records if record["event"] == "step")
    captured = captured_times(use.cache)
    assert captured is not None
    epoch_share = 3 * step["num_positions"] / captured.num_positions
    assert use.costs.live_epoch_s == pytest.approx(captured.teacher_s * epoch_share)


def test_epochs_that_no_log_tells_are_unknown(tree: dict[str, Any]) -> None:
    """Runs from before they were logged: they are shown, and left out of what their cache has saved."""
    old, new = (written_run(make_recipe(tree, run__name=name)) for name in ("old", "new"))
    relog(old, lambda record: record.pop("num_epochs", None))
    assert read_run(old).num_epochs is None
    assert "| old (not finished) | 2 | - |" in table([read_run(old)])[2]
    assert cache_uses([read_run(old)]) == []
    assert cache_uses(read_runs([old, new])) == cache_uses([read_run(new)])


def test_waits_are_those_of_all_ranks_as_the_capture_is(tree: dict[str, Any]) -> None:
    """The log has the first rank's; costs are in seconds of one device."""
    alone, four = (
        read_run(written_run(make_recipe(tree, run__name=f"ranks{n}"), num_ranks=n)) for n in (1, 4)
    )
    assert alone.reading_s == pytest.approx(0.4)  # two steps that waited 0.2 s
    assert four.reading_s == pytest.approx(1.6)


def test_a_cache_that_never_pays(tree: dict[str, Any], tmp_path: Path) -> None:
    path = written_run(make_recipe(tree))
    relog(path, lambda record: record.update(step_s=1e6))
    (use,) = cache_uses([read_run(path)])
    assert use.line().endswith("never pays")
    save([read_run(path)], tmp_path / "found.json")
    (cache,) = json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)["caches"]
    assert cache["break_even_epochs"] is None


def test_runs_of_one_name_are_told_apart(tree: dict[str, Any], tmp_path: Path) -> None:
    places = [("a", "same"), ("b", "same"), ("a", "other")]
    runs = [
        read_run(written_run(make_recipe(tree, run__root=str(tmp_path / root), run__name=name)))
        for root, name in places
    ]
    assert labels(runs) == [str(tmp_path / "a" / "same"), str(tmp_path / "b" / "same"), "other"]
    shown = [line.split(" | ")[0] for line in table(runs)[2:]]
    assert shown == [f"| {label} (not finished)" for label in labels(runs)]


@pytest.mark.parametrize("prompt", ["one\ntwo", "one|two", "one\r\ntwo", "a\\|b"])
def test_a_value_cannot_break_the_table(tree: dict[str, Any], prompt: str) -> None:
    recipes = [
        make_recipe(tree, run__name="bare"),
        make_recipe(tree, run__name="told", data__system_prompt=prompt),
    ]
    lines = table([read_run(written_run(recipe)) for recipe in recipes])
    assert all(len(line.splitlines()) == 1 for line in lines)
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(columns) == 1


def test_a_capture_that_was_stopped_has_cost_what_all_of_it_costs(
    teacher_cache: Path, tmp_path: Path
) -> None:
    whole = captured_times(str(teacher_cache))
    assert whole is not None
    assert 0 < whole.teacher_s < whole.seconds

    resumed = shutil.copytree(teacher_cache, tmp_path / "cache")
    (line,) = (json.loads(line) for line in (resumed / "log.jsonl").read_text().splitlines())
    rest = line | {name: line[name] / 8 for name in ("seconds", "teacher_ms", "positions")}
    (resumed / "log.jsonl").write_text('{"event": "interrupted"}\n' + json.dumps(rest) + "\n")
    found = captured_times(str(resumed))
    assert found is not None
    assert (found.seconds, found.teacher_s) == pytest.approx((whole.seconds, whole.teacher_s))


def test_lines_of_a_caches_log_that_tell_nothing_are_passed_over(teacher_cache: Path, tmp_path: Path) -> None:
    whole = captured_times(str(teacher_cache))
    copied = shutil.copytree(teacher_cache, tmp_path / "cache")
    log = copied / "log.jsonl"
    timed = json.loads(log.read_text())
    lines = [5, [], {}, {"event": "captured"}, {"event": "captured", "teacher_ms": 1.0}]
    lines += [{name: value for name, value in timed.items() if name != "seconds"}, timed | {"ranks": "2"}]
    log.write_bytes(b"\xff\n{torn\n" + log.read_bytes() + "\n".join(map(json.dumps, lines)).encode())
    assert captured_times(str(copied)) == whole


@pytest.mark.parametrize("text", ["[", "5", "{}", "[]", "", "loss: {kd_ratio: 1.0}", "run: {name: \xff}"])
def test_a_damaged_recipe_of_a_run_is_one_error(tree: dict[str, Any], text: str) -> None:
    path = written_run(make_recipe(tree))
    (path / "recipe.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: "):
        read_run(path)


@pytest.mark.parametrize("text", ["[", "5", "{}", "[]", '{"step": "4"}', "\xff"])
def test_damaged_results_of_a_run_are_one_error(tree: dict[str, Any], text: str) -> None:
    path = written_run(make_recipe(tree))
    (path / "results.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"results\.json: .*--resume"):
        read_run(path)


@pytest.mark.parametrize("text", ["[", "5", "{}", '{"num_ranks": "2"}'])
def test_a_damaged_environment_of_a_run_is_one_error(tree: dict[str, Any], text: str) -> None:
    path = written_run(make_recipe(tree))
    (path / "environment.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"environment\.json: "):
        read_run(path)


@pytest.mark.parametrize("line", [b"5", b"[]", b"\xff", b'{"event": "step", "step": "3"'])
def test_lines_of_a_runs_log_that_are_no_records_are_refused_but_for_a_torn_last_one(
    tree: dict[str, Any], line: bytes
) -> None:
    path = written_run(make_recipe(tree))
    whole = read_run(path)
    log = path / "metrics.jsonl"
    kept = log.read_bytes()
    log.write_bytes(kept + b'{"event": "st')
    assert read_run(path) == whole
    log.write_bytes(line + b"\n" + kept)
    with pytest.raises(CheckpointError, match="damaged in line 1"):
        read_run(path)


def test_captures_whose_teacher_was_not_timed_are_left_out(teacher_cache: Path, tmp_path: Path) -> None:
    """Those of caches from before it was."""
    whole = captured_times(str(teacher_cache))
    copied = shutil.copytree(teacher_cache, tmp_path / "cache")
    timed = json.loads((copied / "log.jsonl").read_text())
    untimed = {name: value for name, value in timed.items() if name != "teacher_ms"} | {"seconds": 1e6}
    (copied / "log.jsonl").write_text(json.dumps(untimed) + "\n")
    assert captured_times(str(copied)) is None
    (copied / "log.jsonl").write_text(f"{json.dumps(untimed)}\n{json.dumps(timed)}\n")
    assert captured_times(str(copied)) == whole


def test_a_run_without_a_cache_section_beside_one_with(tree: dict[str, Any]) -> None:
    tuned = {name: section for name, section in tree.items() if name not in ("teacher", "cache")}
    recipes = [
        make_recipe(tuned, run__name="tuned", loss__kd_ratio=0.0),
        make_recipe(tree, run__name="distilled"),
    ]
    for recipe in recipes:
        assert run_alone(recipe) == 0
    found = differing([read_run(recipe.run.path) for recipe in recipes])
    assert found == ["loss.kd_ratio", "teacher.model", "cache.path"]


def test_a_run_given_twice_is_one(tree: dict[str, Any]) -> None:
    path = make_recipe(tree).run.path
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump(dump_recipe(make_recipe(tree))))
    assert len(read_runs([path, path.parent / "." / path.name, path])) == 1


def test_files_beside_the_runs_are_left_out_and_said(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with ``compare runs/*`` after a sweep."""
    path = make_recipe(tree).run.path
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump(dump_recipe(make_recipe(tree))))
    log = path.with_suffix(".log")
    log.touch()
    assert [run.path for run in read_runs([path, log])] == [path]
    assert str(log) in capsys.readouterr().err
    with pytest.raises(RecipeError, match="no run among them"):
        read_runs([log])


def test_a_link_to_itself_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(RecipeError, match="there is no run in it"):
        read_runs([tmp_path / "circle"])


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no run in it"):
        read_run(tmp_path)


def test_an_unfinished_run_is_shown_with_what_it_has(tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree)
    run_alone(recipe)
    (recipe.run.path / "results.json").unlink()
    run = read_run(recipe.run.path)
    assert not run.is_finished
    assert "grid (not finished)" in table([run])[2]


def test_flat() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
