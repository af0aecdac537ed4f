"""Ends well, and leaves a process in a session of its own that holds its output open."""

import os
import signal
import sys
import time

work = sys.argv[sys.argv.index("--working_dir") + 1]
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
with open(f"{work}/submission.csv", "w") as file:
    file.write("id,answer\n1,a\n")
