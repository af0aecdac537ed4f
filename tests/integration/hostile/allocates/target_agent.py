"""Wants 50 GB."""

import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
block = bytearray(50 * 10**9)
with open(f"{work}/submission.csv", "w") as file:
    file.write("id,answer\n1,a\n")
