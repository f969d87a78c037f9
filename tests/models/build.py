"""Tiny random checkpoints with a tiny tokenizer, written as Hugging Face folders."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from fedtune.config import ModelConfig
from fedtune.models.backbone import quiet

WORDS = [
    "<s>", "</s>", "<unk>", "turn", "on", "off", "the", "light", "lamp", "heat", "in", "a", "room", "kitchen", "bed", "up", "down", "set",
    "to", "one", "two", "three", "four", "red", "blue",
]  # fmt: skip
VOCABULARY = 32
assert len(WORDS) <= VOCABULARY


def llama_config(**changes: Any) -> LlamaConfig:
    """Grouped-query attention, tied embeddings; wide initialisation, so that logits differ visibly."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True, "initializer_range": 0.3,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return LlamaConfig(**{**values, **changes})


def gpt2_config() -> GPT2Config:
    """Its linear layers are Conv1D, which store (in, out)."""
    return GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def bert_config(kind: type = BertConfig) -> Any:
    return kind(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=64,
        initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a word; without a pad token unless asked for."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **special)


CONFIGS = {"llama": llama_config, "gpt2": gpt2_config, "bert": bert_config, "roberta": lambda: bert_config(RobertaConfig)}


def checkpoint(folder: Path, kind: str = "llama", *, seed: int = 0, config: Any = None, **save: Any) -> Path:
    """Write a checkpoint: a causal LM, or for encoders their bare body with a pooler (as sentence encoders come)."""
    config = config or CONFIGS[kind]()
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "bert":
            from transformers import BertModel

            model: Any = BertModel(config)
        elif kind == "roberta":
            model = AutoModelForMaskedLM.from_config(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder, **save)
    tokenizer().save_pretrained(folder)
    return folder


def hub(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(source="hub", name=str(folder), device="cpu", **changes)


def token_ids(rows: int = 3, columns: int = 10, seed: int = 1) -> torch.Tensor:
    """(rows, columns) ids without the special tokens 0 to 2."""
    return torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))
