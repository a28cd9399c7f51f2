"""Log-probs of a recipe's teacher and of its student before training, for ``bench_targets --distributions``.

    make teacher-cache RECIPE=medpix_sample
    python -m tests.benchmarks.real_teacher medpix_sample work/distributions.pt
    python -m tests.benchmarks.bench_targets --distributions work/distributions.pt

The student is the recipe's own run where it has been exported, else its model before training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.data.collation import Batch
from shared.data.processing import open_processor
from shared.data.rows import open_split
from shared.models.vlm import last_hidden_states, load_vlm, split
from shared.recipes import Recipe, load_recipe

BATCH = 8


def batches(recipe: Recipe, model: str, num_positions: int) -> Iterator[Batch]:
    """Training examples in order, until they have that many positions."""
    processor, rows = open_processor(model, recipe.data), open_split(recipe.data, "train")
    found = 0
    for start in range(0, len(rows), BATCH):
        some = [processor.encode(rows[row]) for row in range(start, min(start + BATCH, len(rows)))]
        yield processor.collate(some)
        found += sum(one.num_positions for one in some)
        if found >= num_positions:
            return


@torch.inference_mode()
def distributions(model: PreTrainedModel, batch: Batch, num_ids: int) -> tuple[Tensor, Tensor]:
    """Log-probs (N, V) and hidden states (N, D) at the answer positions."""
    body, head = split(model)
    hidden_ND = last_hidden_states(body, batch.inputs).flatten(0, 1)[batch.position_index]
    return head.logits(hidden_ND)[:, :num_ids].float().log_softmax(-1), hidden_ND


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("out", type=Path)
    parser.add_argument("--positions", type=int, default=4096)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    assert recipe.teacher is not None
    trained = recipe.run.path / "export"
    student = str(trained) if trained.exists() else recipe.student.model
    num_ids = open_processor(recipe.teacher.model, recipe.data).num_token_ids
    parts: dict[str, list[Tensor]] = {"logprobs": [], "student_logprobs": [], "hidden": []}
    teacher, its_student = (
        load_vlm(name, revision=None, dtype=torch.float32, attn_implementation=None)
        for name in (recipe.teacher.model, student)
    )
    for batch in batches(recipe, recipe.teacher.model, arguments.positions):
        parts["logprobs"].append(distributions(teacher, batch, num_ids)[0])
        logprobs_NV, hidden_ND = distributions(its_student, batch, num_ids)
        parts["student_logprobs"].append(logprobs_NV)
        parts["hidden"].append(hidden_ND)
    stored = {name: torch.cat(some)[: arguments.positions] for name, some in parts.items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(stored, arguments.out)
    print(f"{arguments.out}: {len(stored['logprobs'])} positions, student {student}")


if __name__ == "__main__":
    main()
