"""Submits a link to a file of the host."""

import json
import os
import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
data = sys.argv[sys.argv.index("--dataset_dir") + 1]
with open(f"{data}/hints.json") as file:
    os.symlink(json.load(file)["label"], f"{work}/submission.csv")
os.makedirs(f"{work}/agent_execution")
os.symlink("/etc/passwd", f"{work}/agent_execution/execution_q1.json")
