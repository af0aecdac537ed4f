"""Makes folders that cannot be entered or removed at once."""

import os
import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
os.makedirs(f"{work}/closed/inner")
with open(f"{work}/closed/inner/file", "w") as file:
    file.write("x")
os.chmod(f"{work}/closed/inner", 0)
os.chmod(f"{work}/closed", 0)
with open(f"{work}/submission.csv", "w") as file:
    file.write("id,answer\n1,a\n")
