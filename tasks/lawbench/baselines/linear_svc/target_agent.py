"""The plain baseline: character 2-3-grams, TF-IDF, LinearSVC with its defaults."""

import argparse
import csv
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC


def main() -> None:
    """Fits on train.csv, answers items.csv."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    args = parser.parse_args()
    train, items = read(args.dataset_dir / "train.csv"), read(args.dataset_dir / "items.csv")
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(2, 3), min_df=3, sublinear_tf=True)
    features = vectorizer.fit_transform(row["text"] for row in train)
    classifier = LinearSVC(random_state=0).fit(features, [row["label"] for row in train])
    answers = classifier.predict(vectorizer.transform(row["text"] for row in items))
    with (args.working_dir / "submission.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "label"))
        writer.writerows(zip((row["id"] for row in items), answers, strict=True))


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file by column name."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
