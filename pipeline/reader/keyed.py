"""Random numbers as a pure function of a key: the same key gives the same numbers in any process, thread or world size.

Only raw 64-bit output is used and turned into numbers here, so that nothing depends on how a numpy release maps bits to
permutations or floats.
"""

from __future__ import annotations

import hashlib

import numpy as np

Key = int | str


def digest(*key: Key) -> int:
    """128-bit integer of a key. Parts are length-prefixed, so ("a", "bc") and ("ab", "c") differ."""
    parts = [str(part).encode() for part in key]
    return int.from_bytes(
        hashlib.blake2b(b"".join(b"%d:%s" % (len(p), p) for p in parts), digest_size=16).digest(), "big"
    )


def uniforms(n: int, *key: Key) -> np.ndarray:
    """float64 [n] in [0, 1): the extendable hash SHAKE-128 of the key, 53 bits each. Cheap for tens of numbers."""
    parts = [str(part).encode() for part in key]
    stream = hashlib.shake_128(b"".join(b"%d:%s" % (len(p), p) for p in parts)).digest(8 * n)
    return (np.frombuffer(stream, "<u8") >> np.uint64(11)) * 2.0**-53


def bits(n: int, *key: Key) -> np.ndarray:
    """uint64 [n] of Philox-4x64 keyed by the key: counter-based, cheap for millions of numbers."""
    return np.random.Philox(key=digest(*key)).random_raw(n)


def permutation(n: int, *key: Key) -> np.ndarray:
    """A permutation of 0 … n-1 (int64 [n]): the stable order of `bits`."""
    return np.argsort(bits(n, *key), kind="stable")
