"""Exports a run for Ollama: a GGUF file, and a Modelfile with the prompt template and the texts that end an answer.

Source: https://github.com/ollama/ollama/blob/main/docs/modelfile.md
"""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.contracts.task import find
from fedtune.export.gguf import describe_gguf, export_gguf
from fedtune.export.go_template import fixed_text
from fedtune.export.huggingface import CARD, check_out, export_folder
from fedtune.export.ollama_template import go_template
from fedtune.export.origin import Origin, read_origin
from fedtune.models.chat_template import answer_end
from fedtune.models.checkpoint import find_folder
from fedtune.models.tokens import load_tokenizer
from fedtune.storage.parsing import parse_json, read_text

__all__ = ["describe_ollama", "export_ollama", "modelfile"]

_README = """# {name}

A model for [Ollama](https://ollama.com) that fedtune exported. These commands run it in this folder.

```bash
ollama create {name} -f Modelfile
ollama run {name}
```

Ollama samples at temperature 0.8. `PARAMETER temperature 0` in the Modelfile gives greedy answers, the default in fedtune.
"""


def export_ollama(source: Path, out: Path, *, kind: str = "f16", replace: bool = False) -> Path:
    """Merge an adapter into its decoder, and write a folder for `ollama create`.

    A chat model gets its own chat template, rewritten in Ollama's language and compared with the original; another model the run's prompt
    template, or none. The system message is left to the user.

    Args:
        source: As in `export_gguf`.
        out: The folder to write; it appears complete or not at all.
        kind: GGUF type.
        replace: Overwrite `out` if it is an export of fedtune.

    Returns:
        `out`.

    Raises:
        CheckpointError: As in `export_gguf`.
        ModelError: As in `export_gguf`, or Ollama cannot express the chat template.
        DataError: The chat template refuses every conversation.
    """
    source, out = Path(source), Path(out)
    check_out(out, replace)
    origin = read_origin(source)
    tokenizer = load_tokenizer(find_folder(origin.model), origin.model, origin.task)
    chat = _is_chat(origin, tokenizer)
    template, differs = go_template(tokenizer) if chat else (_prompt(origin.card["prompt"]), "")
    name, file = origin.name, f"model-{kind}.gguf"
    with export_folder(out) as folder:
        # a chat template writes the BOS token itself
        export_gguf(source, folder / file, kind=kind, begins=False if chat else None)
        (folder / "Modelfile").write_text(modelfile(file, template, _stops(tokenizer, find_folder(origin.model), chat)), encoding="utf-8")
        notes = "; ".join(part for part in (describe_gguf(folder / file), differs) if part)
        (folder / "README.md").write_text(_README.format(name=name) + (f"\nNote: {notes}.\n" if notes else ""), encoding="utf-8")
        (folder / CARD).write_text(json.dumps({**origin.card, "ollama": name, "note": notes}, indent=1) + "\n", encoding="utf-8")
    return out


def describe_ollama(out: Path) -> str:
    """Describe a folder of `export_ollama`: how to run it, and what differs from the model."""
    card = parse_json(read_text(out / CARD))
    how = f"run it with `ollama create {card['ollama']} -f {out / 'Modelfile'}`, then `ollama run {card['ollama']}`"
    return "; ".join(part for part in (how, card["note"]) if part)


def modelfile(gguf: str, template: str, stops: Sequence[str]) -> str:
    """The text of a Modelfile for a GGUF file beside it. Ollama reads values as they stand between quotes, without escapes."""
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop """{stop}"""' if '"' in stop else f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _is_chat(origin: Origin, tokenizer: Any) -> bool:
    """Whether the model answers in its chat template; a model that fedtune did not write does if it has one."""
    if origin.whole == {}:
        return tokenizer.chat_template is not None
    return find(origin.card["task"]).conversational


def _prompt(template: str | None) -> str:
    """A run's prompt template in Ollama's language; the request alone if there is none, as in `wrap`."""
    parts = list(string.Formatter().parse(template or ""))
    if len([name for _, name, _, _ in parts if name is not None]) != 1:
        return "{{ .Prompt }}"
    return "".join(fixed_text(text) + ("{{ .Prompt }}" if name is not None else "") for text, name, _, _ in parts)


def _stops(tokenizer: Any, folder: Path, chat: bool) -> list[str]:
    """The special tokens that end an answer."""
    own = parse_json(read_text(folder / "generation_config.json")) if (folder / "generation_config.json").is_file() else {}
    value = own.get("eos_token_id")
    ids = {tokenizer.eos_token_id, answer_end(tokenizer) if chat else None, *(value if isinstance(value, list) else [value])}
    added = tokenizer.added_tokens_decoder
    return [added[i].content for i in sorted(ids - {None}) if i in added]
