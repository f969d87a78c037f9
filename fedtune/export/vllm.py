"""Exports a run for vLLM: a merged model, or a LoRA folder for `--lora-modules`, with the command that serves it.

vLLM reads PEFT's LoRA with one rank and scaling for all modules, `target_modules` by name, no bias, and no other trained weights; its
`--max-lora-rank` is one of a few numbers. The factors of the adapter and of the run's shifts are joined, padded with zeros to the largest
rank, and include their scalings, so `lora_alpha` equals `r`.

Source: https://docs.vllm.ai/en/latest/features/lora.html, vllm/lora/peft_helper.py, vllm/lora/lora_model.py, vllm/config/lora.py
"""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedtune.contracts.task import task_of
from fedtune.errors import ModelError
from fedtune.export.huggingface import CARD, add_ends, check_out, describe_folder, export_folder, export_hf
from fedtune.export.merged import read_merged
from fedtune.export.origin import Origin, read_origin
from fedtune.inference.engine.shape import text_config
from fedtune.models.checkpoint import find_folder, read_config
from fedtune.models.methods import mergeable
from fedtune.models.tokens import end_tokens, load_tokenizer
from fedtune.storage.parsing import parse_json, read_text

__all__ = ["RANKS", "describe_vllm", "export_vllm"]

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank
_README = """# {name}

A model for [vLLM](https://docs.vllm.ai) that fedtune exported. This command serves it.

```bash
{command}
```
"""


def export_vllm(source: Path, out: Path, *, separate: bool = False, replace: bool = False, trust_remote_code: bool = False) -> Path:
    """Write a merged model as `export_hf` does, or the LoRA adapter alone.

    Args:
        source: A run directory, a client's folder in it, or an adapter folder.
        out: The folder to write; it appears complete or not at all.
        separate: Write a LoRA folder, to be served beside the backbone.
        replace: Overwrite `out` if it is an export of fedtune.
        trust_remote_code: As in `read_origin`.

    Returns:
        `out`.

    Raises:
        CheckpointError: `source` is missing or is a run without an adapter.
        ModelError: vLLM does not run the model or the adapter, or as in `export_hf`.
    """
    source, out = Path(source), Path(out)
    check_out(out, replace)
    origin = read_origin(source, trust_remote_code=trust_remote_code)
    if not (task := task_of(origin.task)).gives_text:
        raise ModelError(f"{source} is {task.noun}, and fedtune exports only models that generate text for vLLM: use --to hf")
    if not mergeable(kind := origin.adapter.state.spec.method):
        raise ModelError(f"{source}: vLLM cannot run peft.method={kind}, which cannot be merged into weights: use --to hf")
    if read_config(find_folder(origin.model)).get("is_encoder_decoder"):
        raise ModelError(f"{source}: vLLM does not run this encoder-decoder: use --to hf")
    more = {"--trust-remote-code": list[str]()} if trust_remote_code else {}
    if separate:
        with export_folder(out) as folder:
            flags = _write_adapter(origin, folder)
            _describe(folder, origin, {**flags, "serve": flags["serve"] | more})
        return out
    flags = {"model": "{here}", "serve": {"--served-model-name": [origin.name], **more}}
    return export_hf(
        source, out, replace=replace, trust_remote_code=trust_remote_code, finish=lambda folder: _finish_model(folder, origin, flags)
    )


def describe_vllm(out: Path) -> str:
    """Describe a folder of `export_vllm`: the command that serves it, and the deviations of `describe_folder`."""
    flags = parse_json(read_text(out / CARD))["vllm"]
    return "; ".join(part for part in (f"serve it with `{_command(flags, str(out))}`", describe_folder(out)) if part)


def _command(flags: dict[str, Any], here: str) -> str:
    """The command line, with `{here}` in the flags replaced by the folder."""
    words = ["vllm", "serve", flags["model"]]
    for flag, values in flags["serve"].items():
        words += [flag, *values]
    return shlex.join(word.replace("{here}", here) for word in words)


def _describe(folder: Path, origin: Origin, flags: dict[str, Any]) -> None:
    """Write the card with the command, and the README."""
    card = parse_json(read_text(folder / CARD)) if (folder / CARD).is_file() else origin.card
    (folder / CARD).write_text(json.dumps({**card, "vllm": flags}, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_README.format(name=origin.name, command=_command(flags, ".")), encoding="utf-8")


def _finish_model(folder: Path, origin: Origin, flags: dict[str, Any]) -> None:
    """Name the dtype also under the key of older releases of transformers, and describe the folder."""
    path = folder / "config.json"
    config = parse_json(read_text(path))
    if dtype := config.get("dtype"):
        path.write_text(json.dumps({**config, "torch_dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    _describe(folder, origin, flags)


def _write_adapter(origin: Origin, folder: Path) -> dict[str, Any]:
    """Write adapter_config.json and adapter_model.safetensors, and for a chat its template and end tokens."""
    merged = read_merged(origin.source, separate=True)
    if text_config(merged.config) is not merged.config:
        raise ModelError(f"{origin.source}: vLLM names the layers of this composite model in another way: leave out --separate")
    rank = max(len(a) for a, _ in merged.apart.values())
    if rank > RANKS[-1]:
        raise ModelError(f"{origin.source}: the adapter has rank {rank}, and vLLM allows {RANKS[-1]}: leave out --separate")
    tensors = dict[str, torch.Tensor]()
    for module, (a, b) in merged.apart.items():
        more = rank - len(a)
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, more)).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.nn.functional.pad(b, (0, more)).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    local = origin.model.source != "hub" or Path(origin.model.name).expanduser().is_dir()
    base = str(merged.folder) if local else origin.model.name
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in merged.apart}),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    most = next(r for r in RANKS if r >= rank)
    serve = {"--enable-lora": [], "--lora-modules": [f"{origin.name}={{here}}"], "--max-lora-rank": [str(most)]}
    if task_of(origin.task).conversational:
        tokenizer = load_tokenizer(merged.folder, origin.model, origin.task)
        (folder / "chat_template.jinja").write_text(tokenizer.get_chat_template(), encoding="utf-8")
        if (own := merged.folder / "generation_config.json").is_file():
            shutil.copyfile(own, folder / own.name)
        add_ends(folder, sorted(end_tokens(tokenizer, origin.task)))
        serve |= {"--chat-template": ["{here}/chat_template.jinja"], "--generation-config": ["{here}"]}
    return {"model": base, "serve": serve}
