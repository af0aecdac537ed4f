"""Prints bytes that are not UTF-8."""

import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
sys.stdout.buffer.write(b"\xff\xfe\x00 \xe9\n")
sys.stderr.buffer.write(b"\x80 bad\n")
with open(f"{work}/submission.csv", "w") as file:
    file.write("id,answer\n1,a\n")
