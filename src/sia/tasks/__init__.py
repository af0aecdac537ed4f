"""Tasks: folders with a question, data, a verifier and a reference harness."""

from sia.tasks.task import Task, bundled_task, find_task_dir, load_task, open_folder

__all__ = ["Task", "bundled_task", "find_task_dir", "load_task", "open_folder"]
