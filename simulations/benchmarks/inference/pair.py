"""A real pair of models for speculation: a small pretrained model and a draft distilled from it, with real prompts.

Prompts are cut from real text (wikitext-2 and Shakespeare). Prompts from the first nine tenths of each text, with the model's own answers,
are the draft's training texts. Prompts from the last tenth are for measurement.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from fedtune.errors import DataError
from fedtune.export.distill import Distillation, distill
from fedtune.inference.engine.generate import Generation
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.sample import Sampling

TEXTS = {"wikitext-2": "lm/wikitext-2/valid.txt", "Shakespeare": "fed/tinyshakespeare/input.txt"}
MODELS = ("babyllama_tok105", "stories260k")
PROMPT, ANSWER = 48, 128  # tokens
HELD = 0.1  # share of each text for measurement
ROWS = 1500  # training texts of the draft
DRAFT = Distillation(layers=1, steps=1200, length=PROMPT + ANSWER, lr=2e-3)


def prompts(engine: Engine, data: Path, count: int, *, held: bool, seed: int = 0, length: int = PROMPT) -> list[list[int]]:
    """Return `count` prompts of `length` tokens, each from a word boundary, from the texts in turn.

    Args:
        engine: Its tokenizer encodes the prompts.
        data: Folder with `TEXTS`.
        held: Cut from the last tenth of each text, else from the rest.

    Raises:
        DataError: A text is missing or too short.
    """
    draws = [_cuts(engine, data / file, length, held, random.Random(f"{seed} {name}")) for name, file in TEXTS.items()]
    return [next(draws[i % len(draws)]) for i in range(count)]


def _cuts(engine: Engine, file: Path, length: int, held: bool, draw: random.Random) -> Iterator[list[int]]:
    try:
        text = " ".join(line for line in file.read_text(encoding="utf-8").splitlines() if "<unk>" not in line and " = " not in line)
    except OSError as bad:
        raise DataError(f"cannot read {file} ({bad.strerror}): FEDTUNE_DATA names the folder that holds it") from None
    words = " ".join(text.split())
    border = round((1 - HELD) * len(words))
    words = words[border:] if held else words[:border]
    window = 8 * length  # characters, enough for `length` tokens of any tokenizer
    if len(words) < 2 * window:
        raise DataError(f"{file} holds {len(words)} characters to cut prompts from: {2 * window} are too few")
    while True:
        at = words.index(" ", draw.randrange(len(words) - window - 64)) + 1
        yield engine.text.encode(words[at : at + window])[:length]


def learn_from(engine: Engine, data: Path, file: Path, rows: int) -> Path:
    """Write prompts with the model's answers, sampled at temperature 1, as JSON lines, unless the file exists."""
    if not file.is_file():
        lines = []
        for i, ids in enumerate(prompts(engine, data, rows, held=False)):
            answer = Generation(engine, ids, Sampling(temperature=1.0, seed=i), ANSWER)
            text = engine.text.decode([*ids, *(piece.token for piece in answer)])
            lines.append(json.dumps({"text": text}))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def draft_of(model: Path, data: Path, out: Path, how: Distillation = DRAFT, rows: int = ROWS) -> Path:
    """Distill a model's draft as `fedtune draft` does, unless it exists."""
    if not (out / "config.json").is_file():
        text = learn_from(load_engine(model, "fp32"), data, out.with_name(f"{out.name}.jsonl"), rows)
        distill(model, out, text=text, how=how)
    return out


def acceptance(draft: Path) -> float:
    """Acceptance rate that `draft_of` measured on held-out texts, at temperature 1."""
    return json.loads((draft / "fedtune.json").read_text(encoding="utf-8"))["distilled"]["acceptance"]
