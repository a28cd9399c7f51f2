"""The kinds of pictures: regions, planes, fields of view, and the places where a finding may lie.

Sides are the patient's, in the radiological convention: the patient's right is the left of the picture, so a
place with a negative ``x`` is on the right.  Coordinates are millimetres of a standard body, from the middle
of the picture, ``x`` towards its right and ``y`` downwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.phantom.findings import Modality

Side = Literal["Right", "Left", "Midline"]


@dataclass(frozen=True)
class Site:
    """A place for a finding, ``x`` and ``y`` give or take ``spread`` mm."""

    organ: str
    name: str
    side: Side
    x: float
    y: float
    max_cm: float
    spread: float = 5.0


@dataclass(frozen=True)
class Extra:
    """Something else that a picture of a study shows or does not show.

    ``impression`` names the condition when it is one: then a picture with it is not normal.
    """

    name: str
    present: str
    absent: str
    impression: str = ""


@dataclass(frozen=True)
class Study:
    """A kind of picture: what is examined, how, and where findings may lie."""

    name: str
    modalities: tuple[Modality, ...]
    region: str
    shown: str  # the region, or the part of it that is in the middle
    plane: str
    fov_mm: float
    sites: tuple[Site, ...]
    extra: Extra
    unremarkable: str
    letter: Literal["", "mark", "side"] = ""  # a letter in the picture: an R or L mark, or the side examined


def pair(organ: str, name: str, x: float, y: float, max_cm: float, spread: float = 5.0) -> tuple[Site, Site]:
    """A place on the right, and its mirror image on the left; ``name`` has a ``{side}``."""
    return (
        Site(organ, name.format(side="right"), "Right", -abs(x), y, max_cm, spread),
        Site(organ, name.format(side="left"), "Left", abs(x), y, max_cm, spread),
    )


def either(organ: str, name: str, x: float, y: float, max_cm: float, spread: float) -> tuple[Site, Site]:
    """One place of the picture that is the patient's right or left, as the letter in the picture says."""
    return (
        Site(organ, name.format(side="right"), "Right", x, y, max_cm, spread),
        Site(organ, name.format(side="left"), "Left", x, y, max_cm, spread),
    )


VENTRICLES = Extra(
    "enlargement of the ventricles",
    "The ventricles are enlarged.",
    "The ventricles are of normal size.",
    "hydrocephalus",
)

HEAD_CT = Study(
    "ct_head_axial",
    ("CT",),
    "head",
    "head",
    "axial",
    220.0,
    (
        *pair("brain", "{side} frontal lobe", 30, -46, 3.5),
        *pair("brain", "{side} parietal lobe", 39, 2, 4.5, 3),
        *pair("brain", "{side} occipital lobe", 27, 50, 3.5),
    ),
    Extra(
        "a calcified pineal gland",
        "There is a calcified pineal gland.",
        "No calcification of the pineal gland is seen.",
    ),
    "The skull is intact.",
)

CHEST_CT = Study(
    "ct_chest_axial",
    ("CT",),
    "chest",
    "chest",
    "axial",
    360.0,
    (
        *pair("lung", "anterior part of the {side} lung", 92, -30, 4.5, 7),
        *pair("lung", "posterior part of the {side} lung", 94, 34, 5.0, 7),
    ),
    Extra(
        "calcification of the aorta",
        "The wall of the aorta is calcified.",
        "The aorta is not calcified.",
    ),
    "The mediastinum is not displaced.",
)

ABDOMEN_CT = Study(
    "ct_abdomen_axial",
    ("CT",),
    "abdomen",
    "abdomen",
    "axial",
    360.0,
    (
        Site("liver", "right lobe of the liver", "Right", -92, -12, 5.5, 12),
        Site("liver", "right lobe of the liver", "Right", -92, -12, 5.5, 12),
        Site("spleen", "spleen", "Left", 108, 24, 3.0, 3),
        *pair("kidney", "{side} kidney", 64, 46, 3.0, 4),
    ),
    Extra(
        "gas in the stomach",
        "Gas is seen in the stomach.",
        "The stomach contains no gas.",
    ),
    "There is no free fluid.",
)

TRUNK_CT = Study(
    "ct_abdomen_coronal",
    ("CT",),
    "abdomen",
    "abdomen",
    "coronal",
    420.0,
    (
        Site("liver", "right lobe of the liver", "Right", -82, -66, 5.5, 12),
        Site("spleen", "spleen", "Left", 108, -70, 3.0, 3),
        *pair("kidney", "upper pole of the {side} kidney", 62, 0, 3.0, 3),
        *pair("kidney", "lower pole of the {side} kidney", 68, 36, 3.0, 3),
    ),
    Extra(
        "an inferior vena cava filter",
        "A vena cava filter is in place.",
        "There is no vena cava filter.",
    ),
    "The bowel is not dilated.",
)

BRAIN_AXIAL = Study(
    "mr_brain_axial",
    ("T1", "T2"),
    "head",
    "brain",
    "axial",
    220.0,
    (
        *pair("brain", "{side} frontal lobe", 30, -44, 3.5),
        *pair("brain", "{side} parietal lobe", 39, 2, 4.5, 3),
        *pair("brain", "{side} occipital lobe", 27, 48, 3.5),
    ),
    VENTRICLES,
    "There is no midline shift.",
)

BRAIN_CORONAL = Study(
    "mr_brain_coronal",
    ("T1", "T2"),
    "head",
    "brain",
    "coronal",
    220.0,
    (
        *pair("brain", "{side} frontal lobe", 30, -42, 3.5),
        *pair("brain", "{side} temporal lobe", 44, 20, 3.0, 3),
    ),
    VENTRICLES,
    "There is no midline shift.",
)

BRAIN_SAGITTAL = Study(
    "mr_brain_sagittal",
    ("T1", "T2"),
    "head",
    "brain",
    "sagittal",
    240.0,
    (
        Site("brain", "frontal lobe", "Midline", -40, -40, 3.5, 5),
        Site("brain", "parietal lobe", "Midline", 28, -56, 3.0, 4),
        Site("brain", "occipital lobe", "Midline", 58, -26, 2.5, 3),
    ),
    VENTRICLES,
    "The brainstem is normal.",
)

SPINE = Study(
    "mr_spine_sagittal",
    ("T1", "T2"),
    "spine",
    "lumbar spine",
    "sagittal",
    220.0,
    tuple(
        Site("vertebra", f"{name} lumbar vertebra", "Midline", x, y, 2.5, 2)
        for name, x, y in (("first", -14, -76), ("second", -19, -39), ("third", -22, -2), ("fourth", -20, 35))
    ),
    Extra(
        "collapse of a vertebra",
        "The fifth lumbar vertebra has collapsed.",
        "All vertebrae are of normal height.",
        "compression fracture",
    ),
    "The spinal canal is not narrowed.",
)

KIDNEY_LONG_US = Study(
    "us_kidney_longitudinal",
    ("US",),
    "abdomen",
    "kidney",
    "longitudinal",
    170.0,
    (
        *either("kidney", "upper pole of the {side} kidney", -28, 4, 2.5, 3),
        *either("kidney", "lower pole of the {side} kidney", 28, 4, 2.5, 3),
    ),
    Extra(
        "dilatation of the renal pelvis",
        "The renal pelvis is dilated.",
        "The renal pelvis is not dilated.",
        "hydronephrosis",
    ),
    "The cortex is of normal thickness.",
    letter="side",
)

LIVER_US = Study(
    "us_liver_transverse",
    ("US",),
    "abdomen",
    "liver",
    "transverse",
    170.0,
    (
        Site("liver", "right lobe of the liver", "Right", -24, 8, 4.5, 5),
        Site("liver", "right lobe of the liver", "Right", -24, 8, 4.5, 5),
        Site("gallbladder", "gallbladder", "Right", 31, -2, 1.5, 2),
    ),
    Extra(
        "free fluid",
        "There is free fluid around the liver.",
        "There is no free fluid.",
        "ascites",
    ),
    "The bile ducts are not dilated.",
)

CHEST_XR = Study(
    "xr_chest_frontal",
    ("XR",),
    "chest",
    "chest",
    "frontal",
    400.0,
    (
        *pair("lung", "upper zone of the {side} lung", 66, -84, 3.5, 6),
        *pair("lung", "middle zone of the {side} lung", 92, -22, 5.0, 6),
        *pair("lung", "lower zone of the {side} lung", 104, 34, 3.5, 4),
    ),
    Extra(
        "a pacemaker",
        "A pacemaker is in place.",
        "There is no pacemaker.",
    ),
    "There is no pleural effusion.",
    letter="mark",
)

KNEE_XR = Study(
    "xr_knee_frontal",
    ("XR",),
    "knee",
    "knee",
    "frontal",
    200.0,
    (
        *either("bone", "distal {side} femur", 0, -32, 4.5, 4),
        *either("bone", "proximal {side} tibia", 0, 36, 4.5, 4),
    ),
    Extra(
        "a metal screw",
        "A metal screw is seen in the tibia.",
        "There is no metalwork.",
    ),
    "There is no fracture.",
    letter="side",
)

STUDIES = (
    HEAD_CT,
    CHEST_CT,
    ABDOMEN_CT,
    TRUNK_CT,
    BRAIN_AXIAL,
    BRAIN_CORONAL,
    BRAIN_SAGITTAL,
    SPINE,
    KIDNEY_LONG_US,
    LIVER_US,
    CHEST_XR,
    KNEE_XR,
)
