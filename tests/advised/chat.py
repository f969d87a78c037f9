"""The advice in errors about conversations, their templates, and packed rows."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizer

from fedtune.clients.workspace import Workspace
from fedtune.config import Config, PeftConfig, TaskConfig
from fedtune.contracts.task import task_of
from fedtune.experiment import simulate
from fedtune.export.distill import read_texts
from fedtune.models import LiveAdapter, load_backbone
from fedtune.models.chat_template import encode_conversation, ensure_template
from fedtune.models.probe import probe_packing
from tests.advised.rows import Place, error_of, follows
from tests.export.test_capitals import chatml
from tests.models.build import checkpoint, hub
from tests.tiny import tiny_config

TURNS = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Rome."}]


@follows("the model has a chat template, which task.kind={} does not use: for a model that was tuned to chat, take task={}")
def _(place: Place) -> Iterator[str]:
    rows = [{"prompt": "Hello?", "answer": "Rome.", "client": c} for c in "abcd" for _ in range(4)]
    config = tiny_config(place.folder, rows, rounds=1, model=chatml(place.folder / "chat"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, test_path=None))
    for kind in ("instruction", "chat"):
        simulate(dataclasses.replace(config, task=TaskConfig(kind=kind, max_length=32, max_new_tokens=4)))
        printed = " ".join(place.output.readouterr().err.split())
        yield printed if "has a chat template" in printed else ""


@follows("the tokenizer has neither a chat template nor an end token: set eos_token in its tokenizer_config.json")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    config = json.loads((model / "tokenizer_config.json").read_text())
    for end in (None, "</s>"):
        (model / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": end}))
        yield error_of(lambda: ensure_template(AutoTokenizer.from_pretrained(model)))


@follows("the model's chat template does not show the answer {}: remove the row, or correct the template")
def _(place: Place) -> Iterator[str]:
    tokenizer = AutoTokenizer.from_pretrained(chatml(place.folder / "m").name)
    shown = tokenizer.chat_template
    hidden = shown.replace("+ m.content", "+ (m.content if m.content != 'Rome.' else '')")
    tokenizer.chat_template = hidden.replace("'<|im_end|>\\n' }}", "'' }}")
    yield error_of(lambda: encode_conversation(tokenizer, TURNS))
    other = [*TURNS[:1], {"role": "assistant", "content": "Lima."}]
    yield error_of(lambda: encode_conversation(tokenizer, other))
    tokenizer.chat_template = shown
    yield error_of(lambda: encode_conversation(tokenizer, TURNS))


class Slow(PreTrainedTokenizer):
    """A tokenizer written in Python, of one letter per token."""

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(256)}

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return [*text]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


@follows("gives no positions of its tokens, which a chat needs: add its tokenizer.json to the model")
def _(place: Place) -> Iterator[str]:
    slow = Slow(eos_token="$")
    ensure_template(slow)
    yield error_of(lambda: encode_conversation(slow, TURNS))
    folder = chatml(place.folder / "m").name  # this model has a tokenizer.json
    yield error_of(lambda: encode_conversation(AutoTokenizer.from_pretrained(folder), TURNS))


@follows("cannot train packed rows: {}: set task.packing=false")
def _(place: Place) -> Iterator[str]:
    task, model = TaskConfig(kind="causal_lm", max_length=16, packing=True), hub(checkpoint(place.folder / "m"))
    live = LiveAdapter(load_backbone(model, task), PeftConfig(method="prompt", tokens=3), task)
    yield error_of(lambda: probe_packing(live, task))
    rows = [{"text": "red lamp", "client": c} for c in "abcd" for _ in range(4)]
    config = tiny_config(place.folder / "run", rows, model=model, peft=PeftConfig(method="prompt", tokens=3), rounds=1)
    yield error_of(lambda: simulate(dataclasses.replace(config, task=dataclasses.replace(task, packing=False))))


def error_of_run(place: Place, rows: list[list[dict[str, Any]]], template: str | None = None, **task: Any) -> str:
    """The error of a run on these conversations; "" if there is none."""
    folder = place.folder / str(len(list(place.folder.iterdir())))
    config = tiny_config(folder, [{"messages": messages, "client": "abcd"[i % 4]} for i, messages in enumerate(rows)])
    model = chatml(folder / "chat")
    if template is not None:
        (folder / "chat" / "chat_template.jinja").write_text(template)
    data = dataclasses.replace(config.data, test_path=None, held_out=0.0, test_fraction=0.0)
    changes = TaskConfig(kind="chat", **{"max_length": 64, "max_new_tokens": 4, **task})
    return error_of(lambda: Workspace(dataclasses.replace(config, model=model, data=data, task=changes)).check_examples())


@follows("none of {} conversations fits into task.max_length={}; the shortest needs {} tokens: raise task.max_length", slow=True)
def _(place: Place) -> Iterator[str]:
    error = error_of_run(place, [TURNS] * 4, max_length=8)
    yield error
    yield error_of_run(place, [TURNS] * 4, max_length=int(re.findall(r"needs (\d+) tokens", error)[0]))


@follows("does not show the tool calls of {} conversations: give rows without tool calls, or a model whose template shows them", slow=True)
def _(place: Place) -> Iterator[str]:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "capital", "arguments": {"of": "Italy"}}}]}
    rows = [[TURNS[0], call]] * 4
    yield error_of_run(place, rows)
    yield error_of_run(place, [TURNS] * 4)
    shown = "{{ m.role + m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>"
    yield error_of_run(place, rows, f"{{% for m in messages %}}{shown}{{% endfor %}}")


@follows("the model's chat template refuses a conversation ({}): correct or remove it", slow=True)
def _(place: Place) -> Iterator[str]:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template += "{% for m in messages %}{{ m.role + m.content }}<|im_end|>{% endfor %}"
    yield error_of_run(place, [[{"role": "system", "content": "Hm."}, *TURNS]] * 4, template)
    yield error_of_run(place, [TURNS] * 4, template)


@follows("the model's chat template fails on a conversation ({}): correct or remove it", slow=True)
def _(place: Place) -> Iterator[str]:
    template = "{% for m in messages %}{{ m.role + m.content }}{{ 1 / (m.content | length) }}<|im_end|>{% endfor %}"
    yield error_of_run(place, [[{"role": "user", "content": ""}, TURNS[1]]] * 4, template)
    yield error_of_run(place, [TURNS] * 4, template)


@follows("task.date={} is not a date: write YYYY-MM-DD, such as 2026-01-01")
def _(place: Place) -> Iterator[str]:
    for date in ("today", "2026-01-01"):
        task = TaskConfig(kind="chat", date=date)
        yield error_of(lambda task=task: task_of(task).check(Config(task=task)))


@follows("none of {} rows has two tokens or more: give longer rows", slow=True)
def _(place: Place) -> Iterator[str]:
    for number, text in enumerate(("a", "red lamp")):
        config = tiny_config(place.folder / str(number), [{"text": text, "client": client} for client in "abcd"])
        path = Path(config.model.name) / "tokenizer_config.json"  # a tokenizer that adds no token to a text
        path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": None, "eos_token": None, "pad_token": "e"}))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, test_path=None, held_out=0.0, test_fraction=0.0))
        yield error_of(lambda config=config: Workspace(config).check_examples())


@follows("{}:{} has messages, but the model has no chat template: give rows with `text`")
def _(place: Place) -> Iterator[str]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(place.folder / "m"))
    file = place.folder / "a.jsonl"
    for row in ({"messages": TURNS}, {"text": "Hello? Rome."}):
        file.write_text(json.dumps(row))
        yield error_of(lambda: read_texts(file, tokenizer, None, 64))
