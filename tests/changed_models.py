"""Models of the tests with another configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def with_text_config(model: str | Path, folder: Path, **values: Any) -> str:
    """A copy in a new folder; returns its name."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
