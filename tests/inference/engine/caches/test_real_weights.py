"""The cost of quantized caches and windows on trained models and real text. Run with -s for the figures."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.caches.kivi import KiviCache
from fedtune.inference.engine.caches.window import WindowCache
from fedtune.inference.engine.load import Engine, load_engine

MODELS = ["stories260k", "babyllama_tok105"]
TEXTS = ["lm/wikitext-2/valid.txt", "fed/tinyshakespeare/input.txt"]
BATCHES = 8  # stretches of the model's whole context


def data() -> Path:
    folder = os.environ.get("FEDTUNE_DATA")
    if not folder or not all((Path(folder) / "models" / name / "hf" / "config.json").is_file() for name in MODELS):
        pytest.skip("FEDTUNE_DATA names no folder with models/stories260k/hf and models/babyllama_tok105/hf")
    return Path(folder)


def stretches(folder: Path, model: str, text: str, length: int) -> list[torch.Tensor]:
    """BATCHES times `length` tokens from the text, each after the model's first token."""
    written = (folder / text).read_text("utf-8", "replace").replace("<unk>", "")[:200_000]
    ids = Tokenizer.from_file(str(folder / "models" / model / "hf" / "tokenizer.json")).encode(written, add_special_tokens=False).ids
    step = len(ids) // BATCHES
    assert step >= length
    return [torch.tensor([1, *ids[i * step : i * step + length - 1]]) for i in range(BATCHES)]


def scores(engine: Engine, parts: list[torch.Tensor], make: Callable[[], Cache], after: int = 0) -> torch.Tensor:
    """[tokens, V] log-probabilities of the tokens after the first `after` of each part."""
    out = []
    for ids in parts:
        cache = make()
        pieces = ids[:-1].split(100)
        rows = np.concatenate([engine.decoder.forward(piece.numpy(), [Span(cache, len(piece), keep=None)]) for piece in pieces])
        out.append(torch.from_numpy(rows[after:]).log_softmax(-1))
    return torch.cat(out)


def perplexity(logs: torch.Tensor, parts: list[torch.Tensor], after: int = 0) -> float:
    return math.exp(-logs.gather(1, torch.cat([ids[1 + after :] for ids in parts]).unsqueeze(1)).mean())


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("model", MODELS)
def test_four_bits_stay_within_one_percent_of_full(model: str, text: str) -> None:
    folder = data()
    engine = load_engine(folder / "models" / model / "hf")
    shape, length = engine.shape, engine.shape.context
    parts = stretches(folder, model, text, length)
    for residual in (128, 32):
        full = scores(engine, parts, lambda: FullCache(shape, length), residual)
        off, far = {}, {}
        for bits in (8, 4, 2):
            now = scores(engine, parts, lambda b=bits, r=residual: KiviCache(shape, length, b, residual=r), residual)
            off[bits] = 100 * (perplexity(now, parts, residual) / perplexity(full, parts, residual) - 1)
            far[bits] = float((full.exp() * (full - now)).sum(1).mean())
        shown = ", ".join(f"{bits} bits {off[bits]:+.2f} % (KL {far[bits]:.1e})" for bits in off)
        base = perplexity(full, parts, residual)
        print(f"\n{model}, {text}, {BATCHES} x {length} tokens, those after the first {residual}: full {base:.3f}; {shown}")
        assert abs(off[8]) < 0.1 and abs(off[4]) < 1
        assert far[8] < far[4] / 10 < far[2] / 20  # nats from the full cache's distribution: a step is 16 and 5 times as wide


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_window_with_sinks_continues_beyond_the_context(model: str) -> None:
    folder = data()
    engine = load_engine(folder / "models" / model / "hf")
    shape, context = engine.shape, engine.shape.context
    length = 3 * context
    parts = stretches(folder, model, TEXTS[1], length)
    whole = [part[:context] for part in parts]
    inside = perplexity(scores(engine, whole, lambda: FullCache(shape, context)), whole)
    kinds: dict[str, Callable[[], Cache]] = {
        "full": lambda: FullCache(shape, length),
        "window": lambda: WindowCache(shape, length, context // 2, 0),
        "window with sinks": lambda: WindowCache(shape, length, context // 2 - 4, 4),
    }
    beyond = {name: perplexity(scores(engine, parts, make, context), parts, context) for name, make in kinds.items()}
    shown = ", ".join(f"{name} {value:.2f}" for name, value in beyond.items())
    print(f"\n{model}, {TEXTS[1]}: within {context} tokens {inside:.2f}; beyond them: {shown}")
    assert beyond["window with sinks"] < beyond["full"] and beyond["window with sinks"] < 1.15 * inside
