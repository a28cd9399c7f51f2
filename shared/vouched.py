"""JSON objects that vouch for themselves: a digest stands among their values, and is compared when they are read.

    path.write_text(json.dumps(vouched({"step": 3})))
    told = opened(json.loads(path.read_bytes()))        # ValueError when a bit of it has changed

A flipped bit in a number is a number like any other.  Objects without a digest, as earlier releases wrote them, are
taken as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

DIGEST = "digest"


def vouched(told: Mapping[str, Any]) -> dict[str, Any]:
    """With its digest, as JSON will give it back."""
    plain = json.loads(json.dumps({name: value for name, value in told.items() if name != DIGEST}))
    return plain | {DIGEST: digest_of(plain)}


def opened(read: Any) -> dict[str, Any]:
    """What was vouched for, without the digest.

    Raises   ValueError  when it is no object, or has changed
    """
    if not isinstance(read, dict):
        raise ValueError(f"it holds {str(read)[:40]!r} instead of an object")
    told = {name: value for name, value in read.items() if name != DIGEST}
    if DIGEST in read and read[DIGEST] != digest_of(told):
        raise ValueError("its digest differs from what it says")
    return told


def digest_of(told: Mapping[str, Any]) -> str:
    """SHA-256 over the object as compact JSON, keys in order."""
    return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
