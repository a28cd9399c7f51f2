"""Payloads: the sparse targets of one example as bytes, and back.

    payload = encode(targets)                                   one example's
    payloads = encode_many(targets, [0, 17, 40, ...])           many at once, the same bytes
    targets = decode(payloads, policy=..., temperatures=..., vocab_size=...)

The format is specified in ``docs/targets.md``.  In short: an entry is the gap to the id before it and the
level of its weight; the orders of magnitude of both go into one byte, whose column zstd compresses with a
dictionary of the format's own, and their remaining bits, which nothing can compress, into a bit stream.
"""

from shared.codec.payload import decode, encode, encode_many

__all__ = ["decode", "encode", "encode_many"]
