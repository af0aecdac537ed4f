"""Submits a pipe that nobody writes to."""

import os
import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
os.mkfifo(f"{work}/submission.csv")
