"""The merged model as a Hugging Face folder that any program can load."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from fedtune.config import Config
from fedtune.contracts.task import task_of
from fedtune.errors import ModelError
from fedtune.export.origin import check_base, read_origin
from fedtune.export.outline import merged_tensors, read_outline, write_merged
from fedtune.export.requantize import quantize_again, said, text_logits
from fedtune.export.whole import in_memory, parted, put_adapter, put_heads, save, why_whole
from fedtune.models.adapter_folder import BESIDE, StoredAdapter
from fedtune.models.backbone import load_backbone, quiet
from fedtune.models.checkpoint import stored_tensors
from fedtune.models.methods import mergeable
from fedtune.storage.atomic import new_folder
from fedtune.storage.parsing import parse_json, read_text

CARD = "fedtune.json"  # beside the model: its task and prompt template; also marks the folder as one of ours


def export_hf(source: Path, out: Path, *, replace: bool = False, requantize: bool = False, trust_remote_code: bool = False) -> Path:
    """Merge an adapter into its backbone tensor by tensor, and write config, safetensors and tokenizer, in the dtype of the checkpoint.

    Sums are taken in float64 and rounded once. Of the few models that cannot be read so, the whole is in memory, in float32; `beside`
    says it, and why.

    An adapter that began as what quantization took (peft.init=loftq) is merged into the weights that it was trained over, dequantized; any
    other into the checkpoint's own, whatever the run's precision. What no weights can express (prompts, bottlenecks) is written beside
    them. `beside` says so.

    Args:
        source: A run directory, a client's folder in it (RUN/clients/ID: its personal model), or an adapter folder whose
            adapter_config.json names the backbone.
        out: The folder to write; made whole or not at all.
        replace: Write over `out` if an export of fedtune is there.
        requantize: Quantize the merged model again, in the run's precision; the card has the error (see `quantize_again`).
        trust_remote_code: As in `read_origin`.

    Returns:
        `out`.

    Raises:
        CheckpointError: `source` is missing, or is a run that has no adapter yet.
        ModelError: The adapter or the backbone cannot be used, they do not belong together, `out` is taken, or there is no precision to
            quantize to.
    """
    source, out = Path(source), Path(out)
    check_out(out, replace)
    origin = read_origin(source, trust_remote_code=trust_remote_code)
    if origin.whole is not None:
        raise ModelError(f"{source} is a whole model already: write it with --to edge or gguf")
    config, adapter, task, model = origin.config, origin.adapter, origin.task, origin.model
    again = _precision(config, adapter, source) if requantize else {}
    whole = "it is to be quantized again (--requantize)" if requantize else why_whole(origin)
    outline = None if whole else read_outline(model, task, **origin.settings)
    if outline and outline.odd:
        whole, outline = outline.odd, None
    backbone = outline.backbone if outline else load_backbone(model, task, **origin.settings)
    check_base(origin, backbone.fingerprint, backbone.name)
    kind = adapter.state.spec.method
    apart = None if mergeable(kind) else _apart(source)
    if apart and config is None:
        raise ModelError(f"{source}: peft.method={kind} cannot be merged into weights, and without its run nothing says how it was set up")
    if apart and requantize:
        raise ModelError(f"{source}: peft.method={kind} cannot be merged into weights, so there is nothing to quantize again")
    before, tensors = None, {}
    if outline:
        heads, state = parted(backbone.model, adapter, task)
        tensors = merged_tensors(outline, (*adapter.shifts, *([] if apart else [state])), heads)
    else:
        put_heads(backbone.model, adapter, task)
        before = text_logits(backbone.model, backbone.tokenizer) if requantize else None
        put_adapter(backbone.model, origin)
    if origin.labels and task_of(task).classes:
        backbone.model.config.id2label = dict(enumerate(origin.labels))
        backbone.model.config.label2id = {label: i for i, label in enumerate(origin.labels)}
    card = {**origin.card, "base": backbone.fingerprint}
    if apart and config:
        card["peft"] = vars(config.peft)
    if adapter.over:
        card["merged_into"] = dict(adapter.over)
    if whole:
        card["whole"] = in_memory(whole)
    with export_folder(out) as temporary:
        if apart:
            shutil.copytree(apart, temporary / BESIDE)
        if before is not None:
            card["quantised"] = quantize_again(backbone, folder=temporary, before=before, **again)
        else:
            dtype = torch.float32 if model.init == "random" else stored_dtype(backbone.folder)
            if outline:
                write_merged(backbone.model, tensors, dtype, temporary)
            else:
                save(backbone.model, dtype, temporary)
        write_tokenizer(backbone.tokenizer, backbone.folder, temporary)
        (temporary / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return out


def stored_dtype(folder: Path) -> torch.dtype:
    """bfloat16 or float16 where most of the checkpoint's numbers are kept in it, else float32."""
    counts = Counter[str]()
    for tensor in stored_tensors(folder):
        counts[tensor.dtype] += math.prod(tensor.shape)
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(max(counts, key=lambda d: counts[d]), torch.float32)


def beside(out: Path) -> str:
    """What there is to know of a folder of `export_hf`'s beside its weights, in a sentence each; "" where they are all."""
    card = parse_json(read_text(out / CARD))
    sentences = []
    if (out / BESIDE).is_dir():
        kind = card["peft"]["method"]
        peft_opens = (out / BESIDE / "adapter_config.json").is_file()
        how = f"`fedtune generate` or PeftModel.from_pretrained(model, '{out / BESIDE}')" if peft_opens else "`fedtune generate`"
        sentences.append(
            f"no weights can express peft.method={kind}: {out} is the backbone with the adapter beside it, in {out / BESIDE}; use {how}"
        )
    sentences += [card[name] for name in ("note", "whole") if card.get(name)]
    if over := card.get("merged_into"):
        sentences.append(
            f"the adapter began as what {over['precision']} took from the backbone (peft.init=loftq), so it is merged into the dequantized"
            " weights that it was trained over, not into the checkpoint's own"
        )
    if figures := card.get("quantised"):
        sentences.append(said(figures))
    return "; ".join(sentences)


def check_out(out: Path, replace: bool = False) -> None:
    """Raises ModelError where `out` holds something, but for an export that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (replace and (out / CARD).is_file()):
        raise ModelError(f"{out} exists already: name another folder with --out, or remove it")


def _precision(config: Config | None, adapter: StoredAdapter, source: Path) -> dict[str, str]:
    """`precision` and `compute` of the run's quantized backbone."""
    if adapter.over:
        return dict(adapter.over)
    if config is None:
        raise ModelError(f"{source}: without its run nothing says which precision to quantize to: give the run directory")
    if config.model.precision not in ("nf4", "int8"):
        raise ModelError(
            f"{source} was trained with model.precision={config.model.precision}, no quantized one to go back to: leave out --requantize"
        )
    return {"precision": config.model.precision, "compute": config.model.compute}


def _apart(source: Path) -> Path:
    return source / "adapter" if (source / "adapter").is_dir() else source


def write_tokenizer(tokenizer: Any, folder: Path, out: Path) -> None:
    """The tokenizer's files, and the generation_config.json of the backbone's folder.

    transformers does not save every argument of a tokenizer's class, such as Llama's `legacy`, and makes some classes anew from what it
    saved: where the folder of a model would be read back as another tokenizer, it says that tokenizer.json is to be taken as it is.

    Raises:
        ModelError: It is read back as another tokenizer all the same.
    """
    with quiet():
        tokenizer.save_pretrained(out)
    own = folder / "generation_config.json"  # load_backbone drops sampling defaults; whoever serves the model wants them
    if own.is_file():
        shutil.copyfile(own, out / own.name)
    if not (out / "config.json").is_file() or not (out / "tokenizer.json").is_file() or _reads_back(tokenizer, out):
        return
    path = out / "tokenizer_config.json"
    config = parse_json(read_text(path))
    path.write_text(
        json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if not _reads_back(tokenizer, out):
        raise ModelError(
            f"transformers saves the tokenizer of {folder} so that it gives other tokens when it is read again: export it with --to edge"
        )


def _reads_back(tokenizer: Any, out: Path) -> bool:
    """Whether transformers makes the same tokenizer of what it saved."""
    with quiet():
        again = AutoTokenizer.from_pretrained(out)
    return _parts(again) == _parts(tokenizer)


def _parts(tokenizer: Any) -> dict[str, Any]:
    """All that decides about token ids: not how batches are padded and cut, nor a post-processor that adds nothing."""
    raw = parse_json(tokenizer.backend_tokenizer.to_str())
    added = tokenizer("").input_ids
    return {k: v for k, v in raw.items() if k not in ("padding", "truncation", "post_processor")} | {"added": added}


@contextmanager
def export_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when it is whole, or is gone.

    Raises:
        ModelError: The disk does not take it.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out, replace=True, durable=False) as folder:
            yield folder
    except OSError as bad:
        raise ModelError(f"cannot write {out}: {bad.strerror or bad}") from None
