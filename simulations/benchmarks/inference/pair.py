"""A real pair for speculation: a pretrained model that is small, a draft distilled from it, real prompts, and what it says to them.

Prompts are cut from real text (wikitext-2 and Shakespeare). From the first nine tenths of each come the texts that the draft learns from,
each a prompt and the model's own answer to it; from the last tenth those that are measured.
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
HELD = 0.1  # share of each text that is measured
ROWS = 1500  # texts to learn from
DRAFT = Distillation(layers=1, steps=1200, length=PROMPT + ANSWER, lr=2e-3)


def prompts(engine: Engine, data: Path, count: int, *, held: bool, seed: int = 0, length: int = PROMPT) -> list[list[int]]:
    """`count` rows of `length` tokens, cut at words from the texts in turn.

    Args:
        engine: Whose tokens.
        data: Folder with `TEXTS`.
        held: From the last tenth of each text, else from the rest.

    Raises:
        DataError: A text is not there, or too short.
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
    window = 8 * length  # characters, which are enough for any tokenizer
    if len(words) < 2 * window:
        raise DataError(f"{file} holds {len(words)} characters to cut prompts from: {2 * window} are too few")
    while True:
        at = words.index(" ", draw.randrange(len(words) - window - 64)) + 1
        yield engine.text.encode(words[at : at + window])[:length]


def learn_from(engine: Engine, data: Path, file: Path, rows: int) -> Path:
    """A file of JSON rows: prompts and the model's answers to them, sampled at temperature 1; made once."""
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
    """The draft of a model, as `fedtune draft` makes it; made once."""
    if not (out / "config.json").is_file():
        text = learn_from(load_engine(model, "fp32"), data, out.with_name(f"{out.name}.jsonl"), rows)
        distill(model, out, text=text, how=how)
    return out


def acceptance(draft: Path) -> float:
    """What `draft_of` measured on texts that it did not learn from, at temperature 1."""
    return json.loads((draft / "fedtune.json").read_text(encoding="utf-8"))["distilled"]["acceptance"]
