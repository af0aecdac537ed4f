"""Deletes its own folder."""

import os
import shutil
import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
with open(f"{work}/submission.csv", "w") as file:
    file.write("id,answer\n1,a\n")

os.chdir("/")
shutil.rmtree(work, ignore_errors=True)
