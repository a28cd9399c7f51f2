"""Soft-edged shapes on a millimetre grid: what the pictures are painted with.

A shape is a mask, ``(size, size)`` fp32 from 0 to 1, one pixel soft at its edge.  Shapes live in the body's
frame, which is posed (moved, turned, scaled) and slightly warped for each case, so that no two bodies are
alike; ``place`` says where a point of the body comes to lie in the picture, but for the warp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Grey = NDArray[np.float32]


class Canvas:
    """A square picture of ``fov_mm`` across, its middle at (0, 0), with one case's pose."""

    def __init__(self, size: int, fov_mm: float, rng: np.random.Generator) -> None:
        self.size, self.fov_mm, self.mm = size, fov_mm, fov_mm / size
        axis = ((np.arange(size) + 0.5) * self.mm - fov_mm / 2).astype(np.float32)
        self.u, self.v = np.meshgrid(axis, axis)
        self.scale = float(rng.uniform(0.93, 1.05))
        self.angle = float(rng.normal(0, 0.035))
        self.shift = rng.uniform(-0.02, 0.02, 2) * fov_mm
        warp_mm = 0.007 * fov_mm
        c, s = math.cos(self.angle) / self.scale, math.sin(self.angle) / self.scale
        u, v = self.u - np.float32(self.shift[0]), self.v - np.float32(self.shift[1])
        self.x: Grey = (c * u + s * v + warp_mm * smooth_noise(rng, size, 5)).astype(np.float32)
        self.y: Grey = (-s * u + c * v + warp_mm * smooth_noise(rng, size, 5)).astype(np.float32)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The point of the picture, in mm, where a point of the body comes to lie."""
        c, s = math.cos(self.angle) * self.scale, math.sin(self.angle) * self.scale
        return c * x - s * y + float(self.shift[0]), s * x + c * y + float(self.shift[1])

    def blank(self, value: float = 0.0) -> Grey:
        return np.full((self.size, self.size), value, np.float32)

    def soft(self, distance_mm: Any, blur_mm: float = 0.0) -> Grey:
        """A mask of a signed distance, positive inside."""
        width = self.mm * self.scale + blur_mm
        return np.clip(np.asarray(distance_mm, np.float32) / width + 0.5, 0, 1)

    def radius(self, cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0) -> Grey:
        """The radius in units of an ellipse: 0 in its middle, 1 on its outline."""
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        x, y = self.x - cx, self.y - cy
        radius: Grey = hypot((c * x + s * y) / rx, (c * y - s * x) / ry)
        return radius

    def ellipse(
        self, cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0, *, blur_mm: float = 0.0
    ) -> Grey:
        return self.soft((1 - self.radius(cx, cy, rx, ry, degrees)) * min(rx, ry), blur_mm)

    def ring(
        self,
        cx: float,
        cy: float,
        rx: float,
        ry: float,
        width: float,
        degrees: float = 0.0,
        *,
        blur_mm: float = 0.0,
    ) -> Grey:
        """The outline of an ellipse, ``width`` mm wide."""
        distance = np.abs(1 - self.radius(cx, cy, rx, ry, degrees)) * min(rx, ry)
        return self.soft(width / 2 - distance, blur_mm)

    def box(
        self,
        cx: float,
        cy: float,
        rx: float,
        ry: float,
        degrees: float = 0.0,
        *,
        corner: float = 3.0,
        blur_mm: float = 0.0,
    ) -> Grey:
        """A rectangle of half sides ``rx`` and ``ry`` with round corners."""
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        x, y = self.x - cx, self.y - cy
        dx, dy = np.abs(c * x + s * y) - (rx - corner), np.abs(c * y - s * x) - (ry - corner)
        outside = hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)
        return self.soft(corner - outside, blur_mm)

    def line(self, points: Sequence[tuple[float, float]], width: float, *, blur_mm: float = 0.0) -> Grey:
        """A line through the points, ``width`` mm wide, with round ends."""
        distance = self.blank(np.inf)
        for (x0, y0), (x1, y1) in pairwise(points):
            dx, dy = x1 - x0, y1 - y0
            along = ((self.x - x0) * dx + (self.y - y0) * dy) / (dx * dx + dy * dy + 1e-9)
            along = np.clip(along, 0, 1)
            distance = np.minimum(distance, hypot(self.x - x0 - along * dx, self.y - y0 - along * dy))
        return self.soft(width / 2 - distance, blur_mm)


def hypot(x: Any, y: Any) -> Any:
    """As numpy's, which guards against overflow and takes five times as long."""
    return np.sqrt(x * x + y * y)


def over(grey: Grey, mask: Grey, value: float | Grey) -> Grey:
    """Paints ``value`` over the picture where the mask is."""
    painted: Grey = (grey + mask * (value - grey)).astype(np.float32)
    return painted


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Grey:
    """Noise of unit variance whose grains are about ``size / cells`` pixels wide, ``(size, size)``."""
    grid = Image.fromarray(rng.standard_normal((cells + 2, cells + 2)).astype(np.float32))
    margin = size // cells
    grown = grid.resize((size + 2 * margin, size + 2 * margin), Image.Resampling.BICUBIC)
    return np.asarray(grown, np.float32)[margin : margin + size, margin : margin + size]
