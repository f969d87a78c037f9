"""Loads a folder's tokenizer like transformers' AutoTokenizer, from the folder's files alone.

For most classes transformers uses tokenizer.json unchanged. For some it uses only the vocabulary, the merges and the post-processor, and
rebuilds the rest by rules of the class: for example, Llama's rule adds no space after a special token, whatever tokenizer.json has. In both
cases it adds the special tokens of the configs, with their flags. All of this affects token ids, so it is reproduced here. Other classes
are `Unsupported`: run their models with transformers or as an edge package.

Source: transformers 5.23, `AutoTokenizer.from_pretrained` and `TokenizersBackend`; `tests/export/test_readers.py` compares.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from fedtune.errors import ModelError
from fedtune.inference.engine.shape import Unsupported
from fedtune.storage.parsing import parse_json, read_text

__all__ = ["LoadedTokenizer", "check_tokenizer", "read_object", "read_tokenizer"]

AS_IT_IS = (
    "TokenizersBackend",
    "PreTrainedTokenizer",
    "PythonBackend",
)  # classes that use tokenizer.json unchanged, without the suffix "Fast"
_REGISTERED = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer")}
_PLAIN = ("mistral", "phi3", "olmo2")  # model_types whose tokenizer.json is used unchanged, whatever class the configs name
_MOST = 1 << 24  # limit of token ids, far above any vocabulary
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULTS: dict[str, dict[str, Any]] = {  # class → its default special tokens
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "GemmaTokenizer": {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "mask_token": "<mask>"},
    "GPT2Tokenizer": {"unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": None},
}
_QWEN2 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A loaded tokenizer.

    Args:
        tokenizer: A tokenizer of the `tokenizers` library.
        names: Its special tokens, such as {"bos_token": "<s>"}.
        begun: Ids of the empty text, which its post-processor adds.
    """

    tokenizer: Tokenizer
    names: Mapping[str, str]
    begun: Sequence[int]


def read_tokenizer(folder: Path, *, saved: bool) -> LoadedTokenizer:
    """Load the tokenizer of a model folder.

    Args:
        folder: Folder with tokenizer.json.
        saved: Whether transformers saved the files from a loaded tokenizer, as in an edge package: then tokenizer.json is complete.

    Raises:
        Unsupported: The tokenizer's class is not supported.
        ModelError: tokenizer.json is missing, or a file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json: save its tokenizer in the fast format of the tokenizers library")
    config = read_object(folder / "tokenizer_config.json")
    kind = "" if saved else _kind(folder, config)
    try:
        stored = read_text(path)
        raw = parse_json(stored)
        if kind and raw["model"].get("type") != "BPE":
            raise ModelError(
                f"{path} holds a {raw['model'].get('type')} model, but a {kind} needs BPE: set tokenizer_class to"
                " PreTrainedTokenizerFast in tokenizer_config.json"
            )
        tokenizer = Tokenizer.from_str(json.dumps({**raw, **_REBUILT[kind](raw, config)}) if kind else stored)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        highest = max(tokenizer.get_vocab().values(), default=0)
        if highest >= _MOST:  # serializing the tokenizer takes memory for every id up to the highest
            raise ModelError(f"{path} has a token with the id {highest}: it is damaged")
        names = _add_special(tokenizer, folder, raw, config, kind)
        return LoadedTokenizer(tokenizer=tokenizer, names=names, begun=tokenizer.encode("").ids)
    except (KeyboardInterrupt, SystemExit, ModelError):
        raise
    except BaseException as bad:  # the Rust code raises Exception, and its panics are BaseExceptions
        raise ModelError(
            f"{path} or another of the tokenizer's files cannot be read ({first_line(bad)}): one of them is damaged or of another version"
        ) from None


def check_tokenizer(folder: Path) -> None:
    """Raise Unsupported if `read_tokenizer` would, for a folder with tokenizer.json."""
    _kind(folder, read_object(folder / "tokenizer_config.json"))


def _kind(folder: Path, config: Mapping[str, Any]) -> str:
    """The class by whose rules the tokenizer is rebuilt; "" if tokenizer.json is used unchanged."""
    model = read_object(folder / "config.json")
    family, custom = model.get("model_type"), config.get("auto_map")
    own = config.get("tokenizer_class") or model.get("tokenizer_class")
    name = str(own or _REGISTERED.get(str(family), AS_IT_IS[0])).removesuffix("Fast")
    if custom and (not isinstance(custom, dict) or custom.get("AutoTokenizer")):
        raise Unsupported("its tokenizer is custom code (auto_map in tokenizer_config.json)")
    if (
        config.get("fast_tokenizer_files")
        or config.get("fix_mistral_regex")
        or (family == "mistral" and (folder / "tekken.json").is_file())
    ):
        raise Unsupported("which of its tokenizers is used depends on the version of transformers")
    if family in _PLAIN or (family != "qwen2" and name == "LlamaTokenizer" and _by_bytes(folder)):
        return ""
    if family == "qwen2":  # transformers overrides the class in such folders, which is often wrong
        name = _REGISTERED["qwen2"]
    if name in AS_IT_IS:
        return ""
    if name not in _REBUILT:
        raise Unsupported(f"its tokenizer is a {name}, which the engine does not support (it supports {', '.join(_REBUILT)})")
    return name


def _by_bytes(folder: Path) -> bool:
    try:
        return '"ByteLevel"' in read_text(folder / "tokenizer.json")
    except (OSError, ValueError):
        return False  # reported when it is read


def _llama(raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    space = config.get("add_prefix_space")
    space = True if space is None else bool(space)
    scheme = ("always" if config.get("legacy") else "first") if space else "never"
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space else []
    return _rebuilt(
        raw,
        normalizer=None,
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        decoder={"type": "Sequence", "decoders": [*steps, *strip]},
        model={"fuse_unk": True, "byte_fallback": True},
    )


def _qwen2(raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    bytes_ = {"type": "ByteLevel", "add_prefix_space": bool(config.get("add_prefix_space")), "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False}
    return _rebuilt(
        raw,
        normalizer={"type": "NFC"},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, bytes_]},
        decoder=_BYTES,
        model={"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False},
    )


def _gpt2(raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return _rebuilt(
        raw,
        normalizer=None,
        pre_tokenizer={**_BYTES, "add_prefix_space": bool(config.get("add_prefix_space"))},
        decoder=_BYTES,
        model={"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False},
    )


def _gemma(raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    unknown = config.get("unk_token") or _DEFAULTS["GemmaTokenizer"]["unk_token"]
    return _rebuilt(
        raw,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        pre_tokenizer={"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        decoder={
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        model={"unk_token": str(_token(unknown)), "fuse_unk": True, "byte_fallback": True},
    )


_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_REBUILT = {"LlamaTokenizer": _llama, "Qwen2Tokenizer": _qwen2, "GPT2Tokenizer": _gpt2, "GemmaTokenizer": _gemma}


def _rebuilt(raw: Mapping[str, Any], *, model: Mapping[str, Any], **parts: Any) -> dict[str, Any]:
    """tokenizer.json's entries except the post-processor: the class's parts with the file's vocabulary and merges."""
    own = raw["model"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in own["merges"]]
    plain = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "ignore_merges": False, **model, "vocab": own["vocab"], "merges": merges}  # fmt: skip
    return {**parts, "model": plain, "added_tokens": []}


def _add_special(tokenizer: Tokenizer, folder: Path, raw: Mapping[str, Any], config: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Add the special tokens that the configs list, and return the named ones. A token that is added again gets the new flags."""
    given, added = dict(config), dict[int, AddedToken]()
    if "additional_special_tokens" in given and not given.get("extra_special_tokens"):
        given["extra_special_tokens"] = given.pop("additional_special_tokens")
    if "added_tokens_decoder" in config:
        added = {int(i): AddedToken(**token) for i, token in config["added_tokens_decoder"].items()}
    else:  # versions before 4.34 store them in separate files
        given |= _older(folder, given)
        extra = given.get("extra_special_tokens") or ()
        special = {str(_token(t)) for t in (*(given.get(n) for n in _NAMES), *extra) if t}
        for content, i in read_object(folder / "added_tokens.json").items():
            added[i] = AddedToken(content, normalized=content not in special, special=content in special)
        for token in raw["added_tokens"]:
            added[token["id"]] = AddedToken(**{k: v for k, v in token.items() if k != "id"})
        if "additional_special_tokens" in given and "extra_special_tokens" not in given:
            given["extra_special_tokens"] = given.pop("additional_special_tokens")
    more = given.pop("extra_special_tokens", None) or []
    more, own = ([], more) if isinstance(more, dict) else (more, {})
    custom = own or any(n not in _NAMES and _is_name(n, v) for n, v in config.items())
    own = own if custom else {**(config.get("model_specific_special_tokens") or {}), **own}
    defaults = {"pad_token": (raw.get("padding") or {}).get("pad_token"), **_DEFAULTS.get(kind, {})}
    found = {**dict.fromkeys(_NAMES), **defaults, **{n: v for n, v in given.items() if _is_name(n, v)}, **own}
    flags = {token.content: token for token in added.values()}
    named: dict[str, Any] = {n: _token(v) for n, v in found.items() if v is not None}
    named = {n: flags.get(str(t), t) if n in _NAMES else t for n, t in named.items()}
    texts, extra = list(dict.fromkeys(map(str, named.values()))), [_token(t) for t in more]
    every = [t for _, t in sorted(added.items())]
    known = {t.content for t in (*tokenizer.get_added_tokens_decoder().values(), *every)}
    for token in (*named.values(), *extra):
        if str(token) not in known:
            every.append(AddedToken(token, special=True) if isinstance(token, str) else token)
            known.add(str(token))
    for token in every:
        token.special = token.special or token.content in texts
    tokenizer.add_tokens(every)
    if kind == "Qwen2Tokenizer":
        tokenizer.add_tokens([AddedToken(t, special=True) for t in dict.fromkeys((*texts, *map(str, extra)))])
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    return {n: str(t) for n, t in named.items()}


def _older(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json, which overrides tokenizer_config.json in such versions."""
    out = dict[str, Any]()
    for name, value in read_object(folder / "special_tokens_map.json").items():
        if isinstance(value, dict) and name != "extra_special_tokens":
            value = {**value, "special": True, "__type": "AddedToken"}
        elif name == "extra_special_tokens" and isinstance(value, list):
            value = [*(given.get(name) or ()), *value]
        out[name] = value
    return out


def _is_name(name: str, value: Any) -> bool:
    return name in _NAMES or (name.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "__type" in value)))


def _token(value: Any) -> Any:
    """A token of a config: a string, or an added token with its flags."""
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return AddedToken(**{k: v for k, v in value.items() if k != "__type"})
    if isinstance(value, str | AddedToken):
        return value
    raise TypeError(f"{value!r:.60} is neither a string nor an added token")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if the file does not exist. Raises ModelError."""
    if not path.is_file():
        return {}
    try:
        found = parse_json(read_text(path))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{path} cannot be read: it must be a JSON object")
    return found


def first_line(bad: BaseException) -> str:
    """The first line of an exception's text, shortened."""
    lines = str(bad).strip().splitlines()
    return lines[0][:120] if lines else type(bad).__name__
