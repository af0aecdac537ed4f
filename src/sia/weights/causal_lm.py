"""Policy `causal_lm`: any Hugging Face causal language model with a PEFT adapter.

Letters: B answers, N prompts, G answers a prompt, P prompt tokens (padded to the left), T answer
tokens (padded to the right), V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sia.errors import WeightsError
from sia.weights import adapter
from sia.weights.cache import grouped, sampling_cache, shared_cache
from sia.weights.decode import Capture, Decoder, cuda_graph
from sia.weights.lora import LoraLinear, narrow
from sia.weights.memory import halving
from sia.weights.policy import Sampled, Scores, Tokens

_CHUNK_BYTES = 64 * 2**20
_BLOCK = 64  # tokens


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer whose adapter is merged, and the weights it had before."""

    layer: Any
    weight: Tensor


@dataclass(frozen=True, kw_only=True)
class _Generated:
    """Answers, (B, T), with 0 on the padding of all but the ids."""

    answers_BT: Tensor
    logprobs_BT: Tensor
    mask_BT: Tensor


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """What the model says before some tokens of the answers: logits, and states if wanted."""

    logits_BTV: Tensor
    hidden_BTD: Tensor | None

    @classmethod
    def of(cls, out: Any, where: slice, hidden: bool) -> _Pass:
        """From some places of a model's output."""
        states_BTD = out.hidden_states[-1][:, where] if hidden else None
        return cls(logits_BTV=out.logits[:, where], hidden_BTD=states_BTD)

    def rows(self, index: Tensor) -> _Pass:
        """One row for each index."""
        hidden_BTD = None if self.hidden_BTD is None else self.hidden_BTD.index_select(0, index)
        return _Pass(logits_BTV=self.logits_BTV.index_select(0, index), hidden_BTD=hidden_BTD)


class CausalLM:
    """A frozen base, an adapter on its linear layers, and a value head if asked for.

    Attributes:
        capture: What records a pass while answers are written; None: each is made anew.
    """

    def __init__(
        self,
        *,
        base: str,
        rank: int = 16,
        alpha: float = 32.0,
        dora: bool = False,
        targets: str = "all-linear",
        values: bool = False,
        max_prompt_tokens: int = 1024,
        max_answer_tokens: int = 256,
        checkpoint_activations: bool = False,
        device: str = "cpu",
        precision: str = "auto",
        download: bool = False,
        seed: int = 0,
    ) -> None:
        """Loads the base and puts a fresh adapter on it, which changes nothing yet.

        Args:
            base: A folder, or an id of the model hub.
            rank: Of the adapter.
            alpha: The adapter is scaled by alpha / rank.
            dora: DoRA instead of LoRA.
            targets: `all-linear`, or comma-separated names of linear layers.
            values: Whether to make a value head.
            max_prompt_tokens: Longer prompts lose their beginning.
            max_answer_tokens: Longer answers lose their end.
            checkpoint_activations: Compute activations twice instead of keeping them.
            device: `cpu`, `cuda`, or `cuda:1`.
            precision: Of the base, `float32` or `bfloat16`; `auto` is the latter on a GPU. What is
                trained is float32 in any case.
            download: Whether the base may be fetched; otherwise it has to be on this machine.
            seed: Of the fresh adapter.

        Raises:
            WeightsError: The base cannot be loaded, or has no end-of-text token; the precision is
                unknown.
        """
        if precision not in ("auto", "float32", "bfloat16"):
            raise WeightsError(f"precision={precision!r} is none of auto, float32, bfloat16.")
        self.base = base
        self.max_prompt_tokens, self.max_answer_tokens = max_prompt_tokens, max_answer_tokens
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self._half = precision == "bfloat16" or (precision == "auto" and on_gpu)
        self._tokenizer, model = _load(
            base, download, torch.bfloat16 if self._half else torch.float32
        )
        end = model.generation_config.eos_token_id if model.generation_config else None
        ends = end if isinstance(end, list) else [end]
        self._ends = sorted({e for e in (*ends, self._tokenizer.eos_token_id) if e is not None})
        if not self._ends:
            raise WeightsError(
                f"base={base!r} has no end-of-text token, so its answers never end. Set eos_token "
                "in its tokenizer_config.json."
            )
        self._end = self._tokenizer.eos_token_id
        if self._end is None:
            self._end = self._ends[0]
        self._pad = self._tokenizer.pad_token_id
        if self._pad is None:
            self._pad = self._end
        # In bfloat16, so that a base has one identity in both precisions.
        self.base_sha256 = adapter.identity(model, precision=torch.bfloat16)
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        self._seed = seed
        self.capture: Capture | None = cuda_graph if on_gpu else None
        self._sample_size = 2**20  # prompts that are answered at once; less where memory ran out
        self._checkpoint = checkpoint_activations
        model.to(self.device)
        if checkpoint_activations:
            model.activation_checkpointing_enable({"use_reentrant": False})
        config = adapter.lora_config(
            rank=rank, alpha=alpha, dora=dora, targets=targets, task_type="CAUSAL_LM"
        )
        self._peft = self._adapted(model, config)
        width = model.config.get_text_config().hidden_size
        self._value_head = adapter.Head(width, 1).to(self.device) if values else None
        self._module = nn.ModuleDict({"model": self._peft})
        if self._value_head is not None:
            self._module["value_head"] = self._value_head

    @property
    def module(self) -> nn.Module:
        """The model, its adapter, and its value head."""
        return self._module

    def parameters(self) -> list[nn.Parameter]:
        """The adapter, then the value head."""
        return [p for p in self._module.parameters() if p.requires_grad]

    # From text to tokens and back

    def encode(self, prompts: Sequence[str], answers: Sequence[str]) -> Tokens:
        """Prompts and given answers; an answer is followed by the end-of-text token."""
        prompts_NP, prompt_mask_NP, cut = self._prompts(prompts)
        rows = []
        for answer in answers:
            ids = [*self._tokenizer(answer, add_special_tokens=False)["input_ids"], self._end]
            cut += len(ids) > self.max_answer_tokens
            rows.append(ids[: self.max_answer_tokens])
        longest = max((len(row) for row in rows), default=1)
        answers_BT = torch.tensor(
            [row + [self._pad] * (longest - len(row)) for row in rows], device=self.device
        ).reshape(len(rows), longest)
        lengths_B = torch.tensor([len(row) for row in rows], device=self.device)
        mask_BT = (torch.arange(longest, device=self.device) < lengths_B[:, None]).float()
        inputs = {"prompts": prompts_NP, "prompt_mask": prompt_mask_NP, "answers": answers_BT}
        width = prompts_NP.shape[1] + longest
        return Tokens(inputs=inputs, mask_BT=mask_BT, width=width, cut=cut)

    def ends(self, tokens: Tokens) -> Tensor:
        """Characters of the answer up to and including each token."""
        ends_BT = torch.zeros_like(tokens.inputs["answers"])
        lengths = tokens.mask_BT.sum(1).long().tolist()
        for b, (row, n) in enumerate(zip(tokens.inputs["answers"].tolist(), lengths, strict=True)):
            for t in range(len(row)):
                ends_BT[b, t] = len(self._text(row[: min(t + 1, n)]))
        return ends_BT

    def _prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        """Ids and mask, (N, P) each, padded to the left, and how many prompts were cut."""
        rows, cut = [], 0
        for prompt in prompts:
            if self._tokenizer.chat_template:
                text = self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    add_generation_prompt=True,
                    tokenize=False,
                )
                ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            else:
                ids = self._tokenizer(prompt)["input_ids"]
            cut += len(ids) > self.max_prompt_tokens
            rows.append(ids[-self.max_prompt_tokens :] or [self._end])
        longest = max((len(row) for row in rows), default=1)
        ids_NP = torch.tensor([[self._pad] * (longest - len(row)) + row for row in rows])
        mask_NP = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        shape = (len(rows), longest)
        return ids_NP.reshape(shape).to(self.device), mask_NP.reshape(shape).to(self.device), cut

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    # Answering

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], *, group: int, temperature: float, seed: int
    ) -> Sampled:
        """`group` answers to each prompt; each prompt is read once, whatever the group.

        Answers that are finished leave the batch when half of it is.
        """
        prompts_NP, prompt_mask_NP, cut = self._prompts(prompts)

        def run(size: int) -> list[_Generated]:
            generator = torch.Generator(self.device).manual_seed(seed)
            with self._answering(), self._precision():
                return [
                    self._generate(
                        prompts_NP[k : k + size], prompt_mask_NP[k : k + size],
                        group, temperature, generator,
                    )
                    for k in range(0, len(prompts), size)
                ]  # fmt: skip

        # A part is a whole prompt at least; other parts draw other answers from the same seed.
        done = halving(run, min(self._sample_size, max(len(prompts), 1)))
        if done.size < len(prompts):
            self._sample_size = done.size
        longest = max((part.mask_BT.shape[1] for part in done.value), default=1)
        answers_BT = torch.cat(
            [_widened(part.answers_BT, longest, self._pad) for part in done.value]
        )
        mask_BT = torch.cat([_widened(part.mask_BT, longest) for part in done.value])
        logprobs_BT = torch.cat([_widened(part.logprobs_BT, longest) for part in done.value])
        inputs = {
            "prompts": prompts_NP.repeat_interleave(group, 0),
            "prompt_mask": prompt_mask_NP.repeat_interleave(group, 0),
            "answers": answers_BT,
        }
        lengths = mask_BT.sum(1).long().tolist()
        texts = [
            self._text(row[:length])
            for row, length in zip(answers_BT.tolist(), lengths, strict=True)
        ]
        width = prompts_NP.shape[1] + longest
        tokens = Tokens(inputs=inputs, mask_BT=mask_BT, width=width, cut=cut)
        return Sampled(answers=texts, tokens=tokens, logprobs_BT=logprobs_BT)

    def _generate(
        self,
        prompts_NP: Tensor,
        prompt_mask_NP: Tensor,
        group: int,
        temperature: float,
        generator: torch.Generator,
    ) -> _Generated:
        """Answers to some prompts."""
        model = self._peft.get_base_model()
        N, limit = prompts_NP.shape[0], self.max_answer_tokens
        B = N * group
        answers_BT = prompts_NP.new_full((B, limit), self._pad)
        logprobs_BT = torch.zeros(B, limit, device=self.device)
        mask_BT = torch.zeros(B, limit, device=self.device)
        ends = torch.tensor(self._ends, device=self.device)
        rows_A = torch.arange(B, device=self.device)  # A answers are still being written
        alive_A = torch.ones(B, dtype=torch.bool, device=self.device)
        with sampling_cache(model, prompt_mask_NP) as cache:
            out = self._read(
                model, prompts_NP, prompt_mask_NP, _positions(prompt_mask_NP), 1,
                cache=cache, use_cache=True,
            )  # fmt: skip
            cache.batch_repeat_interleave(group)
            logits_AV = out.logits[:, -1].repeat_interleave(group, 0)
            seen_AL = prompt_mask_NP.repeat_interleave(group, 0)
            positions_A1 = seen_AL.sum(1, keepdim=True)
            masked = not (grouped(cache) and "position_ids" in self._accepts)
            decoder = Decoder(
                read=lambda ids_A1, positions_A1: self._read(
                    model, ids_A1, seen_AL if masked else None, positions_A1, 1,
                    cache=cache, use_cache=True,
                ).logits[:, -1],
                cache=cache, limit=limit, capture=None if masked else self.capture,
            )  # fmt: skip
            for t in range(limit):
                logp_AV = _cooled(logits_AV, temperature).log_softmax(-1)
                next_A = drawn(logp_AV, generator)
                next_A.masked_fill_(~alive_A, self._pad)
                chosen_A = logp_AV.gather(1, next_A[:, None]).squeeze(1)
                answers_BT[:, t].index_copy_(0, rows_A, next_A)
                logprobs_BT[:, t].index_copy_(0, rows_A, chosen_A.masked_fill_(~alive_A, 0.0))
                mask_BT[:, t].index_copy_(0, rows_A, alive_A.float())
                alive_A = alive_A & ~torch.isin(next_A, ends)
                left = int(alive_A.sum())
                if left == 0 or t + 1 == limit:
                    break
                if left <= len(rows_A) // 2:
                    decoder.select(alive_A.nonzero().flatten())
                    rows_A, next_A, seen_AL = rows_A[alive_A], next_A[alive_A], seen_AL[alive_A]
                    positions_A1, alive_A = positions_A1[alive_A], alive_A[alive_A]
                if masked:
                    seen_AL = torch.cat([seen_AL, seen_AL.new_ones(len(rows_A), 1)], 1)
                logits_AV = decoder(next_A[:, None], positions_A1)
                positions_A1 = positions_A1 + 1
        longest = int(mask_BT.sum(1).max())
        return _Generated(
            answers_BT=answers_BT[:, :longest],
            logprobs_BT=logprobs_BT[:, :longest],
            mask_BT=mask_BT[:, :longest],
        )

    # Scoring

    def logprobs(
        self,
        tokens: Tokens,
        *,
        temperature: float = 1.0,
        base: bool = False,
        entropy: bool = False,
        values: bool = False,
    ) -> Scores:
        """Scores of given answers; padding that all of them share costs nothing.

        A prompt whose answers stand side by side is read once, and its gradient is theirs.
        """
        B, T = tokens.mask_BT.shape
        lengths_B = tokens.mask_BT.sum(1)
        longest = max(int(lengths_B.max()), 1) if B else 1
        prompt_mask_BP = tokens.inputs["prompt_mask"]
        start = int(prompt_mask_BP.any(0).int().argmax()) if B else 0
        mask_BT = tokens.mask_BT[:, :longest]
        answers_BT = tokens.inputs["answers"][:, :longest]
        switched = self._peft.disable_adapter() if base else contextlib.nullcontext()
        if self._checkpoint:
            self._peft.train(torch.is_grad_enabled())
        with switched, self._precision():
            passes = self._passes(
                tokens.inputs["prompts"][:, start:], prompt_mask_BP[:, start:], answers_BT,
                mask_BT.to(prompt_mask_BP.dtype), values,
            )  # fmt: skip
        found: dict[str, list[Tensor]] = {"logprobs_BT": [], "entropy_BT": [], "values_BT": []}
        for one in passes:
            ids_BT, answers_BT = answers_BT.tensor_split([one.logits_BTV.shape[1]], 1)
            found["logprobs_BT"].append(chosen_logprobs(one.logits_BTV, ids_BT, temperature))
            if entropy:
                found["entropy_BT"].append(_entropy(one.logits_BTV, temperature))
            if values:
                assert self._value_head is not None
                assert one.hidden_BTD is not None
                found["values_BT"].append(self._value_head(one.hidden_BTD.float()).squeeze(-1))
        joined = {
            name: _widened(torch.cat(parts, 1) * mask_BT, T)
            for name, parts in found.items() if parts
        }  # fmt: skip
        return Scores(**joined)

    def _passes(
        self, prompts_BP: Tensor, prompt_mask_BP: Tensor, answers_BT: Tensor, mask_BT: Tensor,
        hidden: bool,
    ) -> list[_Pass]:  # fmt: skip
        """What the model says before each token of the answers, in the order of the tokens."""
        B, T = answers_BT.shape
        seen_BL = torch.cat([prompt_mask_BP, mask_BT], 1)
        positions_BL = _positions(seen_BL)
        first_N, prompt_B = _neighbours(prompts_BP, prompt_mask_BP)
        cache = None
        if 2 * len(first_N) <= B and not self._checkpoint:
            cache = shared_cache(self._peft.get_base_model().config)
        if cache is None:
            out = self._read(
                self._peft, torch.cat([prompts_BP, answers_BT], 1), seen_BL, positions_BL, T + 1,
                use_cache=False, output_hidden_states=hidden,
            )  # fmt: skip
            return [_Pass.of(out, slice(-T - 1, -1), hidden)]
        out = self._read(
            self._peft, prompts_BP[first_N], prompt_mask_BP[first_N],
            _positions(prompt_mask_BP[first_N]), 1,
            cache=cache, use_cache=True, output_hidden_states=hidden,
        )  # fmt: skip
        passes = [_Pass.of(out, slice(-1, None), hidden).rows(prompt_B)]
        if T > 1:
            cache.reorder_cache(cast(Any, prompt_B))
            out = self._read(
                self._peft, answers_BT[:, :-1], seen_BL[:, :-1], positions_BL[:, -T:-1], T - 1,
                cache=cache, use_cache=True, output_hidden_states=hidden,
            )  # fmt: skip
            passes.append(_Pass.of(out, slice(-T + 1, None), hidden))
        return passes

    def _read(
        self,
        model: Any,
        ids_BL: Tensor,
        seen_BL: Tensor | None,
        positions_BL: Tensor,
        keep: int,
        **options: Any,
    ) -> Any:
        """One pass through the model; positions and `keep` for those that know of them."""
        if "position_ids" in self._accepts:
            options["position_ids"] = positions_BL
        if "logits_to_keep" in self._accepts:
            options["logits_to_keep"] = keep
        return model(input_ids=ids_BL, attention_mask=seen_BL, **options)

    # The adapter

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter in PEFT's format, and the value head beside it."""
        marks = {adapter.BASE_KEY: self.base_sha256}
        adapter.write(folder, self._peft, marks=marks, value_head=self._value_head)

    def load_adapter(self, folder: Path) -> None:
        """Reads an adapter; its rank, alpha, targets and kind replace those of the fresh one."""
        stored = adapter.read(folder)
        base_sha256 = stored.marks.get(adapter.BASE_KEY)
        if base_sha256 is not None and base_sha256 != self.base_sha256:
            raise WeightsError(
                f"The adapter in {folder} was made for the base "
                f"{stored.settings.get('base_model_name_or_path')!r} ({base_sha256[:12]}), not for "
                f"{self.base!r} ({self.base_sha256[:12]}). Give it its own base: policy.base=..."
            )
        self._peft = self._adapted(self._peft.unload(), stored.config)
        self._module["model"] = self._peft
        if unknown := adapter.fill(self._peft, stored, folder, self._value_head):
            raise WeightsError(
                f"The adapter in {folder} has weights for layers that {self.base!r} lacks, for "
                f"example {unknown[0]!r}."
            )

    def _adapted(self, model: Any, config: Any) -> Any:
        config._register_custom_module({nn.Linear: LoraLinear})
        with warnings.catch_warnings():
            # Of models whose linear layers are stored transposed; PEFT turns the flag itself.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            # PEFT 0.21 asks transformers 5.24 by a name that it has just given up.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing")
            return adapter.attach(
                model, config, base=self.base, device=self.device, seed=self._seed
            )

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """With the adapter merged into a base of float32: sampling costs what the base costs."""
        if self._checkpoint:
            self._peft.eval()
        if self._half:
            # Not merged: rounded to bfloat16, small steps of the adapter would vanish in the base.
            with narrow(self._peft, torch.bfloat16):
                yield
            return
        from peft.tuners.lora.layer import LoraLayer

        merged = []
        try:
            for layer in self._peft.modules():
                if isinstance(layer, LoraLayer):
                    linear: Any = layer
                    weight = linear.get_base_layer().weight.detach().clone()
                    merged.append(_Layer(layer=linear, weight=weight))
                    linear.merge()
            yield
        finally:
            for one in merged:
                one.layer.unmerge()
                # Bit by bit as before: adding and subtracting would leave a rounding error.
                one.layer.get_base_layer().weight.data.copy_(one.weight)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if not self._half:
            return contextlib.nullcontext()
        # Nothing is cast twice in a pass; a recorded one must not keep casts for the others.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)


def _load(base: str, download: bool, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and model; dropout is switched off in the model's own configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    cast(Any, transformers_logging).disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    here = {"local_files_only": not download}
    try:
        config = AutoConfig.from_pretrained(base, **here)
        for name, value in vars(config.get_text_config()).items():
            if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
                setattr(config.get_text_config(), name, 0.0)
        tokenizer = AutoTokenizer.from_pretrained(base, **here)
        model: Any = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=dtype, **here)
    except (OSError, ValueError, KeyError) as error:
        fetch = "" if download else " If it may be fetched from the model hub: policy.download=true"
        raise WeightsError(
            f"base={base!r} cannot be loaded: {str(error).splitlines()[0]}{fetch}"
        ) from error
    model.requires_grad_(False)
    model.eval()
    return tokenizer, model


def drawn(logp_AV: Tensor, generator: torch.Generator) -> Tensor:
    """A token from each distribution, (A,), for two random numbers each.

    A block of tokens is drawn, then one of its tokens: neither as many random numbers as there are
    tokens, as `torch.multinomial` draws, nor long running sums, which lose digits.
    """
    A, V = logp_AV.shape
    p_ANK = _widened(logp_AV.exp(), V + -V % _BLOCK).view(A, -1, _BLOCK)
    block_A = _one_of(p_ANK.sum(-1), generator)
    rows_A = torch.arange(A, device=logp_AV.device)
    return block_A * _BLOCK + _one_of(p_ANK[rows_A, block_A], generator)


def _one_of(shares_AN: Tensor, generator: torch.Generator) -> Tensor:
    """An index into each row, (A,), as likely as its share of the row's sum."""
    sums_AN = shares_AN.cumsum(-1, dtype=torch.float64)
    total_A1 = sums_AN[:, -1:]
    point_A1 = total_A1 * torch.rand(
        total_A1.shape, dtype=torch.float64, device=shares_AN.device, generator=generator
    )
    # Rounding may take a point up to the total, behind the last index.
    point_A1 = torch.minimum(point_A1, torch.nextafter(total_A1, torch.zeros_like(total_A1)))
    return torch.searchsorted(sums_AN, point_A1, right=True).squeeze(1)


def _neighbours(prompts_BP: Tensor, mask_BP: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each run of equal prompts, (N,), and the run that each row is in, (B,)."""
    new_B = torch.ones(len(prompts_BP), dtype=torch.bool, device=prompts_BP.device)
    new_B[1:] = (
        (prompts_BP[1:] != prompts_BP[:-1]) | (mask_BP[1:] != mask_BP[:-1])
    ).any(1)  # fmt: skip
    return new_B.nonzero().flatten(), new_B.cumsum(0) - 1


def _positions(mask_BL: Tensor) -> Tensor:
    return (mask_BL.cumsum(1) - 1).clamp(min=0)


def _widened(values_BT: Tensor, width: int, fill: int = 0) -> Tensor:
    return nn.functional.pad(values_BT, (0, width - values_BT.shape[1]), value=fill)


def _cooled(logits: Tensor, temperature: float) -> Tensor:
    """Logits over temperature, in float32."""
    return logits.float() if temperature == 1.0 else logits.float() / temperature


def _entropy(logits_BTV: Tensor, temperature: float) -> Tensor:
    logp_BTV = _cooled(logits_BTV, temperature).log_softmax(-1)
    return -(logp_BTV.exp() * logp_BTV).sum(-1)


def chosen_logprobs(logits_BTV: Tensor, ids_BT: Tensor, temperature: float) -> Tensor:
    """The log softmax(logits / temperature) at the given tokens, (B, T), in float32."""
    found: Tensor = _LogProbs.apply(logits_BTV, ids_BT, temperature)  # type: ignore[no-untyped-call]
    return found


class _LogProbs(torch.autograd.Function):
    """See `chosen_logprobs`; makes no second tensor of size (B, T, V) on the way there.

    What is kept for the gradient is the logits themselves and one number a token; both directions
    work in slices of a few dozen MiB.
    """

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, ids_BT: Tensor, temperature: float) -> Tensor:
        B, T, V = logits_BTV.shape
        norm_BT = torch.empty(B, T, device=logits_BTV.device)
        for rows in _slices(B, T * V):
            norm_BT[rows] = torch.logsumexp(_cooled(logits_BTV[rows], temperature), -1)
        ctx.save_for_backward(logits_BTV, ids_BT, norm_BT)
        ctx.temperature = temperature
        chosen_BT = logits_BTV.gather(-1, ids_BT[..., None]).squeeze(-1)
        return chosen_BT.float() / temperature - norm_BT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_BTV, ids_BT, norm_BT = ctx.saved_tensors
        pull_BT = grads[0] / ctx.temperature
        found_BTV = torch.empty_like(logits_BTV)
        B, T, V = logits_BTV.shape
        for rows in _slices(B, T * V):
            part = (_cooled(logits_BTV[rows], ctx.temperature) - norm_BT[rows, :, None]).exp_()
            part.mul_(-pull_BT[rows, :, None])
            chosen_BT1 = ids_BT[rows, :, None]
            part.scatter_(-1, chosen_BT1, part.gather(-1, chosen_BT1) + pull_BT[rows, :, None])
            found_BTV[rows] = part.to(found_BTV.dtype)
        return found_BTV, None, None


def _slices(rows: int, row_elements: int) -> Iterator[slice]:
    """Slices of rows that take up to `_CHUNK_BYTES` in float32, at least one row each."""
    size = max(1, _CHUNK_BYTES // max(4 * row_elements, 1))
    for start in range(0, rows, size):
        yield slice(start, start + size)
