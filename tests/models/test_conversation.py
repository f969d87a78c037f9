"""A conversation's renderings: their limits, their date, and the tool calls that they do not show."""

import re
from typing import Any

import pytest

from fedtune.errors import DataError, ModelError
from fedtune.models.chat_template import Conversation, encode_conversation
from fedtune.templates import process
from fedtune.templates.render import render as render_chats
from tests.models import templates
from tests.models.test_chat_template import CONVERSATIONS, VICUNA, render, reply, tokenizer_with, user


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}", "failed: it takes more than 0.2 s"),
        ("{{ 'a' * 10 ** 10 }}", "fails on a conversation (it takes more than 512 MB of memory"),
        ("{{ 'a' * 2 ** 25 }}", "fails on a conversation (its output has more than 16777216 characters"),
        ("{{ messages[0].content + 1 }}", "fails on a conversation (can only concatenate str"),
    ],
)
def test_a_template_is_bounded_in_training(monkeypatch: pytest.MonkeyPatch, source: str, why: str) -> None:
    monkeypatch.setattr(process, "SECONDS", 0.2 if "0.2 s" in why else 2.0)
    tokenizer = tokenizer_with(source)
    with pytest.raises((DataError, ModelError), match=f"^the model's chat template {re.escape(why)}"):
        encode_conversation(tokenizer, CONVERSATIONS["one"])


def test_a_row_takes_two_exchanges_with_the_rendering_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def count_requests(template: str, chats: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(chats))
        return render_chats(template, chats, *args, **kwargs)

    monkeypatch.setattr("fedtune.models.chat_template.render", count_requests)
    encode_conversation(templates.tokenizer("llama3"), CONVERSATIONS["three"])
    assert asked == [1, 5]  # first the whole row, then the prompts of three answers and the ends of the first two
    asked.clear()
    encode_conversation(templates.tokenizer("llama3", marks=True), CONVERSATIONS["three"])
    assert asked == [1, 1]


def test_a_template_prints_the_date_of_the_settings() -> None:
    tokenizer = tokenizer_with("{{- strftime_now('%d %B %Y') + '\n' }}" + templates.remove_marks(VICUNA))
    assert render(tokenizer, [user("a")]).startswith("01 January 2026\n")
    assert Conversation(tokenizer, [user("a")], date="2024-02-29").text().startswith("29 February 2024\n")


@pytest.mark.parametrize(
    ("name", "hidden"), [("qwen2", False), ("qwen3", False), ("llama3", False), ("mistral3", False), ("chatml", True), ("phi4", True)]
)
def test_a_tool_call_that_is_not_shown_is_found(name: str, hidden: bool) -> None:
    tokenizer = templates.tokenizer(name)
    assert Conversation(tokenizer, CONVERSATIONS["tools"]).hides_a_call() == hidden
    assert not Conversation(tokenizer, CONVERSATIONS["empty"]).hides_a_call()
    assert not Conversation(tokenizer, [user("?"), reply("", tool_calls=[])]).hides_a_call()
