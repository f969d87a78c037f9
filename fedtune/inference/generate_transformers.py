"""Models that run on transformers: architectures that the engine does not support, and unmerged adapters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.config import ModelConfig, PeftConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.task import adapter_tasks
from fedtune.errors import ConfigError
from fedtune.inference.engine.text import Text, decoder_kinds
from fedtune.models.adapter_folder import BESIDE, OWN
from fedtune.models.backbone import Backbone, load_backbone
from fedtune.models.checkpoint import read_config
from fedtune.models.methods import method
from fedtune.models.quiet import quiet

__all__ = ["HubModel", "HubText", "load_model"]


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model with transformers' `generate`.

    Args:
        model: A transformers model, or a PEFT model around one.
        text: Its tokenizer.
        vocabulary: V, the width of its logits.
        context: Maximum number of tokens of a prompt with its answer, without virtual tokens; None if config.json has no limit.
        seq2seq: Whether an encoder reads the prompt, so that the answer is a separate text.
    """

    model: Any
    text: "HubText"
    vocabulary: int
    context: int | None
    seq2seq: bool

    def write(self, ids: Sequence[int], most: int, choose: Callable[[np.ndarray], int | None]) -> None:
        """Run `model.generate` on a prompt.

        Args:
            ids: Token ids of the prompt.
            most: Longest answer, in tokens.
            choose: Logits (V,) of a position, float32 → its token, or None to end.
        """
        inputs = torch.tensor([list(ids)], device=self.model.device)
        chosen: list[int | None] = []

        def force(_: Tensor, scores: Tensor) -> Tensor:
            chosen.append(token := choose(scores[0].float().cpu().numpy()))
            return scores if token is None else torch.full_like(scores, -torch.inf).index_fill_(1, scores.new_tensor([token]).long(), 0.0)

        def ended(written: Tensor, _: Any, **__: Any) -> Tensor:
            return torch.tensor([chosen[-1] is None], device=written.device)

        with torch.inference_mode(), quiet():
            self.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=most,
                do_sample=False,
                logits_processor=[force],
                stopping_criteria=[ended],
            )


class HubText(Text):
    """A transformers tokenizer, with or without tokenizer.json. It encodes as in training; prompts for an encoder end with the end token.

    Args:
        tokenizer: A transformers tokenizer.
        ends: Tokens that end an answer.
        closes: Whether to append the end token to each prompt.
    """

    def __init__(
        self, tokenizer: Any, ends: frozenset[int], *, closes: bool
    ) -> None:  # Text.__init__ needs a tokenizer of the tokenizers library
        self.tokenizer = tokenizer
        self.ends = ends
        found = tokenizer.chat_template
        self.template = found.get("default") if isinstance(found, dict) else found
        self._names = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        begun = tokenizer("").input_ids
        self.bos = tokenizer.bos_token_id if begun and begun[0] == tokenizer.bos_token_id else None
        self._end = [tokenizer.eos_token_id] if closes and tokenizer.eos_token_id is not None else []
        self.special = frozenset(tokenizer.all_special_ids)
        self.size = len(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self.longest = max(map(len, vocabulary), default=0)
        self.bytes = frozenset(vocabulary[name] for b in range(256) if (name := f"<0x{b:02X}>") in vocabulary)
        backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers written in Python have none
        self.by_letters = backend is not None and "ByteLevel" in decoder_kinds(backend)

    def name(self, token: int) -> str:
        """As `Text.name`."""
        return self.tokenizer.convert_ids_to_tokens(token) or ""

    def encode(self, text: str, *, begin: bool = True) -> list[int]:
        """As `Text.encode`."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError("the text is not UTF-8: give it in that encoding") from None
        lead = [self.bos] if begin and self.bos is not None else []
        ids = lead + self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids + self._end
        if not ids:
            raise ConfigError("the prompt is empty and the tokenizer has no token to begin with: give some text")
        return ids


def load_model(folder: Path, card: dict[str, Any]) -> HubModel:
    """Load a Hugging Face folder, with the unmerged adapter in it, if any.

    Args:
        folder: The model's folder.
        card: Content of its fedtune.json; {} if there is none.

    Raises:
        ModelError: The folder cannot be loaded.
    """
    encodes = bool(read_config(folder).get("is_encoder_decoder"))
    task = TaskConfig(kind=card.get("task") or adapter_tasks()["SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM"], max_length=2, generate=False)
    backbone = load_backbone(ModelConfig(source="hub", name=str(folder)), task, packed=True)
    peft = card.get("peft", {})
    model: Any = _with_adapter(backbone, card, folder, task) if peft else backbone.model
    base: Any = backbone.model
    virtual = PeftConfig(**peft).tokens if peft and method(PeftConfig(**peft).method).virtual_tokens else 0
    context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    ends = base.generation_config.eos_token_id or []
    return HubModel(
        model=model,
        text=HubText(backbone.tokenizer, frozenset(ends if isinstance(ends, list) else [ends]), closes=backbone.seq2seq),
        vocabulary=len(base.get_input_embeddings().weight),
        context=context - virtual if isinstance(context, int) else None,
        seq2seq=backbone.seq2seq,
    )


def _with_adapter(backbone: Backbone, card: dict[str, Any], folder: Path, task: TaskConfig) -> Any:
    """Load the unmerged adapter into the backbone."""
    from fedtune.models.adapter import LiveAdapter  # late: it loads PEFT, which a merged model does not need

    live = LiveAdapter(backbone, PeftConfig(**card["peft"]), task)
    live.load(AdapterState.load(folder / BESIDE / OWN).replace(base=""))
    live.model.eval()
    return live.model
