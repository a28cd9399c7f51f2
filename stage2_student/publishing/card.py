"""The model card of an export: what it was made of, its scores, how to load it.  Nothing that is not on record.

The card is made of the export's ``teachonce.json``.  Its scores come from the run's ``results.json`` and
``evaluation/``, and only those of the exported step.  They stand between two marks, so that they can be made
again when there are new ones, and what people wrote around them stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from shared.cache import Cache, CacheMix
from shared.models.adapters import lineage
from shared.models.weight_files import read_provenance
from shared.recipes import Recipe
from shared.regular_files import read_regular
from stage2_student.runs.files import write_json, write_text
from stage2_student.runs.run_folder import SHUFFLED, RunFolder, scores_in

SOURCES = "sources.json"  # in the run's folder, as they were when it began: they may be gone at an export
ROW_TEACHERS = "row_teachers"  # among them: whose targets the rows for training have
CARD = "README.md"
BEGIN, END = "<!-- scores: begin -->", "<!-- scores: end -->"
SCORES = {
    "accuracy": "right, short",
    "exact_match": "exact, all",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
}
BESIDE_KD = (
    "own_kd_ratio",
    "reverse_kl",
    "visual_weight",
    "positions",
)  # of a loss, where a recipe sets them
VERSIONS = ("teachonce", "commit", "python", "torch", "transformers", "datasets")

LOADING = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```
"""


LOADING_AN_ADAPTER = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

model = AutoModelForImageTextToText.from_pretrained("{name}")
model.generation_config = GenerationConfig.from_pretrained("{name}")  # else the base model's: where answers end
processor = AutoProcessor.from_pretrained("{name}")
```
"""


def write_sources(folder: RunFolder, recipe: Recipe, cache: Cache | None, keys: np.ndarray) -> None:
    """Notes what the run is made of: which names are local folders, and whose targets the cache holds.

    keys  of the rows for training
    """
    base, revision = lineage(recipe.student.model, recipe.student.revision)[0]
    model = recipe.student.model
    path = str(Path(model).absolute()) if Path(model).exists() else None
    facts: dict[str, Any] = {
        "student": {"model": base, "revision": revision, "is_local": Path(base).exists(), "path": path},
        "data": {"source": recipe.data.source, "is_local": Path(recipe.data.source).exists()},
        "cache": None,
    }
    caches = [] if cache is None else facts_of_caches(cache)
    if cache is not None:
        facts[ROW_TEACHERS] = cache.teachers_digest(keys)
    if len(caches) == 1:
        facts["cache"] = caches[0]
    elif caches:
        facts["caches"] = caches
    write_json(folder.path / SOURCES, facts)


def facts_of_caches(cache: Cache) -> list[dict[str, Any]]:
    """Of each that is read, in their order."""
    weights = cache.weights if isinstance(cache, CacheMix) else [None] * len(cache.parts)
    return [
        {
            "path": part.location,
            "sha256": part.manifest.sha256,
            "teacher": part.manifest.identity.teacher.model_dump(mode="json"),
            "targets": part.manifest.identity.targets.model_dump(mode="json"),
            "totals": part.manifest.totals.model_dump(mode="json"),
        }
        | ({} if weight is None else {"weight": weight})
        for part, weight in zip(cache.parts, weights, strict=True)
    ]


def caches_in(sources: dict[str, Any]) -> list[dict[str, Any]]:
    """The same, as a run has noted them; those of earlier releases have no ``path``."""
    one = sources.get("cache")
    return sources.get("caches") or ([one] if one else [])


def read_sources(folder: RunFolder) -> dict[str, Any]:
    """Empty for a run of a release that did not note them."""
    return _read(folder.path / SOURCES)


def model_card(facts: dict[str, Any], folder: RunFolder, *, is_adapter: bool) -> str:
    """The text of the card: YAML that the Hub reads, and Markdown.

    facts  of ``teachonce.json``
    """
    recipe, sources = facts["recipe"], facts["sources"]
    name = recipe["run"]["name"]
    loading = (LOADING_AN_ADAPTER if is_adapter else LOADING).format(name="FOLDER_OR_REPOSITORY")
    lines = [
        "---",
        "# license: left open. The licences of base model, teacher and data decide; so does `language`.",
        yaml.safe_dump(_metadata(recipe, sources, is_adapter=is_adapter), sort_keys=False).rstrip(),
        "---",
        f"\n# {name}\n",
        "Written by the export of [teachonce](#versions) from the run's own records.",
        "Add what they cannot know: intended use, limits, licence.\n",
        "## What it was made of\n",
        "| | |",
        "|---|---|",
        *(f"| {label} | {text} |" for label, text in _made_of(facts)),
        "\n## Scores\n",
        scores_section(facts, folder),
        "\n## Load it\n",
        "An adapter: `peft` must be installed, and the base model must be reachable.\n" if is_adapter else "",
        loading,
        _prompting(recipe["data"]),
        "\n## Licence\n",
        "Left open. It depends on the licences of the base model, the teacher and the data.",
        "Set `license` at the top of this file before you share the model.",
        "\n## Recipe\n",
        "<details><summary>As resolved</summary>\n",
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```\n",
        "</details>",
        "\n## Versions\n",
        ", ".join(f"{one} {facts[one]}" for one in VERSIONS if facts.get(one)),
    ]
    return "\n".join(lines) + "\n"


def refresh_card(folder: RunFolder) -> None:
    """Makes the scores in the run's export anew; does nothing where no card is ours, or its marks are gone."""
    card, facts = folder.export / CARD, read_provenance(folder.export)
    if not facts:
        return
    try:
        text = read_regular(card).decode()
    except (FileNotFoundError, UnicodeDecodeError):  # somebody has removed it, or written another
        return
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    new = before + scores_section(facts, folder) + after
    if begin and end and new != text:
        write_text(card, new)


def scores_section(facts: dict[str, Any], folder: RunFolder) -> str:
    """The marks and what stands between them: scores of this very step, or that there are none."""
    step = facts["step"]
    found = [*_validation(folder, step), *_evaluations(folder, step)]
    return "\n".join(
        [BEGIN, *(found or ["None yet: the run had not finished, or another step was scored."]), END]
    )


def _metadata(recipe: dict[str, Any], sources: dict[str, Any], *, is_adapter: bool) -> dict[str, Any]:
    """Only names that lead somewhere on the Hub."""
    student, data = sources.get("student", {}), sources.get("data", {})
    found: dict[str, Any] = {}
    if student and not student["is_local"] and recipe["student"]["init"] == "pretrained":
        found["base_model"] = student["model"]
    if data and not data["is_local"]:
        found["datasets"] = [data["source"]]
    found["library_name"] = "peft" if is_adapter else "transformers"
    found["pipeline_tag"] = "image-text-to-text"
    found["tags"] = [*(["knowledge-distillation"] if caches_in(sources) else []), "teachonce"]
    return found


def _made_of(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    recipe, caches = facts["recipe"], caches_in(facts["sources"])
    student, data, loss = recipe["student"], recipe["data"], recipe["loss"]
    start = "" if student["init"] == "pretrained" else ", its configuration alone; weights from scratch"
    yield "student", _named(student["model"], student["revision"]) + start
    if student["lora"] is not None:
        yield "LoRA", f"rank {student['lora']['rank']}, alpha {student['lora']['alpha']:g}"
    yield "data", f"{_named(data['source'], data['revision'])}, split `{data['splits']['train']}`"
    if data.get("written"):
        sets = ", ".join(f"`{folder}`" for folder in data["written"])
        yield "written answers", f"{sets}: of the rows that they answer, a model's answer is the label"
    for cache in caches:
        yield from _taught_by(cache)
    if caches:
        beside = [f", {name} {_setting(loss[name])}" for name in BESIDE_KD if loss.get(name) is not None]
        yield "loss", f"kd_ratio {loss['kd_ratio']:g}, temperature {loss['temperature']:g}{''.join(beside)}"
    elif loss["kd_ratio"] == 0:
        yield "loss", "cross-entropy with the labels alone; no teacher"
    yield "steps", f"{facts['step']}, of {recipe['optimization']['global_batch_size']} examples"


def _taught_by(cache: dict[str, Any]) -> Iterator[tuple[str, str]]:
    teacher, targets, totals = cache["teacher"], cache["targets"], cache["totals"]
    policy = ", ".join(f"{key} {value}" for key, value in targets["policy"].items())
    share = f", {cache['weight']:.3g} of the targets" if "weight" in cache else ""
    yield "teacher", f"{_named(teacher['name'], teacher['revision'])}, {teacher['dtype']}{share}"
    yield "teacher's weights", f"SHA-256 `{teacher['weights_fingerprint']}`"
    yield "cache", f"manifest `{cache['sha256']}`"
    yield "policy", f"{policy}; temperatures {', '.join(map(str, targets['temperatures']))}"
    yield (
        "targets",
        (
            f"{totals['examples']} examples, {totals['positions']} positions, {totals['entries']} entries, "
            f"{totals['bytes']} bytes"
        ),
    )


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_setting(one)}" for key, one in value.items()) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _named(name: str, revision: str | None) -> str:
    return f"`{name}`" + (f", revision `{revision}`" if revision else "")


def _prompting(data: dict[str, Any]) -> str:
    said = (
        f"System prompt: `{data['system_prompt']}`."
        if data["system_prompt"]
        else "There was no system prompt."
    )
    pixels = [f"{key} {data[key]}" for key in ("min_pixels", "max_pixels") if data[key] is not None]
    limits = f" Pictures: {', '.join(pixels)}." if pixels else ""
    return f"The chat template writes the prompts, with their pictures. {said}{limits}"


def _validation(folder: RunFolder, step: int) -> Iterator[str]:
    results = folder.read_results()
    if results is None or results["step"] != step or not results["after"]:
        return
    before, after = results["before"] or {}, results["after"]
    yield "| validation, nats a position | before | after |\n|---|---|---|"
    labels = {"ce_loss": "CE", "kl": "KL from the teacher, temperature 1"}
    labels |= {
        "soft_ce": "Cross-entropy with the teacher, whose tokenizer is another one, at shared positions"
    }
    for name, label in labels.items():
        if after.get(name) is not None:
            yield f"| {label} | {_number(before.get(name))} | {_number(after[name])} |"


def _evaluations(folder: RunFolder, step: int) -> Iterator[str]:
    for path in sorted(folder.evaluation.glob("*.json")):
        if path.stem.startswith(SHUFFLED):  # not what the student answers to its own pictures
            continue
        models = scores_in(path)
        if step not in [one.get("step") for one in models if one["model"] == "student"]:  # of another export
            continue
        labels = [*SCORES.values(), "CE", "KL", "cut"]
        split = path.stem.partition("-")[0]
        yield f"\nSplit `{split}`, greedy answers; 95 % intervals over pictures; cut: at `max_new_tokens`:\n"
        yield f"| | questions | {' | '.join(labels)} |\n|{'---|' * (len(labels) + 2)}"
        for one in models:
            cells = [
                *(_interval(one.get(score)) for score in SCORES),
                *(_number(one.get(k)) for k in ("ce", "kl")),
                str(one.get("num_cut", "-")),
            ]
            yield f"| {one['model']} | {one['num_examples']} | {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(found: dict[str, Any] | None) -> str:
    if not found:
        return "-"
    return f"{found['mean']:.1%} ({found['low']:.1%} to {found['high']:.1%}), of {found['count']}"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_regular(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
