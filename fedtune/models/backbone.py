"""Load and freeze a backbone from the embedded folder, a local folder or the hub, always from safetensors."""

import dataclasses
import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from fedtune.config import ModelConfig, TaskConfig
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.task import task_of, tasks_with
from fedtune.errors import ModelError
from fedtune.models.checkpoint import digest, find_folder, fingerprint, first_line, read_config, refuse_quantized, stored_tensors
from fedtune.models.lazy import lazy_tensors
from fedtune.models.quiet import quiet
from fedtune.models.tokens import check_context, load_tokenizer, set_tokens

__all__ = [
    "Backbone", "build_config", "draw", "dropout_rates", "empty_model", "fingerprint", "full_tensors", "head_names", "load_backbone",
    "quiet",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A frozen model with its tokenizer.

    Args:
        model: The model in eval mode; no parameter requires a gradient; dropout rates are the checkpoint's.
        tokenizer: The tokenizer, with the same pad token as the model's config.
        fingerprint: The `spec.base` of this backbone's adapters.
        name: The name for other programs: the hub name, or the folder.
        folder: Folder of its files.
        device: Device of its weights.
        completed: Weights (of a pooler) that the checkpoint lacks; they are set to the identity.
    """

    model: PreTrainedModel
    tokenizer: Any
    fingerprint: str
    name: str
    folder: Path
    device: torch.device
    completed: tuple[str, ...] = ()

    @property
    def seq2seq(self) -> bool:
        """Whether it is an encoder-decoder."""
        return is_seq2seq(self.model.config)


def load_backbone(
    config: ModelConfig,
    task: TaskConfig,
    *,
    num_labels: int = 0,
    seed: int = 0,
    outline: Mapping[str, Tensor] | None = None,
    packed: bool = False,
) -> Backbone:
    """Load, check and freeze a backbone.

    Args:
        config: The backbone, its precision and device.
        task: Its `kind` determines the model class; `max_length` must fit the context.
        num_labels: Outputs of the task's head (`Task.outputs`); 0 without a head.
        seed: The run's seed, for the weights of `init=random` and for a classification head that the checkpoint lacks.
        outline: Float32 tensors on the meta device that replace the checkpoint's tensors, by name. The model is then on the meta device
            too, without weights but fully checked. Only for a pretrained backbone in float32.
        packed: Whether the checkpoint may already be quantized. Such a model can generate answers, but cannot be trained or exported.

    Raises:
        ModelError: The checkpoint is missing, damaged, pickled or of an unknown architecture, or does not fit the task.
    """
    folder = find_folder(config)
    hf_config = build_config(config, task, num_labels=num_labels, folder=folder, packed=packed)
    tokenizer = load_tokenizer(folder, config, task)
    device = torch.device("meta") if outline else pick_device(config.device)
    settings = _settings(config, device)
    drawn = config.init == "random"  # the fingerprint reads every header, so it rejects a truncated file before loading
    mark = digest(read_config(folder), [("random", str(seed).encode())]) if drawn else fingerprint(folder)
    if config.precision in ("nf4", "int8"):
        model = _quantized_model(folder, hf_config, task, config, seed, mark, device, settings)
    else:
        make = _random_model if drawn else partial(_outlined_model, folder, outline) if outline else partial(_pretrained_model, folder)
        model = cast(Any, make(hf_config, task, config, seed, settings)).to(device)
    if settings["dtype"] is torch.bfloat16:
        _keep_heads_in_fp32(model)
    model.requires_grad_(False)
    model.eval()
    if config.checkpointing:
        checkpoint_activations(model)
    completed = () if drawn else _lacking(model, folder)
    set_tokens(model, tokenizer, folder, task)
    check_context(model, task, folder)
    name = config.name if config.source == "hub" and not Path(config.name).expanduser().is_dir() else str(folder)
    model.config._name_or_path = name  # PEFT writes it into an adapter's folder as the base model's name
    return Backbone(model=model, tokenizer=tokenizer, fingerprint=mark, name=name, folder=folder, device=device, completed=completed)


def build_config(config: ModelConfig, task: TaskConfig, *, num_labels: int, folder: Path, packed: bool = False) -> Any:
    """The transformers config of the backbone for this task, from config.json alone.

    Raises:
        ModelError: The architecture is unknown or does not support the task.
    """
    kind = read_config(folder)["model_type"]
    if not packed:
        refuse_quantized(folder)
    wanted = task_of(task)
    extra = wanted.model_settings(num_labels)
    try:
        with quiet():
            out = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code, **extra)
    except Exception as bad:  # transformers' config classes and validators may raise any type
        if "trust_remote_code" in str(bad):
            raise ModelError(
                f"{folder} contains its own code: read it, then allow it with model.trust_remote_code=true, also after resume=RUN, or with"
                " --trust-remote-code of `fedtune export` and `fedtune draft`"
            ) from None
        if "model type" in str(bad) or isinstance(bad, KeyError):
            raise ModelError(f"{folder} has the architecture '{kind}', which this version of transformers does not know") from None
        raise ModelError(f"{folder / 'config.json'} is not a valid '{kind}' config: {first_line(bad)}") from None
    heads = tasks_with(head=True)
    if is_seq2seq(out) and kind != "t5":
        raise ModelError(f"{folder} is an encoder-decoder ('{kind}'): take T5, a decoder, or an encoder for {heads}")
    if is_seq2seq(out) and not wanted.encoder_decoder:
        others = tasks_with(encoder_decoder=True)
        raise ModelError(f"'{kind}' is an encoder-decoder, which does not support task.kind={task.kind}: take {others}, or a decoder")
    if not config.dropout:
        for name in dropout_rates(out):
            setattr(out, name, 0.0)
    if config.trust_remote_code and _auto_class(task, out).__name__ in getattr(out, "auto_map", {}):
        return out
    if type(out) not in _auto_class(task, out)._model_mapping:
        raise ModelError(f"the architecture '{kind}' has no model for task.kind={task.kind} in transformers")
    # transformers also offers encoders as causal LMs (BertLMHeadModel), which are valid only with is_decoder
    if not wanted.head and type(out) in AutoModelForMaskedLM._model_mapping and not getattr(out, "is_decoder", False):
        raise ModelError(f"'{kind}' is an encoder, which does not support task.kind={task.kind}: take task.kind={heads}, or a decoder")
    return out


def is_seq2seq(hf_config: Any) -> bool:
    return bool(getattr(hf_config, "is_encoder_decoder", False))


def dropout_rates(hf_config: Any) -> dict[str, float]:
    """The nonzero dropout rates in an architecture's config, such as hidden_dropout_prob, attn_pdrop and attention_dropout."""
    found = hf_config.to_dict().items()
    return {k: v for k, v in found if ("dropout" in k or k.endswith("pdrop")) and isinstance(v, float) and v > 0}


def empty_model(hf_config: Any, task: TaskConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model on the meta device, without storage."""
    with quiet(), torch.random.fork_rng(), torch.device("meta"):
        return _auto_class(task, hf_config).from_config(hf_config, trust_remote_code=trust_remote_code)


def head_names(model: nn.Module) -> list[str]:
    """Names of the top-level modules outside the base model that have weights: a classifier's head, such as `score`."""
    prefix, children = getattr(model, "base_model_prefix", ""), dict(model.named_children())
    if prefix and prefix not in children:  # T5 for generation has no base model as a child
        output = cast(PreTrainedModel, model).get_output_embeddings()
        return [n for n, m in children.items() if m is output]
    return [n for n, m in children.items() if n != prefix and any(True for _ in m.parameters())]


def draw(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """A head's initial tensor in float32: matrices are normal(0, std) with a generator seeded by the name, norms are 1, biases 0."""
    if len(shape) >= 2:
        return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(derive_seed(seed, "init", name)))
    return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)


def initializer_range(hf_config: Any) -> float:
    return float(getattr(hf_config.get_text_config(), "initializer_range", None) or 0.02)


def _auto_class(task: TaskConfig, hf_config: Any) -> Any:
    return getattr(transformers, task_of(task).auto_class(is_seq2seq(hf_config)))


def pick_device(name: str) -> torch.device:
    """Raises ModelError if `name` is cuda and there is no CUDA device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device=cuda, but torch finds no CUDA device: take model.device=auto or cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def checkpoint_activations(model: PreTrainedModel, *, reentrant: bool = False) -> None:
    """Turn on activation checkpointing: training stores only each layer's input and recomputes the rest in the backward pass.

    Args:
        model: The backbone.
        reentrant: Use PyTorch's older implementation, for hooks that must run exactly once in each layer's backward pass, such as hooks for
            per-sample gradients.

    Raises:
        ModelError: The architecture does not support it.
    """
    try:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    except ValueError:
        raise ModelError(
            f"model.checkpointing: the architecture '{model.config.model_type}' does not support it: set it to false"
        ) from None
    if reentrant:
        model.enable_input_require_grads()  # it needs an input that requires a gradient; a frozen embedding's output does not


def _settings(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    if config.precision in ("nf4", "int8"):
        out: dict[str, Any] = {"dtype": _quantize().compute_dtype(config.compute, device)}
    else:
        out = {"dtype": torch.bfloat16 if config.precision == "bf16" else torch.float32}
    if out["dtype"] is torch.bfloat16 and device.type == "cpu":
        out["attn_implementation"] = "eager"  # on a CPU the backward pass of bf16 SDPA takes more than half of a step
    return out


def _quantize() -> ModuleType:
    """The module `quantize`, imported late: it loads bitsandbytes, which some runs do not need and some machines do not have."""
    try:
        return importlib.import_module("fedtune.models.quantize")
    except ImportError as bad:
        raise ModelError(f"model.precision=nf4 and int8 need bitsandbytes ({first_line(bad)}): install it, or take bf16") from None


def full_tensors(
    config: ModelConfig, task: TaskConfig, hf_config: Any, folder: Path, seed: int, dtype: torch.dtype, early: Collection[str] = ()
) -> dict[str, Any]:
    """The backbone's tensors before quantization, by their names in the checkpoint. Read each as `tensors[name][...]`.

    A checkpoint's tensors stay on disk until they are read; tensors whose names end in one of `early` are read as `dtype`. Random tensors
    are in memory.
    """
    if config.init == "random":
        whole = dataclasses.replace(config, precision="fp32")
        return _random_model(hf_config, task, whole, seed, {"dtype": torch.float32}).state_dict()
    return dict(lazy_tensors(folder, dtype, early))


def _quantized_model(
    folder: Path,
    hf_config: Any,
    task: TaskConfig,
    config: ModelConfig,
    seed: int,
    mark: str,
    device: torch.device,
    settings: dict[str, Any],
) -> PreTrainedModel:
    quantize, dtype = _quantize(), settings["dtype"]
    hf_config._attn_implementation = settings.get("attn_implementation", hf_config._attn_implementation)
    bare = empty_model(hf_config, task, trust_remote_code=config.trust_remote_code)
    ends = [n for n, m in bare.named_modules() if m in (bare.get_input_embeddings(), bare.get_output_embeddings())]
    tensors = partial(full_tensors, config, task, hf_config, folder, seed, dtype, [f"{n.rpartition('.')[2]}.weight" for n in ends])
    recipe = quantize.recipe(bare, config.precision, dtype, mark)
    if config.init == "pretrained":  # a pooler that will be set to the identity must not be quantized
        lacking = [n.rpartition(".")[0] for n in _lacking(bare, folder)]
        recipe = dataclasses.replace(recipe, skip=tuple(dict.fromkeys([*recipe.skip, *lacking])))
    try:
        with quiet(), torch.random.fork_rng():
            own = _own_config(bare, hf_config)
            model, fresh = quantize.load_quantized(type(bare), own, tensors, partial(_missing, folder, task), recipe, device)
    except ModelError:
        raise
    except Exception as bad:  # transformers, bitsandbytes and remote code may raise any type
        raise ModelError(f"the weights in {folder} cannot be quantized: {first_line(bad)}") from None
    _draw_heads(model, fresh, hf_config, seed)
    return model


def _pretrained_model(
    folder: Path, hf_config: Any, task: TaskConfig, config: ModelConfig, seed: int, settings: dict[str, Any]
) -> PreTrainedModel:
    try:
        with quiet(), torch.random.fork_rng():  # transformers draws a missing head with the global generator; it is overwritten below
            model, info = _auto_class(task, hf_config).from_pretrained(
                folder,
                config=hf_config,
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head for other classes is drawn again; any other mismatch raises an error below
                **settings,
            )
    except Exception as bad:  # transformers, safetensors and remote code may raise any type
        raise ModelError(f"the weights in {folder} cannot be loaded: {first_line(bad)}") from None
    _draw_heads(model, _missing(folder, task, model, info), hf_config, seed)
    return model


def _outlined_model(
    folder: Path, outline: Mapping[str, Tensor], hf_config: Any, task: TaskConfig, config: ModelConfig, seed: int, settings: dict[str, Any]
) -> PreTrainedModel:
    """The model on the meta device, loaded by transformers, so that names, tied and missing weights are checked as usual."""
    bare = empty_model(hf_config, task, trust_remote_code=config.trust_remote_code)
    try:
        with quiet(), torch.random.fork_rng():
            model, info = cast(Any, type(bare)).from_pretrained(
                None,
                config=_own_config(bare, hf_config),
                state_dict=dict(outline),
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # checked below
                **settings,
            )
    except Exception as bad:  # transformers and remote code may raise any type
        raise ModelError(f"the weights in {folder} cannot be loaded: {first_line(bad)}") from None
    _missing(folder, task, model, info)
    return model


def _own_config(bare: PreTrainedModel, hf_config: Any) -> Any:
    """The config for the model's class: for some composite checkpoints, transformers builds only the text model."""
    return hf_config if type(bare.config) is type(hf_config) else hf_config.get_text_config()


def _missing(folder: Path, task: TaskConfig, model: PreTrainedModel, info: Mapping[str, Any]) -> list[str]:
    """A head's weights that the checkpoint lacks or has with another shape.

    Raises:
        ModelError: Other weights are missing.
    """
    mismatched = {m[0] for m in info["mismatched_keys"]}
    fresh = sorted(set(info["missing_keys"]) | mismatched)
    heads = head_names(model) if task_of(task).head else []
    poolers = sorted(set(info["missing_keys"]).intersection(_poolers(model))) if heads else []
    _set_poolers(model, poolers)
    if wrong := [n for n in fresh if n.split(".")[0] not in heads and n not in poolers]:
        what = "has another shape in" if wrong[0] in mismatched else "is missing from"
        raise ModelError(f"the weight '{wrong[0]}' {what} {folder} ({len(wrong)} such): config.json and the weights do not belong together")
    # A head is drawn entirely or not at all: a random projection on top of a trained one would be useless
    redrawn = {n.split(".")[0] for n in fresh if n not in poolers}
    return [n for n, _ in model.named_parameters() if n.split(".")[0] in redrawn]


def _poolers(model: nn.Module) -> list[str]:
    """Weights and biases of poolers: the square layer at the end of BERT's base model. Masked-LM checkpoints have none."""
    heads = head_names(model)
    found = [(n, p) for n, p in model.named_parameters() if ".pooler." in n and n.split(".")[0] not in heads]
    return [n for n, p in found if p.ndim == 1 or p.shape[0] == p.shape[1]]


def _lacking(model: nn.Module, folder: Path) -> tuple[str, ...]:
    """The pooler weights that the checkpoint lacks. A base model's checkpoint may lack the name prefix of the model's tensors."""
    poolers = _poolers(model)
    stored = [t.name for t in stored_tensors(folder)] if poolers else []
    return tuple(n for n in poolers if not any(f".{n}".endswith(f".{s}") for s in stored))


def _set_poolers(model: nn.Module, names: Collection[str]) -> None:
    """Set a missing pooler to the identity: it is frozen, and random weights would destroy the information in the base model's output."""
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            parameter.copy_(torch.eye(len(parameter)) if parameter.ndim == 2 else torch.zeros(len(parameter)))


def _draw_heads(model: PreTrainedModel, fresh: Collection[str], hf_config: Any, seed: int) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in fresh:
                parameter.copy_(draw(name, tuple(parameter.shape), initializer_range(hf_config), seed))


def _random_model(hf_config: Any, task: TaskConfig, config: ModelConfig, seed: int, settings: dict[str, Any]) -> PreTrainedModel:
    rest = {k: v for k, v in settings.items() if k != "dtype"}
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "backbone"))
        model = _auto_class(task, hf_config).from_config(hf_config, trust_remote_code=config.trust_remote_code, dtype=torch.float32, **rest)
    heads = head_names(model) if task_of(task).head else []
    _draw_heads(model, [n for n, _ in model.named_parameters() if n.split(".")[0] in heads], hf_config, seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(settings["dtype"])  # not model.to: the rotary frequencies (buffers) must stay float32
    return model


def _keep_heads_in_fp32(model: PreTrainedModel) -> None:
    """Heads are trained in float32 for every precision of the backbone: AdamW's small steps are lost in bf16's 8-bit significand."""

    def cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    output = model.get_output_embeddings()
    for name in head_names(model):
        head = model.get_submodule(name)
        if head is not output:
            head.float()
            head.register_forward_pre_hook(cast)
