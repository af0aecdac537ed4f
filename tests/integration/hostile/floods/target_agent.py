"""Prints 100 MB, then a last line."""

import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
line = "x" * 99_999 + "\n"
for _ in range(1000):
    sys.stdout.write(line)
print("last words")
with open(f"{work}/submission.csv", "w") as file:
    file.write("id,answer\n1,a\n")
