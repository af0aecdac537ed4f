"""What people look at: a read model of run directories, and the templates that show it.

Nothing here writes, and nothing in a run directory is trusted: reads are bounded, follow no link
and leave no folder, and all text is escaped. `sia.pages.compare` pairs runs; it loads numpy.
"""

from sia.pages.candidate import CandidateFolder
from sia.pages.files import Folder, NotThere
from sia.pages.run import CandidateView, GenerationView, RunPage, RunReader
from sia.pages.runs import Chosen, RunLine, Runs

__all__ = [
    "CandidateFolder",
    "CandidateView",
    "Chosen",
    "Folder",
    "GenerationView",
    "NotThere",
    "RunLine",
    "RunPage",
    "RunReader",
    "Runs",
]
