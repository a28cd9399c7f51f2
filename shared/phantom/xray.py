"""Radiographs: everything on the way of the beam adds up; bone is white, air is dark."""

from __future__ import annotations

import math

import numpy as np

from shared.phantom.anatomy import Picture
from shared.phantom.canvas import Canvas, Grey, over, smooth_noise


def chest_frontal(canvas: Canvas, picture: Picture, rng: np.random.Generator) -> Grey:
    body = np.maximum(
        canvas.box(0, 40, 158, 170, corner=60, blur_mm=8), canvas.ellipse(0, -110, 200, 60, blur_mm=8)
    )
    body = np.maximum(body, canvas.box(0, -180, 45, 60, blur_mm=6))
    grey = over(canvas.blank(0.05), body, 0.55)
    lungs = canvas.blank()
    for side in (-1, 1):
        lung = canvas.ellipse(side * 74, -20, 62, 128, side * 5, blur_mm=6)
        dome = 72 + side * 6 + (canvas.x - side * 70) ** 2 / 130
        lungs = np.maximum(lungs, lung * canvas.soft(dome - canvas.y, 3))
    grey -= 0.38 * lungs
    grey += 0.05 * lungs * markings(canvas, rng)
    heart = np.maximum(
        canvas.ellipse(26, 26, 58, 46, 28, blur_mm=4), canvas.ellipse(2, -28, 28, 74, blur_mm=5)
    )
    grey = over(grey, heart, 0.64)
    grey = over(grey, canvas.ellipse(22, -64, 18, 18, blur_mm=4), 0.60)  # aortic arch
    grey += 0.12 * canvas.line([(0, -200), (0, 200)], 30, blur_mm=3)  # spine
    for y in range(-180, 200, 26):
        grey -= 0.06 * canvas.box(0, y, 15, 3, corner=2)
    grey -= 0.12 * canvas.line([(0, -200), (1, -62)], 15, blur_mm=3)  # trachea
    grey -= 0.20 * canvas.ellipse(76, 104, 30, 14, blur_mm=4)  # gas under the left dome
    for number in range(9):
        grey += ribs(canvas, number)
    for side in (-1, 1):
        grey += 0.20 * canvas.line([(side * 16, -118), (side * 70, -132), (side * 150, -146)], 11, blur_mm=2)
        grey += 0.12 * canvas.line([(side * 150, -150), (side * 138, -60)], 14, blur_mm=4)  # scapula
    if picture.has_extra:
        grey = over(grey, canvas.box(112, -116, 17, 14, corner=8), 1.0)
        grey = over(grey, canvas.line([(104, -124), (40, -108), (10, -60), (2, 10), (28, 44)], 3), 1.0)
    return grey


def ribs(canvas: Canvas, number: int) -> Grey:
    """A pair of ribs: from the spine outwards and down, then forwards."""
    y, reach = -124 + 23 * number, 78 + 58 * math.sin(min(1.0, (number + 2) / 7) * math.pi / 2)
    pair = canvas.blank()
    for side in (-1, 1):
        across = np.clip(canvas.x * side / reach, 0, 1)
        course = y - 10 + 40 * across**2
        inside = (canvas.x * side > 12) * canvas.soft(reach - canvas.x * side)
        pair += canvas.soft(3.8 - np.abs(canvas.y - course), 1) * inside
        front = y + 52 - 34 * np.clip((across - 0.45) / 0.55, 0, 1) ** 1.5
        pair += 0.5 * canvas.soft(3.8 - np.abs(canvas.y - front), 2) * inside * (across > 0.45)
    return (0.11 * pair).astype(np.float32)


def markings(canvas: Canvas, rng: np.random.Generator) -> Grey:
    """Vessels that run out from the hila."""
    lines = canvas.blank()
    for side in (-1, 1):
        for _ in range(14):
            angle, reach = rng.uniform(-1.5, 1.5), rng.uniform(30, 90)
            x0, y0 = side * 32, rng.uniform(-35, 0)
            end = (x0 + side * reach * math.cos(angle), y0 + reach * math.sin(angle))
            lines += canvas.line([(x0, y0), end], rng.uniform(1.5, 4), blur_mm=3)
    return lines


def knee_frontal(canvas: Canvas, picture: Picture, rng: np.random.Generator) -> Grey:
    outer = 1 if picture.side_letter == "L" else -1  # the fibula lies on the outer side
    skin = np.abs(canvas.x) - 58 - 6 * np.cos(canvas.y / 34)
    grey = 0.05 + 0.20 * canvas.soft(-skin, 5) + 0.10 * canvas.soft(-skin - 14, 10)
    femur = np.maximum(canvas.box(0, -72, 17, 60, corner=6), canvas.ellipse(0, -24, 34, 26))
    for side in (-1, 1):
        femur = np.maximum(femur, canvas.ellipse(side * 19, -14, 21, 17))
    femur = femur * (1 - canvas.ellipse(0, 8, 9, 12))
    tibia = np.maximum(canvas.box(0, 86, 15, 74, corner=6), canvas.box(0, 18, 39, 9, corner=6))
    wedge = canvas.soft(34 - 0.5 * (canvas.y - 14) - np.abs(canvas.x)) * canvas.soft(
        26 - np.abs(canvas.y - 38)
    )
    tibia = np.maximum(tibia, wedge)
    tibia = np.maximum(tibia, canvas.line([(-5, 12), (-4, 7)], 6))
    fibula = np.maximum(
        canvas.line([(outer * 33, 34), (outer * 31, 140)], 11), canvas.ellipse(outer * 34, 34, 9, 10)
    )
    trabeculae = 1 + 0.06 * smooth_noise(rng, canvas.size, 26)
    for bone, weight in ((fibula, 0.26), (femur, 0.34), (tibia, 0.34)):
        grey = grey + weight * bone * trabeculae + 0.22 * rim(canvas, bone)
    grey = grey + 0.07 * canvas.ellipse(3, -24, 17, 20, blur_mm=2)  # patella
    if picture.has_extra:
        grey = over(grey, canvas.line([(-30, 62), (22, 58)], 4.5), 1.0)
        grey = over(grey, canvas.line([(-31, 59), (-30, 66)], 7), 1.0)
    return grey.astype(np.float32)


def rim(canvas: Canvas, mask: Grey) -> Grey:
    """The cortex of a bone: its mask less the mask shrunk by about 2 mm."""
    steps = max(1, round(2.0 / canvas.mm))
    inner = mask
    for axis in (0, 1):
        for step in (-steps, steps):
            inner = np.minimum(inner, np.roll(mask, step, axis))
    return mask - inner


def finish(canvas: Canvas, grey: Grey, rng: np.random.Generator) -> Grey:
    """Exposure that differs from film to film, a gentle fall-off, fine grain."""
    grey = grey * rng.uniform(0.94, 1.06) * (1 + 0.05 * smooth_noise(rng, canvas.size, 2))
    return (grey + 0.012 * rng.standard_normal(grey.shape)).astype(np.float32)
