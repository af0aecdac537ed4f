"""The reference harness of `lawbench` on tiny made-up cases."""

import copy
import csv
import importlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

HARNESS = Path(__file__).parents[2] / "tasks" / "lawbench" / "harness"
MODULES = tuple(path.stem for path in HARNESS.glob("*.py"))
LABELS = ["盗窃", "[贩卖、运输]毒品", "放火", "受贿"]
ACTS = ["深夜入室窃取财物", "在车站交付海洛因", "用打火机点燃仓库", "收受他人所送现金"]

CONFIG = yaml.safe_load((HARNESS / "harness.yaml").read_text(encoding="utf-8"))
SPACE = yaml.safe_load((HARNESS / "space.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def harness() -> Iterator[dict[str, ModuleType]]:
    """The harness's modules by name; sys.path and sys.modules are put back afterwards."""
    hidden = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(HARNESS))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(HARNESS))
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)


def made_up_case(k: int, rng: random.Random) -> str:
    fillers = ["后被抓获。", "赃款已退还。", "当庭自愿认罪。", "有证人证言为证。"]
    return (
        f"经审理查明，{rng.randint(2008, 2017)}年{rng.randint(1, 12)}月，被告人张某{k % 3}在"
        f"某市某区{ACTS[k % 4]}，价值{rng.randint(1, 99)}00元，{rng.choice(fillers)}"
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("public")
    rng = random.Random(0)
    (folder / "labels.json").write_text(json.dumps(LABELS, ensure_ascii=False), encoding="utf-8")
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [[f"t{k}", made_up_case(k, rng), LABELS[k % 4]] for k in range(40)]
        csv.writer(file).writerows([["id", "text", "label"], *rows])
    with (folder / "items.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [[f"i{k}", made_up_case(k, rng)] for k in range(12)]
        csv.writer(file).writerows([["id", "text"], *rows])
    return folder


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        *groups, last = path.split(".")
        section = config
        for group in groups:
            section = section[group]
        assert last in section, f"space.yaml names {path}, which harness.yaml does not have"
        section[last] = value
    return dict(config)


def knob_values(knob: dict[str, Any]) -> list[Any]:
    return list(knob.get("values", [])) or [knob["low"], knob["high"]]


SINGLE_CHANGES = [
    {**knob.get("needs", {}), path: value}
    for path, knob in SPACE["knobs"].items()
    for value in knob_values(knob)
    # Without words there would be no view at all.
    if (path, value) != ("views.words.use", False)
] + [move["set"] for move in SPACE["moves"]]


@pytest.mark.parametrize("changes", [{}, *SINGLE_CHANGES], ids=str)
def test_every_knob_value_and_move_runs(
    harness: dict[str, ModuleType], dataset: Path, changes: dict[str, Any]
) -> None:
    cases = harness["texts"].read_cases(dataset)
    gram, scores = harness["target_agent"].score_items(cases, changed(changes))
    assert gram.shape == (52, 52)
    assert scores.shape == (12, 4)
    assert [int(k) for k in scores.argmax(1)] == [k % 4 for k in range(12)]


def test_needs_and_sets_name_knobs_of_the_space() -> None:
    knobs = SPACE["knobs"]
    for knob in knobs.values():
        assert knob["idea"]
        for path, value in knob.get("needs", {}).items():
            assert value in knobs[path]["values"]
    for move in SPACE["moves"]:
        assert move["hypothesis"]
        assert move["expect"]
        for path, value in move["set"].items():
            values = knob_values(knobs[path])
            assert value in values or values[0] <= value <= values[1]


def test_the_command_line_writes_the_same_bytes_twice(dataset: Path, tmp_path: Path) -> None:
    outputs = []
    for name in ("a", "b"):
        working = tmp_path / name
        working.mkdir()
        command = [sys.executable, "-W", "error", str(HARNESS / "target_agent.py")]
        command += ["--dataset_dir", str(dataset), "--working_dir", str(working)]
        subprocess.run(command, check=True)
        outputs.append({str(p.relative_to(working)): p.read_bytes() for p in working.rglob("*.*")})
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 1 + min(12, CONFIG["trajectories"])
    rows = list(csv.DictReader(outputs[0]["submission.csv"].decode("utf-8").splitlines()))
    assert [row["id"] for row in rows] == [f"i{k}" for k in range(12)]
    assert all(row["alternatives"].split("|")[0] == row["label"] for row in rows)
    messages = json.loads(outputs[0]["agent_execution/execution_q0.json"])
    assert [set(message) for message in messages] == [{"role", "content"}] * len(messages)


def test_no_view_is_a_one_line_error(harness: dict[str, ModuleType], dataset: Path) -> None:
    cases = harness["texts"].read_cases(dataset)
    with pytest.raises(ValueError, match=r"set views\.<name>\.use"):
        harness["target_agent"].score_items(cases, changed({"views.words.use": False}))


def random_gram(n: int) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def test_leave_one_out_equals_a_refit(harness: dict[str, ModuleType]) -> None:
    classifiers = harness["classifiers"]
    gram = random_gram(23)
    answers = np.arange(20) % 3
    targets = classifiers.one_hot(answers, 3)
    settings = classifiers.Classifier(ridge=0.3, center=False, hinge_rounds=0)
    scores = classifiers.kernel_classifier(gram, targets, settings=settings)
    for i in (0, 7, 19):
        keep = [k for k in range(20) if k != i]
        dual = np.linalg.solve(gram[np.ix_(keep, keep)] + 0.3 * np.eye(19), targets[keep])
        np.testing.assert_allclose(scores.train[i], gram[i, keep] @ dual, atol=2e-4)
    dual = np.linalg.solve(gram[:20, :20] + 0.3 * np.eye(20), targets)
    np.testing.assert_allclose(scores.items, gram[20:, :20] @ dual, atol=2e-4)


def test_hinge_rounds_lower_the_squared_hinge_loss(harness: dict[str, ModuleType]) -> None:
    classifiers = harness["classifiers"]
    gram = random_gram(40)
    gram = np.block([[gram, gram], [gram, gram]])  # items repeat train: their score is the fit
    targets = classifiers.one_hot(np.arange(40) % 4, 4)

    def loss(rounds: int) -> float:
        settings = classifiers.Classifier(ridge=0.1, center=False, hinge_rounds=rounds)
        fitted = classifiers.kernel_classifier(gram, targets, settings=settings).items
        dual = np.linalg.lstsq(gram[:40, :40], fitted, rcond=1e-5)[0]
        hinge = np.maximum(0, 1 - targets * fitted)
        return float((hinge**2).sum() + 0.1 * (dual * (gram[:40, :40] @ dual)).sum())

    assert loss(20) < loss(0)
    assert loss(20) <= loss(2) + 1e-3


def test_prototype_of_a_text_leaves_it_out(harness: dict[str, ModuleType]) -> None:
    gram = random_gram(7)
    answers = np.array([0, 0, 0, 1, 1])
    scores = harness["classifiers"].prototypes(gram, answers, 2)
    assert scores.train[0, 0] == pytest.approx((gram[0, 1] + gram[0, 2]) / 2, abs=1e-6)
    assert scores.train[0, 1] == pytest.approx(gram[0, 3:5].mean(), abs=1e-6)
    assert scores.items[1, 0] == pytest.approx(gram[6, :3].mean(), abs=1e-6)


def test_gram_of_dense_and_sparse_columns_is_the_plain_product(
    harness: dict[str, ModuleType],
) -> None:
    views = harness["views"]
    texts = [made_up_case(k, random.Random(k)) for k in range(60)]
    view = views.View(use=True, unit="char", low=1, high=2)
    rows = views.tfidf_rows(
        texts, view=view, tfidf=views.Tfidf(binary=False, idf_power=1.0, min_df=1)
    )
    plain = (rows @ rows.T).toarray()
    np.testing.assert_allclose(views.gram(rows), plain, atol=1e-5)
    np.testing.assert_allclose(np.diag(plain), 1, atol=1e-5)


def test_masks_replace_what_differs_from_case_to_case(harness: dict[str, ModuleType]) -> None:
    texts = harness["texts"]
    text = "青冈县人民检察院指控，2015年3月2日，张某甲和王某1给李某某3.5万元，卡号62××××××18。"
    off = texts.Mask(numbers=False, persons=False, dates=False, courts=False)
    every = texts.Mask(numbers=True, persons=True, dates=True, courts=True)
    assert texts.mask_text(text, off) == text
    masked = texts.mask_text(text, every)
    assert masked == "人民检察院指控，日，某和某给某0万元，卡号0××0。"


def test_second_stage_picks_the_candidate_that_the_evidence_favours(
    harness: dict[str, ModuleType],
) -> None:
    rng = np.random.default_rng(0)
    answers = np.arange(60) % 3
    truth = (answers[:, None] == np.arange(3)).astype(np.float32)
    noisy = truth * 0.5 + rng.normal(size=truth.shape).astype(np.float32)
    candidates = harness["rerank"].best_labels(noisy, 2)
    evidence = [np.take_along_axis(scores, candidates, 1) for scores in (noisy, truth)]
    choice = harness["rerank"].choose(candidates, evidence, answers[:40], n_labels=3, penalty=1.0)
    reachable = (candidates == answers[:, None]).any(1)
    assert (choice.argmax(1) == answers)[reachable].all()
    assert (np.isneginf(choice).sum(1) == 1).all()


def test_duels_equal_refits_on_the_two_labels(harness: dict[str, ModuleType]) -> None:
    gram = random_gram(14)
    answers = np.arange(12) % 3
    candidates = np.array([[k % 3, (k + 1) % 3] for k in range(14)])
    wins = harness["rerank"].duels(gram, answers, candidates, ridge=0.5)
    np.testing.assert_allclose(wins[:, 0], -wins[:, 1], atol=1e-6)
    for text in (0, 4, 13):  # two training texts and an item
        first, second = candidates[text]
        own = [k for k in range(12) if answers[k] in (first, second) and k != text]
        targets = np.where(answers[own] == first, 1, -1)
        dual = np.linalg.solve(gram[np.ix_(own, own)] + 0.5 * np.eye(len(own)), targets)
        assert wins[text, 0] == pytest.approx(gram[text, own] @ dual, abs=1e-4)


def test_duels_with_a_label_without_texts_are_drawn(harness: dict[str, ModuleType]) -> None:
    wins = harness["rerank"].duels(
        random_gram(4), np.zeros(3, np.intp), np.array([[0, 1]] * 4), ridge=0.5
    )
    assert not wins.any()


def test_centering_gives_cosines_around_the_mean(harness: dict[str, ModuleType]) -> None:
    rows = np.random.default_rng(1).normal(2, 1, size=(9, 4)).astype(np.float32)
    around = rows - rows.mean(0)
    around /= np.linalg.norm(around, axis=1, keepdims=True)
    centered = harness["classifiers"].center(rows @ rows.T)
    np.testing.assert_allclose(centered, around @ around.T, atol=1e-4)


def test_word_pairs_stay_within_their_clause(harness: dict[str, ModuleType]) -> None:
    texts = harness["texts"]
    text = "被告人点燃仓库，邻居报警。"
    assert "仓库 点燃" in texts.word_pairs(text, texts.CLAUSE_ENDS)
    assert "仓库 邻居" not in texts.word_pairs(text, texts.CLAUSE_ENDS)
    assert "仓库 邻居" in texts.word_pairs(text, texts.SENTENCE_ENDS)


def test_name_overlap_is_largest_for_the_label_that_is_written_out(
    harness: dict[str, ModuleType],
) -> None:
    overlap = harness["rerank"].name_overlap(["他运输毒品", "他盗窃", "无"], LABELS)
    assert overlap.argmax(1)[:2].tolist() == [1, 0]
    assert not overlap[2].any()


def write_policy(folder: Path, dataset: Path, logprobs: Any, *, leave_out: str = "") -> None:
    """A policy's scores of all texts of the dataset, in another order of rows and of labels."""
    ids = [f"i{k}" for k in range(12)] + [f"t{k}" for k in range(40)]
    rows = [row for row, name in enumerate(ids) if name != leave_out]
    folder.mkdir(exist_ok=True)
    np.savez(
        folder / "scores.npz",
        ids=np.array([ids[row] for row in rows]),
        labels=np.array(LABELS[::-1]),
        logprobs=np.asarray(logprobs, np.float32)[rows][:, ::-1],
    )


def test_scores_of_a_policy_are_found_by_id_and_label(
    harness: dict[str, ModuleType], dataset: Path, tmp_path: Path
) -> None:
    logprobs = np.log(np.random.default_rng(0).dirichlet(np.ones(4), 52))
    write_policy(tmp_path, dataset, logprobs)
    cases = harness["texts"].read_cases(dataset)
    found = harness["policy"].policy_scores(cases, tmp_path)
    np.testing.assert_allclose(found, np.concatenate([logprobs[12:], logprobs[:12]]), rtol=1e-6)


def test_a_policy_that_fits_other_data_is_a_clear_error(
    harness: dict[str, ModuleType], dataset: Path, tmp_path: Path
) -> None:
    cases = harness["texts"].read_cases(dataset)
    with pytest.raises(ValueError, match="no scores of a policy"):
        harness["policy"].policy_scores(cases, tmp_path)
    logprobs = np.zeros((52, 4))
    write_policy(tmp_path, dataset, logprobs, leave_out="t3")
    with pytest.raises(ValueError, match="1 ids or the labels differ"):
        harness["policy"].policy_scores(cases, tmp_path)
    logprobs[5, 1] = np.nan
    write_policy(tmp_path, dataset, logprobs)
    with pytest.raises(ValueError, match="not finite"):
        harness["policy"].policy_scores(cases, tmp_path)


def test_a_policy_that_knows_better_changes_the_answers(
    harness: dict[str, ModuleType], dataset: Path
) -> None:
    """Training labels are shuffled, so that the texts say nothing and the policy everything."""
    cases = harness["texts"].read_cases(dataset)
    truth = np.random.default_rng(1).integers(0, 4, 52)
    policy = np.full((52, 4), np.log(0.02), np.float32)
    policy[np.arange(52), truth] = np.log(0.94)
    grams = [(1.0, own) for _, own in harness["target_agent"].view_grams(
        cases.train_texts + cases.item_texts, CONFIG
    )]  # fmt: skip
    shared: dict[str, Any] = {"n_labels": 4, "config": CONFIG, "overlap": None}
    score = harness["target_agent"].score_grams
    _, without = score(grams, truth[:40], **shared)
    _, with_policy = score(grams, truth[:40], **shared, policy=policy)
    assert np.mean(without.argmax(1) == truth[40:]) < 0.7
    assert np.mean(with_policy.argmax(1) == truth[40:]) > 0.9


def test_the_policy_folder_comes_from_the_environment(dataset: Path, tmp_path: Path) -> None:
    logprobs = np.full((52, 4), -9.0)
    logprobs[:, 2] = (
        0.0  # items are all of one label, says this policy; of train it knows the truth
    )
    for k in range(40):
        logprobs[12 + k] = np.where(np.arange(4) == k % 4, 0.0, -9.0)
    write_policy(tmp_path / "policy", dataset, logprobs)
    answers = {}
    for name, folder in (("without", None), ("with", tmp_path / "policy")):
        work = tmp_path / name
        work.mkdir()
        environment = {"PATH": "/usr/bin:/bin", **({"SIA_POLICY": str(folder)} if folder else {})}
        subprocess.run(
            [sys.executable, str(HARNESS / "target_agent.py"), "--dataset_dir", str(dataset),
             "--working_dir", str(work)],
            check=True, env=environment, timeout=120,
        )  # fmt: skip
        answers[name] = (work / "submission.csv").read_text(encoding="utf-8")
    assert answers["with"] != answers["without"]
