"""A backbone of a few thousand parameters, and experiments small enough for quick tests."""

import functools
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fedtune.models
from fedtune.config import (
    ClientConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvalConfig,
    InferenceConfig,
    ModelConfig,
    PartitionConfig,
    PeftConfig,
    TaskConfig,
)

NANO = Path(str(fedtune.models.__file__)).parent / "nano"
WORDS = ["lamp", "kettle", "door", "window", "garden", "stairs", "radio", "oven", "cat", "train", "river", "stone"]


def tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """A random Llama (hidden 24, 2 layers, grouped-query attention) with the nano backbone's tokenizer."""
    made = _cached_checkpoint(seed)
    torch.manual_seed(seed)  # the same state after making and after copying the checkpoint
    return Path(shutil.copytree(made, folder))


_kept = tempfile.TemporaryDirectory(prefix="fedtune-tests-", ignore_cleanup_errors=True)


@functools.cache
def _cached_checkpoint(seed: int) -> Path:
    folder = Path(_kept.name) / str(seed)
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    vocab = json.loads((NANO / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def texts(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with a text of 3 to 9 words, a label and a client."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        words = rng.choices(WORDS, k=rng.randint(3, 9))
        rows.append(
            {"text": " ".join(words), "label": WORDS.index(words[0]) % 3, "client": f"c{i % 4}", "question": words[0], "reply": words[-1]}
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def tiny_config(folder: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Config:
    """A causal-LM experiment on the tiny backbone and a jsonl file under `folder`, one thread, float32."""
    model = folder / "model"
    if not model.exists():
        tiny_llama(model)
        write_rows(folder / "rows.jsonl", rows or texts(40))
        write_rows(folder / "test.jsonl", texts(8, seed=9))
    values: dict[str, Any] = {
        "name": "tiny",
        "rounds": 2,
        "clients_per_round": 4,
        "output_dir": str(folder / "outputs"),
        "model": ModelConfig(source="hub", name=str(model)),
        "data": DataConfig(source="local", path=str(folder / "rows.jsonl"), test_path=str(folder / "test.jsonl"), held_out=0.2),
        "partition": PartitionConfig(kind="natural"),
        "task": TaskConfig(kind="causal_lm", max_length=16, stride_texts=False),
        "peft": PeftConfig(rank=2, alpha=4.0),
        "client": ClientConfig(steps=2, epochs=None, batch_size=4, lr=1e-2, schedule="constant"),
        "engine": EngineConfig(threads=1, batched="none"),
        "eval": EvalConfig(where="none", clients=0),
        "inference": InferenceConfig(samples=0),
    }
    return Config(**{**values, **changes})
