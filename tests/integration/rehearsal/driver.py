"""The driver of an agent without a model: does what `task.md` says for this session."""

import json
import os
import sys
from pathlib import Path

MARK = "REHEARSAL "

job = json.loads((Path(__file__).parent / "job.json").read_text())
lines = Path("task.md").read_text().splitlines()
parts = json.loads(next(line for line in lines if line.startswith(MARK))[len(MARK) :])
acts = parts["decision" if "decision.json" in job["prompt"] else "proposal"]
if "generation 0" not in job["prompt"] and "# Write the first harness" in job["prompt"]:
    acts = parts.get("first", acts)
# The second of two sessions is told what was wrong.
act = acts[min(job["prompt"].startswith("# Once more"), len(acts) - 1)]
said = {"end": "done", "detail": "", "turns": 1}
exec(act, {"Path": Path, "os": os, "sys": sys, "json": json, "job": job, "said": said})
print(json.dumps(said))
