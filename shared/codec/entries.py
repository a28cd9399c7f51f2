"""Entries as symbols and bits, for many rows at once.

Sorted ids are told by their gaps.  A gap of b bits is b itself, its *class*, and the b - 1 bits below its
leading one.  A level has one of four classes, and bits that place it in its class.  An entry's *symbol* is a
byte made of both classes; the gap's is taken relative to what the entry's place among its position's entries
leads one to expect, since ids that tokenizers assign early are the frequent ones.

Shapes: R rows, P positions of all rows, E entries of all rows, S symbols (E and one for each empty position).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

MAX_ID_BITS = 30
_FIRST = 128  # in a symbol: a position begins
_EMPTY = 31  # in place of a gap's class: no entry, the position is empty
_LEVEL_STARTS = np.array([0, 1, 17, 81])  # the lowest level of each class
_WINDOW_BYTES = 8


@dataclass(frozen=True)
class Columns:
    """Rows' entries, decoded: all of one row, then all of the next."""

    row_positions: Integers  # (R,) positions of each row
    counts: Integers  # (P,) entries of each position
    ids: Integers  # (E,)
    levels: Integers  # (E,)


@dataclass(frozen=True)
class Coded:
    """Rows' entries, coded; a row's bits begin at a whole byte, and zeros fill its last one."""

    symbols: Bytes  # (S,)
    row_symbols: Integers  # (R,) symbols of each row
    id_bits: Integers  # (R,) bits of each row's largest id
    bits: Bytes  # all rows' bit streams
    row_bytes: Integers  # (R,) bytes of each row's bit stream


class InconsistentError(ValueError):
    """Symbols or bits that ``pack`` cannot have made; the message says what, of which row."""


def level_widths(max_level: int) -> Integers:
    """Bits that place a level in its class, for each class."""
    last = max(max_level - int(_LEVEL_STARTS[-1]), 0)
    return np.array([0, 4, 6, last.bit_length()])


def pack(columns: Columns, *, max_level: int) -> Coded:
    counts, ids = columns.counts, columns.ids
    num_rows = len(columns.row_positions)
    position_row = np.repeat(np.arange(num_rows), columns.row_positions)
    id_bits = _row_maximum(_bit_length(ids), np.repeat(position_row, counts), num_rows)

    # Symbols: an empty position has one, which says so.
    symbol_counts = np.maximum(counts, 1)
    starts = _starts(symbol_counts)
    symbol_position = np.repeat(np.arange(len(counts)), symbol_counts)
    is_entry = (counts > 0)[symbol_position]
    is_first = np.zeros(len(symbol_position), bool)
    is_first[starts] = True
    expected = _expected_class(symbol_counts, starts, symbol_position, id_bits[position_row])

    before = np.empty(len(ids), np.int64)
    before[1:] = ids[:-1]
    before[is_first[is_entry]] = -1
    gaps = ids - before - 1
    gap_class = np.full(len(symbol_position), _EMPTY)
    gap_class[is_entry] = _bit_length(gaps)
    level_class = np.zeros(len(symbol_position), np.int64)
    level_class[is_entry] = np.searchsorted(_LEVEL_STARTS, columns.levels, side="right") - 1
    symbols = (gap_class - expected) % 32 + 32 * level_class + _FIRST * is_first

    gap_width = np.maximum(gap_class[is_entry] - 1, 0)
    level_width = level_widths(max_level)[level_class[is_entry]]
    fields = gaps - np.where(gaps > 0, 1 << gap_width, 0)
    fields |= (columns.levels - _LEVEL_STARTS[level_class[is_entry]]) << gap_width
    row_symbols = _row_sums(symbol_counts, columns.row_positions)
    row_entries = _row_sums(counts, columns.row_positions)
    bits, row_bytes = _write_bits(fields, gap_width + level_width, row_entries)
    return Coded(symbols.astype(np.uint8), row_symbols, id_bits, bits, row_bytes)


def unpack(coded: Coded, *, max_level: int) -> Columns:
    """Raises InconsistentError where possible; what it returns is well-formed but for ids above a vocabulary."""
    symbols = coded.symbols.astype(np.int64)
    is_first = symbols >= _FIRST
    row_of_symbol = np.repeat(np.arange(len(coded.row_symbols)), coded.row_symbols)
    row_starts = _starts(coded.row_symbols)[coded.row_symbols > 0]
    _require(is_first[row_starts], row_of_symbol[row_starts], "does not begin with a position")

    starts = np.flatnonzero(is_first)
    symbol_counts = np.diff(starts, append=len(symbols))
    symbol_position = np.repeat(np.arange(len(starts)), symbol_counts)
    id_bits = coded.id_bits[row_of_symbol[starts]]
    gap_class = (symbols + _expected_class(symbol_counts, starts, symbol_position, id_bits)) % 32
    level_class = symbols // 32 % 4
    is_entry = gap_class != _EMPTY
    is_sound = np.where(is_entry, gap_class <= id_bits[symbol_position], symbol_counts[symbol_position] == 1)
    _require(is_sound & (is_entry | (level_class == 0)), row_of_symbol, "has an impossible symbol")

    gap_class, level_class = gap_class[is_entry], level_class[is_entry]
    gap_width = np.maximum(gap_class - 1, 0)
    widths = gap_width + level_widths(max_level)[level_class]
    row_positions = np.bincount(row_of_symbol[starts], minlength=len(coded.row_symbols))
    counts = np.where(is_entry[starts], symbol_counts, 0)
    fields = _read_bits(coded.bits, coded.row_bytes, widths, _row_sums(counts, row_positions))

    gaps = np.where(gap_class > 0, (1 << gap_width) | (fields & ((1 << gap_width) - 1)), 0)
    ids = _ids_of_gaps(gaps, counts)
    levels = _LEVEL_STARTS[level_class] + (fields >> gap_width)
    entry_row = row_of_symbol[is_entry]
    _require(levels <= max_level, entry_row, f"has a level above {max_level}")
    _require(
        _bit_length(ids) <= coded.id_bits[entry_row], entry_row, "has an id of more bits than it announces"
    )
    return Columns(row_positions, counts, ids, levels)


def _expected_class(counts: Integers, starts: Integers, position: Integers, id_bits: Integers) -> Integers:
    """The class that the gap of entry i of k is expected to have: max(0, id_bits * i // k - floor(log2(k)))."""
    index = np.arange(len(position)) - starts[position]
    log_counts = _bit_length(counts) - 1
    return np.maximum(id_bits[position] * index // counts[position] - log_counts[position], 0)


def _ids_of_gaps(gaps: Integers, counts: Integers) -> Integers:
    ends = (gaps + 1).cumsum()
    offsets = _starts(counts)
    before = np.concatenate([[0], ends])[offsets]
    return ends - np.repeat(before, counts) - 1


def _write_bits(fields: Integers, widths: Integers, row_fields: Integers) -> tuple[Bytes, Integers]:
    """Fields, least significant bit first, one after the other; each row from a whole byte on."""
    row_bytes = -(-_row_sums(widths, row_fields) // 8)
    offsets = _bit_offsets(widths, row_fields, row_bytes)
    first_byte = offsets >> 3
    shifted = (fields << (offsets & 7)).astype("<u8").view(np.uint8).reshape(-1, _WINDOW_BYTES)
    num_bytes = int(row_bytes.sum())
    bits = np.zeros(num_bytes + _WINDOW_BYTES, np.int64)
    for i in range(_WINDOW_BYTES):
        if shifted[:, i].any():
            # Fields do not overlap, so that adding is or-ing.
            bits += np.bincount(first_byte + i, shifted[:, i], len(bits)).astype(np.int64)
    return bits[:num_bytes].astype(np.uint8), row_bytes


def _read_bits(bits: Bytes, row_bytes: Integers, widths: Integers, row_fields: Integers) -> Integers:
    """The fields of ``_write_bits``; raises InconsistentError unless the bits are just as many as they need."""
    row_bits = _row_sums(widths, row_fields)
    _require(-(-row_bits // 8) == row_bytes, np.arange(len(row_bytes)), "has too few or too many bits")
    padded = np.concatenate([bits, np.zeros(_WINDOW_BYTES, np.uint8)])
    row_end = np.cumsum(row_bytes)
    unused = row_bytes * 8 - row_bits
    last_byte = padded[np.maximum(row_end - 1, 0)].astype(np.int64)
    is_clear = (last_byte >> (8 - unused) == 0) | (row_bytes == 0) | (unused == 0)
    _require(is_clear, np.arange(len(row_bytes)), "has bits after its last entry")

    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW_BYTES)
    offsets = _bit_offsets(widths, row_fields, row_bytes)
    words = windows[offsets >> 3].view("<u8").reshape(-1).astype(np.int64)
    return (words >> (offsets & 7)) & ((1 << widths) - 1)


def _bit_offsets(widths: Integers, row_fields: Integers, row_bytes: Integers) -> Integers:
    """Where each field begins in all rows' bits."""
    running = _starts(widths)
    first_field = np.minimum(_starts(row_fields), max(len(widths) - 1, 0))
    row_shift = 8 * _starts(row_bytes) - (running[first_field] if len(widths) else 0)
    return running + np.repeat(row_shift, row_fields)


def _starts(counts: Integers) -> Integers:
    """Where each of consecutive runs begins."""
    return np.cumsum(counts) - counts


def _row_sums(values: Integers, lengths: Integers) -> Integers:
    """Sums over consecutive runs of these lengths, which may be zero."""
    running = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(lengths)
    return running[ends] - running[ends - lengths]


def _row_maximum(values: Integers, rows: Integers, num_rows: int) -> Integers:
    maximum = np.zeros(num_rows, np.int64)
    np.maximum.at(maximum, rows, values)
    return maximum


def _bit_length(values: Integers) -> Integers:
    """Bits of numbers from 0 to 2 ** 53, 0 for 0; ``frexp`` is exact there."""
    return np.frexp(values)[1].astype(np.int64)


def _require(is_sound: npt.NDArray[np.bool_], rows: Integers, problem: str) -> None:
    if not is_sound.all():
        raise InconsistentError(f"row {rows[np.argmin(is_sound)]} of the batch {problem}")
