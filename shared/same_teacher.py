"""Whether a recipe's teacher is the one whose targets a cache holds, found out without loading it.

    compare_teacher(reader, recipe.teacher).require(...)

A capture writes down what the teacher's files were: a hash of their content in the manifest, and in the log, since a
manifest holds no times, a stamp of their sizes, times and headers.  Files with that stamp are the same.  Of others
every byte is hashed: a renamed or copied folder is found equal, weights that changed in their place are found
different.  Where the files are gone, or the cache is older than this, names and revisions decide.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from shared.cache import Cache, CacheMix, CacheReader, Comparison
from shared.cache.log import log_records
from shared.cache.storage import open_folder
from shared.models.weight_files import weight_files
from shared.recipes import TeacherConfig

ANOTHER_TEACHER = (
    "Name the cache's teacher in the recipe, or capture this one into a cache of its own (cache.path). If the "
    "weights are the same, run teacher-cache with this recipe: it compares them and writes the new name down."
)
NONE_OF_THEM = "Name the teacher of one of these caches in the recipe, or leave the section out."
CONTENT = "teacher_content"  # in the manifest's ``created_by``
STAMP = "teacher_stamp"  # in the log


def require_teacher(cache: Cache, teacher: TeacherConfig | None) -> tuple[str, ...]:
    """Compares the teacher that a recipe names, if it does, with those of the caches; its files may be gone.

    Of several caches of many teachers one must be its own.

    Returns  notices
    Raises   CacheMismatchError  with both sides
    """
    if teacher is None:
        return ()
    found = []
    for part in sorted(cache.parts, key=lambda one: one.manifest.identity.teacher.name != teacher.model):
        comparison = compare_teacher(part, teacher)
        if not comparison.refusals:
            return comparison.notices
        found.append((part.location, comparison))
        if len(cache.teacher_names) == 1 and not isinstance(cache, CacheMix):
            break  # the others are of the same
    if len(found) == 1:
        location, comparison = found[0]
        comparison.require(where=f"cache {location}", remedy=ANOTHER_TEACHER)
    refusals = tuple(f"{location}: {line}" for location, one in found for line in one.refusals)
    Comparison(refusals).require(where=cache.where, remedy=NONE_OF_THEM)
    return ()


def teacher_content(teacher: TeacherConfig) -> dict[str, str]:
    """What a capture writes into the manifest; reads every byte.  Empty where the files cannot be found."""
    files = weight_files(teacher.model, teacher.revision)
    return {} if files is None else {CONTENT: files.content()}


def teacher_stamp(teacher: TeacherConfig) -> dict[str, str]:
    """What a capture writes into the log."""
    files = weight_files(teacher.model, teacher.revision)
    return {} if files is None else {STAMP: files.stamp}


def compare_teacher(cache: CacheReader, teacher: TeacherConfig) -> Comparison:
    """Refuses another teacher; a teacher of another name that is proved the same is a notice."""
    stored, facts = cache.manifest.identity.teacher, cache.manifest.created_by
    theirs, ours = _named(stored.name, stored.revision), _named(teacher.model, teacher.revision)
    files = weight_files(teacher.model, teacher.revision)
    if files is None or files.faults() or CONTENT not in facts:
        if theirs == ours or _same_folder(stored.name, teacher.model):
            return Comparison(())
        reason = (
            "the cache does not say what its files were"
            if CONTENT not in facts
            else "its files are not here, or not whole"
        )
        return Comparison((f"teacher: {theirs} in the cache, {ours} asked for ({reason}: names decide)",))
    if files.stamp in _stamps(cache.location):
        found = facts[CONTENT]
    else:
        told = f"teacher {teacher.model}: its weights are compared with those of the cache"
        tqdm.write(told, file=sys.stderr)  # what is printed may be JSON
        found = files.content()
    if found != facts[CONTENT]:
        both = (
            f"{theirs}, weights {facts[CONTENT][:12]}, in the cache, {ours}, weights {found[:12]}, asked for"
        )
        return Comparison((f"teacher: {both}",))
    if theirs != ours:
        return Comparison(
            (), (f"teacher: {theirs} in the cache is called {ours} here; the weights are the same",)
        )
    return Comparison(())


def _stamps(location: str) -> set[str]:
    """Of the teacher's files at each capture; the log is no part of the cache, and may be damaged or gone."""
    return {str(record[STAMP]) for record in log_records(open_folder(location)) if STAMP in record}


def _named(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name} at {revision}"


def _same_folder(one: str, other: str) -> bool:
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)
