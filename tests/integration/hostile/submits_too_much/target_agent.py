"""Submits more than is taken."""

import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
with open(f"{work}/submission.csv", "wb") as file:
    file.truncate(3 * 2**20)
