"""From run directories to tables and figures: one run (`run`), or arms of several (`arms`)."""

from sia.report.run import markdown, show

__all__ = ["markdown", "show"]
