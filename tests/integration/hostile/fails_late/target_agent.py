"""Submits, then fails."""

import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
with open(f"{work}/submission.csv", "w") as file:
    file.write("id,answer\n1,a\n")

raise RuntimeError("too late")
