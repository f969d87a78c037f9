import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.text import StopStrings, Stream, Text, read_text, wrap
from tests.tiny import NANO

DATA = Path(os.environ.get("FEDTUNE_DATA", Path(__file__).parents[3] / "../shared/data")).resolve()


def byte_fallback() -> Tokenizer:
    """As Llama 2: spaces as ▁, unknown characters as bytes, the first space is cut."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcde,é", "▁a", "ab", "▁▁"]
    tok = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a"), ("a", "b"), ("▁", "▁")], unk_token="<unk>", byte_fallback=True)
    )
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tok


def byte_level() -> Tokenizer:
    """As GPT-2: every byte a character, and merges that begin with a space or end in the middle of one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("b", "c"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("a", "ð")]
    words = alphabet + ["".join(m) for m in merges] + ["<|end|>"]
    tok = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<|end|>"])
    return tok


def words() -> Tokenizer:
    """One token a word and no decoder: the library joins them with spaces."""
    return Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "turn", "on", "the", "light"])}, unk_token="<unk>"))


def word_pieces() -> Tokenizer:
    tok = Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(["[UNK]", "do", "##ing", "##n", "not", ".", "n't", "a"])}, unk_token="[UNK]")
    )
    tok.decoder = decoders.WordPiece()
    return tok


TOKENIZERS = {"byte_fallback": byte_fallback, "byte_level": byte_level, "words": words, "word_pieces": word_pieces}
TEXTS = {name: Text(make(), bos=None, ends=frozenset(), template=None, names={}) for name, make in TOKENIZERS.items()}


def stream_text(text: Text, ids: list[int]) -> list[str]:
    stream = Stream(text)
    return [*map(stream.push, ids), stream.finish()]


def test_a_failing_tokenizer_gives_a_one_sentence_error() -> None:
    text = Text(Tokenizer(models.WordLevel({"on": 0}, unk_token="?")), bos=None, ends=frozenset(), template=None, names={})
    assert text.encode("on") == [0]
    with pytest.raises(ModelError, match=r"cannot encode this text \(WordLevel error: Missing \[UNK\] token from the vocabulary\): export"):
        text.encode("off")


@pytest.mark.parametrize("name", TEXTS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_whole_text(name: str, data: st.DataObject) -> None:
    text = TEXTS[name]
    ids = data.draw(st.lists(st.integers(0, text.size - 1), max_size=30))
    assert "".join(stream_text(text, ids)) == text.decode(ids)


@pytest.mark.parametrize("name", ["byte_fallback", "byte_level"])
@given(string=st.text("ab c,é→😀👩🏽‍🚀e\u0301", max_size=20))
@settings(max_examples=100, deadline=None)
def test_no_piece_holds_half_a_character(name: str, string: str) -> None:
    text = TEXTS[name]
    ids = text.encode("a" + string)
    pieces = stream_text(text, ids)
    assert "".join(pieces) == "a" + string and not any("\ufffd" in piece for piece in pieces)


def test_an_emoji_of_four_byte_tokens_comes_at_once_and_text_before_it_does_not_wait() -> None:
    text = TEXTS["byte_level"]
    ids = text.encode("b 😁c")
    assert [text.tokenizer.id_to_token(i) for i in ids] == ["b", "Ġ", "ðŁĺ", "ģ", "c"]
    assert stream_text(text, ids) == ["b", " ", "", "😁", "c", ""]
    # a run of byte tokens decodes as one: it waits for its end
    text = TEXTS["byte_fallback"]
    ids = text.encode("b😁c")
    assert len(ids) == 7 and stream_text(text, ids) == ["", "b", "", "", "", "", "😁c", ""]


def test_spaces_that_belong_to_tokens_are_kept() -> None:
    text = TEXTS["byte_fallback"]
    spaced = "a a  b"
    assert "".join(stream_text(text, text.encode(spaced))) == spaced
    long = text.encode("a b c d e " * 40)
    stream = Stream(text)
    assert "".join(map(stream.push, long)) == "a b c d e " * 40
    assert len(stream._ids) < 5  # each step decodes a few tokens, not all


def test_special_tokens_give_no_text_and_break_no_character() -> None:
    text = TEXTS["byte_level"]
    end = max(text.special)
    ids = text.encode("😁")
    assert "".join(stream_text(text, [end, *ids[:1], end, *ids[1:], end])) == "😁"


# -- stop strings -------------------------------------------------------------------------------------------------------------------------


def stop(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    watch = StopStrings(stops)
    out = [watch.push(piece) for piece in pieces]
    return [*out, watch.finish()], watch.stopped


def test_stop_strings_by_hand() -> None:
    assert stop(["END"], ["abE", "N", "Dx"]) == (["ab", "", "", ""], True)
    assert stop(["END"], ["abE", "N", "x"]) == (["ab", "", "ENx", ""], False)
    assert stop(["END"], ["abE", "N"]) == (["ab", "", "EN"], False)
    assert stop(["b", "abc"], ["a", "bc"]) == (["", "a", ""], True)  # the first that is complete ends it
    assert stop(["aab"], ["aaab"]) == (["a", ""], True)
    assert stop([], ["a", "b"]) == (["a", "b", ""], False)


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(stops: list[str], pieces: list[str]) -> None:
    out, stopped = stop(stops, pieces)
    whole = "".join(pieces)
    ends = [i + len(s) for s in stops for i in [whole.find(s)] if i >= 0]
    assert stopped == bool(ends) and "".join(out) == "".join(stop(stops, list(whole))[0])
    for i in range(1, len(out) + 1):  # no returned text can belong to a stop string
        assert not any(s in "".join(out[:i]) for s in stops)
    if not stopped:
        assert "".join(out) == whole
    else:
        assert whole.startswith("".join(out)) and any(whole[len("".join(out)) :].startswith(s) for s in stops)


# -- folders ------------------------------------------------------------------------------------------------------------------------------


def save(folder: Path, tok: Tokenizer, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    "config",
    [{}, {"bos_token": "<s>"}, {"bos_token": "<s>", "add_bos_token": True}, {"bos_token": "<s>", "add_bos_token": False},
     {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "add_bos_token": True, "eos_token": "</s>"}],
)  # fmt: skip
def test_texts_begin_as_transformers_begins_them(tmp_path: Path, config: dict[str, Any], begun: bool) -> None:
    """The post-processor of tokenizer.json decides: `from_pretrained` drops add_bos_token where there is one."""
    tok = byte_fallback()
    if begun:
        tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))])
    folder = save(tmp_path / "m", tok, **config)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    text, theirs = read_text(folder), AutoTokenizer.from_pretrained(folder)
    assert text.bos == (1 if begun and config else None)  # without a name <s> is any token that the post-processor writes
    if config or not begun:
        assert theirs("ab a").input_ids == text.encode("ab a")


def test_a_special_token_that_is_neither_text_nor_an_added_token_is_refused_as_by_transformers(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", byte_fallback(), bos_token={"content": "<s>"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TypeError, match="Special token bos_token has to be either str or AddedToken"):
        AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ModelError, match="neither a string nor an added token"):
        read_text(folder)


def test_the_end_tokens_are_the_tokenizers_and_the_models(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", byte_fallback(), eos_token="</s>")
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert read_text(folder).ends == {2, 7}
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read_text(folder).ends == {2, 5, 6}


def test_damaged_files_give_a_one_sentence_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer.json"):
        read_text(tmp_path)
    good = save(tmp_path / "m", byte_fallback())
    for name, content in [
        ("tokenizer_config.json", "[]"), ("tokenizer_config.json", "{"), ("generation_config.json", "[" * 100_000),
        ("special_tokens_map.json", "nul"), ("chat_template.jinja", None),
    ]:  # fmt: skip
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        (folder / name).write_bytes(b"\xff\xfe\x00" if content is None else content.encode())
        with pytest.raises(ModelError, match=name) as bad:
            read_text(folder)
        assert "\n" not in str(bad.value)
    rng = random.Random(0)
    whole = (good / "tokenizer.json").read_bytes()
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at, kind = rng.randrange(len(data)), rng.random()
            if kind < 0.4:
                data[at] = rng.randrange(256)
            elif kind < 0.7:
                del data[at : at + rng.randint(1, 400)]
            else:
                data[at:at] = rng.choice([b"null", b"-1", b"1e99", b'""', b"[]", b"{}"])
        (good / "tokenizer.json").write_bytes(data)
        try:
            text = read_text(good)
            text.decode(text.encode("ab é→", begin=False))
        except (ModelError, ConfigError) as bad:
            assert "\n" not in str(bad)
            refused += 1
    assert refused > 75


# -- chat templates -----------------------------------------------------------------------------------------------------------------------

CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


TOOLS = "{{ raise_exception('for a chat with tools') }}"
WHERE: dict[str, tuple[Any, dict[str, str]]] = {  # chat_template of tokenizer_config.json, and further files
    "file": (None, {"chat_template.jinja": CHATML}),
    "config": (CHATML, {}),
    "named": ([{"name": "tool_use", "template": TOOLS}, {"name": "default", "template": CHATML}], {}),
    "mapping": ({"tool_use": TOOLS, "default": CHATML}, {}),
    "file over config": (TOOLS, {"chat_template.jinja": CHATML}),
    "beside": (TOOLS, {"chat_template.jinja": CHATML, "additional_chat_templates/tool_use.jinja": TOOLS}),
    "beside as default": (None, {"chat_template.jinja": TOOLS, "additional_chat_templates/default.jinja": CHATML}),
    "none": (None, {}),
    "none named default": ([{"name": "tool_use", "template": CHATML}], {}),
    "no default beside": (CHATML, {"additional_chat_templates/tool_use.jinja": CHATML}),
}


@pytest.mark.parametrize("where", WHERE)
def test_a_folder_has_the_chat_template_that_transformers_finds(tmp_path: Path, where: str) -> None:
    config, files = WHERE[where]
    folder = save(tmp_path / "m", byte_fallback(), bos_token="<s>", chat_template=config)
    for name, source in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source)
    messages = [{"role": "user", "content": "a 😀"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    text, theirs = read_text(folder), AutoTokenizer.from_pretrained(folder)
    if where.startswith("no"):  # a model that has none, or none for a chat without tools
        with pytest.raises(ValueError, match="chat template"):
            theirs.apply_chat_template(messages, tokenize=False)
        with pytest.raises(ModelError, match="no chat template"):
            text.chat(messages)
    else:
        assert text.chat(messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text.encode(text.chat(messages), begin=False)[0] == 1


def test_a_template_is_sandboxed_and_its_faults_give_a_one_sentence_error(tmp_path: Path) -> None:
    def chat(template: str) -> str:
        return read_text(save(tmp_path / "m", byte_fallback(), chat_template=template)).chat([{"role": "user", "content": "hi"}])

    with pytest.raises(ConfigError, match="refuses the messages: roles must alternate"):
        chat("{{ raise_exception('roles must alternate') }}")
    for bad in ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for %}", "{{ 1 / 0 }}", "{{ messages.append(1) }}", "{{ x.y }}",
                "{% for i in range(10**9) %}{% endfor %}", "{% include '/etc/passwd' %}"]:  # fmt: skip
        with pytest.raises(ModelError, match="chat template failed") as error:
            chat(bad)
        assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="no chat template"):
        TEXTS["words"].chat([])


# -- complete tokenizers ----------------------------------------------------------------------------------------------------------------


def test_a_request_is_wrapped_in_a_template_of_one_field() -> None:
    assert wrap("hi", "Q: {q}\nA:") == "Q: hi\nA:" and wrap("Q: hi", "Q: {q}") == "Q: hi" and wrap("hi", None) == "hi"


def test_an_empty_prompt_needs_a_token_to_begin_with() -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        TEXTS["words"].encode("")


def test_only_equal_vocabularies_count_as_equal() -> None:
    assert TEXTS["words"].same_as(TEXTS["words"]) and not TEXTS["words"].same_as(TEXTS["word_pieces"])


def agree(folder: Path, samples: list[str]) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), read_text(folder)
    lead = [theirs.bos_token_id] if theirs("").input_ids[:1] == [theirs.bos_token_id] else []
    for sample in samples:
        ids = lead + theirs(sample, add_special_tokens=False).input_ids
        assert ours.encode(sample) == ids and ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert "".join(stream_text(ours, ids)) == ours.decode(ids)


SAMPLES = ["Once upon a time", " two  spaces ", "naïve café → 😀👩🏽‍🚀", "tab\tnew\nline", "</s> in the text"]


def test_the_nano_tokenizer_equals_transformers() -> None:
    agree(NANO, SAMPLES)


@pytest.mark.skipif(not (DATA / "models").is_dir(), reason="needs FEDTUNE_DATA with models")
@pytest.mark.parametrize("name", ["stories260k", "babyllama_tok105"])
def test_real_tokenizers_equal_transformers(name: str) -> None:
    agree(DATA / "models" / name / "hf", SAMPLES)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "tokenizers/gpt2").is_dir(), reason="needs FEDTUNE_DATA with tokenizers/gpt2")
def test_every_emoji_through_gpt2s_tokenizer() -> None:
    tok = Tokenizer(models.BPE.from_file(str(DATA / "tokenizers/gpt2/vocab.json"), str(DATA / "tokenizers/gpt2/merges.txt")))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = Text(tok, bos=None, ends=frozenset(), template=None, names={})
    for begin in range(0x1F300, 0x1FAFF, 16):
        string = "x " + " and ".join(map(chr, range(begin, begin + 16)))
        pieces = stream_text(text, text.encode(string))
        assert "".join(pieces) == string and not any("\ufffd" in piece for piece in pieces)
