"""The models of the benchmark, made on the spot: random Llama weights in each backend's form."""

import json
import subprocess
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM

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
    """A Hugging Face folder of random weights in bf16, made once."""
    folder = root / f"llama-{size}"
    if (folder / "model.safetensors").is_file():
        return folder
    hidden, layers, heads, kv_heads, inner = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=inner,
        vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<s>", *alphabet, *(f"<{i}>" for i in range(VOCABULARY - len(alphabet) - 1))])}
    tokenizer = Tokenizer(BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}))
    return folder


def openvino(folder: Path, bits: int, python: str) -> Path:
    """OpenVINO's form with 4-bit (asymmetric, groups of 32) or 8-bit weights, by optimum-intel under `python`; made once."""
    out = folder.with_name(f"{folder.name}-openvino-int{bits}")
    if not (out / "openvino_model.xml").is_file():
        done = subprocess.run([python, "-c", OPENVINO, str(folder), str(out), str(bits)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"OpenVINO's export failed: {done.stderr.strip().splitlines()[-1]}")
    return out


def package(folder: Path, kind: str) -> Path:
    """This engine's edge package, rounded to nearest; made once."""
    raise NotImplementedError


def gguf(folder: Path, kind: str) -> Path:
    """A GGUF file; made once."""
    raise NotImplementedError
