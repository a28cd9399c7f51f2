"""The card of a written set: for people, for the Hub, and for ``datasets``, which may take any JSON for rows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

CARD = "README.md"


def card(told: Mapping[str, Any]) -> str:
    """Of what ``written.json`` will say."""
    splits = dict.fromkeys(name.rpartition("-of-")[0].rpartition("-")[0] for name in told["files"])
    files = "\n".join(
        f"  - split: {json.dumps(split)}\n    path: {json.dumps(_pattern(split))}" for split in splits
    )
    writer = "\n".join(f"| {name} | {_shown(value)} |" for name, value in told["written_by"].items())
    counts = "\n".join(f"| {name} | {number:,} |" for name, number in told["counts"].items())
    return f"""---
task_categories:
- visual-question-answering
configs:
- config_name: default
  data_files:
{files}
---

# Answers that a model wrote

The rows are prompts of another data set, with answers of a model in place of its own. `answer_ids` are the tokens
that it wrote, `answer_end` says whether it ended the answer, `written_by` who wrote it, how and when; `source_key`,
`source_row` and `draw` say which row was asked, and which of its answers this is.

| written by | |
| --- | --- |
{writer}

| | |
| --- | --- |
{counts}

`written.json` lists what was left out, with reasons, and the SHA-256 of each file.
"""


def _pattern(split: str) -> str:
    """Of the split's files, and of no other split whose name begins like it; its own special characters are any."""
    return re.sub(r"[^\w.-]", "?", split) + "-?????-of-?????.parquet"


def _shown(value: Any) -> str:
    """In a cell of a table."""
    return str(value).replace("|", "\\|").replace("\n", " ")
