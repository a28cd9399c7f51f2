"""From a picture's description to the bytes of a PNG file."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from shared.phantom import ct, mr, ultrasound, xray
from shared.phantom.anatomy import Lesion, Picture
from shared.phantom.canvas import Canvas, Grey, hypot, over, smooth_noise

Painter = Callable[[Canvas, Picture, np.random.Generator], Grey]

PAINTERS: dict[str, Painter] = {
    "ct_head_axial": ct.head_axial,
    "ct_chest_axial": ct.chest_axial,
    "ct_abdomen_axial": ct.abdomen_axial,
    "ct_abdomen_coronal": ct.abdomen_coronal,
    "mr_brain_axial": mr.brain_axial,
    "mr_brain_coronal": mr.brain_coronal,
    "mr_brain_sagittal": mr.brain_sagittal,
    "mr_spine_sagittal": mr.spine_sagittal,
    "us_kidney_longitudinal": ultrasound.kidney_longitudinal,
    "us_liver_transverse": ultrasound.liver_transverse,
    "xr_chest_frontal": xray.chest_frontal,
    "xr_knee_frontal": xray.knee_frontal,
}
FINISHERS = {"CT": ct.finish, "T1": mr.finish, "T2": mr.finish, "US": ultrasound.finish, "XR": xray.finish}
CONTRAST = {"CT": 0.34, "T1": 0.36, "T2": 0.36, "XR": 0.30}
STORED_MODES = ("L", "RGB", "RGBA", "I;16")
STORED_SHARES = (0.7, 0.14, 0.08, 0.08)


def draw(picture: Picture, size: int) -> Grey:
    """The picture as grey values.

    Shapes   returns (size, size) fp32 from 0 to 1
    Holds    the same for the same picture and size; without the lesion, nothing else of it changes
    """
    canvas = Canvas(size, picture.study.fov_mm, picture.stream("pose"))
    grey = PAINTERS[picture.study.name](canvas, picture, picture.stream("anatomy"))
    if picture.lesion is not None:
        grey = add_lesion(canvas, grey, picture, picture.lesion)
    grey = FINISHERS[picture.modality](canvas, grey, picture.stream("noise " + picture.modality))
    grey = np.maximum(grey, scale_bar(canvas))
    if picture.side_letter:
        grey = np.maximum(grey, letter(canvas, picture.side_letter))
    return np.clip(grey, 0, 1)


def add_lesion(canvas: Canvas, grey: Grey, picture: Picture, lesion: Lesion) -> Grey:
    """Brightens or darkens the lesion's area: evenly where its margin is smooth, mottled where not."""
    rng = picture.stream("lesion")
    x, y = canvas.place(lesion.site.x, lesion.site.y)
    x, y = x + lesion.shift_mm[0], y + lesion.shift_mm[1]
    radius_mm = 5.0 * lesion.diameter_cm
    mask = lesion_mask(canvas, x, y, radius_mm, lesion.finding.margin, rng)
    mottle = canvas.blank(1.0)
    if lesion.finding.margin == "irregular":
        mottle = np.clip(1 + 0.3 * smooth_noise(rng, canvas.size, 24), 0.4, 1.5).astype(np.float32)
    if picture.modality == "US":
        return ultrasound.add_lesion(
            canvas, grey, lesion.finding, picture.sign, mask, mottle, (x, y, radius_mm)
        )
    amount = CONTRAST[picture.modality] * picture.sign * mottle
    if picture.modality == "XR":
        return grey + mask * amount  # shadows add up
    ground = np.median(grey[mask > 0.5])
    return over(grey, mask, ground + 0.25 * (grey - ground) + amount)


def lesion_mask(
    canvas: Canvas, x: float, y: float, radius_mm: float, margin: str, rng: np.random.Generator
) -> Grey:
    """A disc nearly round, or one with lobes and spikes; both are ``2 radius_mm`` at their longest."""
    dx, dy = canvas.u - x, canvas.v - y
    angle = np.arctan2(dy, dx)
    phases = rng.uniform(0, math.tau, 3)
    if margin == "smooth":
        outline = 0.97 + 0.03 * np.cos(2 * angle + phases[0])
    else:
        waves = (
            np.cos(6 * angle + phases[0])
            + 0.7 * np.cos(9 * angle + phases[1])
            + np.cos(3 * angle + phases[2])
        )
        outline = 0.80 + 0.20 * np.clip(waves / 1.4, -1, 1)
    distance = outline * radius_mm - hypot(dx, dy)
    return np.clip(distance / canvas.mm + 0.5, 0, 1).astype(np.float32)


def scale_bar(canvas: Canvas) -> Grey:
    """A bar of 5 cm with a tick at each end, at the lower right."""
    x, y = canvas.u - canvas.fov_mm / 2, canvas.v - canvas.fov_mm / 2
    right, bottom, width = -4 * canvas.mm, -4 * canvas.mm, canvas.mm
    bar = (np.abs(x - right + 25) <= 25) & (np.abs(y - bottom) <= width / 2 + 1e-3)
    ticks = (np.minimum(np.abs(x - right), np.abs(x - right + 50)) <= width / 2) & (
        np.abs(y - bottom) <= 2.2 * width
    )
    return np.where(bar | ticks, np.float32(0.9), np.float32(0))


def letter(canvas: Canvas, name: str) -> Grey:
    """R at the upper left of the picture, or L at its upper right, where the patient's side is."""
    unit = canvas.fov_mm / 128
    corner = -56 * unit if name == "R" else 50 * unit
    x, y = (canvas.u - corner) / unit, (canvas.v + 58 * unit) / unit
    stem = (np.abs(x - 1) <= 1) & (y >= 0) & (y <= 11)
    if name == "L":
        strokes = stem | ((np.abs(y - 10) <= 1) & (x >= 0) & (x <= 6.5))
    else:
        bowl = (np.abs(hypot(x - 3.2, y - 3) - 2.4) <= 1.0) & (x >= 1)
        leg = (np.abs(x - 3 - (y - 5) * 0.6) <= 1.1) & (y >= 5) & (y <= 11)
        strokes = stem | bowl | leg
    return np.where(strokes, np.float32(0.95), np.float32(0))


def encode(grey: Grey, rng: np.random.Generator) -> bytes:
    """A PNG file, most often 8-bit grey; sometimes RGB, RGBA with clear corners, or 16-bit grey."""
    mode = STORED_MODES[rng.choice(len(STORED_MODES), p=STORED_SHARES)]
    # 64 levels: a third fewer bytes than 256, and no difference to the eye under the grain.
    levels = np.round(grey * 63)
    bytes_ = (levels * 255 / 63).round().astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray((levels * 4095 / 63).round().astype(np.uint16))  # 12 bits, as scanners give
    elif mode == "RGBA":
        image = Image.fromarray(np.dstack([bytes_] * 3 + [clear_corners(len(bytes_))]))
    else:
        image = Image.fromarray(bytes_).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=4)
    return file.getvalue()


def clear_corners(size: int) -> np.ndarray:
    """An alpha channel that is 0 in the corners outside of a circle, 255 elsewhere."""
    axis = np.arange(size) - (size - 1) / 2
    outside = hypot(*np.meshgrid(axis, axis)) > 0.68 * size
    return np.where(outside, 0, 255).astype(np.uint8)
