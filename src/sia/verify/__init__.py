"""Running the task's verifier, and statistics on what it says."""

from sia.verify.verifier import TaskVerifier, Verifier

__all__ = ["TaskVerifier", "Verifier"]
