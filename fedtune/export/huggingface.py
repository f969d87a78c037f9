"""Exports a run's merged model as a Hugging Face folder that any program can load."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from fedtune.config import Config, TaskConfig
from fedtune.contracts.task import task_of
from fedtune.errors import ModelError
from fedtune.export.origin import Origin, check_base, read_origin
from fedtune.export.outline import merged_tensors, read_outline, write_merged
from fedtune.export.personal import client_folder
from fedtune.export.requantize import describe_requantized, quantize_again, text_logits
from fedtune.export.whole import in_memory_note, merge_adapter, put_heads, save, split_heads, why_in_memory
from fedtune.models.adapter_folder import BESIDE, OWN, StoredAdapter
from fedtune.models.backbone import load_backbone, quiet
from fedtune.models.checkpoint import stored_tensors
from fedtune.models.methods import mergeable
from fedtune.models.tokens import end_tokens
from fedtune.storage.atomic import new_folder
from fedtune.storage.parsing import parse_json, read_text

CARD = "fedtune.json"  # the model's card (task, prompt template, …); also marks the folder as an export of fedtune


def export_hf(
    source: Path,
    out: Path,
    *,
    client: str | None = None,
    replace: bool = False,
    requantize: bool = False,
    trust_remote_code: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Merge an adapter into its backbone tensor by tensor, and write config, safetensors and tokenizer, in the dtype of the checkpoint.

    Sums are computed in float64 and rounded once. The few models that cannot be merged tensor by tensor are merged in memory, in float32.

    An adapter initialized from the quantization error (peft.init=loftq) is merged into the dequantized weights that it was trained on; any
    other into the checkpoint's own weights, whatever the run's precision. An adapter that cannot be merged (prompts, bottlenecks) is
    written beside the weights. `describe_folder` reports all such deviations.

    Args:
        source: A run directory, a client's folder in it (RUN/clients/ID: its personal model), or an adapter folder whose
            adapter_config.json names the backbone.
        out: The folder to write; it appears complete or not at all.
        client: A client of the run: export its personal model, as for RUN/clients/ID.
        replace: Overwrite `out` if it is an export of fedtune.
        requantize: Quantize the merged model again, to the run's precision; the card has the error (see `quantize_again`).
        trust_remote_code: As in `read_origin`.
        finish: Called with the complete folder before it gets its name, to change files or add some.

    Returns:
        `out`.

    Raises:
        CheckpointError: `source` is missing or is a run without an adapter, or the client has no personal model.
        ModelError: The adapter or the backbone is invalid, they do not match, `out` exists, or there is no precision to quantize to.
    """
    source, out = Path(source), Path(out)
    check_out(out, replace)
    source = source if client is None else client_folder(source, client)
    return write_hf(read_origin(source, trust_remote_code=trust_remote_code), out, requantize=requantize, finish=finish)


def write_hf(origin: Origin, out: Path, *, requantize: bool = False, finish: Callable[[Path], None] | None = None) -> Path:
    """`export_hf` of a source that has been read."""
    source = origin.source
    if origin.whole is not None:
        raise ModelError(f"{source} is already a complete model: export it with --to edge or gguf")
    config, adapter, task, model = origin.config, origin.adapter, origin.task, origin.model
    again = _precision(config, adapter, source) if requantize else {}
    whole = "it is quantized again (--requantize)" if requantize else why_in_memory(origin)
    outline = None if whole else read_outline(model, task, **origin.settings)
    if outline and outline.odd:
        whole, outline = outline.odd, None
    backbone = outline.backbone if outline else load_backbone(model, task, **origin.settings)
    check_base(origin, backbone.fingerprint, backbone.name)
    kind = adapter.state.spec.method
    apart = not mergeable(kind)
    if apart and config is None:
        raise ModelError(f"{source}: peft.method={kind} cannot be merged into weights, and without its run its settings are unknown")
    if apart and requantize:
        raise ModelError(f"{source}: peft.method={kind} cannot be merged into weights, so there is nothing to quantize again")
    before, tensors = None, {}
    if outline:
        heads, state = split_heads(backbone.model, adapter, task)
        tensors = merged_tensors(outline, (*adapter.shifts, *([] if apart else [state])), heads)
    else:
        put_heads(backbone.model, adapter, task)
        before = text_logits(backbone.model, backbone.tokenizer) if requantize else None
        merge_adapter(backbone.model, origin)
    if origin.labels and task_of(task).classes:
        backbone.model.config.id2label = dict(enumerate(origin.labels))
        backbone.model.config.label2id = {label: i for i, label in enumerate(origin.labels)}
    card = {**origin.card, "base": backbone.fingerprint}
    if apart and config:
        card["peft"] = vars(config.peft)
    if adapter.over:
        card["merged_into"] = dict(adapter.over)
    if whole:
        card["whole"] = in_memory_note(whole)
    with export_folder(out) as temporary:
        if apart:
            _write_beside(origin, temporary / BESIDE)
        if before is not None:
            card["quantised"] = quantize_again(backbone, folder=temporary, before=before, **again)
        else:
            dtype = torch.float32 if model.init == "random" else stored_dtype(backbone.folder)
            if outline:
                write_merged(backbone.model, tensors, dtype, temporary)
            else:
                save(backbone.model, dtype, temporary)
        write_tokenizer(backbone.tokenizer, backbone.folder, temporary, task)
        (temporary / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        if finish:
            finish(temporary)
    return out


def stored_dtype(folder: Path) -> torch.dtype:
    """bfloat16 or float16 if most of the checkpoint's numbers have that dtype, else float32."""
    counts = Counter[str]()
    for tensor in stored_tensors(folder):
        counts[tensor.dtype] += math.prod(tensor.shape)
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(max(counts, key=lambda d: counts[d]), torch.float32)


def describe_folder(out: Path) -> str:
    """Describe a folder of `export_hf`: deviations from a plain merge, one sentence each; "" if there are none."""
    card = parse_json(read_text(out / CARD))
    sentences = []
    if (out / BESIDE).is_dir():
        kind = card["peft"]["method"]
        peft_opens = (out / BESIDE / "adapter_config.json").is_file()
        how = f"`fedtune generate` or PeftModel.from_pretrained(model, '{out / BESIDE}')" if peft_opens else "`fedtune generate`"
        sentences.append(
            f"peft.method={kind} cannot be merged into weights: {out} is the backbone, with the adapter in {out / BESIDE}; use {how}"
        )
    sentences += [card[name] for name in ("note", "whole") if card.get(name)]
    if over := card.get("merged_into"):
        sentences.append(
            f"the adapter was initialized from the {over['precision']} quantization error (peft.init=loftq), so it is merged into the"
            " dequantized weights that it was trained on, not into the checkpoint's own"
        )
    if figures := card.get("quantised"):
        sentences.append(describe_requantized(figures))
    return "; ".join(sentences)


def check_out(out: Path, replace: bool = False) -> None:
    """Raise ModelError if `out` is not empty, unless it is an export that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (replace and (out / CARD).is_file()):
        raise ModelError(f"{out} already exists: give another folder with --out, or remove it")


def _precision(config: Config | None, adapter: StoredAdapter, source: Path) -> dict[str, str]:
    """`precision` and `compute` of the run's quantized backbone."""
    if adapter.over:
        return dict(adapter.over)
    if config is None:
        raise ModelError(f"{source}: the precision to quantize to is in the adapter's run: give the run directory")
    if config.model.precision not in ("nf4", "int8"):
        raise ModelError(
            f"{source} was trained with model.precision={config.model.precision}, which is not quantized: leave out --requantize"
        )
    return {"precision": config.model.precision, "compute": config.model.compute}


def _write_beside(origin: Origin, folder: Path) -> None:
    """Write the adapter's folder; that of a personal adapter has none of PEFT's files."""
    if origin.client is None:
        shutil.copytree((origin.run or origin.source) / "adapter", folder)
    else:
        folder.mkdir()
        origin.adapter.state.save(folder / OWN)


def write_tokenizer(tokenizer: Any, folder: Path, out: Path, task: TaskConfig) -> None:
    """Write the tokenizer's files, and copy generation_config.json from the backbone's folder; it gets the end tokens of a chat.

    transformers does not save every argument of a tokenizer's class, such as Llama's `legacy`, and rebuilds some tokenizers from saved
    arguments. If the saved tokenizer would load differently, the saved config selects the class that reads tokenizer.json as it is.

    Raises:
        ModelError: The saved tokenizer still loads differently.
    """
    with quiet():
        tokenizer.save_pretrained(out)
    own = folder / "generation_config.json"  # load_backbone drops sampling defaults, which servers of the model need
    if own.is_file():
        shutil.copyfile(own, out / own.name)
    if task_of(task).conversational:
        add_ends(out, sorted(end_tokens(tokenizer, task)))
    if not (out / "config.json").is_file() or not (out / "tokenizer.json").is_file() or _reads_back(tokenizer, out):
        return
    path = out / "tokenizer_config.json"
    config = parse_json(read_text(path))
    path.write_text(
        json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if not _reads_back(tokenizer, out):
        raise ModelError(f"transformers saves the tokenizer of {folder} so that it loads with other token ids: export it with --to edge")


def add_ends(out: Path, ends: list[int]) -> None:
    """Add end tokens to the folder's generation_config.json."""
    path = out / "generation_config.json"
    config = parse_json(read_text(path)) if path.is_file() else {}
    own = config.get("eos_token_id")
    config["eos_token_id"] = sorted({*ends, *(own if isinstance(own, list) else [] if own is None else [own])})
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _reads_back(tokenizer: Any, out: Path) -> bool:
    """Whether transformers loads the saved tokenizer without a difference."""
    with quiet():
        again = AutoTokenizer.from_pretrained(out)
    return _parts(again) == _parts(tokenizer)


def _parts(tokenizer: Any) -> dict[str, Any]:
    """The parts of a tokenizer that determine token ids: not padding and truncation, nor a post-processor that adds nothing."""
    raw = parse_json(tokenizer.backend_tokenizer.to_str())
    added = tokenizer("").input_ids
    return {k: v for k, v in raw.items() if k not in ("padding", "truncation", "post_processor")} | {"added": added}


@contextmanager
def export_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `out` at the end, or deleted on an error.

    Raises:
        ModelError: The folder cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out, replace=True, durable=False) as folder:
            yield folder
    except OSError as bad:
        raise ModelError(f"cannot write {out}: {bad.strerror or bad}") from None
