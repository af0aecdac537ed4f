import pandas as pd


def prepare(raw, public, private):
    rows = pd.read_csv(raw / "flowers.csv")
    train, test = rows.iloc[:300], rows.iloc[300:]
    train.to_csv(public / "train.csv", index=False)
    test.drop(columns="colour").to_csv(public / "test.csv", index=False)
    test[["flower"]].assign(colour="red").to_csv(public / "sample_submission.csv", index=False)
    test.to_csv(private / "test.csv", index=False)
