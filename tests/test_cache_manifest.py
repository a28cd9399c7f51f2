"""The manifest: strict, versioned, self-checking; and what it says of two identities that differ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from cache_examples import VOCAB_SIZE, capture, make_identity

from shared.cache import CacheReader, InputsIdentity, Manifest
from shared.cache.identity import Identity, TargetsIdentity
from shared.cache.manifest import content_hash
from shared.cache.verify import verify
from shared.errors import CacheFormatError, CacheMismatchError
from shared.recipes.policies import Threshold, TopK


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    capture(tmp_path, range(7))
    return tmp_path


def edit(cache: Path, **changes) -> None:
    """Rewrites the manifest with other values and a hash that fits."""
    tree = json.loads((cache / "manifest.json").read_text()) | changes
    tree["sha256"] = content_hash(tree)
    (cache / "manifest.json").write_text(json.dumps(tree))


def test_the_hash_is_that_of_the_canonical_json(cache: Path) -> None:
    tree = json.loads((cache / "manifest.json").read_text())
    claimed = tree.pop("sha256")
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    assert (
        claimed == hashlib.sha256(canonical.encode()).hexdigest() == CacheReader(str(cache)).manifest.sha256
    )


def test_what_is_written_is_what_is_read(cache: Path) -> None:
    data = (cache / "manifest.json").read_bytes()
    manifest = Manifest.loads(data, where="cache")
    assert manifest.dumps() == data
    assert manifest.identity == make_identity()
    assert Identity.model_validate_json(manifest.identity.model_dump_json()) == manifest.identity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "version 3 found, this program reads up to 2. Upgrade teachonce"),
        ({"format_version": 0}, "is no version number"),
        ({"format_version": "1"}, "is no version number"),
        ({"format_version": True}, "is no version number"),
        ({"format": "parquet"}, "'parquet' found, 'teachonce-cache' needed"),
        ({"colour": "red"}, "colour"),
        ({"shards": []}, "shards: Extra inputs"),
        ({"segments": [{"list": {"name": "../../etc/passwd"}}]}, "segments.0.list.name"),
        ({"segments": []}, "7 examples in its totals"),
        ({"totals": {"examples": -1}}, "totals.examples"),
        ({"identity": {"policy": None}}, "identity.policy"),
        ({"skipped": [{"row": "r", "reason": "x", "key": "zz"}]}, "skipped.0.key"),
        ({"skipped": [{"row": "r", "reason": "x", "key": "0" * 31}]}, "skipped.0.key"),
        ({"skipped": [{"row": "r", "reason": "x", "key": "0" * 32 + "\n"}]}, "skipped.0.key"),
        ({"totals": {"examples": 10**30}}, "totals.examples"),
    ],
)
def test_other_versions_and_fields_are_refused(cache: Path, changes: dict, message: str) -> None:
    edit(cache, **changes)
    with pytest.raises(CacheFormatError) as error:
        CacheReader(str(cache))
    assert message in str(error.value)
    assert "manifest.json" in str(error.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": "teachonce-cache"}'])
def test_a_manifest_that_is_none_is_refused(cache: Path, data: bytes) -> None:
    (cache / "manifest.json").write_bytes(data)
    with pytest.raises(CacheFormatError, match=r"manifest\.json"):
        CacheReader(str(cache))


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("inputs", "vocab_size", 10**30),
        ("targets", "temperatures", [0.0]),
        ("targets", "temperatures", [-1.0]),
    ],
)
def test_numbers_that_no_capture_can_have_are_refused(cache: Path, part: str, field: str, value) -> None:
    identity = make_identity().model_dump(mode="json")
    identity[part][field] = value
    edit(cache, identity=identity)
    for use in (CacheReader, verify):
        with pytest.raises(CacheFormatError, match=rf"manifest\.json: identity\.{part}\.{field}"):
            use(str(cache))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"seed": 0', '"seed": NaN'),
        ('"seed": 0', '"seed": -Infinity'),
        ('"seed": 0', '"seed": 1e999'),
        ('"seed": 0', '"seed": ' + "[" * 100_000 + "]" * 100_000),
        ('"seed": 0', '"seed": ' + "9" * 10_000),
    ],
)
def test_json_that_is_no_json_of_ours_is_one_error(cache: Path, old: str, new: str) -> None:
    text = (cache / "manifest.json").read_text()
    (cache / "manifest.json").write_text(text.replace(old, new))
    for use in (CacheReader, verify):
        with pytest.raises(CacheFormatError, match=r"manifest\.json: not JSON .*the file is damaged"):
            use(str(cache))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_manifest_saved_in_another_encoding_is_refused(cache: Path, encoding: str) -> None:
    text = (cache / "manifest.json").read_text()
    (cache / "manifest.json").write_text(text, encoding=encoding)
    with pytest.raises(CacheFormatError, match=r"manifest\.json: not JSON \(.*(utf-8|BOM)"):
        CacheReader(str(cache))


def test_an_edited_manifest_is_refused(cache: Path) -> None:
    text = (cache / "manifest.json").read_text()
    (cache / "manifest.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(CacheFormatError, match="changed after it was committed"):
        CacheReader(str(cache))


def student(**changes) -> InputsIdentity:
    return make_identity(**changes).inputs


def test_a_student_with_the_same_inputs_is_welcome(cache: Path) -> None:
    reader = CacheReader(str(cache))
    assert reader.require_student(student(), temperature=1.0) == ()
    assert reader.require_student(student(), temperature=1.0, policy=Threshold(tau=1 / 16)) == ()


def test_all_that_keeps_a_student_away_is_listed_with_both_sides(cache: Path) -> None:
    other = student(
        tokenizer_fingerprint="t1", template_fingerprint="c1", vocab_size=5, max_answer_tokens=None
    )
    with pytest.raises(CacheMismatchError) as error:
        CacheReader(str(cache)).require_student(other, temperature=2.0, policy=TopK(k=3))
    message = str(error.value)
    assert "6 difference(s)" in message
    for line in (
        'inputs.tokenizer_fingerprint: "t0" in the cache, "t1" asked for',
        'inputs.template_fingerprint: "c0" in the cache, "c1" asked for',
        f"inputs.vocab_size: {VOCAB_SIZE} in the cache, 5 asked for",
        "inputs.max_answer_tokens: 32 in the cache, null asked for",
        "temperature: 1.0 in the cache, 2.0 asked for",
        'in the cache, {"k":3,"kind":"top_k"} asked for',
    ):
        assert line in message


def test_a_recipe_names_the_targets_that_it_trains_on(tmp_path: Path) -> None:
    """What a run records of its cache would not be true otherwise."""
    capture(tmp_path, range(7), identity=make_identity(temperatures=(1.0, 2.0)))
    reader = CacheReader(str(tmp_path))
    for temperatures in ((1.0, 2.0), (2.0, 1.0), (2.0,)):  # captured for other students, too
        reader.require_student(student(), temperature=2.0, seed=0, temperatures=temperatures)
    with pytest.raises(CacheMismatchError) as error:
        reader.require_student(student(), temperature=2.0, seed=7, temperatures=(2.0, 3.0))
    for line in (
        "2 difference(s)",
        "targets.seed: 0 in the cache, 7 asked for",
        "targets.temperatures: [1.0,2.0] in the cache, [2.0,3.0] asked for",
    ):
        assert line in str(error.value)


def test_another_picture_resolution_is_only_a_notice(cache: Path) -> None:
    notices = CacheReader(str(cache)).require_student(
        student(image_processor_fingerprint="i1"), temperature=1.0
    )
    assert notices == ('inputs.image_processor_fingerprint: "i0" in the cache, "i1" asked for',)


def test_a_capture_compares_the_image_processor_too() -> None:
    comparison = make_identity().compare_capture(
        make_identity(image_processor_fingerprint="i1", name="other")
    )
    assert len(comparison.refusals) == 1
    assert comparison.notices == ('teacher.name: "teacher" in the cache, "other" asked for',)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"name": "x", "revision": "y"}, True),
        ({"data": ()}, True),
        ({"weights_fingerprint": "w1"}, False),
        ({"dtype": "bfloat16"}, False),
        ({"temperatures": (1.0, 2.0)}, False),
        ({"policy": Threshold(tau=1 / 32)}, False),
        ({"max_answer_tokens": 31}, False),
        ({"image_processor_fingerprint": "i1"}, False),
    ],
)
def test_the_digest_covers_what_rows_depend_on(change: dict, same: bool) -> None:
    assert (make_identity(**change).digest() == make_identity().digest()) is same


def test_an_index_that_disagrees_with_the_manifest_is_refused(cache: Path, tmp_path_factory) -> None:
    other = tmp_path_factory.mktemp("other")
    larger, own = capture(other, range(9)), CacheReader(str(cache)).manifest
    index = larger.segments[0].index
    (cache / index.name).write_bytes((other / index.name).read_bytes())
    edit(cache, segments=[own.segments[0].model_dump(mode="json") | {"index": index.model_dump()}])
    with pytest.raises(CacheFormatError, match="9 keys found, 7 examples"):
        CacheReader(str(cache))


def test_ways_of_drawing_are_told_apart_and_the_first_is_not_written() -> None:
    """At temperature 1 alone manifests and shards stay as they were; others never join older captures."""
    alone = TargetsIdentity.of_capture(Threshold(), temperatures=(1.0,), seed=0)
    assert alone == TargetsIdentity(policy=Threshold(), temperatures=(1.0,), seed=0)
    assert "sampling" not in alone.model_dump(mode="json")
    several = TargetsIdentity.of_capture(Threshold(), temperatures=(1.0, 2.0), seed=0)
    assert several.model_dump(mode="json")["sampling"] == 2
    old = make_identity(policy=Threshold(), temperatures=(1.0, 2.0))
    now = old.model_copy(update={"targets": several})
    assert old.compare_capture(now).refusals == ("targets.sampling: 1 in the cache, 2 asked for",)
    assert Identity.model_validate_json(now.model_dump_json()) == now
