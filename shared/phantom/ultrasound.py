"""Ultrasound: a sector of speckle that fades with depth, shadows behind stones, brightness behind cysts."""

from __future__ import annotations

import math

import numpy as np

from shared.phantom.anatomy import Picture
from shared.phantom.canvas import Canvas, Grey, hypot, over, smooth_noise
from shared.phantom.findings import Finding

APEX_Y = -98.0
DEPTH = 166.0
HALF_ANGLE = 0.72
LIVER = 0.40


def kidney_longitudinal(canvas: Canvas, picture: Picture, rng: np.random.Generator) -> Grey:
    grey = canvas.blank(LIVER) * (1 + 0.12 * smooth_noise(rng, canvas.size, 8))
    grey = over(grey, canvas.soft(-44 - canvas.y), 0.52)  # wall
    for y in (-66, -56, -47):
        grey = over(grey, canvas.soft(1.2 - np.abs(canvas.y - y - canvas.x**2 / 900)), 0.85)
    grey = over(grey, canvas.soft(canvas.y - 42 + canvas.x**2 / 300, 6), 0.55)  # behind the kidney
    grey = over(grey, canvas.ellipse(0, 6, 60, 29, 4), 0.75)  # capsule
    grey = over(grey, canvas.ellipse(0, 6, 58, 27, 4), 0.27)  # cortex
    for x in (-34, -18, 0, 18, 34):
        for side in (-1, 1):
            grey = over(grey, canvas.ellipse(x * 0.9, 6 + side * 13, 5, 4, blur_mm=2), 0.16)  # pyramids
    sinus = canvas.soft((1 - canvas.radius(0, 6, 33, 9, 4)) * 9 + 1.5 * smooth_noise(rng, canvas.size, 14), 3)
    grey = over(grey, sinus, 0.85)
    if picture.has_extra:
        grey = over(grey, canvas.ellipse(0, 6, 27, 8, 4), 0.02)
    return grey


def liver_transverse(canvas: Canvas, picture: Picture, rng: np.random.Generator) -> Grey:
    grey = canvas.blank(LIVER) * (1 + 0.10 * smooth_noise(rng, canvas.size, 8))
    grey = over(grey, canvas.soft(-56 - canvas.y), 0.5)
    for y in (-72, -64, -57):
        grey = over(grey, canvas.soft(1.2 - np.abs(canvas.y - y)), 0.85)
    if picture.has_extra:
        fluid = np.abs(canvas.y + 47 - canvas.x**2 / 400)
        grey = over(grey, canvas.soft(5.5 - fluid), 0.01)
    bottom = canvas.y - 58 + canvas.x**2 / 180
    grey = over(grey, canvas.soft(bottom), 0.20)
    grey = over(grey, canvas.soft(2.5 - np.abs(bottom)), 1.0)  # diaphragm
    for points in (
        [(-66, 26), (-40, 36), (-8, 42)],
        [(-60, -22), (-34, -26), (-6, -22)],
        [(4, 26), (20, 36)],
    ):
        grey = over(grey, canvas.line(points, 7), 0.72)
        grey = over(grey, canvas.line(points, 4.2), 0.03)  # vessels
    grey = over(grey, canvas.ellipse(31, -2, 16, 25, 22), 0.75)
    return over(grey, canvas.ellipse(31, -2, 14, 23, 22), 0.02)  # gallbladder


def finish(canvas: Canvas, grey: Grey, rng: np.random.Generator) -> Grey:
    """Speckle along the arcs of the sector, fading with depth, black outside of it."""
    x, y = canvas.u, canvas.v - APEX_Y
    depth, angle = hypot(x, y), np.arctan2(x, y)
    rows, columns = math.ceil(1.2 * canvas.size), math.ceil(0.55 * canvas.size)
    speckle = rng.rayleigh(0.8, (rows, columns)).astype(np.float32)
    i = np.clip(depth / DEPTH * rows, 0, rows - 1).astype(int)
    j = np.clip((angle / HALF_ANGLE + 1) / 2 * columns, 0, columns - 1).astype(int)
    fade = np.exp(-0.003 * (depth - 60)) * rng.uniform(0.92, 1.08)
    echo = np.maximum(grey, 0) * (0.35 + 0.65 * speckle[i, j]) * fade
    sector = canvas.soft((HALF_ANGLE - np.abs(angle)) * depth) * canvas.soft(DEPTH - depth)
    return (echo * sector * canvas.soft(depth - 34)).astype(np.float32)


def add_lesion(
    canvas: Canvas,
    grey: Grey,
    finding: Finding,
    sign: int,
    mask: Grey,
    mottle: Grey,
    disc: tuple[float, float, float],
) -> Grey:
    """A lesion, and what it does to the beam behind it; ``disc`` is its x, y and radius in mm."""
    echo = 1.2 if finding.casts == "shadow" else 0.85 if sign > 0 else 0.02 if finding.casts else 0.15
    grey = over(grey, mask, echo * mottle)
    if not finding.casts:
        return grey
    return cast(canvas, grey, *disc, strength=0.12 if finding.casts == "shadow" else 1.7)


def cast(canvas: Canvas, grey: Grey, x: float, y: float, radius: float, *, strength: float) -> Grey:
    """Multiplies what lies behind (x, y), seen from the probe: below 1 a shadow, above 1 an enhancement."""
    across = np.arctan2(canvas.u, canvas.v - APEX_Y) - math.atan2(x, y - APEX_Y)
    depth = hypot(canvas.u, canvas.v - APEX_Y)
    behind = depth - math.hypot(x, y - APEX_Y) - 0.6 * radius
    mask = canvas.soft(radius * 0.9 - np.abs(across) * depth, 2) * canvas.soft(behind, 4)
    return grey * (1 + mask * (strength - 1))
