"""The advice about backbones, checkpoints, tokenizers and the methods that are attached to them."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from fedtune.config import ModelConfig, PeftConfig, TaskConfig
from fedtune.models import LiveAdapter, load_backbone
from fedtune.models.backbone import pick_device
from fedtune.models.checkpoint import NANO, find_folder, stored_tensors
from fedtune.models.methods import method
from fedtune.models.shift import FrozenWeights
from fedtune.models.sparse import SparseSlot
from tests.advised.models import run_of
from tests.advised.rows import Place, error_of, follows
from tests.models.build import checkpoint, hub, llama_config
from tests.models.test_adapter import random_state
from tests.models.test_shift import shift
from tests.models.test_sparse import first_state

CAUSAL, CLASSES = TaskConfig(kind="causal_lm", max_length=16), TaskConfig(kind="classification", max_length=16)
ASKS = TaskConfig(kind="instruction", max_length=16, max_new_tokens=6)
LORA = PeftConfig(rank=2)


def attach_error(folder: Path, task: TaskConfig = CAUSAL, peft: PeftConfig = LORA, labels: int = 3, **model: Any) -> str:
    """The error of attaching an adapter to the checkpoint in a folder; "" if there is none."""
    return error_of(lambda: LiveAdapter(load_backbone(hub(folder, **model), task, num_labels=labels), peft, task))


def choices_in(error: str) -> list[str]:
    """The choices at the end of a sentence."""
    return re.split(r", or |, | or ", re.split(r"(?:choose from|choose|take) ", error)[-1])


# -- folders ------------------------------------------------------------------------------------------------------------------------------


@follows("is a file: give the folder with config.json and the safetensors weights")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    yield attach_error(model / "model.safetensors")
    yield attach_error(model)


@follows("no such folder; give a local folder or a hub name")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    place.patch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(model))
    yield attach_error(place.folder / "none")
    yield attach_error(model)
    yield error_of(lambda: find_folder(ModelConfig(source="hub", name="owner/name")))


@follows("and the hub cannot be reached: check the name and the network, or give a local folder")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    named = ModelConfig(source="hub", name="fedtune-nobody/nothing", device="cpu")
    with place.patch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield error_of(lambda: find_folder(named))
        yield attach_error(model)
    place.patch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(model))  # the network is back
    yield error_of(lambda: find_folder(named))


@follows("is neither a local folder nor a public hub repository: check the name")
def _(place: Place) -> Iterator[str]:
    from httpx import Request, Response
    from huggingface_hub.errors import RepositoryNotFoundError

    def download(name: str, **_: Any) -> str:
        if name == "owner/name":
            return str(place.folder)
        raise RepositoryNotFoundError("404", response=Response(404, request=Request("GET", "https://huggingface.co")))

    place.patch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("owner/nmae", "owner/name"):
        yield error_of(lambda name=name: find_folder(ModelConfig(source="hub", name=name)))


@follows("the embedded backbone is missing from {}: reinstall fedtune, or take model=hub with a model.name")
def _(place: Place) -> Iterator[str]:
    with place.patch.context() as patch:
        patch.setattr("fedtune.models.checkpoint.NANO", place.folder)
        yield error_of(lambda: find_folder(ModelConfig()))
        yield error_of(lambda: find_folder(hub(checkpoint(place.folder / "m"))))
    assert find_folder(ModelConfig()) == NANO  # after a new installation
    yield error_of(lambda: find_folder(ModelConfig()))


@follows("has no config.json: give the folder of a Hugging Face model")
def _(place: Place) -> Iterator[str]:
    yield attach_error(place.folder)
    yield attach_error(checkpoint(place.folder / "m"))


@follows("is an adapter, not a model: merge it first with fedtune export {}", slow=True)
def _(place: Place) -> Iterator[str]:
    error = attach_error(run_of(place) / "adapter")
    yield error
    yield place.run(*error.rpartition("with ")[2].split(), "--out", place.folder / "out")
    yield attach_error(place.folder / "out")


@follows("holds a model and an adapter (adapter_config.json): move the adapter to its own folder")
def _(place: Place) -> Iterator[str]:
    model, own = checkpoint(place.folder / "m"), place.folder / "adapter"
    shutil.copytree(run_of(place) / "adapter", model, dirs_exist_ok=True)
    yield attach_error(model)
    own.mkdir()
    for path in model.glob("adapter_*"):
        path.rename(own / path.name)
    yield attach_error(model)


@follows("give the original checkpoint; model.precision=nf4 quantizes it while it is read")
def _(place: Place) -> Iterator[str]:
    original = checkpoint(place.folder / "m")
    packed = Path(shutil.copytree(original, place.folder / "packed"))
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    yield attach_error(packed)
    yield attach_error(original)


def _download_row(says: str, damage: Callable[[Path], Any]) -> None:
    """Add a row: a checkpoint with a damaged download, then with a complete one."""

    def follow(place: Place) -> Iterator[str]:
        source = checkpoint(place.folder / "source")
        for damaged in (True, False):
            model = Path(shutil.copytree(source, place.folder / "m", dirs_exist_ok=True))
            if damaged:
                damage(model)
            yield error_of(lambda model=model: stored_tensors(model))
            if damaged:
                shutil.rmtree(model)

    follows(says)(follow)


def _cut(model: Path, to: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:to])


def _shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')


_download_row("{} is not a valid safetensors file ({}): download or export it again", lambda m: _cut(m, -8))
_download_row("lacks the {} {}, which {} names: download the checkpoint again", _shard)


@follows("which can run code when loaded: convert them to safetensors first")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    yield attach_error(model)
    save_file(torch.load(model / "pytorch_model.bin", weights_only=True), model / "model.safetensors", {"format": "pt"})
    yield attach_error(model)


@follows("has no tokenizer ({}, …): copy the tokenizer's files into it")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    (model / "tokenizer.json").unlink()
    yield attach_error(model)
    shutil.copy(checkpoint(place.folder / "source") / "tokenizer.json", model)
    yield attach_error(model)


@follows("has neither a pad nor an eos token: set one in its tokenizer_config.json", slow=True)
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    tokens = AutoTokenizer.from_pretrained(model)
    tokens.eos_token = None
    tokens.save_pretrained(model)
    error = attach_error(model)
    yield error
    file = model / error.rpartition(" ")[2]
    for name in ("pad_token", "eos_token"):
        whole = file.read_text()
        file.write_text(json.dumps(json.loads(whole) | {name: "</s>"}))
        yield attach_error(model)
        file.write_text(whole)


# -- tasks and methods that do not fit the backbone ---------------------------------------------------------------------------------------


def _mismatch_row(says: str, kind: str, task: TaskConfig, ways: Callable[[str], list[tuple[str, TaskConfig]]]) -> None:
    def follow(place: Place) -> Iterator[str]:
        error = attach_error(checkpoint(place.folder / "m", kind), task)
        yield error
        for number, (other, fitting) in enumerate(ways(error)):
            yield attach_error(checkpoint(place.folder / f"m{number}", other), fitting)

    follows(says, slow=True)(follow)


def _tasks(error: str) -> list[TaskConfig]:
    found = re.findall(r"take (?:task\.kind=)?(.*), or", error)[0].split(" or ")
    return [dataclasses.replace(ASKS, kind=kind) for kind in found]


_mismatch_row("is an encoder-decoder, which does not support task.kind={}: take {}, or a decoder", "t5", CAUSAL,
         lambda error: [("llama", CAUSAL), *(("t5", task) for task in _tasks(error))])  # fmt: skip
_mismatch_row("is an encoder, which does not support task.kind={}: take task.kind={}, or a decoder", "bert", CAUSAL,
         lambda error: [("llama", CAUSAL), *(("bert", task) for task in _tasks(error))])  # fmt: skip


@follows("is an encoder-decoder ('{}'): take T5, a decoder, or an encoder for {}", slow=True)
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    (model / "config.json").write_text(json.dumps({"model_type": "bart", "d_model": 16}))
    error = attach_error(model, CLASSES)
    yield error
    for name in error.rpartition(" for ")[2].split(" or "):
        for kind in ("t5", "llama", "bert"):
            yield attach_error(checkpoint(place.folder / f"{name}-{kind}", kind), TaskConfig(kind=name, max_length=16))


@follows("model.device=cuda, but torch finds no CUDA device: take model.device=auto or cpu")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr("torch.cuda.is_available", lambda: False)
    error = error_of(lambda: pick_device("cuda"))
    yield error
    for device in error.rpartition("model.device=")[2].split(" or "):
        yield error_of(lambda device=device: pick_device(device))


@follows("is more than the context of {} ({} tokens): make it smaller")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    for length in (65, 64):
        yield attach_error(model, TaskConfig(kind="causal_lm", max_length=length))


@follows("{} with task.max_new_tokens={} is more than the context of {} ({} tokens): make one of them smaller")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    for length, answer in ((60, 6), (58, 6), (60, 4)):
        yield attach_error(model, TaskConfig(kind="instruction", max_length=length, max_new_tokens=answer))


@follows("is more than the model's context of {} tokens: make one of them smaller")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    for tokens, length in ((49, 16), (48, 16), (49, 15)):
        yield attach_error(model, dataclasses.replace(CAUSAL, max_length=length), PeftConfig(method="prompt", tokens=tokens))


def _method(says: str, kind: str, name: str, task: TaskConfig = CAUSAL, *, config: Any = None, other: str = "", **model: Any) -> None:
    """A row about a method that does not fit, and the methods that its error names; it may also name the backbone `other`."""

    def follow(place: Place) -> Iterator[str]:
        folder = checkpoint(place.folder / "m", kind, config=config() if config else None)
        error = attach_error(folder, task, PeftConfig(method=name, tokens=3), **model)
        yield error
        for way in re.sub(r"peft=", "", error.rpartition(": ")[2]).split(" or "):
            if other and "a backbone" in way:
                yield attach_error(checkpoint(place.folder / "other", other), task, PeftConfig(method=name))
            else:
                yield attach_error(folder, task, PeftConfig(method=re.findall(r"\w+", way)[-1], tokens=3, rank=2))

    follows(says, slow=True)(follow)


def _bloom() -> Any:
    from transformers import BloomConfig

    return BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)


_method("peft.method=adapter does not support the architecture '{}', only {}: take peft=lora", "bloom", "adapter", config=_bloom)
_method("peft.method=ptuning_v2 does not support the architecture '{}', only {}: take peft=prefix", "bloom", "ptuning_v2", config=_bloom)
_method("has none: take peft=lora, or a backbone with biases", "llama", "bitfit", other="gpt2")
_method("is an encoder, which takes no past keys and values: choose prompt or ptuning_v2", "bert", "prefix", CLASSES)
_method("the classifier of the encoder-decoder '{}' takes token ids only: choose ptuning_v2 or lora", "t5", "prompt", CLASSES)


@follows("loses small steps in {}: take model.precision=fp32")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    for precision in ("bf16", "fp32"):
        yield attach_error(model, peft=PeftConfig(method="full"), precision=precision)


@follows("no linear module of the backbone is called '{}', choose from {}")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    error = attach_error(model, peft=PeftConfig(targets="q_prj"))
    yield error
    yield attach_error(model, peft=PeftConfig(targets=choices_in(error)))


@follows("unknown PEFT method '{}', this version has {}: update fedtune")
def _(place: Place) -> Iterator[str]:
    error = error_of(lambda: method("newest"))
    yield error
    for name in re.findall(r"has (.*): update", error)[0].split(", ")[:3]:  # as if this version had the method
        yield error_of(lambda name=name: method(name))


# -- states -------------------------------------------------------------------------------------------------------------------------------


@follows("this backbone already has an adapter: load the backbone again, or use its adapter", slow=True)
def _(place: Place) -> Iterator[str]:
    model = hub(checkpoint(place.folder / "m"))
    live = LiveAdapter(load_backbone(model, CAUSAL), LORA, CAUSAL)
    yield error_of(lambda: LiveAdapter(live.backbone, LORA, CAUSAL))
    yield error_of(lambda: LiveAdapter(load_backbone(model, CAUSAL), LORA, CAUSAL))
    yield error_of(lambda: live.load(random_state(live)))


def _state(says: str, right: PeftConfig, wrong: PeftConfig, *, seed: int = 0, config: Any = None) -> None:
    """A row about the state of another adapter; the state is loaded with the same settings and the same checkpoint."""

    def follow(place: Place) -> Iterator[str]:
        def attach_peft(folder: Path, peft: PeftConfig) -> LiveAdapter:
            return LiveAdapter(load_backbone(hub(folder), CAUSAL), peft, CAUSAL)

        own = checkpoint(place.folder / "own")
        other = checkpoint(place.folder / "other", seed=seed, config=config() if config else None)
        live = attach_peft(own, right)
        foreign = attach_peft(other, wrong).read(0)
        yield error_of(lambda: live.load(foreign if seed else foreign.replace(base="")))
        yield error_of(lambda: live.load(attach_peft(own, right).read(0)))

    follows(says, slow=True)(follow)


_state("the adapter belongs to the backbone {}, but {} is loaded: load the same checkpoint", LORA, LORA, seed=3)
_state("the adapter's method is '{}', but the model's is '{}': see peft.method", LORA, PeftConfig(method="ia3"))
_state("the adapter lacks '{}' ({} such) of the model: see peft.targets and the task", LORA, PeftConfig(rank=2, targets="q_proj"))
_state("unknown to the model: see peft.targets and the task", PeftConfig(rank=2, targets="q_proj"), LORA)
_state("but the model allows 1 to {}: see peft.rank", LORA, PeftConfig(rank=4))
_state("the adapter's '{}' is {}, but the model's is {}: see peft.targets", LORA, LORA, config=lambda: llama_config(intermediate_size=32))


def _shift(says: str, model: nn.Module) -> None:
    def follow(place: Place) -> Iterator[str]:
        for each in (model, nn.ModuleDict({"q": nn.Linear(5, 3)})):
            yield error_of(lambda each=each: FrozenWeights(each).add(shift(1, 2)))

    follows(says)(follow)


_shift("which is not a linear layer of this backbone: load the same checkpoint", nn.ModuleDict({"q": nn.LayerNorm(5)}))
_shift("a shift changes '{}' by {}, but the backbone's is {}: load the same checkpoint", nn.ModuleDict({"q": nn.Linear(3, 5)}))


@follows("the state belongs to the backbone {}, but {} is loaded: load the same checkpoint", slow=True)
def _(place: Place) -> Iterator[str]:
    for number, seed in enumerate((3, 0)):
        live = LiveAdapter(load_backbone(hub(checkpoint(place.folder / str(number), seed=seed)), CAUSAL), PeftConfig(rank=3), CAUSAL)
        own = first_state(place.folder / str(number), CAUSAL)
        if not number:
            other = LiveAdapter(load_backbone(hub(checkpoint(place.folder / "own")), CAUSAL), PeftConfig(rank=3), CAUSAL)
            own = own.replace(base=other.backbone.fingerprint)
        yield error_of(lambda live=live, own=own: SparseSlot(live, own.spec).load(own))


@follows("the sparse state {} '{}' ({} such), unlike the model: see peft.targets and the task", slow=True)
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    state = first_state(model, CAUSAL)
    for targets in ("q_proj", "all-linear"):
        live = LiveAdapter(load_backbone(hub(model), CAUSAL), PeftConfig(rank=3, targets=targets), CAUSAL)
        yield error_of(lambda live=live: SparseSlot(live, state.spec).load(state))


@follows("but the model has no LoRA adapter: take peft=lora", slow=True)
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    state = first_state(model, CAUSAL)
    for name in ("ia3", "lora"):
        live = LiveAdapter(load_backbone(hub(model), CAUSAL), PeftConfig(method=name, rank=3), CAUSAL)
        yield error_of(lambda live=live: SparseSlot(live, state.spec))
