"""An independent reader of payloads, in plain Python, written from docs/targets.md.  It imports nothing of ours."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

SPEC = Path(__file__).parents[1] / "docs" / "targets.md"


def spec_dictionary() -> bytes:
    (block,) = re.findall(r"```dictionary\n(.*?)```", SPEC.read_text(), re.DOTALL)
    return base64.b64decode(block)


def read_leb128(payload: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = payload[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


class Bits:
    def __init__(self, data: bytes) -> None:
        self.value, self.size, self.at = int.from_bytes(data, "little"), 8 * len(data), 0

    def take(self, width: int) -> int:
        field = (self.value >> self.at) & ((1 << width) - 1)
        self.at += width
        return field


def read_payload(
    payload: bytes, *, max_level: int, has_plain: bool
) -> tuple[list[list[tuple[int, int]]], bytes]:
    """Each position's (id, level) pairs, and the plain bytes."""
    assert payload[0] >> 5 == 1
    id_bits = payload[0] & 31
    frame_bytes, at = read_leb128(payload, 1)
    plain = b""
    if has_plain:
        plain_bytes, at = read_leb128(payload, at)
        plain, at = payload[at : at + plain_bytes], at + plain_bytes
    reader = zstandard.ZstdDecompressor(dict_data=zstandard.ZstdCompressionDict(spec_dictionary()))
    symbols = reader.decompress(b"\x28\xb5\x2f\xfd" + payload[at : at + frame_bytes])
    bits = Bits(payload[at + frame_bytes :])

    groups: list[list[int]] = []
    for symbol in symbols:
        if symbol >= 128:
            groups.append([])
        groups[-1].append(symbol)
    lowest, widths = [0, 1, 17, 81], [0, 4, 6, max(max_level - 81, 0).bit_length()]
    positions = []
    for group in groups:
        entries, previous = [], -1
        for i, symbol in enumerate(group):
            expected = max(0, id_bits * i // len(group) - int(math.log2(len(group))))
            gap_class = (symbol + expected) % 32
            if gap_class == 31:
                assert len(group) == 1
                break
            gap = 0
            if gap_class:
                gap = bits.take(gap_class - 1) | 1 << (gap_class - 1)
            level_class = symbol // 32 % 4
            level = lowest[level_class] + bits.take(widths[level_class])
            previous += gap + 1
            entries.append((previous, level))
        positions.append(entries)
    assert bits.size - 8 < bits.at <= bits.size
    return positions, plain


def spec_grid(policy: dict[str, Any], temperatures: tuple[float, ...]) -> np.ndarray:
    """The log-probs that levels stand for, under a policy as the manifest has it."""
    everything = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    everything = np.sort(everything[np.isfinite(everything) & (everything < 0)])
    everything = np.append(everything, np.float16(0))
    if policy["kind"] != "threshold" or temperatures != (1.0,):
        return everything
    log_tau = np.float16(math.log(policy["tau"]))
    if policy["values"] == "fp16":
        return everything[everything >= log_tau]
    root = math.exp(float(log_tau) / 2)
    steps = math.ceil(16 * (1 / root - 1))
    if steps == 0:
        return np.zeros(1, np.float16)
    inner = [2 * math.log(root + (1 - root) * j / steps) for j in range(1, steps)]
    return np.array([log_tau, *inner, 0], np.float16)
