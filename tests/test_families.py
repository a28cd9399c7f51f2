"""Every family that docs/models.md names: from pictures to an export that plain Transformers opens.

The quick tests look at what goes into a model and what it computes; the slow one does all that a user does.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from documents import ROOT
from families import FAMILIES, HAS_TORCHVISION, MISSING, NEED_TORCHVISION, REFUSED, make_family, of_families
from peft import PeftModel
from PIL import Image
from samples import ANSWERS, QUESTIONS, encoded_picture
from stage2_runs import make_recipe, on_ranks, run_alone, run_ranks, step_records, validation_records
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import AutoModelForImageTextToText, GenerationConfig, ProcessorMixin

from shared.cache import CacheReader
from shared.data.collation import IGNORE_INDEX, Batch, Encoded
from shared.data.conversations import Turn, question_answer
from shared.data.model_inputs import answer_kinds, continued
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.processors import chat_template
from shared.data.rows import Example
from shared.errors import DataError, RecipeError
from shared.model_check import check_model, two_examples
from shared.models.vlm import in_dtype_of, last_hidden_states, load_vlm, split
from shared.recipes import DataConfig, Recipe
from shared.runtime import distributed
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage1_teacher.write import write as teacher_writes
from stage2_student.evaluation.answers import answer
from stage2_student.runs.checkpoint import load, student_state
from stage2_student.runs.run_folder import RunFolder
from stage2_student.training.export import choose_checkpoint, export_checkpoint
from stage2_student.training.freezing import find_parts
from stage2_student.training.student import build_student, reshard
from stage2_student.write import write as student_writes

SIZES = ((40, 48), (90, 31), (33, 120), (64, 64), (150, 40))
ONE_QUESTION_A_ROW = {"paligemma"}
CPU = torch.device("cpu")
MODELS = ROOT / "docs" / "models.md"

COLUMNS = (  # of the table in docs/models.md
    *("prompts", "markers", "batches", "rows of text", "conversations", "capture", "training"),
    *("gradients", "checkpointing", "frozen tower", "LoRA", "bf16", "answers", "export"),
)
SHARDED = {"qwen3_vl_moe", "smolvlm", "gemma3", "paligemma", "llava_next", "mllama"}
SHOWN: dict[str, set[str]] = {name: set() for name in FAMILIES}  # what held in this process


def shown_in_the_table(*columns: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of every family, which is noted for the table when it holds."""
    assert set(columns) <= set(COLUMNS)

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        @of_families(FAMILIES, without=MISSING | REFUSED)
        @wraps(test)
        def noted(family: str, **fixtures: Any) -> None:
            test(family, **fixtures)
            SHOWN[family].update(columns)

        return noted

    return decorated


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a family's model when it is first asked for."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda family: make_family(family, root / family))


def rows(count: int) -> list[Example]:
    """Pictures of five sizes and shapes."""
    return [
        Example.single(
            image=encoded_picture(index, size=SIZES[index % len(SIZES)]),
            question=QUESTIONS[index % 4],
            answer=f"{ANSWERS[index % 3]} {index}",
            kind="",
            case=f"case {index}",
            index=index,
        )
        for index in range(count)
    ]


def opened(folder: Path) -> tuple[ExampleProcessor, Any]:
    processor = open_processor(str(folder), DataConfig(source="unused", max_answer_tokens=64))
    model = load_vlm(str(folder), revision=None, dtype=torch.float32, attn_implementation=None)
    return processor, model


def states_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    body, head = split(model)
    return last_hidden_states(body, in_dtype_of(head, inputs))


def of_text(index: int) -> Example:
    """A row without a picture."""
    return Example((), question_answer(QUESTIONS[index], ANSWERS[index], 0), index=index)


def conversation() -> Example:
    """Two questions, the first about two pictures of different sizes, the second about a third."""
    turns = (
        Turn("user", (None, None, "Which one is CT?")),
        Turn("assistant", ("The first.",)),
        Turn("user", (None, "Which plane is this?")),
        Turn("assistant", ("axial",)),
    )
    return Example(tuple(encoded_picture(seed, size=SIZES[seed]) for seed in (1, 2, 0)), turns)


# --- what goes in, and what a model makes of it ----------------------------------------------------------


@shown_in_the_table("batches")
def test_pictures_of_mixed_sizes_in_batches(family: str, folder_of: Callable[[str], Path]) -> None:
    processor, model = opened(folder_of(family))
    encoded = [processor.encode(one) for one in rows(3)]
    check_model(model, processor, two_examples(encoded), device=CPU)
    for padding_side in ("right", "left"):
        batch = processor.collate(encoded, padding_side=padding_side)
        with torch.no_grad():
            states_BSD = states_of(model, batch.inputs)
            own_BSV = model(**in_dtype_of(split(model)[1], batch.inputs), use_cache=False).logits
            for row, one in enumerate(encoded):
                alone_SD = states_of(model, processor.collate([one]).inputs)[0]
                there = batch.inputs["attention_mask"][row].bool()
                torch.testing.assert_close(states_BSD[row][there], alone_SD, rtol=1e-4, atol=1e-5)
        ours_NV = split(model)[1].logits(states_BSD.flatten(0, 1)[batch.position_index])
        own_NV = own_BSV.flatten(0, 1)[batch.position_index]
        torch.testing.assert_close(ours_NV, own_NV, rtol=1e-4, atol=1e-5)


@shown_in_the_table("batches")
def test_the_picture_counts_and_the_prompt_is_the_templates(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    processor, model = opened(folder_of(family))
    examples = [replace(rows(1)[0], images=(encoded_picture(seed),)) for seed in (1, 2)]
    one, other = map(processor.encode, examples)
    with torch.no_grad():
        states = [states_of(model, processor.collate([each]).inputs)[0, -1] for each in (one, other)]
    assert (states[0] - states[1]).abs().max() > 1e-4
    text = processor.tokenizer.decode(one.input_ids)
    assert QUESTIONS[0] in text
    assert text.replace("\n", "").endswith(f"CT 0{FAMILIES[family].end_of_turn}")
    bos = processor.tokenizer.bos_token_id
    assert bos is None or one.input_ids.tolist().count(bos) == 1
    again = pickle.loads(pickle.dumps(processor)).encode(examples[0])
    assert torch.equal(again.input_ids, one.input_ids)


@shown_in_the_table("markers")
def test_markers_in_a_question_are_text(family: str, folder_of: Callable[[str], Path]) -> None:
    processor, _ = opened(folder_of(family))
    plain = processor.encode(rows(1)[0])
    marked = processor.encode(
        Example.single(
            encoded_picture(0, size=SIZES[0]), f"Is {FAMILIES[family].end_of_turn} a marker?", "CT 0"
        )
    )
    special = [processor.tokenizer.convert_tokens_to_ids(token) for token in FAMILIES[family].tokens]
    assert [i for i in marked.input_ids.tolist() if i in special] == [
        i for i in plain.input_ids.tolist() if i in special
    ]
    assert all(len(value) == len(marked.input_ids) for value in marked.per_token.values())
    assert "a marker?" in processor.tokenizer.decode(marked.input_ids)


@of_families(["smolvlm", "idefics3", "qwen3_vl"])
def test_lengths_are_about_right_whether_or_not_the_processor_tells_them(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    """What a microbatch of so many tokens holds is planned by them."""
    processor, _ = opened(folder_of(family))
    for example in rows(4):
        exact = len(processor.encode(example).input_ids)
        assert 0.5 * exact <= processor.approximate_length(example) <= 1.6 * exact


@shown_in_the_table("rows of text")
def test_rows_with_and_without_pictures_share_a_batch(family: str, folder_of: Callable[[str], Path]) -> None:
    processor, model = opened(folder_of(family))
    pictured, textual = [processor.encode(one) for one in rows(2)], processor.encode(of_text(2))
    assert not textual.per_picture
    for encoded in ([pictured[0], textual], [textual, *pictured], [textual, textual]):
        assert_alike_alone(encoded, processor, model)


@shown_in_the_table("conversations")
def test_conversations_about_several_pictures(family: str, folder_of: Callable[[str], Path]) -> None:
    processor, model = opened(folder_of(family))
    if family in ONE_QUESTION_A_ROW:
        with pytest.raises(DataError, match="it knows no conversations"):
            processor.encode(conversation())
        return
    one = processor.encode(conversation())
    answers = processor.tokenizer.decode(one.answer_ids)
    assert re.fullmatch(r"\s*The first\.(.+?)\s*axial(.+?)", answers, flags=re.DOTALL), answers
    assert_alike_alone([processor.encode(rows(1)[0]), one], processor, model)
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in conversation().images]
    assert_as_the_processor(processor, one, conversation(), images)


@shown_in_the_table("prompts")
def test_tokens_are_those_of_the_processors_own_template(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    processor, _ = opened(folder_of(family))
    example = rows(1)[0]
    image = Image.open(io.BytesIO(example.images[0])).convert("RGB")
    assert_as_the_processor(processor, processor.encode(example), example, [image])


def test_line_breaks_are_text_where_they_are_added_tokens(folder_of: Callable[[str], Path]) -> None:
    """Gemma's tokenizers have added ones for them, which a text may hold: they are no markers."""
    processor, _ = opened(folder_of("gemma3"))
    added = processor.tokenizer.added_tokens_decoder
    assert [one.content for one in added.values() if not one.special] == ["\n", "\n\n"]
    question, answer = "Which plane?\nIs it CT?", "axial\n\nCT\nno"
    example = Example.single(encoded_picture(0, size=SIZES[0]), question, answer)
    one = processor.encode(example)
    image = Image.open(io.BytesIO(example.images[0])).convert("RGB")
    assert_as_the_processor(processor, one, example, [image])
    assert processor.tokenizer.decode(one.answer_ids) == f"{answer}<end_of_turn>"

    marked = processor.encode(replace(example, turns=question_answer(question, f"{answer} <end_of_turn>", 1)))
    assert processor.tokenizer.decode(marked.answer_ids) == f"{answer} <end_of_turn><end_of_turn>"
    assert marked.answer_ids.tolist()[: one.num_positions - 1] == one.answer_ids.tolist()[:-1]


def assert_as_the_processor(
    processor: ExampleProcessor, one: Encoded, example: Example, images: list[Image.Image]
) -> None:
    """As ``apply_chat_template`` makes the tokens, but for what it writes behind the last end of turn."""
    own, left = processor._processor, iter(images)
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "image", "image": next(left)} if part is None else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in example.turns
    ]
    is_prefix_lm = type(own).__name__ == "PaliGemmaProcessor"  # its answers are no part of a text
    found = ProcessorMixin.apply_chat_template(  # SmolVLM's own asks for a part for videos
        own,
        messages[:-1] if is_prefix_lm else messages,
        chat_template=chat_template(own),
        add_generation_prompt=is_prefix_lm,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    theirs, ours = found["input_ids"][0].tolist(), one.input_ids.tolist()
    if is_prefix_lm:
        ours = ours[: len(ours) - one.num_positions]
    assert theirs[: len(ours)] == ours
    assert not processor.tokenizer.decode(theirs[len(ours) :]).strip()


@torch.no_grad()
def assert_alike_alone(encoded: list[Encoded], processor: ExampleProcessor, model: Any) -> None:
    states_BSD = states_of(model, processor.collate(encoded).inputs)
    for row, one in enumerate(encoded):
        alone_SD = states_of(model, processor.collate([one]).inputs)[0]
        torch.testing.assert_close(states_BSD[row, : len(alone_SD)], alone_SD, rtol=1e-4, atol=1e-5)


# --- all that a user does --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows to train on and four for validation."""
    folder = tmp_path_factory.mktemp("pictures")
    examples = rows(12)
    for name, some in (("train", examples[:8]), ("validation", examples[8:])):
        table = {
            "image_id": [one.images[0] for one in some],
            "question": [one.question for one in some],
            "answer": [one.answer for one in some],
            "mode": ["" for _ in some],
            "case_id": [one.case for one in some],
        }
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    return folder


@dataclass(frozen=True)
class Trained:
    """A family's cache, and a run of four steps with it; ``tree`` is its recipe."""

    folder: Path
    tree: dict[str, Any]
    recipe: Recipe

    def run(self, name: str, **overrides: Any) -> Recipe:
        """Another run with the same cache."""
        recipe = make_recipe(self.tree, run__name=name, **overrides)
        assert run_alone(recipe) == 0
        return recipe


@pytest.fixture(scope="session")
def trained(
    folder_of: Callable[[str], Path], pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trained]:
    """Captures and trains a family's model when it is first asked for; it is its own teacher."""
    root = tmp_path_factory.mktemp("trained")

    def make(family: str) -> Trained:
        folder = folder_of(family)
        tree = {
            "data": {"source": str(pictures), "max_answer_tokens": 64},
            "teacher": {"model": str(folder), "dtype": "float32"},
            "cache": {"path": str(root / family / "cache"), "num_workers": 0},
            "student": {"model": str(folder), "compute_dtype": "float32"},
            "optimization": {
                "global_batch_size": 4,
                "microbatch_size": 2,
                "max_steps": 4,
                "learning_rate": 1e-2,
            },
            "run": {"name": "run", "root": str(root / family), "num_workers": 0},
        }
        recipe = make_recipe(tree)
        assert captured(recipe) == 0
        assert run_alone(recipe) == 0
        return Trained(folder, tree, recipe)

    return cache(make)


def captured(recipe: Recipe) -> int:
    with distributed(device="cpu") as world:
        return capture(recipe, world, StopRequest())


def plain(folder: Path) -> Any:
    """As a user of Transformers opens it."""
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def losses(
    model: Any, folder: Path, examples: Sequence[Example], *, num_ids: int | None = None
) -> list[float]:
    """Cross-entropy of each example's labels by the model's own logits, an example at a time; nats, sums.

    num_ids  of the logits that count; None: all, those of ids that the tokenizer does not know among them
    """
    processor = open_processor(str(folder), DataConfig(source="unused", max_answer_tokens=64))
    found = []
    for example in examples:
        one = processor.encode(example)
        with torch.no_grad():
            logits_SV = model(**in_dtype_of(split(model)[1], processor.collate([one]).inputs)).logits[0]
        found.append(F.cross_entropy(logits_SV[:-1, :num_ids], one.labels[1:], reduction="sum").item())
    return found


def ce_of(recipe: Recipe) -> list[float]:
    return [step["ce_loss"] for step in step_records(recipe)]


def last_validation(recipe: Recipe) -> float:
    """The sum over the split's positions, nats."""
    record = validation_records(recipe)[-1]
    return record["ce_loss"] * record["num_positions"]


@pytest.mark.slow
@shown_in_the_table("capture")
def test_captured_targets_are_the_models_own(family: str, trained: Callable[[str], Trained]) -> None:
    found = trained(family)
    processor = open_processor(str(found.folder), found.recipe.data)
    cached = CacheReader(found.recipe.cache.path).rows([processor.key(one) for one in rows(12)])
    num_ids = processor.num_token_ids  # a teacher has no mass beyond them
    own = losses(plain(found.folder), found.folder, rows(12), num_ids=num_ids)
    assert [row.ce_sum for row in cached] == pytest.approx(own, rel=1e-4, abs=1e-4)


@pytest.mark.slow
@shown_in_the_table("training", "export")
def test_training_learns_and_the_export_is_what_was_trained(
    family: str, trained: Callable[[str], Trained]
) -> None:
    found = trained(family)
    assert ce_of(found.recipe)[-1] < ce_of(found.recipe)[0]
    export = found.recipe.run.path / "export"
    model = plain(export)
    assert sum(losses(model, export, rows(12)[8:])) == pytest.approx(last_validation(found.recipe), rel=1e-4)
    assert_the_students_logits([model], found.recipe)


def all_shapes(processor: ExampleProcessor) -> list[Example]:
    """Rows with a picture and without one, and a conversation about several where the family knows any."""
    is_prefix_lm = type(processor._processor).__name__ == "PaliGemmaProcessor"
    return [*rows(3), of_text(1), *([] if is_prefix_lm else [conversation()])]


def assert_the_students_logits(models: Sequence[Any], recipe: Recipe, *, atol: float = 1e-5) -> None:
    """Plain models' logits, at every label, are those of the student that was trained: of its body and its head."""
    processor = open_processor(recipe.student.model, recipe.data)
    batches = [processor.collate([processor.encode(one)]) for one in all_shapes(processor)]
    for batch, ours_NV in zip(batches, students_logits(recipe, batches), strict=True):
        for model in models:
            with torch.no_grad():
                own_SV = model(**in_dtype_of(split(model)[1], batch.inputs)).logits[0]
            torch.testing.assert_close(own_SV[batch.position_index], ours_NV, rtol=1e-5, atol=atol)


@torch.no_grad()
def students_logits(recipe: Recipe, batches: Sequence[Batch]) -> list[Tensor]:
    """(N, V) of each batch, by the sharded student as it trains, with the weights of its newest checkpoint."""
    checkpoint = choose_checkpoint(RunFolder(recipe.run.path))
    processor = open_processor(recipe.student.model, recipe.data)
    with distributed(device="cpu") as world:
        student = build_student(
            recipe, world, num_token_ids=processor.num_token_ids, num_answer_ids=processor.num_answer_ids
        )
        load(checkpoint, student_state(student.model), world=world)
        register_fsdp_forward_method(student.eval(), "_hidden")
        found = []
        for batch in batches:
            hidden_ND, _ = student._hidden(batch.inputs, batch.position_index, None)
            found.append(split(student.model)[1].logits(hidden_ND))
            reshard(student)
        del student
        world.release_memory()
    return found


@pytest.mark.slow
@shown_in_the_table("checkpointing")
def test_checkpointed_activations_change_nothing(family: str, trained: Callable[[str], Trained]) -> None:
    found = trained(family)
    recipe = found.run("checkpointed", student__activation_checkpointing=True, run__export=False)
    assert ce_of(recipe) == pytest.approx(ce_of(found.recipe), rel=1e-5)


@pytest.mark.slow
@shown_in_the_table("frozen tower")
def test_a_frozen_tower_stays(family: str, trained: Callable[[str], Trained]) -> None:
    found = trained(family)
    recipe = found.run("frozen", student__freeze={"vision": True})
    assert ce_of(recipe)[-1] < ce_of(recipe)[0]
    before, after = (find_parts(plain(folder)) for folder in (found.folder, recipe.run.path / "export"))
    connector = {id(parameter) for part in before["connector"] for parameter in part.parameters()}
    moved = {
        name: [
            not torch.equal(one, other)
            for part, same in zip(before[name], after[name], strict=True)
            for one, other in zip(part.parameters(), same.parameters(), strict=True)
            if name == "connector" or id(one) not in connector
        ]
        for name in ("vision", "connector", "language")
    }
    assert moved["vision"]
    assert not any(moved["vision"])
    assert any(moved["connector"])
    assert any(moved["language"])


@pytest.mark.slow
@shown_in_the_table("LoRA")
def test_adapters(family: str, trained: Callable[[str], Trained]) -> None:
    found = trained(family)
    recipe = found.run("adapters", student__lora={"rank": 4, "alpha": 8.0})
    assert ce_of(recipe)[-1] < ce_of(recipe)[0]
    adapter, merged = recipe.run.path / "export", recipe.run.path / "merged"
    folder = RunFolder(recipe.run.path)
    export_checkpoint(folder, choose_checkpoint(folder), merged, merge=True)
    models = [
        PeftModel.from_pretrained(plain(found.folder), adapter),
        load_vlm(str(adapter), revision=None, dtype=torch.float32, attn_implementation=None),
        plain(merged),
    ]
    for model, place in zip(models, (adapter, adapter, merged), strict=True):
        own = losses(model.eval(), place, rows(12)[8:])
        assert sum(own) == pytest.approx(last_validation(recipe), rel=1e-4)
    assert_the_students_logits(models, recipe, atol=1e-4)


@pytest.mark.slow
@shown_in_the_table("answers")
def test_answers_in_a_batch_are_those_of_the_model_alone(
    family: str, trained: Callable[[str], Trained]
) -> None:
    export = trained(family).recipe.run.path / "export"
    processor, model = opened(export)
    model.generation_config = GenerationConfig()
    examples = all_shapes(processor)
    together = answer(model, processor, examples, max_new_tokens=5)
    assert together == [answer(model, processor, [one], max_new_tokens=5)[0] for one in examples]
    assert [one.text for one in together] == [greedy(model, processor, one, 5) for one in examples]


@pytest.mark.slow
def test_a_picture_s_placeholder_needs_no_logit(
    trained: Callable[[str], Trained], pictures: Path, tmp_path: Path
) -> None:
    """Llama 3.2 Vision's head ends before it: targets, losses and written answers keep to the ids of the head."""
    found = trained("mllama")
    processor, model = opened(found.folder)
    width = split(model)[1].weight_VD.shape[0]
    assert processor.tokenizer.convert_tokens_to_ids("<|image|>") == width
    assert (processor.num_token_ids, processor.num_answer_ids) == (width + 1, width)
    cache = CacheReader(found.recipe.cache.path)
    assert cache.manifest.identity.inputs.vocab_size == processor.num_token_ids
    settings = {"max_new_tokens": 4, "num_workers": 0, "splits": ["train"], "temperature": 1.0}
    every_id = {"path": str(tmp_path / "cache"), "num_workers": 0, "policy": {"kind": "top_k", "k": 512}}
    recipe = make_recipe(
        found.tree | {"cache": every_id, "write": settings | {"path": str(tmp_path / "set")}},
        run__name="uniform",
        loss__tail="uniform",
        loss__kd_ratio=1.0,
    )
    assert captured(recipe) == 0
    keys = [processor.key(one) for one in rows(12)]
    targets = CacheReader(str(tmp_path / "cache"))
    assert all(int(targets.targets([row]).counts.min()) == width for row in targets.rows(keys))
    assert run_alone(recipe) == 0
    with distributed(device="cpu") as world:
        assert teacher_writes(recipe, world, StopRequest()) == 0
        run = RunFolder(recipe.run.path)
        out = tmp_path / "students"
        assert student_writes(run, recipe, choose_checkpoint(run), world, StopRequest(), out=out) == 0
    for folder in (tmp_path / "set", out):
        assert (folder / "written.json").exists()


def longer(processor: ExampleProcessor, one: Encoded, token: Tensor) -> Encoded:
    """With one more token of an answer, without a label."""
    return replace(
        one,
        input_ids=torch.cat([one.input_ids, token[None]]),
        labels=torch.full((len(one.labels) + 1,), IGNORE_INDEX),
        per_token=continued(one.per_token, 1, answer_kinds(processor._processor)),
    )


@torch.no_grad()
def greedy(model: Any, processor: ExampleProcessor, example: Example, count: int) -> str:
    """The most likely tokens one after the other, each from a whole forward."""
    one, found = processor.encode_prompt(example), []
    while len(found) < count and processor.end_of_turn not in found:
        inputs = processor.collate([one]).inputs
        token = model(**in_dtype_of(split(model)[1], inputs), use_cache=False).logits[0, -1].argmax()
        found.append(int(token))
        one = longer(processor, one, token)
    kept = [token for token in found if token != processor.end_of_turn]
    return processor.tokenizer.decode(kept, skip_special_tokens=True).strip()


@pytest.mark.slow
@shown_in_the_table("bf16")
def test_the_defaults_compute_in_bfloat16(family: str, trained: Callable[[str], Trained]) -> None:
    found = trained(family)
    folder = Path(found.recipe.cache.path).parent / "bf16"
    tree = found.tree | {"teacher": {"model": str(found.folder)}, "student": {"model": str(found.folder)}}
    tree["cache"] = found.tree["cache"] | {"path": str(folder)}
    recipe = make_recipe(tree, run__name="defaults", run__export=False)
    assert captured(recipe) == 0
    assert run_alone(recipe) == 0
    assert ce_of(recipe) == pytest.approx(ce_of(found.recipe), rel=0.1)


@pytest.mark.slow
@shown_in_the_table("gradients")
def test_gradients_are_those_of_plain_transformers(family: str, trained: Callable[[str], Trained]) -> None:
    found = trained(family)
    all_rows = {"optimization__global_batch_size": 8, "optimization__max_steps": 1}
    recipe = found.run("gradient", loss__kd_ratio=0.0, run__export=False, **all_rows)
    processor = open_processor(str(found.folder), recipe.data)
    model = plain(found.folder).train()
    count = 0
    for example in rows(8):
        one = processor.encode(example)
        inputs = in_dtype_of(split(model)[1], processor.collate([one]).inputs)
        F.cross_entropy(model(**inputs).logits[0, :-1], one.labels[1:], reduction="sum").backward()
        count += one.num_positions
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]) / count
    assert step_records(recipe)[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.slow
@of_families(sorted(SHARDED))
def test_two_ranks_with_a_sharded_teacher_are_one(family: str, trained: Callable[[str], Trained]) -> None:
    found = trained(family)
    place = Path(found.recipe.cache.path).with_name("sharded")
    tree = found.tree | {"cache": found.tree["cache"] | {"path": str(place)}}
    recipe = make_recipe(tree, run__name="ranks", run__export=False, teacher__shard=True)
    assert on_ranks(2, lambda world: capture(recipe, world, StopRequest())) == [0, 0]
    processor = open_processor(str(found.folder), recipe.data)
    keys = [processor.key(one) for one in rows(12)]
    ours, theirs = (CacheReader(path).rows(keys) for path in (str(place), found.recipe.cache.path))
    assert [row.ce_sum for row in ours] == pytest.approx([row.ce_sum for row in theirs], rel=1e-4)
    assert run_ranks(recipe, 2) == [0, 0]
    assert ce_of(recipe) == pytest.approx(ce_of(found.recipe), rel=1e-4)


@pytest.mark.slow
def test_a_template_of_the_recipe_makes_the_prompts_and_is_exported(
    folder_of: Callable[[str], Path], tmp_path: Path, pictures: Path
) -> None:
    folder = shutil.copytree(folder_of("llava"), tmp_path / "bare")
    template = tmp_path / "mine.jinja"
    shutil.move(folder / "chat_template.jinja", template)
    data = {"source": str(pictures), "max_answer_tokens": 64}
    with pytest.raises(RecipeError, match=r"has no chat template.*data\.chat_template"):
        open_processor(str(folder), DataConfig(**data))
    with pytest.raises(RecipeError, match=r"data\.chat_template nowhere\.jinja: cannot be read"):
        open_processor(str(folder), DataConfig(**data, chat_template="nowhere.jinja"))
    text = template.read_text().replace("USER", "PUPIL")
    template.write_text(text)
    tree = {
        "data": {**data, "chat_template": str(template)},
        "student": {"model": str(folder), "compute_dtype": "float32"},
        "loss": {"kd_ratio": 0.0},
        "optimization": {"global_batch_size": 4, "max_steps": 1},
        "run": {"name": "run", "root": str(tmp_path), "num_workers": 0},
    }
    recipe = make_recipe(tree)
    assert run_alone(recipe) == 0
    export = recipe.run.path / "export"
    assert (export / "chat_template.jinja").read_text() == text
    processor = open_processor(str(export), DataConfig(**data))
    assert "PUPIL" in processor.tokenizer.decode(processor.encode(rows(1)[0]).input_ids)


# --- what is refused -------------------------------------------------------------------------------------


def examples_of(folder: Path) -> tuple[ExampleProcessor, list[Encoded], Any]:
    processor, model = opened(folder)
    return processor, two_examples(map(processor.encode, rows(4))), model


@of_families(["paligemma"], without=REFUSED)
def test_an_answer_that_is_read_before_it_is_predicted_is_refused(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    processor, examples, model = examples_of(folder_of(family))
    check_model(model, processor, examples, device=CPU)
    as_a_prefix = [
        replace(one, per_token={name: torch.zeros_like(value) for name, value in one.per_token.items()})
        for one in examples
    ]
    with pytest.raises(
        RecipeError, match="last token of its answer is another one, the hidden states before"
    ):
        check_model(model, processor, as_a_prefix, device=CPU)


@pytest.mark.slow
@pytest.mark.skipif("paligemma" in REFUSED, reason="it is refused for another reason")
def test_both_stages_refuse_it_before_they_begin_sharded_too(
    folder_of: Callable[[str], Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the answers of PaliGemma marked as of other families: captures and runs looked sound."""
    monkeypatch.setattr("shared.data.model_inputs.PREFIX_LM", set())
    tree = {
        "data": {"source": str(pictures), "max_answer_tokens": 64},
        "teacher": {"model": str(folder_of("paligemma")), "shard": True},
        "cache": {"path": str(tmp_path / "cache"), "num_workers": 0},
        "student": {"model": str(folder_of("paligemma"))},
        "optimization": {"global_batch_size": 4, "max_steps": 1},
        "run": {"name": "run", "root": str(tmp_path), "num_workers": 0},
    }
    recipe = make_recipe(tree)
    alone, on_two = (make_recipe(tree, loss__kd_ratio=0.0, run__name=name) for name in ("alone", "two"))
    for begin in (
        lambda: captured(recipe),
        lambda: on_ranks(2, lambda world: capture(recipe, world, StopRequest())),
        lambda: run_alone(alone),
        lambda: run_ranks(on_two, 2),
    ):
        with pytest.raises(RecipeError, match="It reads answers before it predicts them"):
            begin()
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_what_equal_rows_of_a_batch_differ_by_is_rounding(folder_of: Callable[[str], Path]) -> None:
    """As on a GPU, whose kernels may add in another order for another row."""
    processor, examples, model = examples_of(folder_of("gemma3"))

    def differing(norm: Any, inputs: Any, states_BSD: torch.Tensor) -> torch.Tensor:
        return states_BSD * (1 + 2e-4 * torch.arange(len(states_BSD)))[:, None, None]

    model.model.language_model.norm.register_forward_hook(differing)
    check_model(model, processor, examples, device=CPU)


def with_logits(model: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The model, its forward changing its logits last."""
    plain_forward = model.forward

    def forward(**inputs: Any) -> Any:
        outputs = plain_forward(**inputs)
        outputs.logits = change(outputs.logits)
        return outputs

    model.forward = forward
    return model


def test_logits_that_are_no_product_of_the_head_are_refused(folder_of: Callable[[str], Path]) -> None:
    processor, examples, model = examples_of(folder_of("gemma3"))
    with_logits(model, lambda logits: logits * 2)
    with pytest.raises(RecipeError, match=r"its logits differ by .* from those of its body and its head"):
        check_model(model, processor, examples, device=CPU)


def test_a_cap_that_the_class_leaves_out_is_named(folder_of: Callable[[str], Path]) -> None:
    processor, examples, model = examples_of(folder_of("gemma3"))
    model.config.text_config.final_logit_softcapping = 2.0  # which this class never applies
    with pytest.raises(RecipeError, match=r"caps logits \(final_logit_softcapping 2\).* leaves the cap out"):
        check_model(model, processor, examples, device=CPU)


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -torch.inf])
def test_ids_that_the_model_leaves_out_are_named(lowest: float, folder_of: Callable[[str], Path]) -> None:
    """As Chameleon's do: it is no damage to its weights, and no other scale."""
    processor, examples, model = examples_of(folder_of("gemma3"))

    def without_ids(logits_BSV: Tensor) -> Tensor:
        return torch.cat([logits_BSV[..., :3] + 100, torch.full_like(logits_BSV[..., 3:], lowest)], dim=-1)

    with_logits(model, without_ids)
    with pytest.raises(RecipeError, match=r"it leaves \d+ ids out by giving them the lowest logit there is"):
        check_model(model, processor, examples, device=CPU)


def test_logits_that_end_behind_the_tokenizer_s_ids_are_enough(folder_of: Callable[[str], Path]) -> None:
    """Some heads are padded, and their models cut the padding off."""
    processor, examples, model = examples_of(folder_of("gemma3"))
    width, needed = split(model)[1].weight_VD.shape[0], processor.num_answer_ids
    assert needed < width
    with_logits(model, lambda logits: logits[..., :needed])
    check_model(model, processor, examples, device=CPU)
    with_logits(model, lambda logits: logits[..., : needed - 1])
    with pytest.raises(RecipeError, match=rf"it gives {needed - 1} logits, its tokenizer has {needed} ids"):
        check_model(model, processor, examples, device=CPU)


def test_states_that_are_not_one_for_each_token_are_refused(folder_of: Callable[[str], Path]) -> None:
    """GIT puts pictures in front of the text: what stands at a label's place would be another token's."""
    processor, examples, model = examples_of(folder_of("gemma3"))

    def with_pictures_in_front(body: Any, inputs: Any, outputs: Any) -> None:
        states = outputs.last_hidden_state
        outputs.last_hidden_state = torch.cat([states[:, :3], states], dim=1)

    model.model.register_forward_hook(with_pictures_in_front)
    length = len(examples[0].input_ids)
    with pytest.raises(RecipeError, match=rf"it gives {length + 3} hidden states for {length} tokens"):
        check_model(model, processor, examples, device=CPU)


def test_examples_that_depend_on_each_other_are_refused(
    folder_of: Callable[[str], Path],
) -> None:
    processor, examples, model = examples_of(folder_of("mllama"))
    mixed = [examples[0], processor.encode(of_text(1))]
    check_model(model, processor, mixed, device=CPU)
    for layer in model.modules():
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
    with pytest.raises(RecipeError, match="when other examples are in its batch"):
        check_model(model, processor, mixed, device=CPU)


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is installed")
@pytest.mark.parametrize("family", sorted(NEED_TORCHVISION))
def test_a_family_that_needs_torchvision_says_so(family: str, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError, match=r"needs torchvision.*pip install 'teachonce\[vision\]'"):
        open_processor(str(folder_of(family)), DataConfig(source="unused"))


# --- the table -------------------------------------------------------------------------------------------


def table_row(family: str) -> str:
    model_type = FAMILIES[family].config(8, lambda token: 0)["model_type"]
    extra = "`vision`" if family in NEED_TORCHVISION else "-"
    refused = {"conversations"} if family in ONE_QUESTION_A_ROW else set()
    held = {column: "refused" if column in refused else "yes" for column in SHOWN[family]}
    cells = [held.get(column, "no") for column in COLUMNS]
    return f"| {' | '.join([FAMILIES[family].title, f'`{model_type}`', extra, *cells])} |"


@pytest.mark.slow
def test_the_table_of_the_documentation_is_what_was_found() -> None:
    """The rows of families that were tested whole in this process; RENEW_MODELS_TABLE=1 writes them."""
    text = MODELS.read_text()
    tested = [name for name in FAMILIES if SHOWN[name] >= set(COLUMNS)]
    if not tested:
        pytest.skip("no family was tested whole in this process")
    if os.environ.get("RENEW_MODELS_TABLE"):
        for name in tested:
            row = re.compile(rf"^\| {re.escape(FAMILIES[name].title)} \|.*$", flags=re.MULTILINE)
            text = row.sub(lambda _, name=name: table_row(name), text)
        MODELS.write_text(text)
    head = f"| family | `model_type` | extra | {' | '.join(COLUMNS)} |"
    lines = text.splitlines()
    assert head in lines
    assert [name for name in tested if table_row(name) not in lines] == []
