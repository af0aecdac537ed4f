"""Policy `label` on a small encoder of random weights: training, adapters, cross-fitted scores."""

import csv
import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoder

from sia.errors import WeightsError
from sia.weights.rollout import fold_of

pytest.importorskip("lightning")

LABELS = ["fire", "theft", "fraud"]
CLUES = ["burns", "takes", "lies"]
TASK = """
import csv
def items(public):
    with (public / "train.csv").open() as file:
        return [{"id": r["id"], "prompt": r["text"], "reference": r["label"]}
                for r in csv.DictReader(file)]
def reward(item, answer):
    return float(answer == item["reference"])
def questions(public):
    with (public / "items.csv").open() as file:
        return [{"id": r["id"], "prompt": r["text"]} for r in csv.DictReader(file)]
"""


def text(rng: random.Random, k: int) -> str:
    noise = "".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 9)))
    return f"{noise} {CLUES[k]} {noise[:3]}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a task with 60 train items and 12 items without a label."""
    folder = tmp_path_factory.mktemp("label")
    tiny_encoder.make(folder / "base")
    rng = random.Random(0)
    public = folder / "public"
    public.mkdir()
    (public / "labels.json").write_text(json.dumps(LABELS))
    rows = [[f"t{k}", text(rng, k % 3), LABELS[k % 3]] for k in range(60)]
    rows.append(["twin", *rows[0][1:]])
    with (public / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text", "label"], *rows])
    with (public / "items.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["id", "text"], *[[f"i{k}", text(rng, k % 3)] for k in range(12)]]
        )
    (folder / "train.py").write_text(TASK)
    return folder


def settings(place: Path, **changes: Any) -> dict[str, Any]:
    return {
        "base": str(place / "base"), "labels": str(place / "public" / "labels.json"),
        "calibration": str(place / "public" / "items.csv"), "max_prompt_tokens": 32,
        "half": False, **changes,
    }  # fmt: skip


def made(place: Path, **changes: Any) -> Any:
    from sia.weights.label import Label

    return Label(**settings(place, **changes))


def job(place: Path, out: Path, **changes: Any) -> Any:
    from sia.weights.update import parse_job

    return parse_job({
        "policy": {"kind": "label", **settings(place)},
        "recipe": {"name": "sft", "steps": 60, "lr": 1e-2, "batch": 16, "rank": 4},
        "task": str(place / "train.py"), "public": str(place / "public"), "out": str(out),
        "device": "cpu", "seed": 1, **changes,
    })  # fmt: skip


def test_supervised_steps_teach_labels_that_a_fresh_policy_does_not_know(
    place: Path, tmp_path: Path
) -> None:
    from sia.weights.update import update

    report = update(job(place, tmp_path / "child")).report
    assert report.reward_before is not None
    assert report.reward_after is not None
    assert report.reward_before < 0.6
    assert report.reward_after > 0.8
    assert report.kl is not None
    assert report.kl > 0.1


def test_rewards_alone_teach_labels_too(place: Path, tmp_path: Path) -> None:
    from sia.weights.update import update

    recipe = {"name": "grpo", "steps": 60, "lr": 3e-3, "items": 16, "group": 8, "rank": 4}
    report = update(job(place, tmp_path / "child", recipe=recipe)).report
    assert report.reward_before is not None
    assert report.reward_after is not None
    assert report.reward_after > report.reward_before + 0.2


def test_a_head_learns_at_its_own_rate(place: Path, tmp_path: Path) -> None:
    """The first step of AdamW moves a parameter by its learning rate.

    While the head is zero the layers get no gradient, so theirs is the second step, whose moments
    have seen one gradient of two: 0.1 / (1 - 0.9^2) over the root of 0.001 / (1 - 0.999^2).
    """
    from safetensors.torch import load_file

    from sia.weights.update import update

    def moved(steps: int, part: str) -> float:
        recipe = {"name": "sft", "steps": steps, "lr": 1e-3, "head_lr": 0.05, "warmup": 0}
        out = tmp_path / str(steps)
        update(job(place, out, recipe=recipe))
        stored = load_file(out / "adapter_model.safetensors")
        return max(float(value.abs().max()) for name, value in stored.items() if part in name)

    assert moved(1, "head") == pytest.approx(0.05, rel=1e-3)
    assert moved(2, "lora_B") == pytest.approx(1e-3 * 0.744, rel=1e-3)


def test_without_its_adapter_all_labels_are_equally_likely(place: Path) -> None:
    policy = made(place)
    tokens = policy.encode(["abc burns", "de lies"], ["fire", "theft"])
    scores = policy.logprobs(tokens, base=True, entropy=True)
    np.testing.assert_allclose(scores.logprobs_BT.detach().numpy(), -np.log(3), rtol=1e-6)
    np.testing.assert_allclose(scores.entropy_BT.detach().numpy(), np.log(3), rtol=1e-6)


def test_an_adapter_says_the_same_wherever_it_is_loaded(place: Path, tmp_path: Path) -> None:
    from sia.weights.update import update

    update(job(place, tmp_path / "child"))
    prompts = ["abc burns ab", "h takes h", "ggg lies"]
    first, second = made(place), made(place, seed=9)
    for policy in (first, second):
        policy.load_adapter(tmp_path / "child")
    np.testing.assert_allclose(first.scores(prompts), second.scores(prompts), atol=1e-5)
    second.save_adapter(tmp_path / "copy")
    third = made(place)
    third.load_adapter(tmp_path / "copy")
    np.testing.assert_allclose(first.scores(prompts), third.scores(prompts), atol=1e-5)
    assert np.ptp(first.scores(prompts).numpy()) > 1.0


def test_log_probabilities_are_those_of_the_scores_and_of_the_samples(
    place: Path, tmp_path: Path
) -> None:
    from sia.weights.update import update

    update(job(place, tmp_path / "child"))
    policy = made(place)
    policy.load_adapter(tmp_path / "child")
    prompts = ["abc burns ab", "h takes h"]
    sampled = policy.sample(prompts, group=4, temperature=1.0, seed=3)
    chosen = np.array([policy.labels.index(answer) for answer in sampled.answers])
    expected = np.repeat(policy.scores(prompts).numpy(), 4, 0)[np.arange(8), chosen]
    np.testing.assert_allclose(sampled.logprobs_BT[:, 0].numpy(), expected, atol=1e-5)
    again = policy.logprobs(sampled.tokens).logprobs_BT[:, 0].detach().numpy()
    np.testing.assert_allclose(again, expected, atol=1e-5)
    assert policy.ends(sampled.tokens)[:, 0].tolist() == [len(a) for a in sampled.answers]


def test_answers_and_adapters_that_do_not_fit_are_refused(place: Path, tmp_path: Path) -> None:
    policy = made(place)
    with pytest.raises(WeightsError, match="'arson' is none of the 3 labels"):
        policy.encode(["abc"], ["arson"])
    policy.save_adapter(tmp_path / "child")
    other = tmp_path / "labels.json"
    other.write_text(json.dumps(LABELS[::-1]))
    with pytest.raises(WeightsError, match="other labels, or another order"):
        made(place, labels=str(other)).load_adapter(tmp_path / "child")
    with pytest.raises(WeightsError, match="holds no adapter"):
        policy.load_adapter(tmp_path)
    with pytest.raises(WeightsError, match="has 3 layers"):
        made(place, upper_layers=4)


def test_train_items_are_scored_by_adapters_that_have_not_seen_them(
    place: Path, tmp_path: Path
) -> None:
    from sia.weights.crossfit import cross_fit
    from sia.weights.rollout import load_train_task

    recipe = {"name": "sft", "steps": 40, "lr": 1e-2, "batch": 16, "rank": 4}
    found = cross_fit(job(place, tmp_path / "policy", recipe=recipe), folds=3)
    with np.load(found) as file:
        ids, labels, logprobs = file["ids"].tolist(), file["labels"].tolist(), file["logprobs"]
    items = load_train_task(place / "train.py", place / "public").items
    assert ids == [item.id for item in items] + [f"i{k}" for k in range(12)]
    assert labels == LABELS
    np.testing.assert_allclose(np.exp(logprobs).sum(1), 1, atol=1e-5)
    answers = [LABELS.index(item.reference or "") for item in items]
    assert np.mean(logprobs[: len(items)].argmax(1) == answers) > 0.6
    assert np.mean(logprobs[len(items) :].argmax(1) == np.arange(12) % 3) > 0.6
    policy = made(place)
    for k in range(3):
        policy.load_adapter(tmp_path / "policy" / f"fold{k}")
        rows = [row for row, item in enumerate(items) if fold_of(item.prompt, 3) == k]
        assert rows
        own = policy.scores([items[row].prompt for row in rows]).numpy()
        np.testing.assert_allclose(logprobs[rows], own, atol=1e-4)
    assert fold_of(items[0].prompt, 3) == fold_of(items[-1].prompt, 3)


def test_an_item_of_the_fold_left_out_changes_nothing(place: Path, tmp_path: Path) -> None:
    from sia.weights.update import update

    recipe = {"name": "sft", "steps": 4, "batch": 16}
    public = tmp_path / "public"
    public.mkdir()
    for name in ("train.csv", "items.csv", "labels.json"):
        (public / name).write_text((place / "public" / name).read_text())
    with (public / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if fold_of(row["text"], 3) == 1:
            row["label"] = "fraud"
    with (public / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    curves = []
    for name, side in (("a", place / "public"), ("b", public)):
        changes = {"recipe": recipe, "public": str(side), "limits": {"probe_items": 0}}
        done = update(job(place, tmp_path / name, leave_out={"k": 1, "of": 3}, **changes))
        curves.append([step["loss"] for step in done.curve])
    assert curves[0] == curves[1]


def packed_file(width: int = 32) -> bytes:
    """A model file of one layer in the form that `sia.weights.e5` reads; weights are random."""
    rng = np.random.default_rng(0)
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", "火", "盗窃"]
    blob = "".join(pieces).encode()
    bounds = np.cumsum([0, *[len(p.encode()) for p in pieces]])
    head = b"E5S1" + struct.pack("<I", 1)
    head += struct.pack("<7ifi", width, 1, 2, 64, len(pieces) + 1, 16, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(pieces), 0, 2, 1, 3, len(blob))
    head += struct.pack(f"<{len(bounds)}I", *bounds) + struct.pack("<7f", *[0, 0, 0, 0, -3, -2, -1])
    head += blob + struct.pack("<iI", 0, 0)
    shapes = {
        "emb.word": (len(pieces) + 1) * width, "emb.pos": 16 * width, "emb.type": 2 * width,
        "emb.ln.w": width, "emb.ln.b": width, "l0.fi.w": 64 * width, "l0.fi.b": 64,
        "l0.fo.w": width * 64, "l0.fo.b": width,
        **{f"l0.{n}.w": width * width for n in ("q", "k", "v", "ao")},
        **{f"l0.{n}.b": width for n in ("q", "k", "v", "ao")},
        **{f"l0.{n}.{s}": width for n in ("aln", "oln") for s in ("w", "b")},
    }  # fmt: skip
    four_bit = {n for n in shapes if n == "emb.word" or (n[0] == "l" and n.endswith(".w"))}
    four_bit -= {"l0.aln.w", "l0.oln.w"}
    bodies = {}
    for name, count in shapes.items():
        if name in four_bit:
            blocks = b""
            for _ in range(count // 32):
                blocks += np.float16(rng.uniform(0.01, 0.1)).tobytes()
                blocks += rng.integers(0, 256, 16, dtype=np.uint8).tobytes()
            bodies[name] = blocks
        else:
            bodies[name] = rng.normal(size=count).astype("<f4").tobytes()
    size = len(head) + 4 + sum(2 + len(n) + 1 + 4 + 16 for n in shapes)
    directory = struct.pack("<i", len(shapes))
    for name, body in bodies.items():
        kind = int(name in four_bit)
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", kind, shapes[name], size, len(body))
        size += len(body)
    return head + directory + b"".join(bodies.values())


def test_four_bit_weights_come_out_as_they_are_written_down() -> None:
    from sia.weights.e5 import dequantised

    low, high = np.arange(16) % 16, 15 - np.arange(16)
    block = np.float16(0.5).tobytes() + (low | high << 4).astype(np.uint8).tobytes()
    found = dequantised(b"xx" + block, 32, 2)
    np.testing.assert_array_equal(found, 0.5 * (np.concatenate([low, high]) - 8))


def test_a_packed_model_becomes_a_base(place: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    from sia.weights.e5 import read_packed, write_base

    packed = read_packed(packed_file())
    write_base(packed, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer("火盗窃")["input_ids"] == [0, 4, 5, 6, 2]
    model = AutoModel.from_pretrained(tmp_path / "base")
    there = model.encoder.layer[0].intermediate.dense.weight.detach().float().numpy()
    np.testing.assert_allclose(there, packed.tensor("l0.fi.w", 64, 32).numpy(), rtol=1e-3)
    policy = made(place, base=str(tmp_path / "base"), upper_layers=1, max_prompt_tokens=8)
    assert policy.scores(["火", "盗窃"]).shape == (2, 3)


def test_a_damaged_model_file_is_refused() -> None:
    from sia.weights.e5 import read_packed

    with pytest.raises(WeightsError, match="begins with"):
        read_packed(b"PK\x03\x04 a zip")
    with pytest.raises(WeightsError, match="cut or damaged"):
        read_packed(packed_file()[:90])
