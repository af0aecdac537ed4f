"""Updates from end to end, on a random model of two layers: policies, recipes, resume, failures."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for package in ("torch", "lightning", "peft", "transformers"):
    pytest.importorskip(package, reason="the extra `train` is not installed")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from sia.errors import WeightsError  # noqa: E402
from sia.provenance import tree_sha256  # noqa: E402
from sia.weights.cache import grouped, sampling_cache  # noqa: E402
from sia.weights.causal_lm import CausalLM, chosen_logprobs, drawn  # noqa: E402
from sia.weights.data import Recorded, Rollouts, Steps  # noqa: E402
from sia.weights.decode import ROOM, Pass  # noqa: E402
from sia.weights.memory import halving  # noqa: E402
from sia.weights.policy import Item, Sample, Step  # noqa: E402
from sia.weights.recipes import RECIPES, Grpo, Ppo, recipe  # noqa: E402
from sia.weights.rollout import TrainTask, load_train_task, write_samples  # noqa: E402
from sia.weights.tiny import make_base  # noqa: E402
from sia.weights.update import Record, fit, parse_job, read_record, update  # noqa: E402

TRAIN = '''
"""Digits are worth something; the right one is worth more."""
import json

def items(public):
    pairs = json.loads((public / "pairs.json").read_text())
    return [
        {"id": f"{a}-{b}", "prompt": f"{a} or {b}?", "reference": str(max(a, b))} for a, b in pairs
    ]

def reward(item, answer):
    right = float(answer == item["reference"])
    return right + sum(c.isdigit() for c in answer) / 8
'''


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_base(folder, width=32)
    return folder


@pytest.fixture
def policy(base: Path) -> CausalLM:
    made = CausalLM(base=str(base), rank=4, max_answer_tokens=6, values=True)
    disturb(made)
    return made


def disturb(policy: CausalLM) -> None:
    """An adapter that does something."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=random)


@pytest.fixture
def public(tmp_path: Path) -> Path:
    folder = tmp_path / "public"
    folder.mkdir()
    pairs = [[a, b] for a in range(10) for b in range(10) if a != b]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return folder


Job = Callable[..., dict[str, Any]]


@pytest.fixture
def job(base: Path, public: Path, tmp_path: Path) -> Job:
    """A job with some things changed; `train` is the code of the task's train.py."""

    def make(train: str = TRAIN, **changes: Any) -> dict[str, Any]:
        (tmp_path / "train.py").write_text(train)
        settings = {"items": 4, "group": 4} if changes["recipe"]["name"] != "sft" else {}
        chosen = {"steps": 3, "rank": 4, "lr": 3e-3, "warmup": 0, **settings, **changes["recipe"]}
        return {
            "policy": {"kind": "causal_lm", "base": str(base), "max_answer_tokens": 6},
            "task": str(tmp_path / "train.py"), "public": str(public),
            "out": str(tmp_path / "child"), "seed": 3, "device": "cpu",
            "limits": {"probe_items": 8, "checkpoint_steps": 1, **changes.pop("limits", {})},
            **changes, "recipe": chosen,
        }  # fmt: skip

    return make


def run(data: dict[str, Any]) -> Record:
    return update(parse_job(data))


def left_behind(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()} - {"train.py", "public", "samples.jsonl"}


# The policy


def test_sampling_and_scoring_agree_about_every_token(policy: CausalLM) -> None:
    """Also when some answers end early, leave the batch, and prompts differ in length."""
    sampled = policy.sample(["1", "2 or 3?", "who"], group=100, temperature=1.3, seed=5)
    lengths = sampled.tokens.mask_BT.sum(1)
    assert len(lengths.unique()) > 3
    scored = policy.logprobs(sampled.tokens, temperature=1.3).logprobs_BT
    assert torch.allclose(sampled.logprobs_BT, scored, atol=1e-5)
    assert not sampled.logprobs_BT[sampled.tokens.mask_BT == 0].any()


def test_a_prompt_that_is_read_once_for_its_group_gives_the_same_answers(policy: CausalLM) -> None:
    """Also when prompts are padded, and answers end early."""
    prompts = ["1 or 2?", "who", "a long prompt: 4"]
    once = policy.sample(prompts, group=20, temperature=1.0, seed=3)
    repeated = [prompt for prompt in prompts for _ in range(20)]
    often = policy.sample(repeated, group=1, temperature=1.0, seed=3)
    assert once.answers == often.answers
    assert torch.allclose(once.logprobs_BT, often.logprobs_BT, atol=1e-4)


def test_a_prompt_that_is_read_once_for_its_group_gives_the_same_gradient(
    policy: CausalLM,
) -> None:
    tokens = policy.sample(["1 or 2?", "who"], group=4, temperature=1.0, seed=0).tokens
    uneven = tokens.rows(torch.tensor([0, 1, 2, 4, 5, 6, 7]))  # three answers, and four
    order = torch.tensor([0, 3, 1, 4, 2, 5, 6])  # where most neighbours have another prompt
    found = []
    for index in (torch.arange(7), order):
        scores = policy.logprobs(uneven.rows(index), values=True, entropy=True)
        assert scores.values_BT is not None
        assert scores.entropy_BT is not None
        back = index.argsort()
        parts = [scores.logprobs_BT[back], scores.values_BT[back], scores.entropy_BT[back]]
        loss = sum(((part.cumsum(1) ** 2).sum() for part in parts), torch.zeros(()))
        found.append([*parts, *torch.autograd.grad(loss, policy.parameters())])
    for shared, apart in zip(*found, strict=True):
        assert float((shared - apart).detach().norm()) < 1e-4 * float(apart.detach().norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_an_adapted_layer_computes_what_pefts_own_does(
    dtype: torch.dtype, atol: float, bias: bool
) -> None:
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from sia.weights.lora import LoraLinear, narrow

    random = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, 8, generator=random)
    found = []
    for mine in (True, False):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(8, 6, bias=bias), nn.Linear(6, 5, bias=bias)).to(dtype)
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"], init_lora_weights=False)
        if mine:
            config._register_custom_module({nn.Linear: LoraLinear})
        model: Any = get_peft_model(layers, config)
        assert isinstance(model.base_model.model[0], LoraLinear) is mine
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        x = start.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            y = model(x)
            if mine:
                with torch.no_grad(), narrow(model, dtype):
                    assert torch.equal(model(x), y)
        assert y.dtype is dtype
        y = y.float()
        found.append([y, *torch.autograd.grad((y**2).sum(), [x, *trained])])
    for ours, pefts in zip(*found, strict=True):
        assert ours.dtype is pefts.dtype
        assert float((ours - pefts).detach().norm()) < atol * float(pefts.detach().norm())


def test_a_recorded_pass_gives_what_a_new_one_gives(base: Path) -> None:
    """No GPU records here, but the tokens go where a recording would put them.

    Answers leave the batch, and some are longer than what a recording is good for.
    """
    policy = CausalLM(base=str(base), rank=4, max_answer_tokens=200)
    disturb(policy)
    recordings = []

    def remembered(run: Pass) -> Pass:
        recordings.append(run)
        return run

    anew = policy.sample(["1 or 2?", "who"], group=60, temperature=1.0, seed=2)
    policy.capture = remembered
    recorded = policy.sample(["1 or 2?", "who"], group=60, temperature=1.0, seed=2)
    assert recorded.answers == anew.answers
    assert torch.allclose(recorded.logprobs_BT, anew.logprobs_BT, atol=1e-5)
    assert anew.tokens.mask_BT.shape[1] > ROOM + 10
    assert len(recordings) > 3


def test_a_model_that_cannot_be_recorded_is_read_anew(base: Path) -> None:
    policy = CausalLM(base=str(base), rank=4, max_answer_tokens=20)
    anew = policy.sample(["1 or 2?"], group=9, temperature=1.0, seed=2)

    def refused(run: Pass) -> Pass:
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    policy.capture = refused
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph.*not permitted"):
        found = policy.sample(["1 or 2?"], group=9, temperature=1.0, seed=2)
    assert found.answers == anew.answers
    assert torch.allclose(found.logprobs_BT, anew.logprobs_BT, atol=1e-5)


def test_what_stands_beside_an_answer_in_the_batch_does_not_matter(policy: CausalLM) -> None:
    prompts, answers = ["1 or 2?", "3", "a long prompt: 4"], ["2", "33333", ""]
    together = policy.logprobs(policy.encode(prompts, answers), values=True, entropy=True)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone = policy.logprobs(policy.encode([prompt], [answer]), values=True, entropy=True)
        for name in ("logprobs_BT", "values_BT", "entropy_BT"):
            one, many = getattr(alone, name)[0], getattr(together, name)[row]
            assert torch.allclose(one, many[: len(one)], atol=1e-5)
            assert not many[len(one) :].any()


def test_the_same_seed_gives_the_same_answers_and_another_one_others(policy: CausalLM) -> None:
    first, again, other = (
        policy.sample(["1 or 2?"], group=6, temperature=1.0, seed=seed).answers
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_sampling_leaves_the_base_bit_by_bit_as_it_was(policy: CausalLM) -> None:
    before = {name: tensor.clone() for name, tensor in policy.module.state_dict().items()}
    policy.sample(["1 or 2?"], group=2, temperature=1.0, seed=1)
    after = policy.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_samples_are_distributed_as_the_scores_say(policy: CausalLM) -> None:
    sampled = policy.sample(["7"], group=4000, temperature=0.8, seed=0)
    first = sampled.tokens.inputs["answers"][:, 0]
    shares = torch.bincount(first, minlength=60) / len(first)
    for token in shares.topk(5).indices.tolist():
        where = int((first == token).nonzero()[0])
        expected = math.exp(float(sampled.logprobs_BT[where, 0]))
        assert abs(float(shares[token]) - expected) < 4 * math.sqrt(expected / len(first))


@pytest.mark.parametrize("vocabulary", [5, 64, 200])
def test_tokens_are_drawn_as_often_as_they_are_likely(vocabulary: int) -> None:
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(vocabulary, generator=random)
    logits[::3] = -math.inf
    logp = logits.log_softmax(-1)
    n = 20_000
    found = torch.bincount(drawn(logp.expand(n, -1), random), minlength=vocabulary)
    assert not found[::3].any()
    expected = n * logp.exp().double()
    chi2 = float(((found - expected) ** 2)[expected > 0].div(expected[expected > 0]).sum())
    free = int((expected > 0).sum()) - 1
    assert chi2 < free + 5 * math.sqrt(2 * free)
    sure = torch.full((3, vocabulary), -math.inf)
    sure[:, -1] = 0.0
    assert drawn(sure, random).tolist() == [vocabulary - 1] * 3


def test_the_base_is_the_policy_with_its_adapter_switched_off(base: Path, policy: CausalLM) -> None:
    fresh = CausalLM(base=str(base), rank=2, max_answer_tokens=6)
    tokens = policy.encode(["1 or 2?"], ["2"])
    ours = policy.logprobs(tokens, base=True).logprobs_BT
    assert torch.equal(ours, fresh.logprobs(tokens).logprobs_BT)
    assert not torch.allclose(ours, policy.logprobs(tokens).logprobs_BT)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_comes_back_as_it_was_saved(base: Path, tmp_path: Path, dora: bool) -> None:
    policy = CausalLM(base=str(base), rank=4, alpha=6.0, dora=dora, values=True)
    disturb(policy)
    policy.save_adapter(tmp_path / "adapter")
    other = CausalLM(base=str(base), rank=16, values=True, seed=9)
    other.load_adapter(tmp_path / "adapter")
    tokens = policy.encode(["1 or 2?", "3"], ["2", "wrong"])
    ours, theirs = (p.logprobs(tokens, values=True) for p in (policy, other))
    assert torch.equal(ours.logprobs_BT, theirs.logprobs_BT)
    assert ours.values_BT is not None
    assert theirs.values_BT is not None
    assert torch.equal(ours.values_BT, theirs.values_BT)
    assert len(other.parameters()) == len(policy.parameters())
    sampled = other.sample(["1 or 2?"], group=4, temperature=1.0, seed=0)
    assert torch.allclose(
        sampled.logprobs_BT, other.logprobs(sampled.tokens).logprobs_BT, atol=1e-5
    )


def test_an_adapter_is_plain_peft(base: Path, policy: CausalLM, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy.save_adapter(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT of transformers, not ours
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")
        )
    tokens = policy.encode(["1 or 2?"], ["2"])
    ids = torch.cat([tokens.inputs["prompts"], tokens.inputs["answers"]], 1)
    logits = model(input_ids=ids).logits[:, -3:-1].log_softmax(-1)
    theirs = logits.gather(-1, tokens.inputs["answers"][..., None]).squeeze(-1)
    assert torch.allclose(theirs, policy.logprobs(tokens).logprobs_BT, atol=1e-5)


def test_an_adapter_for_another_base_is_refused(policy: CausalLM, tmp_path: Path) -> None:
    policy.save_adapter(tmp_path / "adapter")
    make_base(tmp_path / "other", width=32, seed=1)
    stranger = CausalLM(base=str(tmp_path / "other"))
    with pytest.raises(WeightsError, match=r"made for the base .* Give it its own base"):
        stranger.load_adapter(tmp_path / "adapter")
    with pytest.raises(WeightsError, match="holds no adapter that can be read"):
        stranger.load_adapter(tmp_path / "nowhere")


def test_a_base_that_was_moved_is_the_same_base(
    base: Path, policy: CausalLM, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(base)
    assert CausalLM(base=str(moved)).base_sha256 == policy.base_sha256


def test_a_base_that_is_not_there_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"base='.*nobody' cannot be loaded: .*download=true"):
        CausalLM(base=str(tmp_path / "nobody"))
    with pytest.raises(WeightsError, match=r"targets do not fit base="):
        CausalLM(base=str(base), targets="no_such_layer")


def test_prompts_are_put_into_the_chat_template_of_the_base(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}.{% endfor %}a:"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "chat")
    chat = CausalLM(base=str(tmp_path / "chat"))
    plain = CausalLM(base=str(base))
    asked = chat.encode(["1 or 2?"], ["2"]).inputs["prompts"]
    assert torch.equal(asked, plain.encode(["u:1 or 2?.a:"], ["2"]).inputs["prompts"])


def test_what_is_too_long_is_cut_and_counted(base: Path) -> None:
    policy = CausalLM(base=str(base), max_prompt_tokens=4, max_answer_tokens=2)
    tokens = policy.encode(["0123456789", "12"], ["345", "6"])
    assert tokens.cut == 2
    assert tokens.inputs["prompts"].shape == (2, 4)
    assert tokens.mask_BT.tolist() == [[1, 1], [1, 1]]  # "34" without an end, and "6" with one
    assert policy.ends(tokens).tolist() == [[1, 2], [1, 1]]


def test_recomputed_activations_change_nothing(
    base: Path, policy: CausalLM, tmp_path: Path
) -> None:
    policy.save_adapter(tmp_path / "adapter")
    frugal = CausalLM(base=str(base), checkpoint_activations=True, max_answer_tokens=6)
    frugal.load_adapter(tmp_path / "adapter")
    found = []
    for one in (policy, frugal):
        tokens = one.encode(["1 or 2?"], ["2"])
        one.logprobs(tokens).logprobs_BT.sum().backward()
        found.append(next(p.grad for p in one.parameters()))
        one.sample(["1"], group=2, temperature=1.0, seed=0)
    assert torch.allclose(found[0], found[1])


ARCHITECTURES = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "OPT": {"hidden_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32},
    "GPTNeoX": {"hidden_size": 32, "intermediate_size": 32},
    "Llama": {"hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 1},
    "Qwen2": {"hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 2},
    "Mistral": {
        "hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 1, "sliding_window": 4,
    },
    "Gemma2": {
        "hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16,
        "sliding_window": 4,
    },
}  # fmt: skip


PROMPTS_KEPT_ONCE = {"GPT2", "OPT", "GPTNeoX", "Llama", "Qwen2"}  # no window, no position bias


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_sample_as_they_score(name: str, base: Path, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        **{"num_hidden_layers": 2, "num_attention_heads": 2, **ARCHITECTURES[name]},
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    policy = CausalLM(base=str(tmp_path), rank=4, max_answer_tokens=9, values=True)
    disturb(policy)
    model: Any = policy.module["model"].get_base_model()  # type: ignore[index]
    ids = torch.tensor([[2, 3]])
    with sampling_cache(model, torch.ones_like(ids)) as cache:
        model(input_ids=ids, cache=cache, use_cache=True)
        cache.batch_repeat_interleave(2)
    assert grouped(cache) == (name in PROMPTS_KEPT_ONCE)
    sampled = policy.sample(["1", "2 or 33?"], group=30, temperature=1.0, seed=0)
    scored = policy.logprobs(sampled.tokens, values=True)
    assert torch.allclose(sampled.logprobs_BT, scored.logprobs_BT, atol=1e-4)
    assert scored.values_BT is not None
    (scored.logprobs_BT.sum() + scored.values_BT.sum()).backward()
    assert all(p.grad is not None for p in policy.parameters())


def test_half_precision_trains_a_float32_adapter(base: Path, job: Job) -> None:
    half = CausalLM(base=str(base), rank=4, max_answer_tokens=6, precision="bfloat16")
    whole = CausalLM(base=str(base), rank=4, max_answer_tokens=6)
    assert half.base_sha256 == whole.base_sha256
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    disturb(half)
    sampled = half.sample(["1 or 2?"], group=50, temperature=1.0, seed=0)
    scored = half.logprobs(sampled.tokens).logprobs_BT
    assert scored.dtype == torch.float32
    # Two orders of the same sums, in three digits; a rare token is off by more.
    away = (scored - sampled.logprobs_BT).detach().abs()
    assert float(away.mean()) < 0.03
    assert float(away.max()) < 0.5
    data = job(recipe={"name": "ppo", "kl_coef": 0.1})
    record = run({**data, "policy": {**data["policy"], "precision": "bfloat16"}})
    assert all(math.isfinite(point["loss"]) for point in record.curve)
    with pytest.raises(WeightsError, match="precision='int4' is none of"):
        CausalLM(base=str(base), precision="int4")


def test_chosen_logprobs_are_those_of_a_softmax_with_its_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 7, generator=random)
    ids = torch.randint(7, (3, 4), generator=random)
    pull = torch.randn(3, 4, generator=random)
    found = []
    for make in (
        lambda x: chosen_logprobs(x, ids, 0.7),
        lambda x: (x / 0.7).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1),
    ):
        x = logits.clone().requires_grad_()
        value = make(x)
        (value * pull).sum().backward()
        found.append((value.detach(), x.grad))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


# Updates


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_an_adapter_and_says_what_it_did(
    name: str, job: Job, tmp_path: Path
) -> None:
    record = run(job(recipe={"name": name}))
    child = tmp_path / "child"
    assert {path.name for path in child.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "update.json",
    }  # fmt: skip
    assert left_behind(tmp_path) == {"child"}
    assert read_record(child) == record
    assert record.recipe["name"] == name
    report = record.report
    assert (report.ended, report.steps, len(record.curve)) == ("steps", 3, 3)
    assert all(math.isfinite(point["loss"]) for point in record.curve)
    assert any(
        tensor.any()
        for name, tensor in load_file(child / "adapter_model.safetensors").items()
        if "lora_B" in name
    )
    assert report.tokens > 0
    assert report.seconds > 0
    assert report.peak_memory_mib > 50
    assert report.reward_before is not None
    assert report.reward_after is not None
    assert report.entropy is not None
    assert 0 < report.entropy < math.log(60)
    assert (report.silent_share is None) == (name == "sft")
    assert read_record(child).packages["torch"] == torch.__version__


def test_an_update_teaches(job: Job) -> None:
    report = run(job(recipe={"name": "sft", "steps": 150, "batch": 30, "lr": 1e-2})).report
    assert report.reward_before is not None
    assert report.reward_after is not None
    assert report.reward_after > report.reward_before + 0.4
    assert report.kl is not None
    assert report.kl > 1


def test_the_child_starts_where_the_parent_ended(job: Job, tmp_path: Path) -> None:
    parent = str(tmp_path / "parent")
    first = run(job(recipe={"name": "grpo", "lr": 1e-2}, out=parent))
    before = tree_sha256(tmp_path / "parent")
    second = run(job(recipe={"name": "reinforce", "rank": 9}, parent=parent))
    assert second.report.reward_before == first.report.reward_after
    assert (second.parent, second.parent_sha256) == (parent, before)
    assert tree_sha256(tmp_path / "parent") == before
    assert second.report.parameters == first.report.parameters  # rank of the parent
    assert second.base_sha256 == first.base_sha256


def test_the_same_job_makes_the_same_adapter(job: Job, tmp_path: Path) -> None:
    data = job(recipe={"name": "ppo"})
    one, two = run(data), run({**data, "out": str(tmp_path / "again")})
    assert one.curve == two.curve
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("child", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_job_that_is_done_already_is_not_done_again(job: Job, tmp_path: Path) -> None:
    data = job(recipe={"name": "sft"})
    record = run(data)
    stamp = (tmp_path / "child" / "update.json").stat().st_mtime_ns
    assert run(data) == record
    assert (tmp_path / "child" / "update.json").stat().st_mtime_ns == stamp
    with pytest.raises(WeightsError, match="exists already"):
        run({**data, "seed": 4})


KILLED = (
    TRAIN
    + """
import os, pathlib, signal
counted = 0
plain = reward

def reward(item, answer):
    global counted
    counted += 1
    mark = pathlib.Path(__file__).with_name("killed")
    if counted > {after} and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(item, answer)
"""
)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_killed_update_ends_as_an_unbroken_one(name: str, job: Job, tmp_path: Path) -> None:
    """Killed with -9 while the third round is scored; two steps a round, a checkpoint each step."""
    chosen = {"name": name, "steps": 10, "epochs": 2, "kl_coef": 0.1}
    code = KILLED.replace("{after}", str(8 + 2 * 16 + 5))
    broken = job(recipe=chosen, train=code)
    (tmp_path / "job.json").write_text(json.dumps(broken))
    done = subprocess.run(
        [sys.executable, "-m", "sia.weights", str(tmp_path / "job.json")],
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "child").exists()
    kept = sorted(path.name for path in (tmp_path / ".child.update").glob("*.ckpt"))
    assert kept == ["step=4.ckpt"]
    (tmp_path / ".child.update" / "step=5.ckpt").write_bytes(b"cut short")
    resumed = run(broken)
    unbroken = run({**broken, "out": str(tmp_path / "unbroken")})
    assert resumed.curve == unbroken.curve
    assert len(resumed.curve) == 10
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("child", "unbroken"))
    assert all(torch.allclose(a[n], b[n], rtol=1e-5, atol=1e-7) for n in a)
    ours, theirs = resumed.report, unbroken.report
    assert (ours.tokens, ours.rounds, ours.reward_after) == (
        theirs.tokens, theirs.rounds, theirs.reward_after,
    )  # fmt: skip


@pytest.mark.parametrize("epochs", [1, 2])
def test_five_steps_and_five_are_ten(epochs: int, base: Path, tmp_path: Path) -> None:
    """The middle of a round, the optimiser's memory and the warm-up survive a checkpoint."""
    chosen = Grpo(items=4, group=4, steps=10, epochs=epochs, warmup=8, lr=3e-3)
    curves = {}
    for name, parts in (("broken", (5, 10)), ("unbroken", (10,))):
        (tmp_path / name).mkdir()
        for steps in parts:
            policy = CausalLM(base=str(base), rank=4, max_answer_tokens=6)
            task = length_task(rounds=math.ceil(steps / epochs))
            source = Rollouts(policy=policy, recipe=chosen, task=task, seed=1)
            if steps == 5:
                with pytest.raises(WeightsError, match="the power is gone"):
                    fitted(policy, chosen, source, tmp_path / name)
                kept = [path.name for path in (tmp_path / name).glob("*.ckpt")]
                assert kept == ["step=5.ckpt"]
            else:
                curves[name] = fitted(policy, chosen, source, tmp_path / name)
    assert [point["step"] for point in curves["broken"]] == list(range(1, 11))
    for ours, theirs in zip(curves["broken"], curves["unbroken"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def test_every_round_is_answered_by_the_policy_of_the_step_before(
    base: Path, tmp_path: Path
) -> None:
    """Nothing is sampled ahead, as data loaders like to do."""
    policy = CausalLM(base=str(base), rank=4, max_answer_tokens=6)
    chosen = Grpo(items=4, group=4, steps=5, warmup=0, lr=3e-3)
    seen: list[float] = []

    class Watched(Rollouts):
        def draw(self, number: int) -> Any:
            seen.append(sum(float(p.detach().abs().sum()) for p in policy.parameters()))
            return super().draw(number)

    fitted(
        policy, chosen, Watched(policy=policy, recipe=chosen, task=length_task(), seed=1), tmp_path
    )
    assert len(seen) == len(set(seen)) == 5


def test_an_interrupted_update_goes_on(job: Job, tmp_path: Path) -> None:
    code = KILLED.replace("{after}", "50").replace(
        "os.kill(os.getpid(), signal.SIGKILL)", "raise KeyboardInterrupt"
    )
    data = job(recipe={"name": "grpo", "steps": 6}, train=code)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(data)
    signal.signal(signal.SIGINT, handler)  # Lightning turns it off while it shuts down
    assert left_behind(tmp_path) == {".child.update", "killed"}
    resumed = run(data)
    assert resumed.curve == run({**data, "out": str(tmp_path / "unbroken")}).curve


def length_task(rounds: int = 1000) -> TrainTask:
    """Long answers are good; the reward fails after some rounds of 16 answers."""
    items = [Item(id=str(n), prompt=f"{n}?") for n in range(20)]
    asked = []

    def reward(item: Any, answer: str) -> float:
        asked.append(answer)
        if len(asked) > 16 * rounds:
            raise OSError("the power is gone")
        return float(len(answer))

    return TrainTask(items=items, rows={item.id: {} for item in items}, reward_of=reward)


def fitted(policy: Any, chosen: Any, source: Any, work: Path) -> list[dict[str, Any]]:
    return fit(
        policy=policy, recipe=chosen, source=source, work=work, seed=1, device="cpu",
        checkpoint_steps=5, deadline=None,
    ).curve  # fmt: skip


# Samples


def samples(**changes: Any) -> list[Sample]:
    return [
        Sample(
            item=f"{n}", prompt=f"{n} or 0?", answer=answer, reward=reward, group=f"g{n}", **changes
        )
        for n in range(1, 9)
        for answer, reward in ((f"{n}", 1.0), ("0", 0.2), ("x", 0.0), ("", None))
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_from_recorded_samples(name: str, job: Job, tmp_path: Path) -> None:
    write_samples(tmp_path / "samples.jsonl", samples())
    record = run(job(recipe={"name": name, "steps": 4}, samples=str(tmp_path / "samples.jsonl")))
    assert record.report.steps == 4
    assert record.report.unscored == (0 if name == "sft" else 8)


def test_samples_alone_are_enough(job: Job, tmp_path: Path) -> None:
    write_samples(tmp_path / "samples.jsonl", samples())
    data = job(recipe={"name": "dpo"}, samples=str(tmp_path / "samples.jsonl"))
    record = run({**data, "task": None, "public": None})
    assert record.report.reward_after is None
    assert record.curve[-1]["loss"] < math.log(2)


def test_recorded_answers_are_off_policy_after_the_first_step(policy: CausalLM) -> None:
    """Their log-probabilities are those of the policy that the update started from."""
    chosen = Grpo(items=4, steps=4, lr=1e-2)
    recorded = Recorded(policy=policy, recipe=chosen, samples=samples(), seed=0)
    start = recorded.draw(0).logprobs_BT
    disturb(policy)
    again = recorded.draw(0)
    assert start is not None
    assert again.logprobs_BT is not None
    assert torch.equal(again.logprobs_BT, start)
    assert not torch.allclose(policy.logprobs(again.tokens).logprobs_BT, start)


def test_step_rewards_are_paid_at_the_token_that_ends_the_step(policy: CausalLM) -> None:
    steps = (Step(end=2, reward=0.5), Step(end=4, reward=-1.0), Step(end=99, reward=2.0))
    made = [
        Sample(item="a", prompt="1", answer="1234", reward=9.0, group="a", step_rewards=steps),
        Sample(item="b", prompt="1", answer="12", reward=0.7, group="b"),
    ]
    chosen = Ppo(whiten=False, lam=1.0, gamma=1.0, epochs=1, steps=1, kl_coef=0)
    recorded = Recorded(policy=policy, recipe=chosen, samples=made, seed=0)
    answers = recorded.draw(0)
    order = answers.groups
    stream = Steps(policy=policy, recipe=chosen, source=recorded, seed=0)
    batch = next(iter(stream)).batch
    assert batch.targets_BT is not None
    # with gamma = lambda = 1 the targets are the rewards still to come
    returns = {0: [1.5, 1.5, 1.0, 1.0, 2.0], 1: [0.7, 0.7, 0.7, 0, 0]}
    expected = torch.tensor([returns[group] for group in order])
    assert torch.allclose(batch.targets_BT, expected, atol=1e-5)


# Failures: the right error, or the documented way on; the parent as it was


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TRAIN + "\ndef reward(item, answer): return float('nan')", "is nan, not a finite number"),
        (TRAIN + "\ndef reward(item, answer): return 'high'", "is 'high', not a finite number"),
        (TRAIN + "\ndef reward(item, answer): return 1 / 0", "failed on item .* ZeroDivisionError"),
        (TRAIN + "\ndef reward(item, answer): return None", r"None of the \d+ answers .* scored"),
        (TRAIN + "\ndef reward(item, answer): return 1", "in each of 80 groups all rewards"),
        (TRAIN + "\ndef items(public): return []", "found no train items"),
        (TRAIN + "\ndef items(public): return [{'id': 1}]", "an item without 'prompt'"),
        (TRAIN + "\ndef items(public): return [{'id': 1, 'prompt': ''}] * 2", "1 ids more than"),
        ("items = None", r"has no function items\(\)"),
        ("def", "cannot be read"),
    ],
)
def test_a_task_that_cannot_be_learned_from_is_named_and_nothing_is_left(
    train: str, message: str, job: Job, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=message):
        run(job(train=train, recipe={"name": "grpo"}, limits={"probe_items": 0}))
    assert left_behind(tmp_path) == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": {"name": "gropo"}}, "Did you mean 'grpo'"),
        ({"recipe": {"name": "grpo"}, "recipes": {}}, "unknown key 'recipes'"),
        ({"recipe": {"name": "grpo"}, "limits": {"wall": 3}}, "unknown key 'wall'"),
        ({"recipe": {"name": "grpo"}, "seed": "x"}, "Expected `int`, got `str`"),
        ({"recipe": {"name": "grpo"}, "device": "tpu"}, "none of auto, cpu, cuda"),
        ({"recipe": {"name": "grpo"}, "policy": {"kind": "rnn"}}, "policy.kind='rnn' is unknown"),
        (
            {"recipe": {"name": "grpo"}, "policy": {"kind": "causal_lm", "bass": 1}},
            "unexpected keyword argument 'bass'",
        ),
        ({"recipe": {"name": "grpo"}, "task": None}, "neither task nor samples"),
        ({"recipe": {"name": "grpo"}, "public": None}, "needs public"),
        ({"recipe": {"name": "grpo"}, "parent": "/nowhere"}, "holds no adapter"),
        ({"recipe": {"name": "grpo"}, "samples": "/nowhere"}, "cannot be read"),
        ({"recipe": {"name": "grpo"}, "limits": {"wall_s": 0}}, "wall_s=0.0 must be more than 0"),
        ({"recipe": {"name": "grpo"}, "limits": {"wall_s": 1e-3}}, "before the first step"),
    ],
)
def test_a_wrong_job_is_one_message_and_leaves_nothing(
    changes: dict[str, Any], message: str, job: Job, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=message):
        run(job(**changes))
    assert left_behind(tmp_path) == set()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no samples"),
        ('{"item": "1"}', "line 1 is not a sample: .* missing required field `prompt`"),
        (
            '{"item": "1", "prompt": "", "answer": "", "group": "", "reward": NaN}',
            "line 1 is not a sample",
        ),
        (
            '{"item": "1", "prompt": "", "answer": "", "group": "", "reward": null}',
            "None of the 1 samples has a reward",
        ),
    ],
)
def test_samples_that_cannot_be_used_are_named(
    lines: str, message: str, job: Job, tmp_path: Path
) -> None:
    (tmp_path / "samples.jsonl").write_text(lines)
    with pytest.raises(WeightsError, match=message):
        run(job(recipe={"name": "grpo"}, samples=str(tmp_path / "samples.jsonl")))
    with pytest.raises(WeightsError, match="is nan, not a finite number"):
        write_samples(
            tmp_path / "x", [Sample(item="1", prompt="", answer="", reward=math.nan, group="")]
        )


def test_sft_without_a_single_reference_says_what_else_there_is(job: Job) -> None:
    train = TRAIN + "\ndef items(public): return [{'id': '1', 'prompt': '1'}]"
    with pytest.raises(WeightsError, match=r"needs them. Recipes that need rewards only"):
        run(job(train=train, recipe={"name": "sft"}))


def test_a_loss_that_is_not_finite_ends_the_update(job: Job, tmp_path: Path) -> None:
    run(job(recipe={"name": "sft"}, out=str(tmp_path / "parent")))
    before = tree_sha256(tmp_path / "parent")
    data = job(recipe={"name": "sft", "lr": 1e30}, parent=str(tmp_path / "parent"))
    with pytest.raises(WeightsError, match=r"the loss is (nan|inf).*Lower the learning rate"):
        run(data)
    assert left_behind(tmp_path) == {"parent"}
    assert tree_sha256(tmp_path / "parent") == before


def test_a_full_disk_is_one_message_and_leaves_nothing(job: Job, tmp_path: Path) -> None:
    """The size of files is limited, so that checkpoints and adapter cannot be written."""
    data = job(recipe={"name": "sft"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limits in ({"checkpoint_steps": 1}, {"checkpoint_steps": 1000}):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
            with pytest.raises(WeightsError, match=r"Cannot write the adapter .* Free some space"):
                run({**data, "limits": {"probe_items": 0, **limits}})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert left_behind(tmp_path) == set()


def test_answers_without_a_reward_are_left_out_and_counted(job: Job) -> None:
    train = (
        TRAIN
        + "\nplain = reward\n"
        + ("def reward(item, answer): return None if len(answer) % 2 else plain(item, answer)")
    )
    report = run(job(train=train, recipe={"name": "grpo"})).report
    assert report.unscored > 0
    assert report.answers + report.unscored == report.rounds * 16


def test_groups_of_equal_rewards_are_counted(job: Job) -> None:
    train = TRAIN + "\ndef reward(item, answer): return float(answer[:1] == '7')"
    report = run(job(train=train, recipe={"name": "grpo", "items": 8})).report
    assert report.silent_share is not None
    assert 0.5 < report.silent_share < 1


def test_an_update_ends_in_time_with_the_steps_it_has(job: Job) -> None:
    record = run(job(recipe={"name": "grpo", "steps": 10**6}, limits={"wall_s": 5}))
    assert record.report.ended == "wall_s"
    assert 0 < record.report.steps < 10**6
    assert record.report.seconds < 5
    limited = job(
        recipe={"name": "grpo", "steps": 10**6},
        limits={"steps": 2},
        out=job(recipe={"name": "grpo"})["out"] + "2",
    )
    assert run(limited).report.steps == 2


def test_no_step_is_begun_that_would_end_after_the_deadline(policy: CausalLM) -> None:
    now = [0.0]
    chosen = Grpo(items=2, group=4, steps=50)
    source = Rollouts(policy=policy, recipe=chosen, task=length_task(), seed=0)
    steps = Steps(
        policy=policy, recipe=chosen, source=source, seed=0, deadline=100.0, clock=lambda: now[0]
    )
    for _ in steps:
        now[0] += 30.0
    # 0-30, 30-60; a third might end at 93 with its margin, a fourth at 123
    assert (steps.ended, now[0], steps.seconds) == ("wall_s", 90.0, 90.0)


class Cramped:
    """A policy in a memory that holds few answers at once."""

    def __init__(self, policy: CausalLM, holds: int) -> None:
        self._policy, self._holds, self.seen = policy, holds, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def logprobs(self, tokens: Any, **options: Any) -> Any:
        rows = len(tokens.mask_BT)
        self.seen.append(rows)
        if rows > self._holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return self._policy.logprobs(tokens, **options)


def test_a_step_that_runs_out_of_memory_is_repeated_in_halves(base: Path, tmp_path: Path) -> None:
    chosen = recipe({"name": "dpo", "items": 8, "steps": 3, "lr": 1e-2})
    curves = []
    for holds in (99, 5, 2):
        policy = CausalLM(base=str(base), rank=4, max_answer_tokens=6)
        cramped = Cramped(policy, holds)
        source = Recorded(policy=policy, recipe=chosen, samples=samples(), seed=0)
        (tmp_path / str(holds)).mkdir()
        curves.append(fitted(cramped, chosen, source, tmp_path / str(holds)))
        assert (max(cramped.seen) > holds) == (holds < 99)
        # found once, remembered for the steps after it
        assert cramped.seen.count(16) == (6 if holds == 99 else 4)
    for other in curves[1:]:
        for ours, theirs in zip(other, curves[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_memory_that_holds_nothing_is_an_error_and_other_errors_pass() -> None:
    def full(size: int) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(WeightsError, match=r"does not hold 2 answer\(s\)"):
        halving(full, 16, unit=2)
    with pytest.raises(RuntimeError, match="something else"):
        halving(lambda size: (_ for _ in ()).throw(RuntimeError("something else")), 4)
    circle: list[Any] = [torch.ones(1)]
    circle.append(circle)
    kept = weakref.ref(circle[0])
    del circle

    def fits_without(size: int) -> int:
        if kept() is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size

    assert halving(fits_without, 4).value == 2
    sizes = []

    def cpu(size: int) -> int:
        sizes.append(size)
        if size > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return size

    assert halving(cpu, 13).value == 3
    assert sizes == [13, 6, 3]


# The command


def test_the_command_prints_its_report_or_one_message(job: Job, tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    for data, code in ((job(recipe={"name": "sft"}), 0), (job(recipe={"name": "x"}), 2)):
        path.write_text(json.dumps(data))
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "sia.weights", str(path)],
            capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        if code:
            assert done.stderr.startswith("sia: There is no recipe 'x'.")
            assert done.stderr.count("\n") == 1
        else:
            assert done.stderr == ""
            assert json.loads(done.stdout)["steps"] == 3


def test_the_task_is_read_from_its_public_side_alone(public: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    task = load_train_task(tmp_path / "train.py", public)
    assert len(task.items) == 90
    assert task.reward(task.items[0], task.items[0].reference or "") == 1.125
