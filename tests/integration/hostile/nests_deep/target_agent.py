"""Makes folders so deep that no path reaches them."""

import os
import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
with open(f"{work}/submission.csv", "w") as file:
    file.write("id,answer\n1,a\n")

os.chdir(work)
for _ in range(3000):
    os.mkdir("d")
    os.chdir("d")
