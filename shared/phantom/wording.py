"""How authors write about a picture: the same facts in the words of one of three authors.

Whatever is said here can be seen in the picture.  Which synonym an author takes cannot be, so that there is a
spread of right answers to learn, as in real records.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.phantom.anatomy import Lesion, Picture
from shared.phantom.findings import SIZES_CM

MODALITY_NAMES = {
    "CT": "CT",
    "T1": "T1-weighted MR",
    "T2": "T2-weighted MR",
    "US": "Ultrasound",
    "XR": "Radiograph",
}
IMAGE_NOUNS = {
    "CT": "CT image",
    "T1": "T1-weighted MR image",
    "T2": "T2-weighted MR image",
    "US": "ultrasound image",
    "XR": "radiograph",
}
BRIGHTNESS = {
    ("CT", 1): ("hyperdense", "dense", "high-attenuation"),
    ("CT", -1): ("hypodense", "low-density", "low-attenuation"),
    ("T1", 1): ("hyperintense", "bright", "high-signal"),
    ("T1", -1): ("hypointense", "dark", "low-signal"),
    ("T2", 1): ("hyperintense", "bright", "high-signal"),
    ("T2", -1): ("hypointense", "dark", "low-signal"),
    ("US", 1): ("hyperechoic", "echogenic", "bright"),
    ("US", -1): ("hypoechoic", "echo-poor", "dark"),
    ("US", 0): ("anechoic", "echo-free", "dark"),  # a cyst
    ("XR", 1): ("radiopaque", "dense", "opaque"),
    ("XR", -1): ("radiolucent", "lucent", "lytic"),
}
MARGINS = {
    "smooth": ("well-defined", "smooth", "sharply outlined"),
    "irregular": ("irregular", "ill-defined", "lobulated"),
}
BEHIND = {"shadow": "It casts an acoustic shadow.", "enhancement": "There is enhancement behind it."}


def choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of the options, the first most often."""
    weights = np.array([0.6] + [0.4 / (len(options) - 1)] * (len(options) - 1)) if len(options) > 1 else None
    return options[rng.choice(len(options), p=weights)]


def with_article(phrase: str) -> str:
    return ("an " if phrase[0].lower() in "aeiou" else "a ") + phrase


def capital(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]


def centimetres(diameter_cm: float) -> str:
    return f"{diameter_cm:g} cm"


def measure(picture: Picture, lesion: Lesion) -> str:
    """The diameter as the author writes it: in centimetres, or in millimetres."""
    return f"{lesion.diameter_cm * 10:.0f} mm" if picture.author == 1 else centimetres(lesion.diameter_cm)


def size_class(diameter_cm: float) -> str:
    return next(name for name, sizes in SIZES_CM.items() if diameter_cm in sizes)


def subject(picture: Picture) -> str:
    """What is shown: a region, or one of a pair of parts where a letter says which."""
    side = (
        {"R": "right ", "L": "left "}.get(picture.side_letter, "") if picture.study.letter == "side" else ""
    )
    return side + picture.study.shown


def header(picture: Picture) -> str:
    """What kind of picture it is."""
    start = f"{capital(picture.study.plane)} {IMAGE_NOUNS[picture.modality]}"
    return f"{start}, {subject(picture)}" if picture.author == 1 else f"{start} of the {subject(picture)}"


def noun(lesion: Lesion, rng: np.random.Generator) -> str:
    """What the lesion is called: a nodule of the lung is a mass when it is larger than 3 cm."""
    if lesion.finding.organ == "lung":
        return "nodule" if lesion.diameter_cm <= 3 else "mass"
    return choose(
        rng, ("focus", "structure") if lesion.finding.casts == "shadow" else ("lesion", "focus", "mass")
    )


def finding(picture: Picture, rng: np.random.Generator, *, opening: str = "There is ") -> str:
    """The lesion in one or two sentences, or that there is none; ``opening`` is author 0's."""
    lesion = picture.lesion
    if lesion is None:
        absent = choose(rng, ("focal lesion", "focal abnormality"))
        return f"No {absent}." if picture.author == 1 else f"{opening}no {absent}."
    place, size = lesion.site.name, measure(picture, lesion)
    is_cyst = picture.modality == "US" and lesion.finding.casts == "enhancement"
    bright = choose(rng, BRIGHTNESS[(picture.modality, 0 if is_cyst else picture.sign)])
    margin, what = choose(rng, MARGINS[lesion.finding.margin]), noun(lesion, rng)
    if picture.author == 0:
        text = f"{opening}{with_article(margin)}, {bright} {what} in the {place}, measuring {size}."
    elif picture.author == 1:
        text = f"{capital(bright)} {what}, {size}, {place}, {margin}."
    else:
        text = (
            f"The {place} contains {with_article(bright)} {what} about {size} across. Its margin is {margin}."
        )
    behind = BEHIND.get(lesion.finding.casts, "") if picture.modality == "US" else ""
    return f"{text} {behind}".strip()


def diagnosis(picture: Picture, rng: np.random.Generator) -> str:
    """What the lesion is; without one, what else is wrong, or that nothing is."""
    if picture.lesion is not None:
        return choose(rng, picture.lesion.finding.names)
    return picture.has_extra * picture.study.extra.impression or "normal study"


def opinion(picture: Picture, rng: np.random.Generator) -> str:
    """The diagnosis as a sentence."""
    name = diagnosis(picture, rng)
    if picture.author == 1 or picture.lesion is None:
        return f"{capital(name)}."
    verb = "The appearance is consistent with" if picture.author == 0 else "This most likely represents"
    return f"{verb} {with_article(name)}."


def background(picture: Picture) -> str:
    """What else is, or is not, to be seen."""
    extra = picture.study.extra
    return f"{extra.present if picture.has_extra else extra.absent} {picture.study.unremarkable}"


def caption(picture: Picture, rng: np.random.Generator) -> str:
    """The kind of picture and its finding, as the legend under a figure."""
    if picture.author == 0:
        return finding(picture, rng, opening=header(picture) + choose(rng, (" shows ", " demonstrates ")))
    return f"{header(picture)}. {finding(picture, rng)}"


def description(picture: Picture, rng: np.random.Generator) -> str:
    return f"{caption(picture, rng)} {background(picture)} {opinion(picture, rng)}"


def report(picture: Picture, rng: np.random.Generator) -> str:
    """Technique, finding and impression, a line each."""
    impression = capital(diagnosis(picture, rng))
    technique = f"{MODALITY_NAMES[picture.modality]}, {picture.study.plane}"
    return f"Technique: {technique}\nFinding: {finding(picture, rng)}\nImpression: {impression}"


def differential(picture: Picture, rng: np.random.Generator) -> str | None:
    """What the lesion could be, the likeliest first, as the author writes lists."""
    if picture.lesion is None:
        return None
    first, *others = picture.lesion.finding.differential
    rng.shuffle(others)
    names = [capital(name) for name in (first, *others[: 2 + int(rng.integers(2))])]
    if picture.author == 0:
        return "\n".join(f"{number}. {name}" for number, name in enumerate(names, 1))
    return "\n".join(names) if picture.author == 1 else ", ".join(names).capitalize()
