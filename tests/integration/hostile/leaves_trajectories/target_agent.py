"""Leaves one trajectory for all, two for items, and things that are none."""

import os
import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
with open(f"{work}/submission.csv", "w") as file:
    file.write("id,answer\n1,a\n")

os.makedirs(f"{work}/agent_execution/execution_q9.json")
for name in (
    "agent_execution.json",
    "agent_execution/execution_q1.json",
    "agent_execution/execution_q2.json",
    "agent_execution/notes.txt",
):
    with open(f"{work}/{name}", "w") as file:
        file.write("[]")
