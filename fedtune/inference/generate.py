"""Generates text with fedtune's engine if it supports the architecture, else with transformers."""

import importlib.util
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedtune.config import PeftConfig
from fedtune.config.bounds import require
from fedtune.config.registry import TASKS
from fedtune.contracts.task import adapter_tasks, find
from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.caches.budget import choose, parse_size
from fedtune.inference.engine.context import Context
from fedtune.inference.engine.generate import Generation, Speculation
from fedtune.inference.engine.gptq_config import split_config
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.package import CARD, is_package
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.shape import Unsupported, read_shape
from fedtune.inference.engine.text import Text, wrap
from fedtune.inference.engine.tokenizer import check_tokenizer
from fedtune.models.checkpoint import read_config
from fedtune.storage.parsing import parse_json, read_text

if TYPE_CHECKING:
    from fedtune.inference.engine.load import Engine

__all__ = [
    "NoText", "StrippedWriter", "check_folder", "falls_back", "generate_text", "open_context", "open_speculation", "read_card",
    "why_not_engine", "wrap",
]  # fmt: skip

LENGTH = 64  # default length of an answer, in tokens


class NoText(ModelError):
    """The model generates no text: it is a classifier, for instance."""


def generate_text(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    kind: str | None = None,
    kv_budget: str | None = None,
    speculate: str = "auto",
    draft: Path | None = None,
    adapter: str | None = None,
    write: Callable[[str], object] | None = None,
) -> str:
    """The model's continuation of the prompt, without the prompt.

    Args:
        folder: An edge package or a Hugging Face folder; an export of fedtune wraps the request in the run's prompt template, or in the
            model's chat template if the run's task is chat.
        prompt: The request, or the complete prompt if the folder has no template.
        max_new_tokens: Longest answer; None uses the run's setting, or 64.
        temperature, top_k, top_p, min_p, repetition_penalty, seed, stop: As in `Sampling`; temperature 0 is greedy.
        write: Called with each piece of text as it is generated.

    Other arguments:
        kind: Weight format in memory: fp32, bf16, int8 or int4; None keeps the stored one.
        kv_budget: Memory limit of the KV cache, such as "64MB".
        speculate: auto, none, lookup, early-exit or draft (see `open_speculation`).
        draft: Folder of a draft model.
        adapter: A separate LoRA adapter: the name of one in the package, or a folder.

    Raises:
        ConfigError: A number is out of range, or the prompt fills the model's context.
        ModelError: The folder cannot be loaded, or holds a classifier.
    """
    folder = Path(folder)
    card = read_card(folder)
    length = max_new_tokens if max_new_tokens is not None else card.get("max_new_tokens") or LENGTH
    require("max_new_tokens", length, ge=1)
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop)
    )
    if (card.get("prompt") or is_chat(card)) and not prompt.strip():
        raise ConfigError("the request is empty: give some text")
    guesses = None if speculate in ("auto", "none") else speculate
    if falls_back(folder, card, kind=kind, kv_budget=kv_budget, draft=draft, adapter=adapter, speculate=guesses):
        from fedtune.inference.generate_transformers import load_model  # lazy: it imports transformers
        from fedtune.inference.sequential import SequentialScheduler

        one = SequentialScheduler(load_model(folder, card), unstated=sys.maxsize)
        texts: Generator[str, None, None] = one.write(encode_request(one.text, prompt, card), sampling, length)
    else:
        engine = load_engine(folder, kind)
        speculation = open_speculation(engine, speculate, draft)
        ids = encode_request(engine.text, prompt, card)
        chosen: list[str] = []
        context = open_context(engine, kv_budget, adapter, tokens=len(ids) + length, report=chosen.append)
        answer = Generation(engine, ids, sampling, length, context=context, speculation=speculation)
        for sentence in chosen:  # after all checks have passed
            _report(sentence)
        texts = (piece.text for piece in answer)
    pieces: list[str] = []
    with closing(texts):  # stop the generator if the consumer stops
        for text in texts:
            pieces.append(text)
            if write:
                write(text)
    return "".join(pieces)


def is_chat(card: dict[str, Any]) -> bool:
    """Whether a model was tuned on conversations."""
    return "task" in card and find(card["task"]).conversational


def encode_request(text: Text, request: str, card: dict[str, Any]) -> list[int]:
    """Token ids of a request as in training: in the chat template, in the run's prompt template, or unchanged."""
    if is_chat(card):
        return text.encode(text.chat([{"role": "user", "content": request}]), begin=False)
    return text.encode(wrap(request, card.get("prompt")))


def check_folder(folder: Path) -> None:
    """Raise ModelError if the folder does not exist."""
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}: give a model that `fedtune export` wrote")


def read_card(folder: Path) -> dict[str, Any]:
    """Read fedtune.json of a generative model's folder; {} if there is none.

    Raises:
        NoText: The model is a classifier.
        ModelError: The folder does not exist or is a run, or its card is damaged.
    """
    check_folder(folder)
    if not (folder / "config.json").is_file() and (folder / "config.yaml").is_file():
        raise ModelError(f"{folder} is a run directory: export its model with `fedtune export {folder}` and give that folder")
    card = _card(folder)
    classifies = any("Classification" in a for a in read_config(folder).get("architectures") or [])
    name = card.get("task")
    if classifies and (name is None or find(name).gives_text):
        name = adapter_tasks()["SEQ_CLS"]
    if name is not None and not (kind := find(name)).gives_text:
        raise NoText(f"{folder} is {kind.noun}: it outputs {kind.gives}, not text")
    return card


def falls_back(folder: Path, card: dict[str, Any], **options: object) -> bool:
    """Whether transformers must run the model because the engine does not support it; prints the reason on stderr.

    Args:
        folder: The model's folder.
        card: Result of `read_card`.
        options: Options that only the engine has, by name; None if not given.

    Raises:
        ConfigError: Such an option is given, but transformers must run the model.
        ModelError: transformers is not installed.
    """
    why = why_not_engine(folder, card)
    if not why:
        return False
    if asked := [name for name, value in options.items() if value is not None]:
        raise ConfigError(f"{folder} runs on transformers, which has no --{asked[0].replace('_', '-')}: leave it out ({why})")
    if importlib.util.find_spec("transformers") is None:
        raise ModelError(f"{folder} needs transformers, which is not installed ({why}): pip install 'fedtune[train]'")
    _report(f"transformers runs this model: {why}")
    return True


def why_not_engine(folder: Path, card: dict[str, Any]) -> str:
    """Why the engine does not support a model; "" if it does."""
    if is_package(folder):
        return ""
    if "peft" in card:
        return f"its adapter ({card['peft'].get('method')}) is not merged"
    if not (folder / "tokenizer.json").is_file():
        return "it has no tokenizer.json"
    try:
        read_shape(split_config(read_config(folder))[0])
        check_tokenizer(folder)
    except Unsupported as bad:
        return str(bad)
    return ""


def _report(sentence: str) -> None:
    print(f"fedtune: {sentence}", file=sys.stderr, flush=True)


def open_context(
    engine: "Engine",
    kv_budget: str | None,
    adapter: str | None,
    *,
    tokens: int | None = None,
    report: Callable[[str], object] = _report,
) -> Context:
    """Open an empty context of at most `tokens` tokens (None: the model's limit), with the best cache that the budget allows.

    `report` is called with a sentence on the chosen cache.

    Raises:
        ConfigError: The budget is not a size, or is too small.
        ModelError: The adapter does not exist.
    """
    if adapter is not None and adapter not in engine.adapters:
        from fedtune.inference.serve.adapters import add_adapter  # lazy: rarely needed

        if not Path(adapter).is_dir():
            known = ", ".join(engine.adapters) or "none"
            raise ModelError(f"{engine.folder} has no adapter '{adapter}' (it has: {known}), and there is no folder of that name")
        add_adapter(engine, adapter, Path(adapter))
    if kv_budget is None:
        return Context(engine, adapter=adapter)
    longest = engine.shape.context if tokens is None else min(engine.virtual_length + tokens, engine.shape.context)
    chosen = choose(engine.shape, longest, parse_size(kv_budget), engine.entries)
    report(chosen.sentence)
    return Context(engine, chosen.build, adapter=adapter)


def open_speculation(engine: "Engine", speculate: str, draft: Path | None) -> Speculation | None:
    """Choose how tokens are drafted. All ways pause while they do not pay off.

    `auto` uses the draft model if given, else lookup and token recycling.

    Raises:
        ConfigError: `speculate` is draft without a draft model, or another value with one.
        ModelError: The draft model cannot be loaded, or has a different tokenizer.
    """
    from fedtune.inference.engine.speculate.draft import DraftModel
    from fedtune.inference.engine.speculate.early_exit import EarlyExit
    from fedtune.inference.engine.speculate.lookup import Lookup
    from fedtune.inference.engine.speculate.lookup_or_recycle import LookupOrRecycle

    if draft is not None and speculate not in ("auto", "draft"):
        raise ConfigError(f"--draft {draft} has no effect with --speculate {speculate}: leave one out")
    if draft is not None:
        check_folder(draft)
        return Speculation(DraftModel(load_engine(draft), engine))
    if speculate == "draft":
        raise ConfigError("--speculate draft needs a draft model: give its folder with --draft (`fedtune draft` makes one)")
    makes = {"auto": LookupOrRecycle, "lookup": Lookup, "early-exit": EarlyExit, "none": None}
    if speculate not in makes:
        raise ConfigError(f"speculate={speculate} is unknown: choose auto, none, lookup, early-exit or draft")
    make = makes[speculate]
    return Speculation(make()) if make else None


class StrippedWriter:
    """Writes text as it comes, without leading and trailing whitespace."""

    def __init__(self, to: IO[str]) -> None:
        self._to = to
        self._held = ""
        self._begun = False

    def write(self, text: str) -> None:
        """Write text, but hold trailing whitespace back until more text follows."""
        text = self._held + text
        text = text if self._begun else text.lstrip()
        shown = text.rstrip()
        self._begun, self._held = self._begun or bool(shown), text[len(shown) :]
        if shown:
            self._to.write(shown)
            self._to.flush()


def _card(folder: Path) -> dict[str, Any]:
    if not (folder / CARD).is_file():
        return {}
    try:
        card = parse_json(read_text(folder / CARD))
        if (
            isinstance(card["max_new_tokens"], (int, type(None)))
            and isinstance(card["prompt"], (str, type(None)))
            and card["task"] in TASKS
        ):
            PeftConfig(**card.get("peft", {}))
            return card
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ModelError(f"{folder / CARD} cannot be read: export the model again")
