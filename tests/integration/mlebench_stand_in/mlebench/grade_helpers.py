from mlebench.utils import import_fn


class InvalidSubmissionError(Exception):
    pass


class Grader:
    def __init__(self, name, grade_fn):
        self.name = name
        self.grade_fn = import_fn(grade_fn)

    def is_lower_better(self, leaderboard):
        scores = leaderboard["score"]
        return bool(scores.iloc[0] < scores.iloc[-1])
