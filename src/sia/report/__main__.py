"""`python -m sia.report RUN...`, or `python -m sia.report arms RUN...`."""

import sys

from sia.report import arms, run

if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(arms.main(arguments[1:]) if arguments[:1] == ["arms"] else run.main(arguments))
