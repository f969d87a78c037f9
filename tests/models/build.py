"""Tiny random checkpoints with a tiny tokenizer, written as Hugging Face folders."""

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

from fedtune.config import ModelConfig
from fedtune.models.backbone import quiet

WORDS = [
    "<s>", "</s>", "<unk>", "turn", "on", "off", "the", "light", "lamp", "heat", "in", "a", "room", "kitchen", "bed", "up", "down", "set",
    "to", "one", "two", "three", "four", "red", "blue",
]  # fmt: skip
VOCABULARY = 32
assert len(WORDS) <= VOCABULARY


def llama_config(kind: type = LlamaConfig, **changes: Any) -> Any:
    """Grouped-query attention, tied embeddings; wide initialization, so that logits differ visibly."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True, "initializer_range": 0.3,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return kind(**{**values, **changes})


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


def opt_config() -> OPTConfig:
    """Its embeddings are narrower than its layers."""
    return OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        word_embed_proj_dim=8, dropout=0.0, init_std=0.3, pad_token_id=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def distilbert_config() -> DistilBertConfig:
    return DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=64, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0, initializer_range=0.3, pad_token_id=1,
    )  # fmt: skip


def albert_config() -> AlbertConfig:
    """One layer used three times, and embeddings narrower than it."""
    return AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3, pad_token_id=1,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


START: Any = {"decoder_start_token_id": 2}  # not in the signature of T5Config


def t5_config() -> T5Config:
    return T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0, initializer_factor=1.0,
        pad_token_id=2, eos_token_id=1, **START,
    )  # fmt: skip


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word, by default without a pad token."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **special)


CONFIGS = {
    "llama": llama_config,
    "qwen2": lambda: llama_config(Qwen2Config, tie_word_embeddings=False),
    "qwen3": lambda: llama_config(Qwen3Config, head_dim=6),
    "gpt2": gpt2_config,
    "opt": opt_config,
    "bert": bert_config,
    "roberta": lambda: bert_config(RobertaConfig),
    "distilbert": distilbert_config,
    "albert": albert_config,
    "t5": t5_config,
}
ENCODERS = ("bert", "roberta", "distilbert", "albert")


def checkpoint(folder: Path, kind: str = "llama", *, seed: int = 0, config: Any = None, **save: Any) -> Path:
    """Write a checkpoint: a causal LM, or for encoders their bare body with a pooler (as sentence encoders come)."""
    if config is not None or save:
        return _save(folder, kind, seed, config or CONFIGS[kind](), **save)
    return Path(shutil.copytree(_cached_checkpoint(kind, seed), folder, dirs_exist_ok=True))


_kept = tempfile.TemporaryDirectory(prefix="fedtune-tests-", ignore_cleanup_errors=True)


@functools.cache
def _cached_checkpoint(kind: str, seed: int) -> Path:
    """A cached checkpoint to copy, because hundreds of tests need the same one."""
    return _save(Path(_kept.name) / f"{kind}-{seed}", kind, seed, CONFIGS[kind]())


def _save(folder: Path, kind: str, seed: int, config: Any, **save: Any) -> Path:
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind in ("bert", "albert"):
            model: Any = AutoModel.from_config(config)
        elif kind in ENCODERS:
            model = AutoModelForMaskedLM.from_config(config)
        elif kind == "t5":
            model = AutoModelForSeq2SeqLM.from_config(config)
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
