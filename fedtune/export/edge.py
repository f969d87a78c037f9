"""Exports a run as an edge package: a model for the engine on a device, with a card of its provenance."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.contracts.task import task_of
from fedtune.errors import ConfigError, DataError, ModelError
from fedtune.export.calibrate import LENGTH, make_calibration, privacy_disclosure, read_calibration_texts
from fedtune.export.huggingface import check_out, export_folder, write_tokenizer
from fedtune.export.measured import streamed_score
from fedtune.export.merged import Merged, MergedTensor, read_merged
from fedtune.export.provenance import provenance
from fedtune.inference.engine.linear import portable
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.make_linear import linear_from_tensors
from fedtune.inference.engine.package import CARD, Kind, StoredLinear, is_linear, read_object
from fedtune.inference.engine.package_writer import PackageWriter
from fedtune.inference.engine.reference.tensors import as_array
from fedtune.inference.engine.shape import text_config
from fedtune.inference.engine.text import Text, read_text
from fedtune.inference.quantize.model import FOLDING, QuantizeSettings, quantize_model
from fedtune.inference.quantize.perplexity import Piece, answers, engine_score, windows
from fedtune.inference.quantize.rtn import GROUP, QuantizedLinear
from fedtune.models.tokens import load_tokenizer
from fedtune.storage.heap import give_back

__all__ = ["describe_package", "export_edge", "texts"]

_HELD = 8192  # tokens of a run's test data for the perplexity


def export_edge(
    source: Path,
    out: Path,
    *,
    quantize: str | None = None,
    method: str | None = None,
    calibrate: Path | None = None,
    separate: bool = False,
    replace: bool = False,
    head: str | None = None,
) -> Path:
    """Merge an adapter into its decoder tensor by tensor (or read a complete model), quantize it, and write the package.

    The perplexity before and after quantization is measured on text held out from `calibrate`, else on the run's global test if available.

    Args:
        source: A run directory, an adapter folder whose adapter_config.json names the backbone, or a complete model.
        out: The folder to write; it appears complete or not at all.
        quantize: int8 or int4; None keeps the checkpoint's precision.
        method: rtn, gptq, awq or smoothquant; None means rtn.
        calibrate: Calibration text: a file, a folder of files, or a run (its training rows).
        separate: Store a LoRA adapter unmerged, to be selected per request.
        replace: Overwrite `out` if it is an export of fedtune.
        head: Format of a quantized model's output head, int8 or int4; None means int8. If it is given, the card also has the perplexity
            with the head in bfloat16.

    Returns:
        `out`.

    Raises:
        CheckpointError: `source` is missing or is a run without an adapter.
        ConfigError: Settings exclude each other, or a method lacks calibration text.
        DataError: The calibration text cannot be read.
        ModelError: The engine does not support the model, the files do not match, or `out` exists.
    """
    source, out = Path(source), Path(out)
    check_out(out, replace)
    if not quantize and (method or calibrate or head):
        odd = "method" if method else "calibrate" if calibrate else "head"
        raise ConfigError(f"--{odd} has an effect only with quantization: add --quantize int8 or int4")
    settings: Any = {"kind": quantize, "group": GROUP if quantize == "int4" else 0, "method": method or "rtn", "head": head or "int8"}
    recipe = QuantizeSettings(**settings) if quantize else None
    if recipe and recipe.method != "rtn" and not calibrate:
        raise ConfigError(f"--method {recipe.method} needs calibration text: give --calibrate, or use rtn")
    if separate and recipe and recipe.method in FOLDING:
        raise ConfigError(
            f"--method {recipe.method} moves scales between layers, which a separate adapter does not account for: use rtn or gptq,"
            " or leave out --separate"
        )
    merged = read_merged(source, separate=separate)
    tokenizer = load_tokenizer(merged.folder, merged.origin.model, merged.origin.task)
    if len(tokenizer) > merged.shape.vocab:
        raise ModelError(f"the tokenizer in {merged.folder} has {len(tokenizer)} tokens, but the model has only {merged.shape.vocab}")
    with export_folder(out) as folder:
        write_tokenizer(tokenizer, merged.folder, folder, merged.origin.task)
        text = read_text(folder, saved=True)  # fails here, not on the device, if the engine cannot read it
        seen, held = texts(merged, text, tokenizer, calibrate) if recipe else ((), [])
        card = _card(merged)
        if calibrate and (beyond := privacy_disclosure(calibrate)):
            card["beyond_privacy"] = beyond
        if recipe is None:
            write_weights(folder, merged, card)
        else:
            before = streamed_score(merged, held, folder) if held else None
            figures = _write_quantized(folder, merged, recipe, seen, card)
            if before:
                give_back()
                engine = load_engine(folder, keep=False)
                after = engine_score(engine, held)
                measured_on = "calibrate" if calibrate else "the run's global test"
                found = {"before": before.perplexity, "after": after.perplexity, "tokens": after.tokens, "text": measured_on}
                if head:
                    found["whole_head"] = engine_score(_with_whole_head(engine, merged), held).perplexity
                figures["perplexity"] = found
            (folder / CARD).write_text(json.dumps({**card, "quantised": figures}, indent=1) + "\n", encoding="utf-8")
    return out


def write_weights(folder: Path, merged: Merged, card: dict[str, Any]) -> None:
    """Write everything but the tokenizer, in the checkpoint's precision."""
    writer, linears = _begin(folder, merged, None)
    for name, tensor in merged.tensors.items():
        writer.put(name, tensor.read(merged_dtype(merged) if name.removesuffix(".weight") in linears else _plain(merged, name, None)))
    _finish(writer, merged, card, None)


def _write_quantized(
    folder: Path, merged: Merged, recipe: QuantizeSettings, seen: Sequence[Tensor], card: dict[str, Any]
) -> dict[str, Any]:
    """Write everything but the tokenizer, quantized. Returns the card's figures."""
    writer, _ = _begin(folder, merged, recipe)
    errors = dict[str, float]()
    table = "model.embed_tokens.weight"
    writer.put(table, merged.tensors[table].read(_plain(merged, table, recipe)))

    def read(name: str, first: int, last: int) -> Tensor:
        return merged.tensors[name].rows(first, last, torch.float32)

    for name, made in quantize_model(merged.shape, read, recipe, seen, merged.virtual_tokens, folder):
        if isinstance(made, QuantizedLinear):
            errors[name.removesuffix(".weight")] = made.error
            writer.put_linear(name.removesuffix(".weight"), made.tensors)
        else:
            writer.put(name, made)
    _finish(writer, merged, card, recipe)
    return {"kind": recipe.kind, "method": recipe.method, "group": recipe.group, "head": recipe.head, **error_figures(errors)}


def _with_whole_head(engine: Engine, merged: Merged) -> Engine:
    """The engine with the head and the norm before it as they were, the head in bfloat16."""
    shape, decoder = merged.shape, engine.decoder
    table = merged.tensors["model.embed_tokens.weight" if shape.tied else "lm_head.weight"]
    decoder.norm = as_array(merged.tensors["model.norm.weight"].read(torch.float32)) + np.float32(shape.norm_offset)
    decoder.head = linear_from_tensors("bf16", portable("bf16", as_array(table.read(torch.bfloat16))), n_in=shape.hidden, name="lm_head")
    return engine


def error_figures(errors: Mapping[str, float]) -> dict[str, Any]:
    """The card's figures of the weights' relative errors, by linear."""
    worst = max(errors, key=lambda n: errors[n])
    return {"weights_mean": sum(errors.values()) / len(errors), "weights_max": errors[worst], "worst": worst}


def _finish(writer: PackageWriter, merged: Merged, card: dict[str, Any], recipe: QuantizeSettings | None) -> None:
    for name, tensor in merged.virtual_tokens.items():
        writer.put(name, tensor)
    if merged.apart:
        writer.put_adapter(_adapter_name(merged), merged.apart, merged.fingerprint)
    writer.close(_config(merged, recipe), card)


def texts(merged: Merged, text: Text, tokenizer: Any, calibrate: Path | None) -> tuple[Sequence[Tensor], list[Piece]]:
    """Return calibration sequences and held-out pieces; each may be empty."""
    seed = merged.origin.config.seed if merged.origin.config else 0
    if calibrate:
        start = tokenizer.bos_token

        def encode(content: str) -> list[int]:  # a chat template may write the token that begins a text itself
            return text.encode(content, begin=not (start and content.startswith(start)))

        drawn = make_calibration(read_calibration_texts(calibrate, tokenizer), encode, length=min(LENGTH, _window(merged)), seed=seed)
        return drawn.sequences, list(windows(drawn.held, _window(merged)))
    return (), _of_test(merged.origin.config, text, tokenizer, _window(merged)) if merged.origin.config else []


def _of_test(config: Config, text: Text, tokenizer: Any, window: int) -> list[Piece]:
    """The rows of a run's global test; of prompted rows only the answer is scored. Empty if the data are not on this machine."""
    from fedtune.data.federation import load_test  # late: it loads the data libraries

    try:
        rows = load_test(config).test
    except (ConfigError, DataError):
        return []
    if (task := task_of(config.task)).conversational:
        examples = task.encode(rows, tokenizer, encoder_decoder=False, keep_short=False)
        turns = ((e.input_ids[: e.prompt_length].tolist(), e.input_ids[e.prompt_length : e.first or None].tolist()) for e in examples)
        return answers(turns, _HELD, window)
    end = sorted(text.ends)[:1]  # of each row, as in training
    if "prompt" in rows.column_names:
        pairs = ((p, a) for p, a in zip(rows["prompt"][:], rows["answer"][:], strict=True) if p and a)
        return answers(((text.encode(p), [*text.encode(a, begin=False), *end]) for p, a in pairs), _HELD, window)
    ids: list[int] = []
    for row in rows["text"][:] if "text" in rows.column_names else ():
        ids += [*text.encode(row), *end] if row.strip() else []
        if len(ids) >= _HELD:
            break
    return list(windows(torch.tensor(ids[:_HELD]), window)) if len(ids) > 1 else []


def _window(merged: Merged) -> int:
    """Context length for the measurement, in tokens."""
    held = sum(t.shape[1] if t.dim() == 4 else t.shape[0] for n, t in merged.virtual_tokens.items() if n != "prefix.v")
    return max(min(2 * LENGTH, merged.shape.context - held), 2)


def merged_dtype(merged: Merged) -> torch.dtype:
    """The engine's dtype for the checkpoint's matrices. It does not support float16 and rounds it to bfloat16."""
    return torch.float32 if merged.dtype in (torch.float32, torch.float64) else torch.bfloat16


def describe_package(out: Path) -> str:
    """Describe a package: notes, conversions, quantization error. One sentence each; "" if there is nothing to report."""
    card, sentences = read_object(out / CARD), []
    sentences += [card[key] for key in ("note", "whole", "beyond_privacy") if card.get(key)]
    if card.get("from_float16"):
        sentences.append("the checkpoint is float16, which the engine does not support: the package is bfloat16, three bits less precise")
    if apart := sorted(f.stem for f in (out / "adapters").glob("*.safetensors")):
        sentences.append(f"the adapter is separate, and the model answers untuned without it: select it with --adapter {apart[0]}")
    if f := card.get("quantised"):
        sentences.append(
            f"quantized to {f['kind']} by {f['method']}: the relative error of the weights is {f['weights_mean']:.1%} on average and"
            f" {f['weights_max']:.1%} at most ('{f['worst']}')"
        )
        if p := f.get("perplexity"):
            of = " of the calibration text, requests included" if p["text"] == "calibrate" else ""
            sentences.append(f"perplexity on {p['tokens']} held-out tokens{of}: {p['before']:.4g} before, {p['after']:.4g} after")
            if "whole_head" in p:
                sentences.append(f"with the output head in bfloat16 instead of {f['head']}, it would be {p['whole_head']:.4g}")
        else:
            sentences.append("there is no test data here to measure the perplexity: give text with --calibrate")
    return "; ".join(sentences)


def _begin(folder: Path, merged: Merged, recipe: QuantizeSettings | None) -> tuple[PackageWriter, dict[str, StoredLinear]]:
    tensors = _tensors(merged, recipe)
    linears = {n.removesuffix(".weight"): _how(n, t, merged, recipe) for n, t in tensors.items() if is_linear(n)}
    specs = {n: (_plain(merged, n, recipe), t.shape) for n, t in tensors.items() if not is_linear(n)}
    specs |= {n: (torch.float32, tuple(t.shape)) for n, t in merged.virtual_tokens.items()}
    return PackageWriter(folder, specs, linears), linears


def _tensors(merged: Merged, recipe: QuantizeSettings | None) -> Mapping[str, MergedTensor]:
    """The package's tensors. With tied embeddings, a quantized package adds a quantized copy of the table as its head: every token needs
    the whole head, but only one row of the table, which stays on disk."""
    if recipe and merged.shape.tied:
        return {**merged.tensors, "lm_head.weight": merged.tensors["model.embed_tokens.weight"]}
    return merged.tensors


def _how(name: str, tensor: MergedTensor, merged: Merged, recipe: QuantizeSettings | None) -> StoredLinear:
    rows, columns = tensor.shape
    kind: Kind = "fp32" if merged_dtype(merged) == torch.float32 else "bf16"
    if recipe is None:
        return StoredLinear(kind=kind, group=0, shape=(rows, columns))
    own = recipe.of_head if name == "lm_head.weight" else recipe
    assert own.kind in ("int8", "int4")  # the other kinds are those of checkpoints for other programs
    return StoredLinear(kind=own.kind, group=own.group, shape=(rows, columns))


def _plain(merged: Merged, name: str, recipe: QuantizeSettings | None) -> torch.dtype:
    """The dtype of other tensors than linear layers: norms and biases float32, embeddings bfloat16 (float32 in a float32 package)."""
    if len(merged.tensors[name].shape) != 2:
        return torch.float32
    return torch.bfloat16 if recipe else merged_dtype(merged)


def _config(merged: Merged, recipe: QuantizeSettings | None) -> dict[str, Any]:
    """The backbone's config.json, with the package's dtype and ties."""
    config = lasting_config(merged)
    config["dtype"] = "float32" if _plain(merged, "model.embed_tokens.weight", recipe) == torch.float32 else "bfloat16"
    config["tie_word_embeddings"] = merged.shape.tied and recipe is None
    return config


def lasting_config(merged: Merged) -> dict[str, Any]:
    """The backbone's config.json without transient entries, and with its architecture."""
    passing = ("_name_or_path", "torch_dtype", "dtype", "transformers_version", "auto_map")
    config = {k: v for k, v in text_config(merged.config).items() if k not in passing}
    config["architectures"] = config.get("architectures") or [f"{merged.shape.family.capitalize()}ForCausalLM"]
    return config


def origin_card(merged: Merged) -> dict[str, Any]:
    """The part of a card that does not depend on the format: task, backbone, provenance, and how the adapter was merged."""
    card = {**merged.origin.card, "base": merged.fingerprint, **provenance(merged.origin)}
    if merged.origin.adapter.over:
        card["merged_into"] = dict(merged.origin.adapter.over)
    if merged.whole:
        card["whole"] = merged.whole
    return card


def _card(merged: Merged) -> dict[str, Any]:
    card = origin_card(merged)
    if merged.dtype == torch.float16:
        card["from_float16"] = True
    if merged.virtual_tokens:
        card["virtual_tokens"] = next(t.shape[-3] if t.dim() == 4 else t.shape[0] for t in merged.virtual_tokens.values())
    return card


def _adapter_name(merged: Merged) -> str:
    name = merged.origin.config.name if merged.origin.config else merged.origin.source.resolve().name
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".") or "adapter"
