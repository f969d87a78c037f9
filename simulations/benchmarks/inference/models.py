"""Creates the models of the benchmark: random Llama weights in each backend's format."""

import json
import subprocess
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedtune.export.edge import export_edge
from fedtune.export.gguf import export_gguf

SIZES = {  # hidden, layers, heads, key-value heads, intermediate
    "125m": (768, 12, 12, 12, 2560),
    "0.4b": (896, 24, 14, 2, 4864),
    "tiny": (256, 4, 8, 4, 512),
}
VOCABULARY = 32000

OPENVINO = """
import sys
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
source, out, bits = sys.argv[1:]
config = OVWeightQuantizationConfig(bits=4, sym=False, group_size=32, ratio=1.0) if bits == "4" else OVWeightQuantizationConfig(bits=8)
OVModelForCausalLM.from_pretrained(source, export=True, compile=False, quantization_config=config).save_pretrained(out)
"""


def build(size: str, root: Path) -> Path:
    """Create a Hugging Face folder of random bf16 weights, unless it exists."""
    folder = root / f"llama-{size}"
    if (folder / "model.safetensors").is_file():
        return folder
    hidden, layers, heads, kv_heads, inner = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=inner,
        vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}))
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a BPE tokenizer: bytes, one merge (llama.cpp needs at least one), and placeholder names for the other tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", *alphabet, pair := alphabet[0] + alphabet[1]]
    words += [f"<{i}>" for i in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[(pair[0], pair[1])]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(folder / "tokenizer.json"))


def openvino(folder: Path, bits: int, python: str) -> Path:
    """Convert to OpenVINO with 4-bit (asymmetric, groups of 32) or 8-bit weights, with optimum-intel in `python`, unless done."""
    out = folder.with_name(f"{folder.name}-openvino-int{bits}")
    if not (out / "openvino_model.xml").is_file():
        done = subprocess.run([python, "-c", OPENVINO, str(folder), str(out), str(bits)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"OpenVINO's export failed: {done.stderr.strip().splitlines()[-1]}")
    return out


def package(folder: Path, kind: str) -> Path:
    """Export fedtune's edge package, rounded to nearest, unless it exists."""
    out = folder.with_name(f"{folder.name}-edge-{kind}")
    return out if out.is_dir() else export_edge(idle_adapter(folder), out, quantize=kind)


def gguf(folder: Path, kind: str) -> Path:
    """Export llama.cpp's GGUF file, unless it exists."""
    out = folder.with_name(f"{folder.name}-{kind}.gguf")
    return out if out.is_file() else export_gguf(idle_adapter(folder), out, kind=kind)


def idle_adapter(folder: Path) -> Path:
    """Create an adapter of the model that changes nothing: export needs a run or an adapter."""
    out = folder.with_name(f"{folder.name}-adapter")
    if not out.is_dir():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(str(out))
    return out
