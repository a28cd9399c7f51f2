"""Payloads and their frames: what ``docs/targets.md`` calls a payload, in order of its bytes."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import zstandard

from shared.codec.dictionary import DICTIONARY
from shared.codec.entries import MAX_ID_BITS, Bytes, Coded, Columns, InconsistentError, pack, unpack
from shared.codec.levels import levels_of_logprobs, logprobs_of_levels, max_level
from shared.codec.limits import max_entries, require_possible
from shared.errors import CacheFormatError, RecipeError
from shared.recipes.policies import Policy, Random
from shared.sparse import SparseTargets
from shared.sparse.targets import share_logprobs

_VERSION = 1  # three bits; the other five of the first byte are the row's id bits
_MAGIC = zstandard.FRAME_HEADER  # which every zstd frame begins with, and payloads leave out
_MAX_SYMBOLS = 1 << 24  # of one row: a bound on what damaged bytes can make us allocate
_BLOCK_SYMBOLS = 1 << 19  # of rows that are unpacked together


def encode(targets: SparseTargets) -> bytes:
    """The payload of one example's targets; equal targets give equal bytes."""
    return encode_many(targets, [0, targets.num_positions])[0]


def encode_many(targets: SparseTargets, row_offsets: Sequence[int]) -> list[bytes]:
    """The payloads of many examples: those of positions ``row_offsets[i]:row_offsets[i + 1]``.

    Raises   RecipeError  for an example of more than 16 million entries
    Holds    each is what ``encode`` gives for those positions alone
    """
    policy, temperatures = targets.policy, targets.temperatures
    if isinstance(policy, Random):
        levels = targets.draw_counts.numpy().astype(np.int64) - 1
    else:
        levels = levels_of_logprobs(targets.logprobs.numpy(), policy, temperatures)
    bounds = np.asarray(row_offsets)
    assert bounds[0] == 0
    assert bounds[-1] == targets.num_positions
    columns = Columns(
        row_positions=np.diff(bounds),
        counts=targets.counts.numpy(),
        ids=targets.ids.numpy().astype(np.int64),
        levels=levels,
    )
    coded = pack(columns, max_level=max_level(policy, temperatures))
    assert coded.id_bits.max(initial=0) <= MAX_ID_BITS
    if coded.row_symbols.max(initial=0) > _MAX_SYMBOLS:
        raise RecipeError(
            f"an example with {coded.row_symbols.max()} entries found, at most {_MAX_SYMBOLS} possible: keep fewer a "
            "position (cache.policy), or cut answers (data.max_answer_tokens)"
        )
    return _frames(coded, _plain_columns(targets, bounds), has_plain=_has_plain(temperatures))


def _plain_columns(targets: SparseTargets, bounds: npt.NDArray[np.int64]) -> list[bytes]:
    """Each row's numbers that are stored as they are: normalisers, and ``random``'s log-probs beside them."""
    normalizers = targets.log_normalizers.numpy().astype("<f4")
    rows = [normalizers[i:j].tobytes() for i, j in itertools.pairwise(bounds)]
    if _has_plain_logprobs(targets.policy, targets.temperatures):
        logprobs, ends = targets.logprobs.numpy().astype("<f2"), targets.offsets.numpy()[bounds]
        entries = itertools.pairwise(ends)
        rows = [row + logprobs[i:j].tobytes() for row, (i, j) in zip(rows, entries, strict=True)]
    return rows


def _has_plain(temperatures: tuple[float, ...]) -> bool:
    return temperatures != (1.0,)


def _has_plain_logprobs(policy: Policy, temperatures: tuple[float, ...]) -> bool:
    return isinstance(policy, Random) and len(temperatures) > 1


def _frames(coded: Coded, plain: list[bytes], *, has_plain: bool) -> list[bytes]:
    compressor = _zstd().compressor
    symbols, bits = coded.symbols.tobytes(), coded.bits.tobytes()
    payloads, at_symbol, at_byte = [], 0, 0
    rows = zip(
        coded.row_symbols.tolist(), coded.row_bytes.tolist(), coded.id_bits.tolist(), plain, strict=True
    )
    for num_symbols, num_bytes, id_bits, numbers in rows:
        frame = compressor.compress(symbols[at_symbol : at_symbol + num_symbols])[len(_MAGIC) :]
        head = bytes([_VERSION << 5 | id_bits]) + _varint(len(frame))
        if has_plain:
            head += _varint(len(numbers)) + numbers
        payloads.append(b"".join((head, frame, bits[at_byte : at_byte + num_bytes])))
        at_symbol += num_symbols
        at_byte += num_bytes
    return payloads


def decode(
    payloads: Sequence[bytes],
    *,
    policy: Policy,
    temperatures: tuple[float, ...] = (1.0,),
    vocab_size: int,
    num_positions: Sequence[int] | None = None,
    num_entries: Sequence[int] | None = None,
) -> SparseTargets:
    """The targets of the payloads, one after the other; their entropy is NaN, for the reader to fill in.

    ``num_positions`` of each payload, and ``num_entries``, where they are known, bound a row before it is
    decompressed.

    Raises   CacheFormatError  for a payload that ``encode`` cannot have made for this policy, these
             temperatures and this vocabulary
    """
    temperatures = tuple(temperatures)
    has_plain = _has_plain(temperatures)
    most = max_entries(policy, temperatures, vocab_size)
    parts = []
    for row, payload in enumerate(payloads):
        limit = _MAX_SYMBOLS
        if num_positions is not None:
            limit = min(limit, int(num_positions[row]) * max(most, 1))
            if num_entries is not None:  # an empty position has a symbol, too
                limit = min(limit, int(num_entries[row]) + int(num_positions[row]))
        try:
            parts.append(_take_apart(payload, has_plain, max_symbols=limit))
        except (InconsistentError, zstandard.ZstdError) as error:
            raise CacheFormatError(f"payload {row} of the batch is damaged: {error}") from error
    lengths = None if num_positions is None else np.asarray(num_positions, np.int64)
    try:
        blocks = [
            _put_together(
                parts[start:stop],
                policy,
                temperatures,
                vocab_size,
                None if lengths is None else lengths[start:stop],
            )
            for start, stop in _blocks([len(part.symbols) for part in parts])
        ]
    except InconsistentError as error:
        raise CacheFormatError(f"a payload is damaged: {error}") from error
    return SparseTargets.concat(blocks) if len(blocks) > 1 else blocks[0]


def _blocks(row_symbols: list[int]) -> Iterator[tuple[int, int]]:
    """Rows that are unpacked together: what that takes, some 150 bytes a symbol, is bounded."""
    start, total = 0, 0
    for row, symbols in enumerate(row_symbols):
        if row > start and total + symbols > _BLOCK_SYMBOLS:
            yield start, row
            start, total = row, 0
        total += symbols
    yield start, len(row_symbols)


@dataclass(frozen=True)
class _Parts:
    id_bits: int
    plain: bytes
    symbols: bytes
    bits: bytes


def _take_apart(payload: bytes, has_plain: bool, *, max_symbols: int) -> _Parts:
    if not payload or payload[0] >> 5 != _VERSION:
        found = payload[0] >> 5 if payload else "no byte"
        raise InconsistentError(f"payload version {found} found, {_VERSION} needed")
    frame_bytes, at = _read_varint(payload, 1)
    plain = b""
    if has_plain:
        plain_bytes, at = _read_varint(payload, at)
        plain = payload[at : at + plain_bytes]
        at += plain_bytes
    frame = _MAGIC + payload[at : at + frame_bytes]
    # An unknown size is -1: nothing is decompressed that does not say before how much it becomes.
    if at + frame_bytes > len(payload) or not 0 <= zstandard.frame_content_size(frame) <= max_symbols:
        raise InconsistentError("a length is out of bounds")
    symbols = _zstd().decompressor.decompress(frame, max_output_size=max_symbols, allow_extra_data=False)
    return _Parts(payload[0] & 31, plain, symbols, payload[at + frame_bytes :])


def _put_together(
    parts: list[_Parts],
    policy: Policy,
    temperatures: tuple[float, ...],
    vocab_size: int,
    lengths: npt.NDArray[np.int64] | None,
) -> SparseTargets:
    coded = Coded(
        symbols=_joined([part.symbols for part in parts]),
        row_symbols=np.array([len(part.symbols) for part in parts], np.int64),
        id_bits=np.array([part.id_bits for part in parts], np.int64),
        bits=_joined([part.bits for part in parts]),
        row_bytes=np.array([len(part.bits) for part in parts], np.int64),
    )
    columns = unpack(coded, max_level=max_level(policy, temperatures))
    if columns.ids.max(initial=0) >= vocab_size:
        raise InconsistentError(f"id {columns.ids.max()} found, with a vocabulary of {vocab_size}")
    if lengths is not None and not np.array_equal(columns.row_positions, lengths):
        row = int(np.flatnonzero(columns.row_positions != lengths)[0])
        raise InconsistentError(
            f"row {row} of the batch has {columns.row_positions[row]} positions, {lengths[row]} needed"
        )
    num_positions = len(columns.counts)
    draw_counts = torch.from_numpy((columns.levels + 1).astype(np.int32))
    normalizers, plain_logprobs = _read_plain(parts, columns, policy, temperatures)
    if not isinstance(policy, Random):
        logprobs = torch.from_numpy(logprobs_of_levels(columns.levels, policy, temperatures))
        draw_counts = draw_counts[:0]
    elif _has_plain_logprobs(policy, temperatures):
        logprobs = torch.from_numpy(plain_logprobs)
    else:
        logprobs = share_logprobs(draw_counts, policy)
    targets = SparseTargets(
        offsets=F.pad(torch.from_numpy(columns.counts).cumsum(0), (1, 0)),
        ids=torch.from_numpy(columns.ids.astype(np.int32)),
        logprobs=logprobs,
        policy=policy,
        temperatures=temperatures,
        log_normalizers=torch.from_numpy(normalizers),
        entropy=torch.full((num_positions, len(temperatures)), torch.nan),
        draw_counts=draw_counts,
    )
    require_possible(targets, vocab_size)
    return targets


def _read_plain(
    parts: list[_Parts], columns: Columns, policy: Policy, temperatures: tuple[float, ...]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float16]]:
    num_others = sum(t != 1.0 for t in temperatures)
    ends = np.cumsum(columns.row_positions)
    entries = np.concatenate([[0], np.cumsum(columns.counts)])
    row_entries = entries[ends] - entries[ends - columns.row_positions]
    sizes = 4 * num_others * columns.row_positions
    extra = 2 * row_entries if _has_plain_logprobs(policy, temperatures) else 0 * row_entries
    for row, part in enumerate(parts):
        if len(part.plain) != sizes[row] + extra[row]:
            raise InconsistentError(
                f"row {row} of the batch has {len(part.plain)} bytes of normalisers and log-probs"
            )
    normalizers = _joined([part.plain[:size] for part, size in zip(parts, sizes, strict=True)]).view("<f4")
    logprobs = _joined([part.plain[size:] for part, size in zip(parts, sizes, strict=True)]).view("<f2")
    if not (np.isfinite(normalizers).all() and np.isfinite(logprobs).all() and (logprobs <= 0).all()):
        raise InconsistentError("a normaliser or log-prob is out of range")
    return normalizers.reshape(len(columns.counts), num_others), logprobs


def _joined(parts: list[bytes]) -> Bytes:
    # A bytearray, because torch wants memory it may write to.
    return np.frombuffer(bytearray(b"".join(parts)), np.uint8)


def _varint(value: int) -> bytes:
    """LEB128: seven bits a byte, least significant first, the eighth set on all but the last."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(payload: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place, byte in enumerate(payload[at : at + 5]):
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value, at + place + 1
    raise InconsistentError("a length is out of bounds")


class _Zstd(threading.local):
    """One compressor and decompressor a thread: they may not be shared."""

    def __init__(self) -> None:
        dictionary = zstandard.ZstdCompressionDict(DICTIONARY)
        # Symbols hardly repeat in runs: what is to be gained are their frequencies.  Strategies below "lazy"
        # take the dictionary's table even where it does not suit; those above "lazy" gain nothing.
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_LAZY,
            window_log=14,
            hash_log=10,
            chain_log=10,
            search_log=2,
            min_match=6,
            write_content_size=1,
            write_checksum=0,
            write_dict_id=0,
        )
        self.compressor = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters)
        self.decompressor = zstandard.ZstdDecompressor(dict_data=dictionary)


@functools.cache
def _zstd() -> _Zstd:
    return _Zstd()
