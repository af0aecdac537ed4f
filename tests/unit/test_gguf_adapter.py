"""PEFT adapters become GGUF adapters, or are refused with the reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sia.errors import WeightsError
from sia.weights.gguf_adapter import convert, interleaved, read_base

gguf = pytest.importorskip("gguf", reason="the extra `local` is not installed")
safetensors = pytest.importorskip("safetensors.numpy", reason="the extra `local` is not installed")

Q = "base_model.model.model.layers.0.self_attn.q_proj"
V = "base_model.model.model.layers.0.self_attn.v_proj"


def make_base(path: Path, architecture: str = "llama") -> Path:
    """One layer of two heads of four, without a tokenizer: enough to be read."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((8, 6), np.float32))
    writer.add_tensor("blk.0.attn_v.weight", np.zeros((4, 6), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_adapter(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    safetensors.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def matrices(name: str, outputs: int) -> dict[str, Any]:
    return {
        f"{name}.lora_A.weight": np.arange(12, dtype=np.float32).reshape(2, 6),
        f"{name}.lora_B.weight": np.arange(2 * outputs, dtype=np.float32).reshape(outputs, 2),
    }


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def test_the_halves_of_each_head_are_laid_into_each_other() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]  # two heads of four rows
    assert interleaved(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_matrices_are_scaled_renamed_and_permuted(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.gguf")
    adapter = make_adapter(tmp_path / "adapter", matrices(Q, 8) | matrices(V, 4))
    assert convert(adapter, base, tmp_path / "adapter.gguf") == 2
    found = tensors_of(tmp_path / "adapter.gguf")
    assert found.keys() == {f"blk.0.attn_{x}.weight.lora_{side}" for x in "qv" for side in "ab"}
    np.testing.assert_array_equal(found["blk.0.attn_q.weight.lora_a"], np.arange(12).reshape(2, 6))
    scaled = 4 * np.arange(16).reshape(8, 2)  # alpha 8 / rank 2
    np.testing.assert_array_equal(
        found["blk.0.attn_q.weight.lora_b"], scaled[[0, 2, 1, 3, 4, 6, 5, 7]]
    )
    np.testing.assert_array_equal(
        found["blk.0.attn_v.weight.lora_b"], 4 * np.arange(8).reshape(4, 2)
    )


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"use_rslora": True}, 8 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 6}}, 3.0),
        ({"alpha_pattern": {"v_proj": 6}}, 4.0),
    ],
)
def test_the_scale_is_that_of_peft(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    base = make_base(tmp_path / "base.gguf", "qwen2")  # nothing is permuted there
    adapter = make_adapter(tmp_path / "adapter", matrices(Q, 8), **config)
    convert(adapter, base, tmp_path / "out.gguf")
    np.testing.assert_allclose(
        tensors_of(tmp_path / "out.gguf")["blk.0.attn_q.weight.lora_b"],
        scale * np.arange(16).reshape(8, 2),
        rtol=1e-6,
    )


def test_half_precision_is_read_as_it_is(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.gguf", "qwen2")
    b = np.array([1.5, -2.0] * 8, np.float32).reshape(8, 2)
    adapter = make_adapter(tmp_path / "adapter", {}, lora_alpha=2)
    raw = {
        f"{Q}.lora_A.weight": ("F16", (2, 6), np.ones(12, np.float16).tobytes()),
        f"{Q}.lora_B.weight": ("BF16", (8, 2), (b.view("<u4") >> 16).astype("<u2").tobytes()),
    }
    header, data = {}, b""
    for name, (kind, shape, content) in raw.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    convert(adapter, base, tmp_path / "out.gguf")
    found = tensors_of(tmp_path / "out.gguf")
    np.testing.assert_array_equal(found["blk.0.attn_q.weight.lora_b"], b)
    np.testing.assert_array_equal(found["blk.0.attn_q.weight.lora_a"], np.ones((2, 6)))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (matrices(Q, 8), {"use_dora": True}, "not plain LoRA"),
        (matrices(Q, 8), {"peft_type": "IA3"}, "not plain LoRA"),
        (matrices(Q, 6), {}, "another base.*6x6 there and 8x6"),
        (matrices(Q.replace("layers.0", "layers.1"), 8), {}, r"layers\.1\.self_attn\.q_proj"),
        (matrices(Q.replace("q_proj", "qq"), 8), {}, "which base.gguf does not have"),
        (
            {"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)},
            {},
            "no LoRA matrix of a linear",
        ),
    ],
)
def test_what_cannot_be_applied_is_refused(
    tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    base = make_base(tmp_path / "base.gguf")
    adapter = make_adapter(tmp_path / "adapter", tensors, **config)
    with pytest.raises(WeightsError, match=f"(?s){message}"):
        convert(adapter, base, tmp_path / "out.gguf")


def test_a_base_of_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"'mamba'.*llama"):
        read_base(make_base(tmp_path / "base.gguf", "mamba"))
    (tmp_path / "none.gguf").write_bytes(b"GGML and more bytes than a header")
    with pytest.raises(WeightsError, match="no GGUF file"):
        read_base(tmp_path / "none.gguf")


def test_a_folder_without_an_adapter_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.gguf")
    with pytest.raises(WeightsError, match="holds no adapter that can be read"):
        convert(tmp_path, base, tmp_path / "out.gguf")
