"""Writes file after file."""

import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
count = 0
while True:
    with open(f"{work}/{count}", "wb") as file:
        file.write(b"x" * 2**20)
    count += 1
