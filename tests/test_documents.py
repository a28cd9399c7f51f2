"""What the README and the documents tell a user to type is typed here, in their order, with small sizes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
import yaml
from click import Command
from click.testing import CliRunner
from documents import DOCUMENTS, ROOT, Block, blocks, command_words
from samples import encoded_picture

from shared import pipeline
from shared.cache import CacheReader
from shared.data.rows import open_split
from shared.phantom.dataset import write_dataset
from shared.recipes import load_recipe
from shared.stopping import GO_ON
from stage1_teacher.__main__ import commands as teacher_commands
from stage2_student.__main__ import commands as student_commands

GROUPS = {"teacher-cache": teacher_commands, "train-student": student_commands}
TIMEOUT_S = 300
# What is laid over the documented commands: nothing but sizes.
SMALL_PHANTOM = [
    "bootstrap.phantom.train=8",
    "bootstrap.phantom.validation=4",
    "bootstrap.phantom.test=1",
    "bootstrap.phantom.size=64",
    "optimization.num_epochs=0.5",
    "run.validate_every=null",
    "evaluation.max_examples=4",
]
SMALL_OWN = {
    "teacher": {"model": "models/large", "dtype": "float32"},
    "student": {"model": "models/small", "compute_dtype": "float32"},
    "optimization": {"global_batch_size": 8, "max_steps": 2, "num_warmup_steps": 0},
    "evaluation": {"max_examples": 2, "max_new_tokens": 4},
}


# --- a place to type in ----------------------------------------------------------------------------------


@dataclass
class Workbench:
    """A folder with the Makefile and the environment, as a checkout has them."""

    folder: Path

    def type(self, line: str, *, here: bool = False) -> None:
        """Runs one documented command; what it printed is shown if it fails.

        here  in this process, what make would start
        """
        words = smaller(command_words(line))
        program = Path(words[0]).name
        if program in GROUPS:
            assert shutil.which(program, path=str(self.folder / ".venv" / "bin"))
            status, output = in_this_process(GROUPS[program], words[1:], line)
        elif here and program == "make":
            dry = subprocess.run([*words, "-s", "-n"], capture_output=True, text=True, check=True).stdout
            python, *started = command_words(dry.splitlines()[-1])
            assert (python, *started[:2]) == (".venv/bin/python", "-m", "shared.pipeline"), dry
            status, output = in_this_process(pipeline.main, started[2:], line)
        else:
            ran = subprocess.run(
                words,
                cwd=self.folder,
                env=os.environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            status, output = ran.returncode, ran.stdout
        assert status == 0, f"{line}\n{output}"


def in_this_process(command: Command, words: list[str], line: str) -> tuple[int, str]:
    """Status and output."""
    done = CliRunner().invoke(command, words, standalone_mode=False)
    if done.exception is not None:
        raise AssertionError(f"{line}\n{done.output}") from done.exception
    return done.return_value or 0, done.output


def launched_here(launch: Callable[..., int]) -> Callable[..., int]:
    """``pipeline.launch``, but for a single process, which need not load everything anew."""
    stages = {"stage1_teacher": teacher_commands, "stage2_student": student_commands}

    def launch_here(
        module: str,
        verb: str,
        recipe: str,
        overrides: Sequence[str],
        stage_arguments: Sequence[str],
        *,
        nproc: pipeline.Nproc,
        what: str | None = None,
    ) -> int:
        if pipeline.num_processes(nproc) > 1:
            return launch(module, verb, recipe, overrides, stage_arguments, nproc=nproc, what=what)
        settings = [part for item in overrides for part in ("--set", item)]
        words = [verb, recipe, *settings, *stage_arguments]
        return stages[module].main(words, standalone_mode=False) or 0

    return launch_here


def smaller(words: list[str]) -> list[str]:
    """The command with fewer processes, and with small sizes where it takes the drawn set's recipe."""
    words = ["NPROC=2" if word.startswith("NPROC=") else word for word in words]
    settings = [part for item in SMALL_PHANTOM for part in ("--set", item)]
    if words[0] == "make" and words[1] in ("teacher-cache", "train-student"):
        recipe = next((word for word in words if word.startswith("RECIPE=")), "RECIPE=phantom")
        given = next((word for word in words if word.startswith("ARGS=")), "ARGS=")
        rest = [word for word in words if not word.startswith("ARGS=")]
        return [*rest, " ".join([given, *(settings if recipe == "RECIPE=phantom" else [])])]
    return [*words, *settings] if "phantom" in words else words


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    if sys.prefix == sys.base_prefix:
        pytest.skip("needs the environment that make setup makes")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = tmp_path / ".venv"
    environment.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".installed":
            (environment / entry.name).symlink_to(entry)
    (environment / ".installed").write_text(everything_installed())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{environment / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TEACHONCE_STAGING", str(tmp_path / "staging"))
    return Workbench(tmp_path)


def everything_installed() -> str:
    """What the makefile would write down after ``make test``, so that nothing is installed again."""
    ask = "--eval=stamp: ; @echo $(FILES) $(FOR_TESTS) dev"
    return subprocess.run(
        ["make", "-s", ask, "stamp"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def bring_own(bench: Workbench, recipe: str, large: Path, small: Path) -> None:
    """What a user brings: ``mine.yaml`` as documented, its data as JSONL, models."""
    tree = yaml.safe_load(recipe)
    assert not set(tree) & set(SMALL_OWN)
    Path("mine.yaml").write_text(recipe + yaml.safe_dump(SMALL_OWN))
    for name, folder in {"large": large, "small": small, "other": small}.items():
        shutil.copytree(folder, Path("models") / name)
    write_dataset(Path("drawn"), pictures={"train": 4, "validation": 2, "test": 1}, seed=5)
    drawn = load_recipe("phantom", overrides=["data.source=drawn"]).data
    source = Path("data/mine")
    (source / "pictures").mkdir(parents=True)
    for split, name in (("train", "train"), ("validation", "dev")):
        lines = []
        for number, row in enumerate(open_split(drawn, split)):
            picture = f"pictures/{name}-{number}.png"
            (source / picture).write_bytes(row.images[0])
            lines.append(json.dumps({"image": picture, "question": row.question, "answer": row.answer}))
        (source / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


CONVERSATIONS = {"json": "data/llava/{}.json", "jsonl": "data/chats/{}.jsonl"}


def bring_conversations(block: Block) -> None:
    """Writes a documented file of conversations, and pictures for it."""
    for split in ("train", "dev"):
        file = Path(CONVERSATIONS[block.language].format(split))
        (file.parent / "pictures").mkdir(parents=True, exist_ok=True)
        file.write_text(block.text)
    for number in range(3):
        (file.parent / "pictures" / f"{number}.png").write_bytes(encoded_picture(number, size=(64, 48)))


# --- the documents ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_readme_from_top_to_bottom(bench: Workbench, teacher_folder: Path, student_folder: Path) -> None:
    """Shell and Python alike.  What only develops this project is looked up, not run from within a test."""
    for block in blocks(ROOT / "README.md"):
        if block.language == "yaml" and "extends" in block.text:
            bring_own(bench, block.text, teacher_folder, student_folder)
        elif block.language == "yaml":
            Path("other.yaml").write_text(f"extends: mine.yaml\n{block.text}")
            assert load_recipe("other.yaml").student.freeze.vision
        elif block.language == "python":
            exec(compile(block.text, "README.md", "exec"), {})
        elif block.language == "sh" and "make test" not in block.text:
            for line in block.lines:
                if "NPROC=8" in line:  # a student of the name of one above
                    line = f"{line.partition('#')[0]} ARGS='--set run.name=many'"
                bench.type(line)


@pytest.mark.slow
def test_the_guides_from_top_to_bottom(
    bench: Workbench,
    teacher_folder: Path,
    student_folder: Path,
    s3_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What make starts runs in this process: the README is typed as it stands."""
    monkeypatch.setattr(pipeline, "launch", launched_here(pipeline.launch))
    monkeypatch.setenv(GO_ON, "")  # which the pipeline sets
    settings = {"AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").mkdir("bucket")
    for block in blocks(ROOT / "docs" / "guides.md"):
        if block.language in CONVERSATIONS:
            bring_conversations(block)
        elif found := re.match(r"# (\w+\.yaml)\n", block.text):
            Path(found[1]).write_text(block.text.replace("Qwen/Qwen3.5-9B", "models/large"))
        elif block.language == "yaml":
            bring_own(bench, block.text, teacher_folder, student_folder)
        elif block.language == "sh":
            for line in block.lines:
                bench.type(line, here=True)
    assert {path.name for path in Path("runs").iterdir() if path.is_dir()} >= {
        "mine",
        "written",
        "small",
        "tuned",
        "warm",
        "remote",
        "many",
    }
    for name in ("llava", "chats"):
        manifest = CacheReader(f"caches/{name}").manifest
        assert (manifest.totals.examples, manifest.totals.skipped) == (3, 0)
        scores = json.loads((Path("runs") / name / "evaluation" / "validation.json").read_text())
        assert scores


# --- what is mentioned in passing ------------------------------------------------------------------------


def mentioned() -> list[tuple[str, str]]:
    """Commands between backticks and in indented synopses."""
    found = []
    for path in DOCUMENTS:
        text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        spans = re.findall(r"`([^`]+)`", text) + re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE)
        for span in spans:
            line = " ".join(span.split()).removeprefix(".venv/bin/")
            if re.match(r"(make|teacher-cache|train-student|python -m) ", line):
                found.append((path.name, line))
    found += [
        ("README.md", line)
        for one in blocks(ROOT / "README.md", "sh")
        for line in one.lines
        if "make" in line
    ]
    return found


@pytest.mark.parametrize(("document", "line"), mentioned())
def test_a_command_that_is_mentioned_exists(document: str, line: str) -> None:
    words = line.split()
    if words[0] == "python":
        assert importlib.util.find_spec(words[2]) is not None
    elif words[0] == "make":
        if words[1] != "...":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert words[1] in targets
    else:
        command = GROUPS[words[0]].commands[words[1]]
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        assert set(re.findall(r"--[a-z][a-z-]*", line)) <= known | {"--help"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_values_that_a_shell_takes_for_patterns_are_quoted(path: Path) -> None:
    """zsh ends with an error where no file fits a pattern."""
    for line in (line for block in blocks(path, "sh") for line in block.lines):
        bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", line)
        assert not re.search(r"=\S*[\[*?]", bare), line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        aimed = path.parent / file if file else path
        assert aimed.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", aimed.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}, (
                target
            )
