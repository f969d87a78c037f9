"""The advice of the commands that read and write models."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedtune.config import Config, PeftConfig, TaskConfig, to_dict
from fedtune.runs.report import write_card
from tests.advised.rows import Place, command, follows
from tests.export.test_huggingface import CAUSAL, make_run
from tests.models.build import checkpoint, hub


def run_of(place: Place, task: TaskConfig = CAUSAL, kind: str = "llama", **how: Any) -> Path:
    """The parts of a run that an export reads, with an adapter over a tiny random backbone. All rows share it: none may write into it."""
    name = "-".join(map(str, (kind, task.kind, *how.values()))).replace("/", "")[:200]
    made = place.keep(name, lambda path: make_run(path / "run", hub(checkpoint(path / "m", kind)), task, **how))
    return made / "run"


def lora(place: Place) -> dict[str, str]:
    (place.folder / "text.txt").write_text("turn on the light in the kitchen\n" * 40)
    return {"run": str(run_of(place))}


EXPORT = "fedtune export {run} --out {here}/out "
command("is for --to {}, not for --to {}: leave it out", EXPORT + "--to edge --requantize", ready=lora)
command("--method {} needs --quantize int8 or int4", EXPORT + "--to edge --method rtn", ready=lora)
command("--head {} needs --quantize int8 or int4", EXPORT + "--to edge --head int4", ready=lora)
command("--method {} needs text: give --calibrate", EXPORT + "--to edge --quantize int8 --method awq",
        ready=lora, calibrate="{here}/text.txt")  # fmt: skip


@follows("needs transformers, which is not installed ({}): pip install 'fedtune[train]'")
def transformers(place: Place) -> Iterator[str]:
    model = place.keep("gpt2", lambda path: checkpoint(path, "gpt2"))
    with place.patch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        yield place.run("fedtune", "generate", model, "turn on", "--max-new-tokens", "2")
    yield place.run("fedtune", "generate", model, "turn on", "--max-new-tokens", "2")  # the extra is installed again


@follows(", or use `fedtune export`, then `fedtune generate` with the exported folder", slow=True)
def card(place: Place) -> Iterator[str]:
    """The card of a method that no weights can express, over a backbone that PEFT cannot load."""
    backbone = hub(checkpoint(place.folder / "m", "llama"), init="random")
    run, live = make_run(place.folder / "run", backbone, CAUSAL, method="prompt")
    config = to_dict(Config(model=backbone, task=CAUSAL, peft=PeftConfig(method="prompt")))
    write_card(run, config, {"base": "b"}, None, [], [], live.backbone)
    yield (run / "adapter" / "README.md").read_text()
    yield place.run("fedtune", "export", run, "--out", place.folder / "out")
    yield place.run("fedtune", "generate", place.folder / "out", "turn on", "--max-new-tokens", "2")
