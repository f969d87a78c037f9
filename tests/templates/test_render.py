import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.text import Text, read_text
from fedtune.templates import process, render

USER = {"role": "user", "content": 'Grüße & <b>"x"</b> 😀\n'}
CHATS = [
    [USER],
    [{"role": "system", "content": "be brief"}, USER],
    [USER, {"role": "assistant", "content": " yes "}, {"role": "user", "content": ""}],
]
WRITTEN = [
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|it|>{% endif %}",
    "{% for m in messages %}\n  {%- if m.role != 'user' %}\n{% generation %}\n{{ m.content }}{% endgeneration %}\n{% endif %}{% endfor %}",
    "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration -%}{% endfor %}",
    "{{ strftime_now('%d %b %Y') }}",
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ messages | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
    "{{ messages[0] | tojson(false, 4, none, true) }}",
    "{% if tools is not none %}tools{% endif %}{% if tools is defined %}defined{% endif %}{% if not tools %}none{% endif %}",
    "{% if documents is none %}no documents{% endif %}{{ documents }}{{ enable_thinking is defined }}",
    "{% set ns = namespace(i=0, first=true) %}{% for m in messages %}{% set ns.i = ns.i + m.content | length %}{% endfor %}{{ ns.i }}",
    "{{ dict(a=1, b=messages | length) }}{{ dict.fromkeys(['x'], 2) }}{{ dict([('k', 'v')]).k }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.content | trim }}{% break %}{% endfor %}",
    "{{ eos_token }}|{{ pad_token }}|{{ image_token }}|{{ audio_token }}|{{ audio }}|{{ unk_token is defined }}",
    "{{ messages[-1]['tool_calls'] is defined }}{{ messages[0].get('name', 'nobody') }}{{ messages[0].content.split('<')[0].upper() }}",
    "{% macro turn(m) %}[{{ m.role }}]{% endmacro %}{{ messages | map(attribute='role') | join(',') }}{{ turn(messages[0]) }}",
]  # fmt: skip
NOT_WRITTEN = [
    "{{ raise_exception('roles must alternate') }}",
    "{{ namespace(_x=1) }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ dict.__class__ }}{{ dict.mro() }}",
    "{{ messages.append(1) }}",
    "{% generation %}",
    "{{ messages[0].content + 1 }}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("m")
    Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<img>": 2, "<aud>": 3, "<unk>": 4}, unk_token="<unk>")).save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    extra = {"audio_token": "<aud>", "audio": {"__type": "AddedToken", "content": "<aud>"}}
    config |= {"image_token": "<img>", "extra_special_tokens": extra}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("source", WRITTEN)
def test_every_feature_of_a_template_renders_as_in_transformers(folder: Path, source: str) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), read_text(folder)
    ours.template = source
    for chat in CHATS:
        assert ours.chat(chat) == theirs.apply_chat_template(chat, chat_template=source, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("source", NOT_WRITTEN)
def test_templates_that_transformers_refuses_give_a_one_sentence_error(folder: Path, source: str) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), read_text(folder)
    ours.template = source
    with pytest.raises((jinja2.TemplateError, TypeError)):
        theirs.apply_chat_template(CHATS[0], chat_template=source, tokenize=False, add_generation_prompt=True)
    with pytest.raises((ConfigError, ModelError), match="the model's chat template ") as error:
        ours.chat(CHATS[0])
    assert "\n" not in str(error.value)


def text(source: str, messages: list[dict[str, Any]]) -> str:
    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return Text(tokenizer, bos=None, ends=frozenset(), template=source, names={}).chat(messages)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0.2 s"),
        ("{{ 7 ** (9 ** 9) % 10 }}", "takes more than 0.2 s"),  # within a single operation, where no Python code runs
        ("{{ messages | tojson(indent=1e9 | int) }}", "more than 512 MB of memory"),
        ("{{ 'a' * 10 ** 10 }}", "more than 512 MB of memory"),
        ("{{ '%999999999d' % 1 }}", "more than 512 MB of memory"),
        ("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "more than 512 MB of memory"),
        ("{{ 'a' * 2 ** 25 }}", "more than 16777216 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_is_bounded_in_time_and_memory_and_the_next_one_renders(monkeypatch: pytest.MonkeyPatch, source: str, why: str) -> None:
    monkeypatch.setattr(process, "SECONDS", 0.2 if "0.2 s" in why else 2.0)
    began = time.monotonic()
    with pytest.raises(ModelError, match=f"the model's chat template failed: .*{why}"):
        text(source, CHATS[0])
    assert time.monotonic() - began < 20
    assert text("{{ messages[0].role }}", CHATS[0]) == "user"


def test_one_process_renders_for_all_threads_and_each_gets_its_own_text() -> None:
    def answer(i: int) -> str:
        return text("{{ messages[0].content }}" + "{# #}" * (i % 6), [{"role": "user", "content": str(i)}])

    answer(0)
    running = render._PROCESS._process
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, range(200))) == [str(i) for i in range(200)]
    assert running is not None and render._PROCESS._process is running


def test_a_process_that_was_killed_is_started_again() -> None:
    text("", CHATS[0])
    killed = render._PROCESS._process
    assert killed is not None
    killed.kill()
    killed.wait()
    assert text("{{ messages | length }}", CHATS[2]) == "3"


def test_the_check_rejects_a_template_that_cannot_run_and_accepts_one_that_refuses(folder: Path) -> None:
    text = read_text(folder)
    for source in (None, "{{ messages[0].content }}", "{{ raise_exception('a system message comes first') }}"):
        text.template = source
        text.check_template()
    text.template = "{% for m in messages %}"
    with pytest.raises(ModelError, match="the model's chat template failed: "):
        text.check_template()


MARKED = [
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "{% for m in messages %}é{% if m.role == 'assistant' %}{%- generation -%} {{ m.content }} {%- endgeneration -%}{% endif %}{% endfor %}",
    "{% macro turn(m) %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endmacro %}{{ turn(messages[0]) }}",
    "{{ messages[0].content }}",
]


@pytest.mark.parametrize("source", MARKED)
def test_the_marks_equal_those_of_transformers(source: str) -> None:
    chats = [*CHATS, [{**USER, "reasoning_content": "hm"}]]
    found = render.render(source, [render.Chat(messages=chat) for chat in chats], {})
    texts, marks = render_jinja_template(
        conversations=chats, chat_template=source, add_generation_prompt=True, return_assistant_tokens_mask=True
    )
    assert [one.text for one in found] == texts
    assert [[tuple(mark) for mark in one.marks] for one in found] == marks


def test_templates_get_reasoning_and_tools_under_transformers_names() -> None:
    source = "{{ messages[0].reasoning_content }} {{ messages[0].thinking }} {{ messages[0].reasoning is defined }} {{ tools[0].name }}"
    chat, tools = [{**USER, "reasoning_content": "hm"}], [{"name": "capital"}]
    (found,) = render.render(source, [render.Chat(messages=chat, tools=tools)], {})
    assert found.text == "hm hm False capital"
    assert render_jinja_template(conversations=[chat], tools=list(tools), chat_template=source)[0] == [found.text]


@pytest.mark.slow
def test_each_chat_of_a_request_has_its_own_result_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SECONDS", 0.4)
    work = "{% for i in range(9999) %}{% for i in range(9) %}{% endfor %}{% endfor %}" * 3  # about 0.05 s
    source = work + "{% if messages[0].content == 'no' %}{{ raise_exception('not that') }}{% endif %}{{ messages[0].content + '' }}"
    chats = [[{"role": "user", "content": content}] for content in ["a", "no", 5, *["b"] * 17]]
    found = render.render(source, [render.Chat(messages=chat) for chat in chats], {})
    assert [one.text for one in found] == ["a", "", "", *["b"] * 17]
    assert found[1].refused == "not that" and not found[1].fault and "int" in found[2].fault and not found[2].refused


def test_the_date_can_be_fixed() -> None:
    source = "{{ strftime_now('%d %B %Y %H:%M') }}"
    (found,) = render.render(source, [render.Chat(messages=[])], {}, now="2026-02-03")
    assert found.text == "03 February 2026 00:00"
    (found,) = render.render(source, [render.Chat(messages=[])], {})
    assert not found.text.endswith("2026 00:00") or found.text[:2] != "03"
