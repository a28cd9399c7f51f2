"""Payloads: the sparse targets of one example as bytes, and back.  Specified in docs/targets.md."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch
import zstandard

from shared.errors import CacheFormatError
from shared.policies import Policy, Random
from shared.sparse import SparseTargets

_VERSION = 1
_MAX_RAW_BYTES = 1 << 28


def encode(targets: SparseTargets) -> bytes:
    """The payload of one example's targets."""
    counts = targets.counts.numpy().astype("<u4")
    columns = [
        struct.pack("<II", targets.num_positions, targets.num_entries),
        _split(counts),
        _split(targets.ids.numpy().astype("<u4")),
        _split(targets.logprobs.numpy()),
        _split(targets.log_normalizers.numpy().reshape(-1)),
        _split(targets.draw_counts.numpy()),
    ]
    return bytes([_VERSION]) + zstandard.ZstdCompressor(level=3).compress(b"".join(columns))


def decode(
    payloads: Sequence[bytes], *, policy: Policy, temperatures: tuple[float, ...] = (1.0,), vocab_size: int
) -> SparseTargets:
    """The targets of the payloads, one after the other; their entropy is NaN, for the reader to fill in.

    Raises   CacheFormatError  for a payload that ``encode`` cannot have made
    """
    parts = [_decode_one(payload, policy, tuple(temperatures), vocab_size) for payload in payloads]
    if not parts:
        parts = [_decode_columns(bytes(8), policy, tuple(temperatures), vocab_size)]
    return SparseTargets.concat(parts)


def _decode_one(
    payload: bytes, policy: Policy, temperatures: tuple[float, ...], vocab_size: int
) -> SparseTargets:
    try:
        if payload[0] != _VERSION:
            raise ValueError("version")
        if zstandard.frame_content_size(payload[1:]) > _MAX_RAW_BYTES:
            raise ValueError("size")
        raw = zstandard.ZstdDecompressor().decompress(payload[1:])
        return _decode_columns(raw, policy, temperatures, vocab_size)
    except (ValueError, IndexError, struct.error, zstandard.ZstdError) as error:
        raise CacheFormatError(f"payload of {len(payload)} bytes is damaged: {error}") from error


def _decode_columns(
    raw: bytes, policy: Policy, temperatures: tuple[float, ...], vocab_size: int
) -> SparseTargets:
    num_positions, num_entries = struct.unpack_from("<II", raw)
    num_others = sum(t != 1.0 for t in temperatures)
    widths = [num_positions, num_entries, num_entries, num_positions * num_others]
    widths.append(num_entries if isinstance(policy, Random) else 0)
    dtypes = ["<u4", "<u4", "<f2", "<f4", "<i4"]
    columns, at = [], 8
    for width, dtype in zip(widths, dtypes, strict=True):
        size = np.dtype(dtype).itemsize
        if at + width * size > len(raw):
            raise ValueError("truncated")
        planes = np.frombuffer(raw, np.uint8, width * size, at).reshape(size, width)
        columns.append(np.ascontiguousarray(planes.T).view(dtype).reshape(width))
        at += width * size
    counts, ids, logprobs, log_normalizers, draw_counts = columns
    if at != len(raw) or int(counts.astype(np.int64).sum()) != num_entries or (ids >= vocab_size).any():
        raise ValueError("inconsistent")
    offsets = np.concatenate([[0], counts.astype(np.int64).cumsum()])
    return SparseTargets(
        offsets=torch.from_numpy(offsets),
        ids=torch.from_numpy(ids.astype(np.int32)),
        logprobs=torch.from_numpy(logprobs.copy()),
        policy=policy,
        temperatures=temperatures,
        log_normalizers=torch.from_numpy(log_normalizers.copy()).view(num_positions, num_others),
        entropy=torch.full((num_positions, len(temperatures)), torch.nan),
        draw_counts=torch.from_numpy(draw_counts.copy()),
    )


def _split(values: np.ndarray) -> bytes:
    """The bytes of each value apart: all first bytes, then all second ones, and so on."""
    return values.view(np.uint8).reshape(len(values), -1).T.tobytes() if len(values) else b""
