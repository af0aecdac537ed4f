"""Looks for everything that it should not find, and submits what it saw."""

import glob
import json
import os
import socket
import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
data = sys.argv[sys.argv.index("--dataset_dir") + 1]
with open(f"{data}/hints.json") as file:
    hints = json.load(file)
seen = {
    "environment": dict(os.environ),
    "descriptors": sorted(os.listdir("/proc/self/fd")),
    "files": [],
    "network": [],
    "processes": [],
}
for path in (
    hints["label"],
    hints["host_file"],
    "/etc/shadow",
    f"{data}/../private/dev/labels.csv",
):
    try:
        with open(path) as file:
            seen["files"].append(f"{path}: {file.read(40)!r}")
    except OSError:
        pass
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        with open(path, "rb") as file:
            environ = file.read().decode("utf-8", "replace")
    except OSError:
        continue
    if hints["secret"] in environ:
        seen["processes"].append(path)
for address in (("127.0.0.1", hints["port"]), ("::1", hints["port"])):
    try:
        with socket.create_connection(address, timeout=2) as connection:
            seen["network"].append(connection.recv(20).decode())
    except OSError:
        pass
abstract = socket.socket(socket.AF_UNIX)
try:
    abstract.connect("\0" + hints["abstract"])
    seen["network"].append("abstract")
except OSError:
    pass
seen["uid"] = os.getuid()
with open(f"{work}/submission.csv", "w") as file:
    file.write(json.dumps(seen))
