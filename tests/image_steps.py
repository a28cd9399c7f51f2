"""The steps of the Dockerfile, taken without a builder of images: in a folder, as this user, step by step.

    python -m tests.image_steps /tmp/image                                     # all steps, with pip's own indices
    python -m tests.image_steps /tmp/image TORCH_INDEX=https://download.pytorch.org/whl/cpu

Paths from the root on lie in that folder.  What only root can do, packages of the system and users, is left out and
said.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOR_ROOT_ALONE = ("apt-get ", "useradd ")
OWN_FOLDERS = ("/opt/", "/work", "/home/")


@dataclass(frozen=True)
class Step:
    """One instruction, its continued lines joined."""

    name: str
    text: str


def steps(dockerfile: Path = ROOT / "Dockerfile") -> list[Step]:
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Step(*line.split(None, 1)) for line in joined.splitlines() if line.strip()]


@dataclass
class Image:
    """A folder in the place of an image's root."""

    folder: Path
    arguments: Mapping[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    place: str = "/"
    user: str = "root"
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)

    def take(self, step: Step) -> None:
        """Raises   CalledProcessError  when a command of it fails"""
        take = {
            "ARG": self._argument,
            "ENV": self._set,
            "WORKDIR": self._change,
            "COPY": self._copy,
            "RUN": self._run,
        }
        if step.name in take:
            take[step.name](step.text)
        elif step.name == "USER":
            self.user = step.text
        else:
            assert step.name in ("FROM", "CMD"), step

    def environment(self) -> dict[str, str]:
        """Of a command in it."""
        kept = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
        outside = {name: value for name, value in os.environ.items() if name not in kept}
        return {**outside, **self.variables}

    def inside(self, path: str) -> Path:
        return self.folder / path.lstrip("/")

    def _argument(self, text: str) -> None:
        name, _, default = text.partition("=")
        self.variables[name] = self.arguments.get(name, default)

    def _set(self, text: str) -> None:
        before = self.environment()
        for name, value in (item.split("=", 1) for item in text.split()):
            self.variables[name] = re.sub(r"\$(\w+)", lambda found: before[found[1]], self._here(value))

    def _change(self, text: str) -> None:
        self.place = text
        self.inside(text).mkdir(parents=True, exist_ok=True)

    def _copy(self, text: str) -> None:
        *sources, target = text.split()
        for source in sources:
            assert is_sent(source), f"{source} is left out by .dockerignore"
            goal = self.inside(self.place) / target
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, goal, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, goal)

    def _run(self, text: str) -> None:
        if text.startswith(FOR_ROOT_ALONE):
            self.left_out.append(text)
            return
        command = ["sh", "-ec", self._here(text)]
        subprocess.run(command, cwd=self.inside(self.place), env=self.environment(), check=True)

    def _here(self, text: str) -> str:
        return re.sub(r"(?<![\w.:/])(?=" + "|".join(OWN_FOLDERS) + ")", str(self.folder), text)


def is_sent(source: str) -> bool:
    """Whether the builder gets the file: the last line of .dockerignore that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().split():
        if fnmatch(source, line.removeprefix("!").removeprefix("**/")):
            sent = line.startswith("!")
    return sent


def main(words: Sequence[str]) -> None:
    image = Image(Path(words[0]).resolve(), dict(word.split("=", 1) for word in words[1:]))
    for step in steps():
        print(f"==> {step.name} {step.text}", flush=True)
        image.take(step)
    print("left out, as they need root:", *image.left_out, sep="\n  ")


if __name__ == "__main__":
    main(sys.argv[1:])
