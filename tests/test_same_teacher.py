"""Whose targets a cache holds: another teacher is refused, a renamed one is not, and files may be gone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from stage2_runs import make_recipe

from shared.cache import CacheReader
from shared.errors import CacheMismatchError
from shared.recipes import TeacherConfig
from shared.runtime import distributed
from shared.same_teacher import compare_teacher
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.check import check_recipe
from stage2_student.training.inputs import open_inputs


@pytest.fixture
def cache(teacher_cache: Path) -> CacheReader:
    return CacheReader(str(teacher_cache))


@pytest.fixture
def copy(tmp_path: Path, teacher_folder: Path) -> Path:
    return shutil.copytree(teacher_folder, tmp_path / "copy")


def change_weights(folder: Path) -> None:
    """As further training would: same names, shapes and sizes, and the modification time put back."""
    path = folder / "model.safetensors"
    before = path.stat()
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_teacher_of_the_capture_is_recognized_by_its_stamp(
    cache: CacheReader, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.models.weight_files.WeightFiles.content", pytest.fail)  # reads every byte
    found = compare_teacher(cache, TeacherConfig(model=str(teacher_folder)))
    assert (found.refusals, found.notices) == ((), ())


def test_a_renamed_copy_is_told_and_not_refused(cache: CacheReader, copy: Path) -> None:
    found = compare_teacher(cache, TeacherConfig(model=str(copy)))
    assert found.refusals == ()
    assert "the weights are the same" in found.notices[0]


def test_weights_cut_into_other_files_are_the_same(cache: CacheReader, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in names if names[name] == file}, copy / file)
    (copy / "model.safetensors.index.json").write_text(str({"weight_map": names}).replace("'", '"'))
    assert compare_teacher(cache, TeacherConfig(model=str(copy))).refusals == ()


def test_weights_that_changed_in_their_place_are_refused_with_both_sides(
    cache: CacheReader, copy: Path
) -> None:
    change_weights(copy)
    (refusal,) = compare_teacher(cache, TeacherConfig(model=str(copy))).refusals
    assert cache.manifest.created_by["teacher_content"][:12] in refusal
    assert refusal.count("weights ") == 2


@pytest.mark.parametrize("facts", [True, False], ids=["new cache", "cache without facts"])
def test_without_the_files_names_and_revisions_decide(cache: CacheReader, facts: bool) -> None:
    manifest = cache.manifest
    teacher = manifest.identity.teacher.model_copy(update={"name": "gone/teacher"})
    identity = manifest.identity.model_copy(update={"teacher": teacher})
    created_by = manifest.created_by if facts else {}
    cache.manifest = manifest.model_copy(update={"identity": identity, "created_by": created_by})
    assert compare_teacher(cache, TeacherConfig(model="gone/teacher")).refusals == ()
    for other in (
        TeacherConfig(model="gone/other"),
        TeacherConfig(model="gone/teacher", revision="v2"),
    ):
        (refusal,) = compare_teacher(cache, other).refusals
        assert "gone/teacher in the cache, " in refusal


def test_an_older_cache_is_compared_by_name(
    cache: CacheReader, teacher_folder: Path, copy: Path, tmp_path: Path
) -> None:
    cache.manifest = cache.manifest.model_copy(update={"created_by": {}})
    assert compare_teacher(cache, TeacherConfig(model=str(teacher_folder))).refusals == ()
    link = tmp_path / "link"
    link.symlink_to(teacher_folder)
    assert compare_teacher(cache, TeacherConfig(model=str(link))).refusals == ()
    (refusal,) = compare_teacher(cache, TeacherConfig(model=str(copy))).refusals
    assert "names decide" in refusal


def test_a_student_is_kept_from_another_teachers_cache(
    distillation_tree: dict[str, Any], copy: Path, tmp_path: Path, student_folder: Path
) -> None:
    tree = distillation_tree | {"run": {"name": "mine", "root": str(tmp_path), "num_workers": 0}}
    change_weights(copy)
    recipe = make_recipe(tree | {"teacher": {"model": str(copy), "dtype": "float32"}})
    with distributed(device="cpu") as world, pytest.raises(CacheMismatchError, match="asked for"):
        open_inputs(recipe, world)
    report = check_recipe(recipe, num_ranks=1)
    (problem,) = report.problems
    assert problem.count("teacher: ") == 1
    assert report.status == CacheMismatchError.exit_status


def test_a_capture_notices_weights_that_changed_in_their_place(
    distillation_tree: dict[str, Any], copy: Path, tmp_path: Path, teacher_cache: Path
) -> None:
    cache = shutil.copytree(teacher_cache, tmp_path / "cache")
    tree = distillation_tree | {"run": {"name": "mine"}}
    tree |= {"cache": tree["cache"] | {"path": str(cache), "num_workers": 0}}
    recipe = make_recipe(tree | {"teacher": {"model": str(copy), "dtype": "float32"}})
    before = CacheReader(str(cache)).manifest.sha256
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0  # renamed: the same weights, nothing to do
        assert CacheReader(str(cache)).manifest.sha256 == before
        change_weights(copy)
        with pytest.raises(CacheMismatchError, match=r"teacher\.weights_fingerprint"):
            capture(recipe, world, StopRequest())
