"""CT: flat tissues, white bone, black air, fine grain, the table under the patient."""

from __future__ import annotations

import math

import numpy as np

from shared.phantom.anatomy import Picture
from shared.phantom.canvas import Canvas, Grey, over, smooth_noise

FAT, WATER, MUSCLE, BONE = 0.24, 0.33, 0.47, 0.95


def head_axial(canvas: Canvas, picture: Picture, rng: np.random.Generator) -> Grey:
    grey = canvas.blank()
    grey = over(grey, canvas.ellipse(0, 0, 79, 95), 0.32)  # scalp
    grey = over(grey, canvas.ellipse(0, 0, 74, 90), BONE)
    grey = over(grey, canvas.ring(0, 0, 70.5, 86.5, 2.0), 0.72)  # diploe
    brain = canvas.radius(0, 0, 67, 83)
    grey = over(grey, canvas.soft((1 - brain) * 67), 0.16)
    folds = smooth_noise(rng, canvas.size, 16)
    grey = over(grey, canvas.soft((0.97 - brain) * 67 + 2.2 * folds), 0.46)
    white = canvas.soft((0.78 - brain) * 60 + 3 * smooth_noise(rng, canvas.size, 9), 4)
    grey = over(grey, white, 0.40)
    for side in (-1, 1):
        grey = over(grey, canvas.ellipse(side * 17, -5, 8, 17, side * 12, blur_mm=3), 0.47)  # basal ganglia
        grey = over(grey, canvas.ellipse(side * 9, 18, 7, 10, blur_mm=3), 0.46)  # thalamus
        grey = over(grey, canvas.line([(side * 4, -12), (side * 11, -28)], 7), 0.17)  # frontal horn
        grey = over(grey, canvas.line([(side * 19, 24), (side * 24, 38)], 8), 0.17)  # atrium
        grey = over(grey, canvas.ellipse(side * 21, 28, 2, 2), 0.75)  # choroid plexus
    grey = over(grey, canvas.ellipse(0, 10, 2.5, 11), 0.17)  # third ventricle
    grey = over(grey, canvas.line([(0, -80), (0, -34)], 2), 0.60)  # falx
    grey = over(grey, canvas.line([(0, 44), (0, 80)], 2), 0.60)
    grey = over(grey, canvas.ellipse(0, -80, 5, 5), BONE)
    grey = over(grey, canvas.ellipse(0, 81, 5, 4), BONE)
    if picture.has_extra:
        grey = over(grey, canvas.ellipse(0, 27, 4, 4), 1.0)
    return over(grey, head_rest(canvas), 0.30)


def head_rest(canvas: Canvas) -> Grey:
    return canvas.ring(0, 6, 94, 98, 3) * (canvas.y > 40)


def chest_axial(canvas: Canvas, picture: Picture, rng: np.random.Generator) -> Grey:
    grey = trunk(canvas, rng)
    for side in (-1, 1):
        lung = canvas.ellipse(side * 82, 2, 56, 78, side * 8)
        vessels = canvas.blank()
        for _ in range(12):
            x0, y0 = side * 48, rng.uniform(-10, 20)
            angle, reach = rng.uniform(-1.4, 1.4), rng.uniform(20, 65)
            x1, y1 = x0 + side * reach * math.cos(angle), y0 + reach * math.sin(angle)
            vessels = np.maximum(vessels, canvas.line([(x0, y0), (x1, y1)], rng.uniform(1.0, 2.6)))
        grey = over(grey, lung, 0.06 + 0.26 * vessels)
    grey = over(grey, canvas.ellipse(0, -10, 36, 62), FAT)  # mediastinum
    grey = over(grey, canvas.ellipse(20, -22, 50, 36, 25), 0.58)  # heart
    grey = over(grey, canvas.ellipse(34, -16, 26, 18, 30, blur_mm=4), 0.64)
    grey = over(grey, canvas.ellipse(-2, 34, 12, 8), 0.42)  # oesophagus
    grey = over(grey, canvas.ellipse(22, 42, 13, 13), 0.64)  # aorta
    for side in (-1, 1):
        grey = over(grey, canvas.ellipse(side * 24, 14, 7, 6), 0.02)  # main bronchi
    if picture.has_extra:
        around = canvas.ring(22, 42, 13, 13, 5)
        grey = over(grey, around * (canvas.x > 20), 1.0)
    grey = over(grey, canvas.box(0, -94, 18, 5), BONE)  # sternum
    for side in (-1, 1):
        grey = over(grey, canvas.line([(side * 82, 90), (side * 140, 52)], 6), BONE)  # scapula
    return vertebra(canvas, grey, 66)


def abdomen_axial(canvas: Canvas, picture: Picture, rng: np.random.Generator) -> Grey:
    grey = trunk(canvas, rng)
    inside = canvas.ellipse(0, -2, 140, 86)
    for _ in range(16):  # bowel
        x, y, r = rng.uniform(-50, 90), rng.uniform(-60, 20), rng.uniform(9, 15)
        loop = canvas.ellipse(x, y, r, r * 0.8, rng.uniform(0, 180)) * inside
        grey = over(grey, loop, 0.44)
        grey = over(grey, canvas.ellipse(x, y, r * 0.6, r * 0.45) * inside, rng.choice((0.36, 0.40, 0.56)))
    for side in (-1, 1):
        grey = over(grey, canvas.ellipse(side * 64, 46, 26, 31, side * 14), 0.66)  # kidney
        grey = over(grey, canvas.ellipse(side * 49, 42, 10, 9, side * 14, blur_mm=3), FAT)  # its sinus
    grey = over(grey, canvas.ellipse(60, -36, 50, 38, -18), 0.50)  # stomach
    grey = over(grey, canvas.ellipse(60, -36, 45, 33, -18), WATER)
    if picture.has_extra:
        gas = canvas.ellipse(60, -36, 45, 33, -18) * canvas.soft(-38 - canvas.v)
        grey = over(grey, gas, 0.0)
    grey = over(grey, canvas.ellipse(108, 20, 22, 46, -14) * inside, 0.62)  # spleen
    liver = canvas.soft(
        (1 - canvas.radius(-74, -16, 76, 68, 14)) * 60 + 2 * smooth_noise(rng, canvas.size, 6)
    )
    liver = np.maximum(liver, canvas.ellipse(-18, -46, 52, 26, 8)) * inside
    grey = over(grey, liver, 0.58)
    for x1, y1 in ((-110, -42), (-100, 14), (-62, -60), (-30, -52)):
        grey = over(grey, canvas.line([(-46, -8), (x1, y1)], 4, blur_mm=2) * liver, 0.68)  # portal vein
    grey = over(grey, canvas.ellipse(10, 30, 12, 12), 0.72)  # aorta
    grey = over(grey, canvas.ellipse(-20, 26, 14, 10), 0.64)  # vena cava
    grey = over(grey, canvas.line([(-10, 2), (40, 4), (80, -4)], 13, blur_mm=3), 0.50)  # pancreas
    return vertebra(canvas, grey, 60)


def abdomen_coronal(canvas: Canvas, picture: Picture, rng: np.random.Generator) -> Grey:
    grey = over(canvas.blank(), canvas.box(0, 10, 168, 260, corner=90), FAT)
    grey = over(grey, canvas.box(0, 10, 148, 260, corner=80), MUSCLE)
    grey = over(grey, canvas.box(0, 10, 136, 250, corner=70), FAT)
    for side in (-1, 1):
        lung = canvas.ellipse(side * 80, -150, 60, 80)
        grey = over(grey, lung, 0.05)
        for rib in range(-190, 0, 30):
            grey = over(grey, canvas.ellipse(side * (142 + rib * 0.04), rib, 5, 8, side * 20), BONE)  # ribs
    grey = over(grey, canvas.ellipse(24, -150, 48, 48), 0.60)  # heart
    for _ in range(22):
        x, y, r = rng.uniform(-100, 100), rng.uniform(70, 190), rng.uniform(11, 18)
        grey = over(grey, canvas.ellipse(x, y, r, r * 0.8, rng.uniform(0, 180)), 0.46)
        grey = over(grey, canvas.ellipse(x, y, r * 0.6, r * 0.45), rng.choice((0.36, 0.40, 0.56)))
    grey = over(grey, canvas.ellipse(66, -72, 40, 30, 30), 0.44)  # stomach
    grey = over(grey, canvas.ellipse(108, -70, 24, 42, -12), 0.62)  # spleen
    liver = np.maximum(canvas.ellipse(-78, -66, 62, 62, 20), canvas.ellipse(-18, -90, 56, 26, -14))
    grey = over(grey, liver, 0.58)
    for x1, y1 in ((-110, -90), (-104, -30), (-60, -106)):
        grey = over(grey, canvas.line([(-40, -64), (x1, y1)], 4, blur_mm=2) * liver, 0.68)
    for side in (-1, 1):
        grey = over(grey, canvas.ellipse(side * 64, 18, 27, 52, side * 9), 0.66)  # kidney
        grey = over(grey, canvas.ellipse(side * 50, 18, 9, 22, side * 9, blur_mm=4), FAT)
        grey = over(grey, canvas.line([(side * 30, 30), (side * 48, 190)], 26), MUSCLE)  # psoas
    for level in range(-190, 200, 36):
        grey = over(grey, canvas.box(0, level, 21, 14), 0.80)
        grey = over(grey, canvas.box(0, level, 18, 11), 0.70)
    grey = over(grey, canvas.line([(-30, -60), (-30, 130)], 13), 0.60)  # vena cava
    if picture.has_extra:
        for dx in (-7, 0, 7):
            grey = over(grey, canvas.line([(-30, 26), (-30 + dx, 56)], 3), 1.0)
    return grey


def trunk(canvas: Canvas, rng: np.random.Generator) -> Grey:
    """Skin, fat, muscle, ribs and the table of an axial section."""
    grey = over(canvas.blank(), canvas.ellipse(0, 0, 170, 114), 0.42)
    grey = over(grey, canvas.ellipse(0, 0, 167, 111), FAT)
    grey = over(grey, canvas.ellipse(0, 0, 152, 99), MUSCLE)
    grey = over(grey, canvas.ellipse(0, -2, 140, 86), FAT)
    for side in (-1, 1):
        grey = over(grey, canvas.ellipse(side * 34, 82, 28, 17, side * -8), MUSCLE)  # back
    for angle in np.arange(0.25, math.tau, 0.52) + rng.uniform(-0.08, 0.08):
        x, y = 145 * math.cos(angle), 91 * math.sin(angle)
        tangent = math.degrees(math.atan2(91 * math.cos(angle), -145 * math.sin(angle)))
        grey = over(grey, canvas.ellipse(x, y, 13, 4.5, tangent), BONE)
    table = np.abs(canvas.v - 128 + canvas.u**2 / 900)
    return over(grey, canvas.soft(2.0 - table) * (np.abs(canvas.u) < 160), 0.5)


def vertebra(canvas: Canvas, grey: Grey, y: float) -> Grey:
    """A vertebra whose body's middle is at ``y``."""
    bone = np.maximum(canvas.ellipse(0, y, 23, 18), canvas.line([(0, y + 30), (0, y + 44)], 7))
    for side in (-1, 1):
        arch = [(side * 13, y + 12), (side * 13, y + 24), (side * 36, y + 24)]
        bone = np.maximum(bone, canvas.line(arch, 6))
        bone = np.maximum(bone, canvas.line([(side * 13, y + 24), (0, y + 32)], 6))
    grey = over(grey, bone, BONE)
    grey = over(grey, canvas.ellipse(0, y, 19, 14), 0.74)
    return over(grey, canvas.ellipse(0, y + 22, 10, 8), 0.34)


def finish(canvas: Canvas, grey: Grey, rng: np.random.Generator) -> Grey:
    """Grain, and a window that differs a little from scanner to scanner."""
    grain = 0.018 * smooth_noise(rng, canvas.size, canvas.size // 3) + 0.014 * rng.standard_normal(grey.shape)
    return (grey * rng.uniform(0.94, 1.04) + grain).astype(np.float32)
