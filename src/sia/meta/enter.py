"""The first program of a session, inside the sandbox: `data` in the workspace, then the driver.

Where the data lie differs between sandboxes, and prompts must not: they say `data`. Runs with
whatever interpreter the agent has: the standard library alone.
"""

import os
import sys


def main() -> None:
    """Called with --dataset_dir D --working_dir W, as every program in a sandbox."""
    dataset_dir, working_dir = sys.argv[2], sys.argv[4]
    os.symlink(dataset_dir, os.path.join(working_dir, "data"))
    driver = os.path.join(os.path.dirname(os.path.abspath(__file__)), "driver.py")
    os.execv(sys.executable, [sys.executable, driver, *sys.argv[1:]])


if __name__ == "__main__":
    main()
