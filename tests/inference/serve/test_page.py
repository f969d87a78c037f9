"""The page for trying the model, in a headless Chromium."""

import re
from pathlib import Path

import httpx
import pytest

from fedtune.inference.engine.load import Engine
from fedtune.inference.engine.sample import Sampling
from tests.inference.serve.chromium import Page, open_page
from tests.inference.serve.servers import Served, answer_alone, serve_model, text_of

PAGE = Path(__file__).parents[3] / "fedtune/inference/serve/page.html"


def ask(page: Page, text: str, **settings: str) -> None:
    for name, value in settings.items():
        page.run(f"document.getElementById('{name}').value = {value!r}")
    page.run(f"document.getElementById('prompt').value = {text!r}")
    page.run("document.getElementById('form').requestSubmit()")


def ready(page: Page) -> None:
    page.wait("document.getElementById('state').textContent === 'ready'")


def test_the_page_loads_nothing_from_other_hosts() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", text)
    # an answer is inserted as text, never as HTML
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text)
    assert not re.search(r"\bon[a-z]+\s*=\s*[\"']", text)  # the policy would block inline handlers
    assert "style=" not in text.replace("color-scheme", "")


def test_the_policy_names_the_pages_own_script(engine: Engine) -> None:
    with serve_model(engine) as server:
        policy = httpx.get(server.url).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


@pytest.mark.slow
def test_the_page_completes_chats_and_escapes(engine: Engine, tmp_path: Path) -> None:
    with serve_model(engine) as server, open_page(server.url) as page:
        ready(page)
        _check_completion(server, page)
        _check_chat(server, page)
        _check_escaping(server, page)
        for dark in (False, True):
            shot = tmp_path / f"{dark}.png"
            page.screenshot(shot, dark=dark)
            assert shot.stat().st_size > 5000
        assert not page.complaints  # no exception and no violation of the policy


def _check_completion(server: Served, page: Page) -> None:
    page.run("document.getElementById('complete').click()")
    ask(page, "turn on", temperature="0", tokens="9")
    page.wait("/9 tokens .* tok.s .* stopped at max tokens/.test(document.querySelector('.figures')?.textContent)")
    outputs = answer_alone(server.engine, server.engine.text.encode("turn on"), Sampling(), 9, joins=True)
    assert page.run("document.querySelector('.turn').textContent") == "turn on" + text_of(outputs)


def _check_chat(server: Served, page: Page) -> None:
    page.run("document.getElementById('clear').click()")
    page.run("document.getElementById('chat').click()")
    ask(page, "hello", tokens="6")
    page.wait("document.querySelectorAll('.figures').length === 1 && !document.querySelector('.busy')")
    ids = server.engine.text.encode("user: hello\nassistant:", begin=False)
    first = text_of(answer_alone(server.engine, ids, Sampling(), 6)).lstrip()
    assert page.run("[...document.querySelectorAll('.turn')].map((turn) => turn.textContent)") == ["hello", first]
    ask(page, "more")
    page.wait("document.querySelectorAll('.figures').length === 2 && !document.querySelector('.busy')")
    ids = server.engine.text.encode(f"user: hello\nassistant: {first}\nuser: more\nassistant:", begin=False)
    wanted = text_of(answer_alone(server.engine, ids, Sampling(), 6)).lstrip()
    assert page.run("[...document.querySelectorAll('.turn')].at(-1).textContent") == wanted


def _check_escaping(server: Served, page: Page) -> None:
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
    page.wait("!document.querySelector('.busy') && document.getElementById('state').textContent === 'ready'")
    assert page.run("document.querySelectorAll('#talk img, #talk b').length") == 0


@pytest.mark.slow
def test_stopping_an_answer_and_showing_a_refusal(engine: Engine) -> None:
    with serve_model(engine, pace=0.02) as server, open_page(server.url) as page:
        ready(page)
        ask(page, "hello", tokens="400")
        page.wait("document.querySelector('.figures')?.textContent.includes('tokens')")
        page.run("document.getElementById('stop').click()")
        page.wait("document.querySelector('.figures').textContent.endsWith('stopped') && !document.getElementById('send').hidden")
        while server.scheduler.load != (0, 0):
            assert server.scheduler.passes < 300
        page.run("document.getElementById('tokens').removeAttribute('max')")
        ask(page, "hello", tokens="5000")
        page.wait("document.querySelector('.error')?.textContent.includes('limit of 1024')")


@pytest.mark.slow
def test_the_page_asks_for_the_key(engine: Engine) -> None:
    with serve_model(engine, keys=("secret",)) as server, open_page(server.url) as page:
        page.wait("document.getElementById('state').textContent === 'needs an API key'")
        page.run("document.getElementById('key').value = 'secret'; document.getElementById('key').dispatchEvent(new Event('change'))")
        ready(page)
        ask(page, "hello", temperature="0", tokens="3")  # greedy, because a sampled answer could end earlier
        page.wait("document.querySelector('.figures')?.textContent.includes('3 tokens')")
