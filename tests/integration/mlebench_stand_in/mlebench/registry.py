import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlebench.grade_helpers import Grader
from mlebench.utils import import_fn

COMPETITIONS = Path(__file__).parent / "competitions"


@dataclass(frozen=True)
class Competition:
    id: str
    description: str
    grader: Grader
    answers: Path
    gold_submission: Path
    sample_submission: Path
    prepare_fn: Callable[..., Any]
    raw_dir: Path
    private_dir: Path
    public_dir: Path
    leaderboard: Path


class Registry:
    def get_data_dir(self):
        return Path(os.path.expanduser("~")) / ".cache" / "mle-bench" / "data"

    def list_competition_ids(self):
        return sorted(path.parent.name for path in COMPETITIONS.glob("*/config.yaml"))

    def get_competition(self, competition_id):
        folder = COMPETITIONS / competition_id
        config = yaml.safe_load((folder / "config.yaml").read_text())
        data = self.get_data_dir()
        answers = data / config["dataset"]["answers"]
        return Competition(
            id=config["id"],
            description=(folder / "description.md").read_text(),
            grader=Grader(**config["grader"]),
            answers=answers,
            gold_submission=answers,
            sample_submission=data / config["dataset"]["sample_submission"],
            prepare_fn=import_fn(config["preparer"]),
            raw_dir=data / competition_id / "raw",
            private_dir=data / competition_id / "prepared" / "private",
            public_dir=data / competition_id / "prepared" / "public",
            leaderboard=folder / "leaderboard.csv",
        )


registry = Registry()
