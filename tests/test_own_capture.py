"""A cache filled by a loop of one's own: the same as the command's, committed last, and continued."""

from __future__ import annotations

import contextlib
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_examples import files_of
from stage2_runs import make_recipe

from shared.cache import CacheReader
from shared.cache import unit as unit_module
from shared.cache.verify import verify
from shared.capture.loop import Capture, capture, capture_examples, text_inputs
from shared.data.collation import Encoded
from shared.data.processing import ExampleProcessor, open_processor
from shared.errors import CacheFormatError, CacheMismatchError, DataError, RecipeError
from shared.models.vlm import last_hidden_states, load_vlm
from shared.models.weights import weight_fingerprint
from shared.recipes import Recipe
from shared.sparse import sampling_version
from teachonce import TeacherIdentity


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Any:
    return load_vlm(str(teacher_folder), revision=None, dtype=torch.float32, attn_implementation=None)


@pytest.fixture
def recipe(distillation_tree: dict[str, Any], tmp_path: Path) -> Recipe:
    cache = {"path": str(tmp_path / "own"), "temperatures": [1.0, 2.0], "examples_per_shard": 6}
    return make_recipe(distillation_tree | {"cache": cache, "run": {"name": "own"}})


@pytest.fixture
def processor(recipe: Recipe) -> ExampleProcessor:
    assert recipe.teacher is not None
    return open_processor(recipe.teacher.model, recipe.data)


def fill(
    cache: Capture[Encoded],
    teacher: Any,
    processor: ExampleProcessor,
    *,
    size: int = 4,
    at_most: int | None = None,
) -> int:
    """The loop of the page, or its first batches; returns how many examples it was given."""
    found = 0
    for encoded in islice(cache.batches(size), at_most):
        batch = processor.collate(encoded)
        with torch.inference_mode():
            states = last_hidden_states(teacher.base_model, batch.inputs)
        hidden = states.flatten(0, 1)[batch.position_index]
        cache.add(encoded, hidden, head=teacher.get_output_embeddings(), chunk_size=7)
        found += len(encoded)
    return found


def test_it_holds_what_the_command_captures(
    recipe: Recipe, processor: ExampleProcessor, teacher: Any, teacher_cache: Path
) -> None:
    """Same identity, same keys, and the same draws of distributions that differ by rounding at most."""
    assert recipe.cache is not None
    with capture(recipe, processor, weights_fingerprint=weight_fingerprint(teacher)) as cache:
        assert cache.num_missing == 16
        assert fill(cache, teacher, processor) == 16
        assert cache.num_missing == 0
    ours, theirs = CacheReader(recipe.cache.path), CacheReader(str(teacher_cache))
    assert ours.manifest.identity == theirs.manifest.identity
    keys = list(theirs.keys())
    assert list(ours.keys()) == keys
    (our_ids, our_targets), (their_ids, their_targets) = ours.read(keys), theirs.read(keys)
    assert all(torch.equal(one, other) for one, other in zip(our_ids, their_ids, strict=True))
    assert torch.allclose(our_targets.entropy, their_targets.entropy, atol=1e-4)
    shared = min(our_targets.num_entries, their_targets.num_entries)
    assert abs(our_targets.num_entries - their_targets.num_entries) <= 0.01 * shared


def test_an_exception_commits_nothing_and_the_same_loop_goes_on(
    recipe: Recipe, processor: ExampleProcessor, teacher: Any, tmp_path: Path
) -> None:
    assert recipe.cache is not None
    fingerprint, path = weight_fingerprint(teacher), Path(recipe.cache.path)

    def interrupted() -> None:
        with capture(recipe, processor, weights_fingerprint=fingerprint) as cache:
            assert fill(cache, teacher, processor, size=6, at_most=1) == 6
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (path / "manifest.json").exists()
    with capture(recipe, processor, weights_fingerprint=fingerprint) as cache:
        assert cache.num_missing == 10
        assert fill(cache, teacher, processor, size=6) == 10
    whole = files_of(path)
    with capture(recipe, processor, weights_fingerprint=fingerprint) as cache:
        assert fill(cache, teacher, processor) == 0
    assert files_of(path) == whole
    with (
        pytest.raises(CacheMismatchError, match="weights_fingerprint"),
        capture(recipe, processor, weights_fingerprint="another"),
    ):
        pass


def test_a_loop_that_ends_early_is_told(recipe: Recipe, processor: ExampleProcessor) -> None:
    assert recipe.cache is not None
    with (
        pytest.raises(CacheFormatError, match=r"3 of 3 units are not captured"),
        capture(recipe, processor, weights_fingerprint="w") as cache,
    ):
        next(iter(cache.batches(2)))
    assert not (Path(recipe.cache.path) / "manifest.json").exists()


# --- examples of any kind -----------------------------------------------------------------------------------


class Text:
    """Four tokens, the last three of them predicted."""

    truncated = False

    def __init__(self, number: int) -> None:
        self.key = number.to_bytes(16, "little")
        self.answer_ids = torch.tensor([number, 2, 3])


class SomeUnusable(list):
    def __getitem__(self, number: Any) -> Any:
        if number == 1:
            raise DataError("examples[1]: torn")
        return super().__getitem__(number)


def texts(tmp_path: Path, processor: ExampleProcessor, examples: Any, **options: Any) -> Any:
    teacher = TeacherIdentity(name="a server", revision=None, weights_fingerprint="w", dtype="float32")
    keys = [one.key for one in list.__iter__(examples)]
    inputs = text_inputs(processor.tokenizer)
    return capture_examples(
        str(tmp_path / "texts"), examples, keys, teacher=teacher, inputs=inputs, **options
    )


def test_logits_wider_than_the_tokenizer_have_no_mass_there(
    tmp_path: Path, processor: ExampleProcessor
) -> None:
    examples, width = [Text(0), Text(1), Text(0)], processor.num_token_ids + 5
    logits = torch.randn(6, width)
    with texts(tmp_path, processor, examples) as cache:
        for batch in cache.batches(8):
            assert len(batch) == 2  # equal keys once
            cache.add(batch, logits)
    _, targets = CacheReader(str(tmp_path / "texts")).read([examples[1].key, examples[0].key])
    assert int(targets.ids.max()) < processor.num_token_ids
    own = logits[:, : processor.num_token_ids].softmax(-1)
    entropy = -(own * own.log()).sum(-1).view(2, 3).sum(1).flip(0)
    assert torch.allclose(targets.entropy[:, 0].view(2, 3).sum(1), entropy, atol=1e-3)


def test_log_probs_of_labels_where_they_are_asked_for(tmp_path: Path, processor: ExampleProcessor) -> None:
    examples, logits = [Text(0), Text(1)], torch.randn(6, processor.num_token_ids)
    with texts(tmp_path, processor, examples, label_log_prob=True) as cache:
        for batch in cache.batches(8):
            cache.add(batch, logits)
    reader = CacheReader(str(tmp_path / "texts"))
    found = reader.label_log_probs(reader.rows([one.key for one in examples]))
    labels = torch.cat([one.answer_ids for one in examples])
    assert torch.allclose(found, logits.log_softmax(-1).gather(1, labels[:, None])[:, 0], atol=4e-3)


def test_an_example_that_cannot_be_used_is_counted(tmp_path: Path, processor: ExampleProcessor) -> None:
    examples, logits = SomeUnusable([Text(0), Text(1), Text(2)]), torch.randn(6, processor.num_token_ids)
    with (
        pytest.raises(DataError, match=r"torn.* 1 left out, 0 allowed"),
        texts(tmp_path, processor, examples, temperatures=(1.0, 2.0)) as cache,
    ):
        list(cache.batches(8))
    with texts(tmp_path, processor, examples, max_dropped=1, temperatures=(1.0, 2.0)) as cache:
        for batch in cache.batches(8):
            cache.add(batch, logits)
    manifest = CacheReader(str(tmp_path / "texts")).manifest
    targets = manifest.identity.targets
    assert targets.sampling == sampling_version(targets.policy, targets.temperatures) == 2
    assert [(row.row, row.reason) for row in manifest.skipped] == [("examples[1]", "examples[1]: torn")]
    assert manifest.totals.examples == 2


def test_examples_left_out_are_counted_over_all_sessions(tmp_path: Path, processor: ExampleProcessor) -> None:
    class MoreUnusable(SomeUnusable):
        def __getitem__(self, number: Any) -> Any:
            if number == 3:
                raise DataError("examples[3]: torn")
            return super().__getitem__(number)

    examples, logits = (
        MoreUnusable(Text(number) for number in range(4)),
        torch.randn(3, processor.num_token_ids),
    )

    def some(num_batches: int, max_dropped: int) -> None:
        with texts(tmp_path, processor, examples, max_dropped=max_dropped, examples_per_shard=2) as cache:
            for batch in islice(cache.batches(8), num_batches):
                cache.add(batch, logits)

    with pytest.raises(CacheFormatError, match="1 of 2 units are not captured"):
        some(1, max_dropped=1)
    with pytest.raises(DataError, match=r"examples.3.: torn. That makes 2 left out, 1 allowed"):
        some(2, max_dropped=1)
    some(2, max_dropped=2)


@pytest.mark.parametrize(
    ("logit", "told"),
    [(-torch.inf, "no probability"), (torch.finfo(torch.float32).min, "no probability"), (-1e30, None)],
)
def test_a_label_that_the_teacher_masks(
    tmp_path: Path, processor: ExampleProcessor, logit: float, told: str | None
) -> None:
    """An infinite cross-entropy is refused at once; one that a shard can hold is kept, its log-prob in fp16 cut."""
    examples, logits = [Text(0), Text(1)], torch.randn(6, processor.num_token_ids)
    logits[4:, [2, 3]] = logit  # two of the three labels of the second
    with contextlib.ExitStack() as stack:
        if told is not None:
            stack.enter_context(pytest.raises(DataError, match=rf"example {examples[1].key.hex()}: .*{told}"))
        cache = stack.enter_context(texts(tmp_path, processor, examples, label_log_prob=True))
        for batch in cache.batches(8):
            cache.add(batch, logits)
    if told is None:
        assert verify(str(tmp_path / "texts")).faults == ()


def test_a_label_outside_the_vocabulary_is_refused(tmp_path: Path, processor: ExampleProcessor) -> None:
    size = processor.num_token_ids
    with (
        pytest.raises(
            DataError, match=rf"{Text(size).key.hex()}: answer token {size} found, 0 to {size - 1}"
        ),
        texts(tmp_path, processor, [Text(size)]) as cache,
    ):
        cache.add(next(cache.batches(1)), torch.randn(3, size + 5))


def test_a_shard_that_would_be_too_large_is_refused_at_once(
    tmp_path: Path, processor: ExampleProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when all of it is computed."""
    examples, logits = [Text(number) for number in range(4)], torch.randn(3, processor.num_token_ids)
    monkeypatch.setattr(unit_module, "MAX_PAYLOAD_BYTES", 10)
    told = r"the entries of 1 examples take \d+ bytes, a shard was to hold 4 .* Set cache\.examples_per_shard lower"
    with pytest.raises(RecipeError, match=told), texts(tmp_path, processor, examples) as cache:
        cache.add(next(cache.batches(1)), logits)


def test_what_does_not_fit_is_refused(tmp_path: Path, processor: ExampleProcessor) -> None:
    examples, logits = [Text(0), Text(1)], torch.randn(6, processor.num_token_ids)

    def refused(cache: Any) -> None:
        with pytest.raises(ValueError, match="not handed out"):
            cache.add(examples, logits)
        batch = next(iter(cache.batches(1)))
        with pytest.raises(ValueError, match="3 answer tokens"):
            cache.add(batch, logits)
        with pytest.raises(DataError, match="NaN or infinity"):
            cache.add(batch, logits[:3] * torch.nan)
        cache.add(batch, logits[:3])
        with pytest.raises(ValueError, match="came twice"):
            cache.add(batch, logits[:3])

    with (
        pytest.raises(CacheFormatError, match="1 of 2 units are not captured"),
        texts(tmp_path, processor, examples, examples_per_shard=1) as cache,
    ):
        refused(cache)
