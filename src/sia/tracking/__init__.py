"""Tracking: a mirror of run directories in MLflow, made by another process.

Nothing here imports MLflow; `sia.tracking.mlflow` does, in the processes that `python -m
sia.tracking` starts.
"""

from sia.tracking.follower import MlflowMirror, NoTracking
from sia.tracking.location import TrackingError
from sia.tracking.protocol import Tracker

__all__ = ["MlflowMirror", "NoTracking", "Tracker", "TrackingError"]
