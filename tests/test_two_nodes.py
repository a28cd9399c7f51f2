"""Both stages on two machines: two torchrun agents that meet at a rendezvous, by the commands of docs/scaling.md."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import ROOT, blocks, command_words
from stage2_runs import make_recipe, run_alone, step_records, validation_records

from shared.recipes import dump_recipe

AGENTS = 2
TIMEOUT_S = 240


def on_two_agents(line: str, recipe: Path) -> None:
    """Runs a documented command with one rank on each of two agents; their output is shown if one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    here = {"HEAD:29500": endpoint, "--nproc-per-node=8": "--nproc-per-node=1", "mine.yaml": str(recipe)}
    for documented, meant in here.items():
        assert documented in line
        line = line.replace(documented, meant)
    torchrun, *arguments = command_words(line)
    assert torchrun == "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    agents = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(AGENTS)
    ]
    try:
        outputs = [agent.communicate(timeout=TIMEOUT_S)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0] * AGENTS, "\n".join(outputs)


@pytest.mark.slow
def test_a_cache_and_a_student_made_by_two_nodes(
    tmp_path: Path, vqa_folder: Path, teacher_folder: Path, student_folder: Path, teacher_cache: Path
) -> None:
    tree: dict[str, Any] = {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(tmp_path / "cache"), "num_workers": 0, "temperatures": [1.0, 2.0]},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "optimization": {"global_batch_size": 4, "microbatch_size": 2, "max_steps": 3, "learning_rate": 1e-2},
        "run": {"name": "two", "root": str(tmp_path / "runs"), "num_workers": 0, "export": False},
    }
    two = make_recipe(tree)
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(dump_recipe(two)))

    capture, train = blocks(ROOT / "docs" / "scaling.md", "sh")[0].lines
    on_two_agents(capture, recipe_file)
    shards = {path.name: path.read_bytes() for path in (tmp_path / "cache" / "shards").iterdir()}
    assert shards == {path.name: path.read_bytes() for path in (teacher_cache / "shards").iterdir()}

    on_two_agents(train, recipe_file)
    one = make_recipe(tree, run__name="one")
    run_alone(one)
    for ours, theirs in (
        (step_records(two), step_records(one)),
        (validation_records(two), validation_records(one)),
    ):
        assert len(ours) == len(theirs) > 0
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.pop("event") == other.pop("event")
            assert mine == pytest.approx(other, rel=2e-5)
