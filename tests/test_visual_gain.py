"""``cache.visual_gain``: by how much the pictures raise the log-prob of each written token."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from cache_examples import VERSIONS, files_of, keys_and_rows, make_identity, make_key, make_row
from cache_examples import capture as write_cache
from PIL import Image, ImageFilter
from stage2_runs import make_recipe, on_ranks
from transformers import AutoModelForImageTextToText

from shared.cache import CacheList, CacheMix, CacheReader, CacheWriter
from shared.cache.export import export
from shared.cache.inspect import inspect
from shared.cache.merge import merge
from shared.cache.shard import encode_shard
from shared.cache.verify import verify
from shared.capture.loop import capture as own_capture
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import Example, open_split
from shared.data.unseen import encoded_twice
from shared.errors import CacheFormatError, CacheMismatchError, DataError, RecipeError
from shared.models.vlm import last_hidden_states, load_vlm
from shared.models.weights import weight_fingerprint
from shared.recipes import Recipe
from shared.runtime import distributed
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage1_teacher.estimate import estimate, show
from stage1_teacher.inspection.pictures import by_kind_table
from stage1_teacher.inspection.report import write_cache_report
from tests.torture.mutations import forge_shard

WITH = make_identity(visual_gain="blurred")
RecipeOf = Callable[..., Recipe]


# --- the column -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_cache(tmp_path / "cache", range(12), identity=WITH)
    return tmp_path / "cache"


def test_they_come_back_as_they_were(cache: Path) -> None:
    reader = CacheReader(str(cache))
    numbers = [11, 0, 3]
    rows = reader.rows([make_key(number) for number in numbers])
    wanted = np.concatenate([make_row(number, WITH).label_gain for number in numbers])
    assert reader.visual_gain == "blurred"
    assert reader.label_gains(rows).dtype == torch.float32
    assert reader.label_gains(rows).tolist() == wanted.tolist()
    assert reader.label_gains([]).shape == (0,)
    assert verify(str(cache)).faults == ()
    assert inspect(reader)["identity"]["targets"]["visual_gain"] == "blurred"


def test_two_bytes_a_position(tmp_path: Path) -> None:
    without = write_cache(tmp_path / "without", range(200), examples_per_shard=200)
    held = write_cache(tmp_path / "with", range(200), examples_per_shard=200, identity=WITH)
    more = held.totals.bytes - without.totals.bytes
    assert 2 * held.totals.positions <= more < 2 * held.totals.positions + 4 * 201 + 800
    assert "visual_gain" not in (tmp_path / "without" / "manifest.json").read_text()
    reader = CacheReader(str(tmp_path / "without"))
    rows = reader.rows([make_key(3)])
    with pytest.raises(CacheMismatchError, match=r"Capture a cache with cache\.visual_gain: blurred"):
        reader.label_gains(rows)


def test_they_are_never_mixed_silently(cache: Path, tmp_path: Path) -> None:
    removed = make_identity(visual_gain="removed")
    assert len({WITH.digest(), removed.digest(), make_identity().digest()}) == 3
    with pytest.raises(CacheMismatchError, match=r'visual_gain: "blurred" in the cache, null asked for'):
        write_cache(cache, range(14))
    write_cache(tmp_path / "removed", range(20, 24), identity=removed)
    with pytest.raises(CacheMismatchError, match=r'visual_gain: "blurred" in the cache, "removed" asked for'):
        merge([str(cache), str(tmp_path / "removed")], str(tmp_path / "merged"), created_by={})
    with pytest.raises(CacheMismatchError, match=r"targets\.visual_gain"):
        CacheList([str(cache), str(tmp_path / "removed")])
    reader = CacheReader(str(cache))
    assert reader.require_student(WITH.inputs, temperature=1.0) == ()
    assert reader.require_student(WITH.inputs, temperature=1.0, visual_gain="blurred") == ()
    with pytest.raises(CacheMismatchError, match=r'"blurred" in the cache, "removed" asked for'):
        reader.require_student(WITH.inputs, temperature=1.0, visual_gain="removed")


def test_merging_exporting_lists_and_mixes_keep_them(cache: Path, tmp_path: Path) -> None:
    both = make_identity(visual_gain="blurred", label_log_prob=True)
    write_cache(tmp_path / "other", range(10, 17), identity=WITH)
    write_cache(tmp_path / "both", range(3), identity=both)
    assert verify(str(tmp_path / "both")).faults == ()
    merged = str(tmp_path / "merged")
    merge([str(cache), str(tmp_path / "other")], merged, created_by=VERSIONS)  # one shard is written anew
    assert verify(merged).faults == ()
    keys = [make_key(number) for number in (3, 11, 13)]
    wanted = np.concatenate([make_row(number, WITH).label_gain for number in (3, 11, 13)])
    several = CacheList([str(cache), str(tmp_path / "other")], duplicates="first")
    for one in (CacheReader(merged), several):
        assert one.label_gains(one.rows(keys)).tolist() == wanted.tolist()
    export(CacheReader(merged), tmp_path / "parquet")
    rows = datasets.load_dataset("parquet", data_dir=str(tmp_path / "parquet"), split="train")
    by_key = {row["key"]: row["label_gain"] for row in rows}
    assert by_key[make_key(13).hex()] == make_row(13, WITH).label_gain.astype(np.float32).tolist()
    mix = CacheMix([str(cache), merged], weights=[0.25, 0.75])
    assert mix.visual_gain == "blurred"
    found = mix.label_gains(mix.rows(keys[:2]))
    assert torch.allclose(found, torch.from_numpy(wanted[: len(found)]).float(), rtol=1e-6)


def test_a_mix_of_which_one_cache_tells_nothing_tells_nothing(cache: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "without", range(12))
    mix = CacheMix([str(cache), str(tmp_path / "without")])
    assert mix.visual_gain is None
    with pytest.raises(CacheMismatchError, match="does not say what the pictures gave"):
        mix.label_gains(mix.rows([make_key(3)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gain: gain * np.float16(np.nan), "a label_gain is not finite"),
        (lambda gain: gain * np.float16(np.inf), "a label_gain is not finite"),
        (lambda gain: gain - np.float16(90), "label_gain sums to less than -ce_sum"),
    ],
)
def test_verify_finds_what_cannot_be(tmp_path: Path, change: Any, message: str) -> None:
    with CacheWriter.open(str(tmp_path), WITH, created_by=VERSIONS) as writer:
        plan = writer.plan(keys_and_rows(range(6)), examples_per_shard=6)
        with writer.unit(plan.units[0]) as shard:
            for number in range(6):
                row = make_row(number, WITH)
                shard.add(replace(row, label_gain=change(row.label_gain)) if number == 4 else row)
        writer.commit(plan)
    (fault,) = verify(str(tmp_path)).faults
    assert message in fault
    assert make_key(4).hex() in fault
    reader = CacheReader(str(tmp_path))
    if "finite" in message:
        with pytest.raises(CacheFormatError, match=f"{make_key(4).hex()}: a label_gain is not finite"):
            reader.label_gains(reader.rows([make_key(3), make_key(4)]))


def test_a_row_without_them_is_the_callers_mistake() -> None:
    row = replace(make_row(4), label_gain=None)
    with pytest.raises(ValueError, match=r"label_gain None found, .5,. needed"):
        encode_shard([row], num_temperatures=1, metadata={}, optional=("label_gain",))


@pytest.mark.parametrize("change", ["other lengths", "nulls", "another type", "missing"])
def test_a_shard_of_a_stranger_is_one_error(cache: Path, change: str) -> None:
    data = (cache / CacheReader(str(cache)).manifest.shards[0].name).read_bytes()
    batch = pa.ipc.open_file(data).get_batch(0)
    place = batch.schema.get_field_index("label_gain")
    field, column = batch.schema.field(place), batch.column(place)
    if change == "missing":
        batch = batch.drop_columns(["label_gain"])
    elif change == "another type":
        wide = column.cast(pa.list_(pa.float32()))
        batch = batch.set_column(place, pa.field(field.name, wide.type, nullable=False), wide)
    elif change == "nulls":
        values = pa.array([None] * len(column.values), pa.float16())
        batch = batch.set_column(place, "label_gain", pa.ListArray.from_arrays(column.offsets, values))
    else:
        offsets = pa.array([0, *[len(column.values)] * len(batch)], pa.int32())
        odd = pa.ListArray.from_arrays(offsets, column.values)
        batch = batch.set_column(place, field, odd.cast(field.type))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as stream:
        stream.write_batch(batch)
    forge_shard(cache, sink.getvalue().to_pybytes())
    with pytest.raises(CacheFormatError, match="label_gain"):
        CacheReader(str(cache)).read([make_key(0)])
    assert any("label_gain" in fault for fault in verify(str(cache)).faults)


# --- the capture ------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_of(tmp_path: Path, mixed_folder: Path, teacher_folder: Path, student_folder: Path) -> RecipeOf:
    """Rows with and without pictures, two in each of eight units."""
    tree = {
        "data": {"source": str(mixed_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {
            "visual_gain": "blurred",
            "num_workers": 0,
            "examples_per_shard": 2,
            "batch_tokens": 512,
        },
        "student": {"model": str(student_folder)},
        "optimization": {"max_steps": 1},
        "run": {"name": "unused"},
    }
    return lambda name="cache", **settings: make_recipe(tree, cache__path=str(tmp_path / name), **settings)


def captured(recipe: Recipe) -> CacheReader:
    assert recipe.cache is not None
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0
    return CacheReader(recipe.cache.location)


def without_pictures(example: Example, how: str) -> Example:
    """Made here once more, by other means than the package's."""
    if how == "removed":
        turns = tuple(replace(t, parts=tuple(p for p in t.parts if p is not None)) for t in example.turns)
        return replace(example, images=(), turns=turns)
    images = []
    for image in example.images:
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        stream = io.BytesIO()
        picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 8)).save(stream, "PNG")
        images.append(stream.getvalue())
    return replace(example, images=tuple(images))


@pytest.mark.parametrize("how", ["blurred", "removed"])
def test_a_gain_is_the_difference_of_two_forwards(
    recipe_of: RecipeOf, teacher_folder: Path, processor: ExampleProcessor, how: str
) -> None:
    """Of the teacher's own logits in fp32, one example at a time; text alone has gained nothing."""
    recipe = recipe_of(cache__visual_gain=how)
    reader = captured(recipe)
    assert verify(reader.location).faults == ()
    model = AutoModelForImageTextToText.from_pretrained(teacher_folder, dtype=torch.float32).eval()

    def logprobs(example: Example) -> torch.Tensor:
        one = processor.encode(example)
        with torch.no_grad():
            logits = model(**processor.collate([one]).inputs).logits[0, -one.num_positions - 1 : -1]
        logits = logits[:, : processor.num_token_ids]
        return logits.log_softmax(-1).gather(1, one.answer_ids[:, None])[:, 0]

    num_shown = 0
    for example in open_split(recipe.data, "train"):
        (row,) = reader.rows([processor.key(example)])
        found = reader.label_gains([row])
        if not example.images:
            assert found.tolist() == [0.0] * row.num_positions
            continue
        num_shown += 1
        wanted = logprobs(example) - logprobs(without_pictures(example, how))
        assert wanted.abs().max() > 1e-3  # or this test would not test anything
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-3)
    assert num_shown == 6


def test_the_rest_of_a_row_is_what_it_was(recipe_of: RecipeOf) -> None:
    ours, plain = captured(recipe_of()), captured(recipe_of("plain", cache__visual_gain=None))
    keys = list(plain.keys())
    for row, other in zip(ours.rows(keys), plain.rows(keys), strict=True):
        assert (row.payload, row.ce_sum) == (other.payload, other.ce_sum)


def test_a_lost_shard_is_made_again_byte_for_byte(recipe_of: RecipeOf, tmp_path: Path) -> None:
    reader = captured(recipe_of())
    whole = files_of(tmp_path / "cache")
    (tmp_path / "cache" / reader.manifest.shards[3].name).unlink()
    captured(recipe_of())
    again = files_of(tmp_path / "cache")
    assert again == {name: again[name] if name == "capture.log" else data for name, data in whole.items()}


def test_ranks_of_a_sharded_teacher_stay_in_step(recipe_of: RecipeOf) -> None:
    """Whose batches have pictures or none: each rank has another number of second passes."""
    settings = {"cache__visual_gain": "removed", "cache__examples_per_shard": 1, "data__limit": 5}
    whole = captured(recipe_of("whole", **settings))
    sharded = recipe_of("sharded", **settings, teacher__shard=True)
    options = {"collective_timeout_s": 30}
    assert on_ranks(2, lambda world: capture(sharded, world, StopRequest()), **options) == [0, 0]
    assert sharded.cache is not None
    ours, keys = CacheReader(sharded.cache.location), list(whole.keys())
    torch.testing.assert_close(
        ours.label_gains(ours.rows(keys)), whole.label_gains(whole.rows(keys)), atol=2e-4, rtol=1e-3
    )


def test_a_loop_of_ones_own_gives_both_passes(
    recipe_of: RecipeOf, teacher_folder: Path, processor: ExampleProcessor
) -> None:
    recipe = recipe_of("own")
    teacher = load_vlm(str(teacher_folder), revision=None, dtype=torch.float32, attn_implementation=None)

    def states(encoded: list[Any]) -> torch.Tensor:
        batch = processor.collate(encoded)
        with torch.inference_mode():
            return last_hidden_states(teacher.base_model, batch.inputs).flatten(0, 1)[batch.position_index]

    fingerprint, head = weight_fingerprint(teacher), teacher.get_output_embeddings()
    with own_capture(recipe, processor, weights_fingerprint=fingerprint) as cache:
        for encoded in cache.batches(4):
            hidden, shown = states(encoded), [one.unseen for one in encoded if one.unseen is not None]
            if shown:
                with pytest.raises(ValueError, match="0 outputs without pictures found"):
                    cache.add(encoded, hidden, head=head)
            cache.add(encoded, hidden, head=head, unseen_nD=states(shown) if shown else None)
    theirs = captured(recipe_of())
    ours, keys = CacheReader(recipe.cache.location), list(theirs.keys())  # type: ignore[union-attr]
    assert ours.manifest.identity == theirs.manifest.identity
    torch.testing.assert_close(
        ours.label_gains(ours.rows(keys)), theirs.label_gains(theirs.rows(keys)), atol=1e-4, rtol=1e-3
    )


def test_a_blurred_picture_keeps_the_prompt(processor: ExampleProcessor, examples: list[Example]) -> None:
    one = encoded_twice(processor, examples[0], "blurred")
    assert one.unseen is not None
    assert torch.equal(one.unseen.input_ids, one.input_ids)
    assert one.unseen.per_picture.keys() == one.per_picture.keys()
    pixels, blurred = one.per_picture["pixel_values"], one.unseen.per_picture["pixel_values"]
    assert blurred.shape == pixels.shape
    assert blurred.std() < 0.7 * pixels.std()
    assert encoded_twice(processor, examples[0], None).unseen is None


def test_a_prompt_that_needs_its_picture_says_so(
    llava_folder: Path, data_config: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a processor that takes no row of text alone."""
    processor = open_processor(str(llava_folder), data_config)
    whole = processor._processed

    def refusing(text: str, images: Any, where: str) -> Any:
        if not images:
            raise DataError(f"{where}: this model's processor refuses a row without a picture")
        return whole(text, images, where)

    monkeypatch.setattr(processor, "_processed", refusing)
    assert encoded_twice(processor, examples[0], "blurred").unseen is not None
    with pytest.raises(RecipeError, match=r"visual_gain removed: .*refuses a row .*Set it to blurred"):
        encoded_twice(processor, examples[0], "removed")


def test_an_estimate_tells_what_the_second_pass_costs(recipe_of: RecipeOf, capsys: Any) -> None:
    with distributed(device="cpu") as world:
        found = estimate(recipe_of(), world, num_examples=16, taus=())
    assert 0 < found.times.unseen < found.times.live <= found.times.capture
    show(found)
    assert "ms of that its pass without pictures" in capsys.readouterr().out


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page_tells_which_answers_need_their_pictures(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of()
    reader = captured(recipe)
    write_cache_report(reader, recipe, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    keys = list(reader.keys())
    gains = [row.label_gain.astype(np.float64).sum() for row in reader.rows(keys)]
    share = sum(gain >= np.log(2) for gain in gains) / len(gains)
    assert f"{100 * share:.0f} % of {len(gains)} answers do" in page
    for title in (
        "Which answers need their pictures",
        "Pictures by kind of question",
        "Where the pictures matter most",
        "Where they matter least, or mislead",
    ):
        assert title in page
    shown = page.rpartition("Where the pictures matter most")[2].partition("Where they matter least")[0]
    order = [float(found) for found in re.findall(r"gain (-?\d+\.\d\d) nats over the answer", shown)]
    assert order == sorted(order, reverse=True)
    assert order[0] == pytest.approx(max(gains), abs=5e-3)


def test_shares_by_kind_by_hand() -> None:
    def row(*gains: float) -> Any:
        return replace(
            make_row(0), answer_ids=np.zeros(len(gains), np.int32), label_gain=np.array(gains, np.float16)
        )

    rows = [row(0.5, 0.5), row(0.25, 0.25), row(-1.0), row(3.0)]
    page = by_kind_table(["place", "place", "sign", "place"], rows)
    cells = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", line) for line in re.findall(r"<tr>.*?</tr>", page)]
    assert cells[1:] == [["place", "3", "67 %", "1.00", "0.900"], ["sign", "1", "0 %", "-1.00", "-1.000"]]
