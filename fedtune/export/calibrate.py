"""Calibration text: from files or a run's data to sequences of tokens, a part of which is held out for the perplexity."""

import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedtune.config import Config, DataConfig
from fedtune.config.stored import read_config
from fedtune.contracts.seeds import derive_seed
from fedtune.data.decoding import decode
from fedtune.data.local import find_files, read_bytes, read_file, suffix
from fedtune.errors import CheckpointError, DataError

__all__ = ["Calibration", "beyond_privacy", "calibration", "read_texts"]

LENGTH, COUNT, HELD = 256, 128, 1 / 8  # tokens a sequence, sequences, share of the pieces that is held out


@dataclass(frozen=True)
class Calibration:
    """Text to look at while quantizing, and text to measure on that was not looked at.

    Args:
        sequences: Each [n] int64.
        held: [n] int64, one sequence.
    """

    sequences: tuple[Tensor, ...]
    held: Tensor


def calibration(
    texts: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    *,
    length: int = LENGTH,
    count: int = COUNT,
    held: int = COUNT // 4 * LENGTH,
    seed: int = 0,
) -> Calibration:
    """Cut texts into pieces, hold the last eighth of them out, and draw from the others.

    Args:
        encode: Of the model's tokenizer: each text as in training.
        length: Tokens of a piece; at most the model's context.
        count: Most pieces to draw.
        held: Most tokens to hold out.
        seed: Of the draw; the same text and seed give the same pieces.

    Raises:
        DataError: There is less text than two pieces of 2 tokens.
    """
    ids = array("i")  # a text's ints would be nine times as large
    enough = 16 * (count * length + held)  # no need to encode a library
    for text in texts:
        if text.strip():
            ids.extend(encode(text))
        if len(ids) >= enough:
            break
    length = min(length, len(ids) // 2)
    if length < 2:
        raise DataError(f"the calibration text has {len(ids)} tokens: some thousands are wanted")
    pieces = torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)
    kept = len(pieces) - max(round(HELD * len(pieces)), 1)
    drawn = torch.randperm(kept, generator=torch.Generator().manual_seed(derive_seed(seed, "calibration")))[:count].sort().values
    return Calibration(tuple(pieces[drawn]), pieces[kept:].flatten()[:held])


def read_texts(where: Path | str) -> list[str]:
    """The texts of a file, a folder of files or a run's data.

    txt: a text ends at a blank line. jsonl, json, csv, tsv, parquet: of each row its column `text`, else all its strings, a line each.
    A run: its clients' training rows where this machine has them, an answer behind its prompt; of a private one see `beyond_privacy`.

    Raises:
        DataError: Nothing is there, or it cannot be read.
    """
    path = Path(where).expanduser()
    if (path / "config.yaml").is_file():
        return _of_run(_config_of(path))
    config = DataConfig(source="local", path=str(where))
    out: list[str] = []
    for file in find_files(str(where), "calibration text", config):
        if suffix(file) == ".txt":
            out += re.split(r"\n\s*\n", decode(read_bytes(file), file, config.encoding).replace("\r\n", "\n"))
            continue
        for row in read_file(file, config):
            strings = [row["text"]] if isinstance(row.get("text"), str) else [v for v in row.values() if isinstance(v, str)]
            out.append("\n".join(strings))
    if not (out := [text.strip() for text in out if text.strip()]):
        raise DataError(f"{where} holds no text to calibrate with: give a .txt file, or rows with a column 'text'")
    return out


def beyond_privacy(where: Path | str) -> str:
    """What must be told of a package that is calibrated on this, in a sentence: a private run's rows are read without its noise.

    "" of anything else.

    Raises:
        DataError: The run's config.yaml cannot be read.
    """
    path = Path(where).expanduser()
    if not (path / "config.yaml").is_file() or (config := _config_of(path)).privacy.kind == "none":
        return ""
    return (
        f"the calibration text is training rows of '{config.name}', a private run (privacy.kind={config.privacy.kind}), read without its"
        " noise: what the package took from them lies outside ε"
    )


def _config_of(run: Path) -> Config:
    try:
        return read_config(run)
    except CheckpointError as bad:
        raise DataError(f"{bad}; give the text itself to calibrate with") from None


def _of_run(config: Config) -> list[str]:
    from fedtune.data.federation import load_federation

    federation = load_federation(config)
    rows = federation.rows.select(sorted(int(i) for client in federation.clients.values() for i in client.train))
    if "prompt" in rows.column_names:
        return [prompt + answer for prompt, answer in zip(rows["prompt"][:], rows["answer"][:], strict=True)]
    return list(rows["text"][:])
