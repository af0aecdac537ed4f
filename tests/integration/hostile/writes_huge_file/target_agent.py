"""Writes one file that is too large."""

import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
with open(f"{work}/submission.csv", "wb") as file:
    while True:
        file.write(b"x" * 2**20)
