"""MR: soft contrast that depends on the weighting, a bias field, noise that is never negative."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shared.phantom.anatomy import Picture
from shared.phantom.canvas import Canvas, Grey, hypot, over, smooth_noise


@dataclass(frozen=True)
class Signal:
    """The signal of the tissues in one weighting."""

    fluid: float
    grey: float
    white: float
    fat: float
    muscle: float
    marrow: float
    disc: float
    bone: float = 0.05


SIGNALS = {
    "T1": Signal(fluid=0.12, grey=0.40, white=0.58, fat=0.92, muscle=0.34, marrow=0.56, disc=0.36),
    "T2": Signal(fluid=0.95, grey=0.50, white=0.33, fat=0.70, muscle=0.20, marrow=0.46, disc=0.60),
}


def brain_axial(canvas: Canvas, picture: Picture, rng: np.random.Generator) -> Grey:
    t = SIGNALS[picture.modality]
    grey = head(canvas, t, 0, 0, 79, 95)
    grey = cerebrum(canvas, grey, t, rng, 0, 0, 66, 82)
    wide = 1.9 if picture.has_extra else 1.0
    for side in (-1, 1):
        grey = over(grey, canvas.ellipse(side * 23, 4, 7, 16, side * 14, blur_mm=3), t.grey)  # putamen
        grey = over(grey, canvas.ellipse(side * 9, 14, 7, 11, blur_mm=3), t.grey)  # thalamus
        horn = [(side * 3.5 * wide, -8), (side * 8 * wide, -28)]
        grey = over(grey, canvas.line(horn, 6 * wide), t.fluid)
        grey = over(grey, canvas.line([(side * 18, 26), (side * 24, 40)], 6 * wide), t.fluid)
    grey = over(grey, canvas.ellipse(0, 12, 2 * wide, 10), t.fluid)
    for y0, y1 in ((-80, -34), (46, 80)):
        grey = over(grey, canvas.line([(0, y0), (0, y1)], 3), t.fluid)  # between the hemispheres
    return grey


def brain_coronal(canvas: Canvas, picture: Picture, rng: np.random.Generator) -> Grey:
    t = SIGNALS[picture.modality]
    grey = over(head(canvas, t, 0, -14, 80, 84), canvas.box(0, 104, 54, 56, corner=12), t.fat)
    grey = over(grey, canvas.box(0, 102, 48, 56, corner=12), t.muscle)
    for side in (-1, 1):
        grey = cerebrum(canvas, grey, t, rng, side * 40, 20, 27, 25)  # temporal lobe
    grey = cerebrum(canvas, grey, t, rng, 0, -26, 66, 54)
    wide = 1.9 if picture.has_extra else 1.0
    grey = over(grey, canvas.line([(0, 4), (0, 60), (2, 110)], 19, blur_mm=2), t.white)  # brainstem, cord
    for side in (-1, 1):
        grey = over(grey, canvas.ellipse(side * 11, 0, 9, 9, blur_mm=3), t.grey)  # thalamus
        grey = over(grey, canvas.ellipse(side * 27, -4, 6, 11, side * -10, blur_mm=3), t.grey)  # putamen
        grey = over(grey, canvas.line([(side * 4, -17), (side * 15, -25)], 5.5 * wide), t.fluid)  # ventricle
        grey = over(grey, canvas.line([(side * 66, 0), (side * 40, 2)], 3), t.fluid)  # Sylvian fissure
    grey = over(grey, canvas.line([(-16, -34), (0, -29), (16, -34)], 5), t.white)  # corpus callosum
    grey = over(grey, canvas.ellipse(0, 0, 2 * wide, 9), t.fluid)  # third ventricle
    return over(grey, canvas.line([(0, -78), (0, -36)], 3), t.fluid)


def brain_sagittal(canvas: Canvas, picture: Picture, rng: np.random.Generator) -> Grey:
    t = SIGNALS[picture.modality]
    grey = np.maximum(face(canvas, t), head(canvas, t, 6, -26, 98, 84))
    grey = over(grey, canvas.box(-2, 84, 40, 54, corner=14), t.muscle)  # neck
    for y in (62, 80, 98, 116):
        grey = over(grey, canvas.box(-8, y, 9, 7, corner=3), t.marrow)  # cervical vertebrae
    grey = over(grey, canvas.ellipse(-58, 48, 36, 34), t.muscle)  # the face below the base of the skull
    grey = over(grey, canvas.ellipse(-66, 30, 24, 12, 8), 0.04)  # nasal cavity
    grey = over(grey, canvas.ellipse(-58, 62, 22, 12, 12), 0.45)  # tongue
    grey = over(grey, canvas.line([(-36, 30), (-22, 62), (-20, 120)], 9), 0.03)  # airway
    grey = cerebrum(canvas, grey, t, rng, 6, -34, 84, 60)
    grey = over(grey, canvas.ellipse(46, 30, 27, 22, 20), t.fluid * 0.8)
    leaves = 0.5 + 0.5 * np.sin(canvas.radius(30, 32, 1, 1) * 1.1)
    cerebellum = t.grey + (t.white - t.grey) * leaves
    grey = over(grey, canvas.ellipse(46, 30, 25, 20, 20), cerebellum.astype(np.float32))
    grey = over(grey, canvas.line([(2, 4), (10, 26), (14, 48), (16, 120)], 24), t.fluid * 0.85)
    grey = over(grey, canvas.line([(2, 4), (10, 26), (14, 48), (16, 120)], 13), t.white)  # brainstem, cord
    grey = over(grey, canvas.ellipse(4, 24, 11, 14, -15), t.white * 0.95)  # pons
    arch = canvas.ring(8, -18, 34, 20, 7) * canvas.soft(-14 - canvas.y)
    grey = over(grey, arch, min(1.0, t.white * 1.2))  # corpus callosum
    high = 10.0 if picture.has_extra else 3.5
    grey = over(grey, canvas.ellipse(8, -24 + 0.6 * high, 25, high), t.fluid)  # ventricle
    return over(grey, canvas.ellipse(6, -8, 10, 7, blur_mm=2), t.grey)  # thalamus


def spine_sagittal(canvas: Canvas, picture: Picture, rng: np.random.Generator) -> Grey:
    t = SIGNALS[picture.modality]
    grey = canvas.blank(0.0)
    grey = over(grey, canvas.soft(82 - canvas.x + 6 * np.sin(canvas.y / 60)), t.fat)  # up to the back's skin
    grey = over(grey, canvas.soft(52 - canvas.x + 6 * np.sin(canvas.y / 60)), t.muscle * 1.3)
    belly = 0.32 + 0.16 * smooth_noise(rng, canvas.size, 9)
    grey = over(grey, canvas.soft(-38 - canvas.x, 6), belly)
    grey = over(grey, canvas.line([(-50, -120), (-54, 120)], 15), 0.06)  # aorta: flow void
    spine = [(bend(y), y) for y in range(-130, 140, 10)]
    behind = [(x + 30, y) for x, y in spine]
    grey = over(grey, canvas.line(behind, 17), t.fluid)
    cord_end = -58
    grey = over(grey, canvas.line([p for p in behind if p[1] <= cord_end], 8), t.grey)
    for offset in (-2, 2):
        roots = [(x + offset, y) for x, y in behind if y >= cord_end]
        grey = over(grey, canvas.line(roots, 1.2), t.grey)
    for level in range(-2, 6):
        y = -76 + 37 * level
        grey = level_of_spine(canvas, grey, t, y, collapsed=picture.has_extra and level == 4)
    return grey


def level_of_spine(canvas: Canvas, grey: Grey, t: Signal, y: float, *, collapsed: bool) -> Grey:
    """A vertebra, the disc below it and its spinous process."""
    x, lean = bend(y), math.degrees(math.atan2(bend(y + 18) - bend(y - 18), 36))
    half = 6.0 if collapsed else 13.5
    grey = over(grey, canvas.box(x, y, 20, 18.5, -lean, corner=5), t.bone)
    grey = over(grey, canvas.box(x, y + 18.5, 19, 5, -lean, corner=4), t.disc)
    grey = over(grey, canvas.box(x, y - 18.5, 19, 5, -lean, corner=4), t.disc)
    if collapsed:
        grey = over(grey, canvas.box(x, y, 18.5, 12, -lean, corner=4), t.disc)
        grey = over(grey, canvas.box(x, y, 20, half + 2, -lean, corner=3), t.bone)
    grey = over(grey, canvas.box(x, y, 18.5, half, -lean, corner=4), t.marrow)
    return over(grey, canvas.line([(x + 48, y + 10), (x + 66, y + 18)], 11), t.marrow)


def bend(y: float) -> float:
    """The forward curve of the lumbar spine: x of the vertebrae's middle."""
    return -22 + 14 * (y / 100) ** 2


def head(canvas: Canvas, t: Signal, cx: float, cy: float, rx: float, ry: float) -> Grey:
    """Scalp, skull and the fluid around the brain."""
    grey = over(canvas.blank(), canvas.ellipse(cx, cy, rx, ry), t.fat)
    grey = over(grey, canvas.ellipse(cx, cy, rx - 5, ry - 5), t.bone)
    return over(grey, canvas.ellipse(cx, cy, rx - 11, ry - 11), t.fluid)


def face(canvas: Canvas, t: Signal) -> Grey:
    """The profile: forehead to chin, looking to the left, and the neck."""
    profile = [(-86, 4), (-104, 34), (-90, 42), (-92, 56), (-86, 62), (-84, 84), (-60, 92)]
    grey = over(canvas.blank(), canvas.line(profile, 16), t.fat)
    grey = over(grey, canvas.box(-52, 46, 36, 46, corner=20), t.fat)
    grey = over(grey, canvas.box(16, 96, 46, 60, corner=14), t.fat)
    return over(grey, canvas.box(14, 96, 40, 60, corner=12), t.muscle)


def cerebrum(
    canvas: Canvas,
    grey: Grey,
    t: Signal,
    rng: np.random.Generator,
    cx: float,
    cy: float,
    rx: float,
    ry: float,
) -> Grey:
    """Folded cortex around white matter, in an ellipse."""
    radius = canvas.radius(cx, cy, rx, ry)
    angle = np.arctan2((canvas.y - cy) / ry, (canvas.x - cx) / rx)
    folds = np.cos(round(0.26 * (rx + ry)) * angle / 1.6 + 2.2 * smooth_noise(rng, canvas.size, 7))
    shell = min(rx, ry)
    grey = over(grey, canvas.soft((1 - radius) * shell), t.grey)
    sulci = canvas.soft((radius - 0.80 - 0.05 * folds) * shell) * canvas.soft((folds - 0.80) * 6)
    grey = over(grey, sulci * canvas.soft((1 - radius) * shell), t.fluid)
    edge = 0.86 - 0.09 * folds - 0.02 * smooth_noise(rng, canvas.size, 12)
    return over(grey, canvas.soft((edge - radius) * shell, 1.5), t.white)


def finish(canvas: Canvas, grey: Grey, rng: np.random.Generator) -> Grey:
    """A bias field of the coil, and Rician noise."""
    slope = rng.normal(0, 0.10, 2)
    bias = 1 + slope[0] * canvas.u / canvas.fov_mm + slope[1] * canvas.v / canvas.fov_mm
    bias = bias + 0.06 * smooth_noise(rng, canvas.size, 3)
    noise = 0.022 * rng.standard_normal((2, *grey.shape))
    return hypot(grey * bias + noise[0], noise[1]).astype(np.float32)
