"""Policy `label`: an encoder with a head over a closed set of labels; an answer is one label.

The lower layers of the encoder are frozen, so what they make of a prompt is computed once and kept.
The adapter is LoRA on the linear layers above them, and the head. With the adapter off, all labels
are equally likely: the base knows the language and none of the labels.

Letters: B answers, N prompts, P prompt tokens (padded to the right), D width of the encoder,
C labels. An answer has T = 1 token.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sia.errors import WeightsError
from sia.weights import adapter
from sia.weights.policy import Sampled, Scores, Tokens

POOLING_FILE = "pooling.safetensors"
LABELS_KEY = "sia.labels_sha256"
CALIBRATION_TEXTS = 256
CHUNK_TOKENS = 4096  # that pass through the frozen layers at once


# Kept for the process, so that the policies of a cross-fit read every prompt once. Two bytes a
# number: 6,000 prompts of 150 tokens and width 384 take 700 MiB.
_STATES: dict[tuple[str, int, bool], dict[tuple[int, ...], Tensor]] = {}


class Label:
    """A frozen encoder, LoRA on its upper layers, and a head over the labels.

    In float32 on a CPU; in bfloat16 on a GPU and on CPUs that multiply matrices in it, both with a
    float32 adapter.
    """

    def __init__(
        self,
        *,
        base: str,
        labels: str,
        calibration: str,
        column: str = "text",
        upper_layers: int = 2,
        prefix: str = "",
        max_prompt_tokens: int = 192,
        rank: int = 16,
        alpha: float = 32.0,
        dora: bool = False,
        targets: str = "all-linear",
        values: bool = False,
        half: bool | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        """Loads the base and puts a fresh adapter on it.

        Args:
            base: Folder of a Hugging Face encoder of the BERT family and its tokenizer.
            labels: JSON file with the list of labels.
            calibration: CSV file. Its first texts centre and scale what the base makes of a text;
                no label is read.
            column: Of the texts in that file.
            upper_layers: Layers that are adapted, counted from the last; the rest is frozen.
            prefix: Put in front of every prompt, where the base was trained so.
            max_prompt_tokens: Longer prompts lose their end.
            rank: Of the adapter.
            alpha: The adapter is scaled by alpha / rank.
            dora: DoRA instead of LoRA.
            targets: `all-linear`, or comma-separated names of linear layers.
            values: Whether to make a value head.
            half: Whether to compute in bfloat16; None: where the device is fast at it.
            device: `cpu`, `cuda`, or `cuda:1`.
            seed: Of the fresh adapter.

        Raises:
            WeightsError: A file cannot be read, or the base is no encoder of this family.
        """
        self.base = base
        self.labels = _labels(Path(labels))
        self.max_answer_tokens = 1
        self.device = torch.device(device)
        self._index = {label: k for k, label in enumerate(self.labels)}
        self._prefix, self._limit, self._seed = prefix, max_prompt_tokens, seed
        self._half = _is_fast_in_half(self.device) if half is None else half
        self._tokenizer, encoder = _load(base)
        self._pad = self._tokenizer.pad_token_id or 0
        self.base_sha256 = adapter.identity(encoder)
        layers = encoder.encoder.layer
        if not 0 < upper_layers <= len(layers):
            raise WeightsError(
                f"policy.upper_layers={upper_layers!r}: base={base!r} has {len(layers)} layers."
            )
        self._lower = encoder.to(self.device)
        upper = layers[len(layers) - upper_layers :]
        encoder.encoder.layer = layers[: len(layers) - upper_layers]
        # What the frozen layers make of a prompt; its key is the prompt's tokens.
        self._states = _STATES.setdefault((self.base_sha256, upper_layers, self._half), {})
        width = encoder.config.hidden_size
        tower = _Tower(upper, width, len(self.labels)).to(self.device)
        self._calibrate(tower, _texts(Path(calibration), column))
        linear = [name for name, m in tower.named_modules() if isinstance(m, nn.Linear)]
        config = adapter.lora_config(
            rank=rank, alpha=alpha, dora=dora, targets=targets,
            all_linear=[name for name in linear if name != "head"], modules_to_save=["head"],
        )  # fmt: skip
        self._peft = self._adapted(tower, config)
        self._value_head = adapter.Head(width, 1).to(self.device) if values else None
        self._module = nn.ModuleDict({"lower": self._lower, "tower": self._peft})
        if self._value_head is not None:
            self._module["value_head"] = self._value_head

    @property
    def module(self) -> nn.Module:
        """The frozen layers, the adapted layers with the head, and the value head."""
        return self._module

    def parameters(self) -> list[nn.Parameter]:
        """The adapter with the head, then the value head."""
        return [p for p in self._module.parameters() if p.requires_grad]

    # From text to tokens and back

    def encode(self, prompts: Sequence[str], answers: Sequence[str]) -> Tokens:
        """Prompts and given labels."""
        for answer in answers:
            if answer not in self._index:
                raise WeightsError(
                    f"The answer {answer[:80]!r} is none of the {len(self.labels)} labels."
                )
        ids_NP, cut = self._prompts(prompts)
        chosen_BT = torch.tensor([[self._index[answer]] for answer in answers], dtype=torch.long)
        return self._tokens(ids_NP, chosen_BT.reshape(len(answers), 1).to(self.device), cut)

    def ends(self, tokens: Tokens) -> Tensor:
        """Characters of each label."""
        lengths = [[len(self.labels[k]) for k in row] for row in tokens.inputs["answers"].tolist()]
        return torch.tensor(lengths, dtype=torch.long, device=self.device).reshape(-1, 1)

    def _prompts(self, prompts: Sequence[str]) -> tuple[Tensor, int]:
        """Ids, (N, P), -1 for padding, and how many prompts were cut."""
        rows, cut = [], 0
        if prompts:
            found = self._tokenizer([self._prefix + prompt for prompt in prompts])["input_ids"]
            cut = sum(len(ids) > self._limit for ids in found)
            rows = [ids if len(ids) <= self._limit else _cut(ids, self._limit) for ids in found]
        longest = max((len(row) for row in rows), default=1)
        ids_NP = torch.tensor([row + [-1] * (longest - len(row)) for row in rows], dtype=torch.long)
        return ids_NP.reshape(len(rows), longest), cut

    def _tokens(self, ids_BP: Tensor, answers_BT: Tensor, cut: int) -> Tokens:
        mask_BT = torch.ones(len(answers_BT), 1, device=self.device)
        inputs = {"prompts": ids_BP.to(self.device), "answers": answers_BT}
        return Tokens(inputs=inputs, mask_BT=mask_BT, width=ids_BP.shape[1] + 1, cut=cut)

    # Answering

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], *, group: int, temperature: float, seed: int
    ) -> Sampled:
        """`group` labels for each prompt; each prompt is read once, whatever the group."""
        generator = torch.Generator(self.device).manual_seed(seed)
        ids_NP, cut = self._prompts(prompts)
        logp_NC = self._log_probabilities(ids_NP, temperature)
        chosen_NG = torch.multinomial(logp_NC.exp(), group, replacement=True, generator=generator)
        answers_BT = chosen_NG.reshape(-1, 1)
        logprobs_BT = logp_NC.gather(1, chosen_NG).reshape(-1, 1)
        tokens = self._tokens(ids_NP.repeat_interleave(group, 0), answers_BT, cut)
        answers = [self.labels[k] for k in answers_BT.flatten().tolist()]
        return Sampled(answers=answers, tokens=tokens, logprobs_BT=logprobs_BT)

    @torch.no_grad()
    def scores(self, prompts: Sequence[str]) -> Tensor:
        """Log-probabilities of all labels, (N, C), on the CPU."""
        return self._log_probabilities(self._prompts(prompts)[0], 1.0).cpu()

    def _log_probabilities(self, ids_NP: Tensor, temperature: float) -> Tensor:
        """(N, C), in parts of similar length, so that little padding is read."""
        logits_NC = torch.zeros(len(ids_NP), len(self.labels), device=self.device)
        for rows in _parts((ids_NP >= 0).sum(1)):
            logits_NC[rows] = self._tower(ids_NP[rows])[0]
        return (logits_NC / temperature).log_softmax(1)

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
        """Scores of given labels; a prompt that occurs several times is read once."""
        ids_BP = tokens.inputs["prompts"].cpu()
        with self._peft.disable_adapter() if base else contextlib.nullcontext():
            if len(ids_BP):
                ids_NP, row_B = torch.unique(ids_BP, dim=0, return_inverse=True)
                logits_NC, state_ND = self._tower(ids_NP)
                logits_BC, state_BD = logits_NC[row_B], state_ND[row_B]
            else:
                logits_BC = torch.zeros(0, len(self.labels), device=self.device)
                state_BD = torch.zeros(0, self._lower.config.hidden_size, device=self.device)
        logp_BC = (logits_BC / temperature).log_softmax(1)
        entropy_BT = values_BT = None
        if entropy:
            entropy_BT = -(logp_BC.exp() * logp_BC).sum(1, keepdim=True)
        if values:
            assert self._value_head is not None
            values_BT = self._value_head(state_BD)
        return Scores(
            logprobs_BT=logp_BC.gather(1, tokens.inputs["answers"]),
            entropy_BT=entropy_BT,
            values_BT=values_BT,
        )

    def _tower(self, ids_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and the pooled state (N, D), with a graph unless it is switched off."""
        lengths_N = (ids_NP >= 0).sum(1)
        longest = int(lengths_N.max())
        rows = [tuple(row[:n]) for row, n in zip(ids_NP.tolist(), lengths_N.tolist(), strict=True)]
        self._read([row for row in rows if row not in self._states])
        state_NPD = nn.utils.rnn.pad_sequence([self._states[row] for row in rows], batch_first=True)
        mask_NP = torch.arange(longest) < lengths_N[:, None]
        with self._precision():
            found: tuple[Tensor, Tensor] = self._peft(
                state_NPD.to(self.device).float(), mask_NP.to(self.device)
            )
        return found

    @torch.no_grad()
    def _read(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Sends new prompts through the frozen layers and keeps the states, in half precision."""
        new = list(dict.fromkeys(prompts))
        lengths = torch.tensor([len(prompt) for prompt in new], dtype=torch.long)
        for rows in _parts(lengths):
            part = [new[k] for k in rows.tolist()]
            longest = max(len(prompt) for prompt in part)
            ids_NP = torch.tensor([[*p, *[self._pad] * (longest - len(p))] for p in part])
            mask_NP = (torch.arange(longest) < lengths[rows, None]).long()
            with self._precision():
                state_NPD = self._lower(
                    input_ids=ids_NP.to(self.device), attention_mask=mask_NP.to(self.device)
                ).last_hidden_state
            for prompt, state_PD in zip(part, state_NPD.to("cpu", torch.bfloat16), strict=True):
                self._states[prompt] = state_PD[: len(prompt)].clone()

    @torch.no_grad()
    def _calibrate(self, tower: _Tower, texts: Sequence[str]) -> None:
        self._peft = tower
        state_ND = []
        ids_NP, _ = self._prompts(texts)
        for rows in _parts((ids_NP >= 0).sum(1)):
            state_ND.append(self._tower(ids_NP[rows])[1])
        every_ND = torch.cat(state_ND)
        tower.centre_D.copy_(every_ND.mean(0))
        tower.spread_D.copy_(every_ND.std(0) + 1e-4)

    # The adapter

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter and the head in PEFT's format, and the value head beside it."""
        pooling = {"centre": self._peft.centre_D, "spread": self._peft.spread_D}
        adapter.write(
            folder,
            self._peft,
            marks={adapter.BASE_KEY: self.base_sha256, LABELS_KEY: _digest(self.labels)},
            value_head=self._value_head,
            further={POOLING_FILE: pooling},
        )

    def load_adapter(self, folder: Path) -> None:
        """Reads an adapter; its rank, alpha, targets, kind and scaling replace those at hand."""
        stored = adapter.read(folder, POOLING_FILE)
        if stored.marks.get(adapter.BASE_KEY) != self.base_sha256:
            raise WeightsError(
                f"The adapter in {folder} was made for another base than {self.base!r}. "
                "Give it its own base: policy.base=..."
            )
        if stored.marks.get(LABELS_KEY) != _digest(self.labels):
            raise WeightsError(
                f"The adapter in {folder} was made for other labels, or another order of them."
            )
        pooling = stored.further[POOLING_FILE]
        tower = self._peft.unload()
        tower.head = adapter.Head(tower.centre_D.shape[0], len(self.labels)).to(self.device)
        tower.centre_D.copy_(pooling["centre"])
        tower.spread_D.copy_(pooling["spread"])
        self._peft = self._adapted(tower, stored.config)
        self._module["tower"] = self._peft
        if unknown := adapter.fill(self._peft, stored, folder, self._value_head):
            raise WeightsError(
                f"The adapter in {folder} has weights for layers that are frozen here, for example "
                f"{unknown[0]!r}. Was it made with another policy.upper_layers?"
            )

    def _adapted(self, tower: nn.Module, config: Any) -> Any:
        return adapter.attach(tower, config, base=self.base, device=self.device, seed=self._seed)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._half)


class _Tower(nn.Module):
    """The adapted layers, the mean over the tokens, and the head."""

    def __init__(self, layers: nn.ModuleList, width: int, n_labels: int) -> None:
        super().__init__()
        self.layers = layers
        self.head = adapter.Head(width, n_labels)
        self.centre_D: Tensor
        self.spread_D: Tensor
        self.register_buffer("centre_D", torch.zeros(width))
        self.register_buffer("spread_D", torch.ones(width))

    def forward(self, state_NPD: Tensor, mask_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and the pooled, scaled state (N, D), in float32."""
        seen_N11P = torch.zeros(mask_NP.shape, device=mask_NP.device, dtype=state_NPD.dtype)
        seen_N11P = seen_N11P.masked_fill(~mask_NP, -1e4)[:, None, None, :]
        for layer in self.layers:
            out = layer(state_NPD, seen_N11P)
            state_NPD = out[0] if isinstance(out, tuple) else out
        share_NP = mask_NP / mask_NP.sum(1, keepdim=True)
        pooled_ND = (state_NPD.float() * share_NP[..., None]).sum(1)
        with torch.autocast(state_NPD.device.type, enabled=False):
            scaled_ND = (pooled_ND - self.centre_D) / self.spread_D
            return self.head(scaled_ND), scaled_ND


def _load(base: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    cast(Any, transformers_logging).disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        model = AutoModel.from_pretrained(base, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"base={base!r} cannot be loaded: {str(error).splitlines()[0]} "
            "The bundled one is base=e5-small: python -m sia.weights fetch e5-small"
        ) from error
    if not isinstance(getattr(getattr(model, "encoder", None), "layer", None), nn.ModuleList):
        raise WeightsError(
            f"base={base!r} is no encoder of the BERT family: {type(model).__name__}"
        )
    model.pooler = None  # many checkpoints hold none, and what is made up in its place is random
    model.requires_grad_(False)
    model.eval()
    return tokenizer, model


def _labels(path: Path) -> list[str]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightsError(f"policy.labels={str(path)!r} cannot be read: {error}") from error
    if not isinstance(found, list) or len(set(map(str, found))) < max(len(found), 2):
        raise WeightsError(f"policy.labels={str(path)!r} is no list of two or more unequal labels.")
    return [str(label) for label in found]


def _texts(path: Path, column: str) -> list[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row[column] for row in islice(csv.DictReader(file), CALIBRATION_TEXTS)]
    except OSError as error:
        raise WeightsError(f"policy.calibration={str(path)!r} cannot be read: {error}") from error
    except KeyError:
        raise WeightsError(
            f"policy.calibration={str(path)!r} has no column {column!r}. Name it: policy.column"
        ) from None
    if len(rows) < 2:
        raise WeightsError(f"policy.calibration={str(path)!r} has fewer than two texts.")
    return rows


def _cut(ids: list[int], limit: int) -> list[int]:
    """The beginning, and the token that ends every text."""
    return [*ids[: limit - 1], ids[-1]]


def _parts(lengths_N: Tensor) -> list[Tensor]:
    """Rows in parts of up to `CHUNK_TOKENS`, padding included, shortest first."""
    order = torch.argsort(lengths_N, stable=True)
    parts: list[list[int]] = []
    for row in order.tolist():
        if not parts or (len(parts[-1]) + 1) * int(lengths_N[row]) > CHUNK_TOKENS:
            parts.append([])
        parts[-1].append(row)
    return [torch.tensor(part, dtype=torch.long) for part in parts]


def _is_fast_in_half(device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


def _digest(labels: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(labels), ensure_ascii=False).encode()).hexdigest()
