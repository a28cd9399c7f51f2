"""The README and the documents as tests read them: their fenced blocks and the commands in these."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Shell commands, continued lines joined and comments left out."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line for line in joined if command_words(line)]


def command_words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def blocks(path: Path, language: str | None = None) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [Block(name, text) for name, text in found if language in (None, name)]
