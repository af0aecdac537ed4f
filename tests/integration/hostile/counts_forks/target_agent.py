"""Forks until it may not, and submits how far it came."""

import os
import sys
import time

work = sys.argv[sys.argv.index("--working_dir") + 1]
count = 0
try:
    while count < 2000:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        count += 1
except OSError:
    pass
with open(f"{work}/submission.csv", "w") as file:
    file.write(str(count))
