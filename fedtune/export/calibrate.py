"""Reads calibration text from files or a run's data, as token sequences; some are held out to measure perplexity."""

import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.config import Config, DataConfig
from fedtune.config.stored import read_config
from fedtune.contracts.seeds import derive_seed
from fedtune.data.decoding import decode
from fedtune.data.local import find_files, has_files, read_bytes, read_file, suffix
from fedtune.data.messages import read_row
from fedtune.errors import CheckpointError, DataError
from fedtune.storage.parsing import parse_json

__all__ = ["Calibration", "make_calibration", "privacy_disclosure", "read_calibration_texts"]

LENGTH, COUNT, HELD = 256, 128, 1 / 8  # tokens per sequence, number of sequences, held-out share of the pieces


@dataclass(frozen=True)
class Calibration:
    """Text for calibration, and held-out text for measurement.

    Args:
        sequences: Each [n] int64.
        held: [n] int64, one sequence.
    """

    sequences: tuple[Tensor, ...]
    held: Tensor


def make_calibration(
    texts: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    *,
    length: int = LENGTH,
    count: int = COUNT,
    held: int = COUNT // 4 * LENGTH,
    seed: int = 0,
) -> Calibration:
    """Cut texts into pieces, hold out the last eighth, and sample from the others.

    Args:
        encode: Encodes a text as in training, with the model's tokenizer.
        length: Tokens per piece; at most the model's context.
        count: Maximum number of sampled pieces.
        held: Maximum number of held-out tokens.
        seed: Seed of the sample; the same text and seed give the same pieces.

    Raises:
        DataError: The text is shorter than two pieces of 2 tokens.
    """
    ids = array("i")  # a list of Python ints would be nine times as large
    enough = 16 * (count * length + held)  # encode no more than needed
    for text in texts:
        if text.strip():
            ids.extend(encode(text))
        if len(ids) >= enough:
            break
    length = min(length, len(ids) // 2)
    if length < 2:
        raise DataError(f"the calibration text has {len(ids)} tokens: give at least a few thousand")
    pieces = torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)
    kept = len(pieces) - max(round(HELD * len(pieces)), 1)
    drawn = torch.randperm(kept, generator=torch.Generator().manual_seed(derive_seed(seed, "calibration")))[:count].sort().values
    return Calibration(tuple(pieces[drawn]), pieces[kept:].flatten()[:held])


def read_calibration_texts(where: Path | str, tokenizer: Any = None) -> list[str]:
    """Read the texts of a file, a folder of files or a run's data. A conversation is rendered with the tokenizer's chat template, if any.

    txt: blank lines separate texts. jsonl, json, csv, tsv, parquet: each row's column `text`, else its messages, else all its strings, one
        per line.
    A run: its clients' training rows if they are on this machine, prompt and answer concatenated. For private runs see
        `privacy_disclosure`.

    Raises:
        DataError: No text is found, or it cannot be read.
    """
    path = Path(where).expanduser()
    if (path / "config.yaml").is_file():
        return _of_run(_config_of(path), tokenizer)
    config = DataConfig(source="local", path=str(where))
    out: list[str] = []
    for file in find_files(str(where), "calibration text", config):
        if suffix(file) == ".txt":
            out += re.split(r"\n\s*\n", decode(read_bytes(file), file, config.encoding).replace("\r\n", "\n"))
            continue
        out += ["\n".join(_strings(row, file, number, tokenizer)) for number, row in enumerate(read_file(file, config), 1)]
    if not (out := [text.strip() for text in out if text.strip()]):
        raise DataError(f"{where} holds no calibration text: give a .txt file, or rows with a column 'text'")
    return out


def privacy_disclosure(where: Path | str) -> str:
    """The disclosure for a package that is calibrated on a private run's rows, which are read without noise; "" for other text.

    Raises:
        DataError: The run's config.yaml cannot be read.
    """
    path = Path(where).expanduser()
    if not (path / "config.yaml").is_file() or (config := _config_of(path)).privacy.kind == "none":
        return ""
    return (
        f"the calibration text consists of training rows of '{config.name}', a private run (privacy.kind={config.privacy.kind}), read"
        " without noise: what the package discloses about them is not covered by ε"
    )


def _config_of(run: Path) -> Config:
    try:
        return read_config(run)
    except CheckpointError as bad:
        raise DataError(f"{bad}; give calibration text instead of the run: a .txt or .jsonl file") from None


def _strings(row: Mapping[str, Any], file: Path, number: int, tokenizer: Any) -> list[str]:
    if isinstance(row.get("text"), str):
        return [row["text"]]
    if (found := read_row(row, str(file), number)) is not None:
        return [_rendered(*found, tokenizer)]
    return [value for value in row.values() if isinstance(value, str)]


def _rendered(chat: str, tools: str, tokenizer: Any) -> str:
    from fedtune.models.chat_template import Conversation  # late: it loads transformers

    messages = parse_json(chat)
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n".join(m["content"] for m in messages)
    return Conversation(tokenizer, messages, tools=parse_json(tools) if tools else None).text()


def _of_run(config: Config, tokenizer: Any) -> list[str]:
    from fedtune.data.federation import load_federation

    if config.data.source == "local" and not has_files(config.data.path):
        raise DataError(f"the training rows of '{config.name}' are not on this machine: give a .txt or .jsonl file instead")
    federation = load_federation(config)
    rows = federation.rows.select(sorted(int(i) for client in federation.clients.values() for i in client.train))
    if "prompt" in rows.column_names:
        return [prompt + answer for prompt, answer in zip(rows["prompt"][:], rows["answer"][:], strict=True)]
    if told := [name for name in ("messages", "chosen") if name in rows.column_names]:
        schemas = rows["tools"][:] if "tools" in rows.column_names else [""] * len(rows)
        return [_rendered(chat, tools, tokenizer) for chat, tools in zip(rows[told[0]][:], schemas, strict=True)]
    return list(rows["text"][:])
