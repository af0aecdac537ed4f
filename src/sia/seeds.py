"""One seed, many named streams.

Every random choice draws from a stream that is named after its purpose, so that adding a draw in
one place changes nothing elsewhere, and a resumed run draws what the unbroken run would have drawn.
"""

import hashlib

import numpy as np


def stream_seed(seed: int, name: str) -> int:
    """A 32-bit seed that is a function of `seed` and `name` alone, equal on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4])


def stream(seed: int, name: str) -> np.random.Generator:
    """A generator for one purpose, for example `stream(0, "bootstrap")`."""
    return np.random.default_rng(stream_seed(seed, name))
