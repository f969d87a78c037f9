"""Answer by `transformers.generate`: architectures that the engine does not run, and adapters that lie beside their model."""

from pathlib import Path
from typing import Any

import torch

from fedtune.config import ModelConfig, PeftConfig, TaskConfig
from fedtune.errors import ConfigError
from fedtune.inference.adapter_folder import OWN
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.text import StopStrings
from fedtune.inference.export import BESIDE
from fedtune.models.backbone import Backbone, load_backbone
from fedtune.models.checkpoint import read_config
from fedtune.seeds import derive_seed

__all__ = ["generate_by_transformers"]


def generate_by_transformers(folder: Path, card: dict[str, Any], prompt: str, sampling: Sampling, length: int) -> str:
    """The continuation of a whole prompt, of at most `length` tokens.

    Raises:
        ConfigError: The prompt leaves no room in the model's context.
        ModelError: The folder cannot be loaded.
    """
    encodes = bool(read_config(folder).get("is_encoder_decoder"))
    task = TaskConfig(kind=card.get("task") or ("instruction" if encodes else "causal_lm"), max_length=2, generate=False)
    backbone = load_backbone(ModelConfig(source="hub", name=str(folder)), task)
    model = _with_adapter(backbone, card, folder, task) if "peft" in card else backbone.model
    ids = _tokens(backbone.tokenizer, prompt, ended=backbone.seq2seq)
    context = getattr(backbone.model.config, "max_position_embeddings", None)
    virtual = card.get("peft", {}).get("tokens", 0) if card.get("peft", {}).get("method") in ("prompt", "prefix", "ptuning_v2") else 0
    if context and virtual + len(ids) + length > context:
        raise ConfigError(
            f"the prompt's {virtual + len(ids)} tokens and {length} new ones are more than the model's context, {context}: shorten one"
        )
    inputs = torch.tensor([ids], device=backbone.device)
    options: dict[str, Any] = {"do_sample": False}
    if not sampling.greedy:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        options |= {"min_p": sampling.min_p} if sampling.min_p else {}
    if sampling.repetition_penalty != 1:
        options["repetition_penalty"] = float(sampling.repetition_penalty)
    begun = 1 if backbone.seq2seq else len(ids)  # the decoder's start token, or the prompt

    def stopped(written: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        text = backbone.tokenizer.decode(written[0, begun:], skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in sampling.stop)])

    if sampling.stop:  # transformers' own stop strings fail where a token by itself is no text
        options["stopping_criteria"] = [stopped]
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(derive_seed(sampling.seed, "generate"))
        out = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=length, **options)  # pyright: ignore
    stops = StopStrings(sampling.stop)
    return stops.push(backbone.tokenizer.decode(out[0, begun:], skip_special_tokens=True)) + stops.finish()


def _with_adapter(backbone: Backbone, card: dict[str, Any], folder: Path, task: TaskConfig) -> Any:
    """The backbone with the adapter that could not be merged."""
    from fedtune.models.adapter import LiveAdapter  # late: they load PEFT and Flower, which a merged model does not need
    from fedtune.state import AdapterState

    live = LiveAdapter(backbone, PeftConfig(**card["peft"]), task)
    live.load(AdapterState.load(folder / BESIDE / OWN).replace(base=""))
    return live.model


def _tokens(tokenizer: Any, text: str, *, ended: bool) -> list[int]:
    """As in training: begun as the tokenizer begins texts, and ended for an encoder only."""
    begun = tokenizer("").input_ids
    lead = [tokenizer.bos_token_id] if begun and begun[0] == tokenizer.bos_token_id else []
    end = [tokenizer.eos_token_id] if ended and tokenizer.eos_token_id is not None else []
    ids = lead + tokenizer(text, add_special_tokens=False).input_ids + end
    if not ids:
        raise ConfigError("the prompt is empty and the tokenizer has no token to begin with: give some text")
    return ids
