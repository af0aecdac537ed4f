"""Replaces its working folder by a link to a folder of the host."""

import json
import os
import shutil
import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
data = sys.argv[sys.argv.index("--dataset_dir") + 1]
with open(f"{data}/hints.json") as file:
    label = json.load(file)["label"]
os.chdir("/")
shutil.rmtree(work, ignore_errors=True)
try:
    os.symlink(os.path.dirname(label), work)
except OSError as error:
    print(error)
