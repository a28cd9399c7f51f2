"""What a case is: a study, perhaps one finding at a place and of a size, and an author who writes about it.

Everything random is drawn from named streams that are a pure function of (seed, split, case, name): a case
does not change when another is added, and a picture drawn without its finding keeps its noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Literal

import numpy as np

from shared.phantom.findings import FINDINGS, SIZES_CM, Finding, Modality
from shared.phantom.studies import STUDIES, Site, Study

NO_LESION_FRACTION = 0.2
NUM_AUTHORS = 3


@dataclass(frozen=True)
class Lesion:
    """A finding at a site; ``shift_mm`` moves it from the site's middle."""

    finding: Finding
    site: Site
    diameter_cm: float
    shift_mm: tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """One picture of a case, with all that drawing and questions need to know."""

    key: tuple[int, str, int]  # seed, split, case number
    study: Study
    modality: Modality
    lesion: Lesion | None
    has_extra: bool
    side_letter: Literal["", "R", "L"]
    author: int

    @property
    def case_id(self) -> str:
        return f"PHX-{self.key[1]}-{self.key[2]:06d}"

    @property
    def file_name(self) -> str:
        return f"{self.case_id}-{self.modality.lower()}.png"

    @property
    def sign(self) -> int:
        """+1 where the lesion is brighter than its surroundings, -1 where it is darker, 0 without one."""
        return self.lesion.finding.signs[self.modality] if self.lesion else 0

    def without_lesion(self) -> Picture:
        return replace(self, lesion=None)

    def stream(self, name: str) -> np.random.Generator:
        return stream(self.key, name)


def stream(key: tuple[int, str, int], name: str) -> np.random.Generator:
    """A random stream of its own for each (seed, split, case number) and name."""
    text = "/".join((*map(str, key), name))
    return np.random.default_rng(int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little"))


def draw_case(seed: int, split: str, number: int) -> tuple[Picture, ...]:
    """The pictures of one case: one, or a T1 and a T2 weighted one of the same anatomy."""
    key = (seed, split, number)
    rng = stream(key, "facts")
    shares = np.array([1 / len(study.modalities) for study in STUDIES])  # as many pictures of each study
    study = STUDIES[rng.choice(len(STUDIES), p=shares / shares.sum())]
    lesion = None if rng.random() < NO_LESION_FRACTION else draw_lesion(study, rng)
    letter = ("R", "L")[rng.integers(2)] if study.letter else ""
    if study.letter == "side" and lesion is not None:
        letter = lesion.site.side[0]
    has_extra, author = bool(rng.random() < 0.4), int(rng.integers(NUM_AUTHORS))
    return tuple(
        Picture(key, study, modality, lesion, has_extra, letter, author)  # type: ignore[arg-type]
        for modality in study.modalities
    )


def draw_lesion(study: Study, rng: np.random.Generator) -> Lesion:
    """A finding that the study shows, at one of its sites, of a size that the site has room for."""
    site = study.sites[rng.integers(len(study.sites))]
    findings = [f for f in FINDINGS if f.organ == site.organ and set(study.modalities) <= set(f.signs)]
    finding = findings[rng.integers(len(findings))]
    largest = min(site.max_cm, finding.max_cm)
    classes = [[size for size in sizes if finding.min_cm <= size <= largest] for sizes in SIZES_CM.values()]
    classes = [sizes for sizes in classes if sizes]
    sizes = classes[rng.integers(len(classes))]
    shift = rng.uniform(-site.spread, site.spread, 2)
    return Lesion(finding, site, sizes[rng.integers(len(sizes))], (float(shift[0]), float(shift[1])))
