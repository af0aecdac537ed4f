from mlebench.grade_helpers import InvalidSubmissionError


def grade(submission, answers):
    if set(submission["flower"]) != set(answers["flower"]):
        raise InvalidSubmissionError("the flowers are others")
    both = submission.merge(answers, on="flower", suffixes=("", "_true"))
    return float((both["colour"] == both["colour_true"]).mean())
