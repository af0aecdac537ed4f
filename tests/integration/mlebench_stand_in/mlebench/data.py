import random

import pandas as pd


def is_dataset_prepared(competition, grading_only=False):
    return competition.answers.is_file()


def download_and_prepare_dataset(competition):
    if competition.id == "flower-heights":
        raise RuntimeError("You must accept the competition rules before downloading the dataset.")
    rng = random.Random(0)
    rows = [
        {"flower": f"f{k}", "petal": rng.uniform(0, 9), "soil": rng.choice(["clay", "sand"])}
        for k in range(400)
    ]
    for row in rows:
        row["colour"] = "red" if (row["petal"] % 3 > 1.5) != (row["soil"] == "clay") else "blue"
    for folder in (competition.raw_dir, competition.public_dir, competition.private_dir):
        folder.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(competition.raw_dir / "flowers.csv", index=False)
    competition.prepare_fn(
        raw=competition.raw_dir, public=competition.public_dir, private=competition.private_dir
    )
    (competition.public_dir / "description.md").write_text(competition.description)


def get_leaderboard(competition):
    return pd.read_csv(competition.leaderboard)
