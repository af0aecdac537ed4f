"""Tries to change the data and its own code."""

import os
import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
data = sys.argv[sys.argv.index("--dataset_dir") + 1]
outcomes = []


def attempt(act, *arguments):
    try:
        act(*arguments)
        outcomes.append("done")
    except OSError:
        outcomes.append("refused")


def append(path):
    with open(path, "a") as file:
        file.write("# spoilt")


attempt(os.chmod, f"{data}/train.csv", 0o666)
attempt(append, f"{data}/train.csv")
attempt(append, f"{data}/new")
attempt(os.remove, f"{data}/train.csv")
attempt(os.chmod, __file__, 0o666)
attempt(append, __file__)
attempt(append, f"{os.path.dirname(__file__)}/new.py")
with open(f"{work}/submission.csv", "w") as file:
    file.write("\n".join(outcomes))
