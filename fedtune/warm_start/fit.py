"""Fits an earlier adapter to a run: the model of version 0 is the earlier model."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.task import task_of
from fedtune.contracts.warm_start import WarmStart
from fedtune.errors import ConfigError, ModelError
from fedtune.models.combined import stack
from fedtune.models.methods import method
from fedtune.warm_start.source import Source

# settings of peft that names and shapes depend on, besides the rank
_SHAPES = ("targets", "heads", "core", "bottleneck", "placement", "tokens")
_A, _B = ".lora_A", ".lora_B"


def fit(source: Source, drawn: AdapterState, config: Config, labels: Sequence[str], *, needs_zero: bool) -> WarmStart:
    """The start of a run with this config.

    The run continues the earlier factors. If its rank is larger, the rows of A beyond the earlier rank are the drawn ones and their columns
    of B are zero; if its scaling differs, B is rescaled: s·B·A stays the same. The shifts of the earlier run become one shift.

    Args:
        source: The earlier adapter.
        drawn: The adapter that the run would start with, with its backbone's fingerprint.
        config: The run's config.
        labels: The run's class names.
        needs_zero: Whether the strategy assumes B·A = 0 before round 1. The product is then merged into the frozen weights, and the run
            starts with the drawn factors and the earlier head. So it is if the task's loss compares with the model before the run, which is
            then the frozen weights alone.

    Raises:
        ConfigError: The adapter does not fit the run; the sentence names the setting to change.
        ModelError: The adapter is damaged.
    """
    earlier = source.adapter.state.replace({**source.adapter.state.tensors, **source.adapter.heads})
    _check_kind(source, earlier, drawn, config, labels)
    _check_tensors(source, earlier, drawn, config)
    moved = [m for m in earlier.spec.ranks if earlier[m + _B].any()]
    compares, kind = task_of(config.task).needs_reference, earlier.spec.method
    if compares and method(kind).factors is None:
        raise ConfigError(
            f"task.loss={config.task.loss} compares with the model before the run, and {source.key}, with peft.method={kind}, cannot be"
            " merged into its frozen weights: start from a run with peft=lora, or set task.loss=orpo"
        )
    merges = (needs_zero or compares) and bool(moved)
    if merges and method(earlier.spec.method).factors is None:
        raise ConfigError(
            f"{source.key} changes the model, but the strategy assumes B·A = 0 before round 1, and peft.method={config.peft.method} cannot"
            " be merged into the frozen weights: take strategy=fedavg"
        )
    shifts = [*source.adapter.shifts, *([earlier] if merges else [])]
    adapter = _continued(source, earlier, drawn, config) if not merges else _with_head(earlier, drawn)
    about = {"from": source.name, "sha256": source.sha256, "round": earlier.spec.version, "merged": merges}
    return WarmStart(adapter=adapter, shifts=_one_shift(shifts, drawn), about=about)


def _check_kind(source: Source, earlier: AdapterState, drawn: AdapterState, config: Config, labels: Sequence[str]) -> None:
    """Raises ConfigError if method, backbone, precision or classes differ."""
    spec, before = earlier.spec, source.config
    plain = all(method(kind).factors is not None for kind in (spec.method, drawn.spec.method))  # plain LoRA: only the scaling differs
    if spec.method != drawn.spec.method and not plain:
        raise ConfigError(f"{source.key} has peft.method={spec.method}, but this run has {drawn.spec.method}: set peft={spec.method}")
    if spec.base and spec.base != drawn.spec.base:
        name = f", model.source={before.model.source} model.name={before.model.name}" if before else ""
        raise ConfigError(
            f"{source.key} belongs to the backbone {spec.base[:12]}, but this run has {drawn.spec.base[:12]}: use the checkpoint that the"
            f" adapter was trained on{name}"
        )
    over = source.adapter.over
    if over and (config.peft.init, config.model.precision, config.model.compute) != ("loftq", over["precision"], over["compute"]):
        raise ConfigError(
            f"{source.key} was trained over quantized weights that it corrects: set peft.init=loftq model.precision={over['precision']}"
            f" model.compute={over['compute']}"
        )
    if not over and config.peft.init != "default":
        raise ConfigError(f"peft.init={config.peft.init} computes a start of its own, so {source.key} cannot be one: set peft.init=default")
    if source.labels and labels and list(source.labels) != list(labels) and len(earlier.tensors) > 2 * len(spec.ranks):
        raise ConfigError(
            f"{source.key} has a head for the classes {_some(source.labels)}, but this run's classes are {_some(labels)}: set data.labels"
            " to the earlier classes in their order"
        )


def _check_tensors(source: Source, earlier: AdapterState, drawn: AdapterState, config: Config) -> None:
    """Raises an error if names or shapes differ, apart from the rank, or a value is not finite."""
    advice = _advice(source, earlier, config)
    for own, other, what in ((earlier, drawn, "which this run's lacks"), (drawn, earlier, "which it lacks")):
        if odd := [n for n in own.tensors if n not in other.tensors]:
            whose = "has" if own is earlier else "does not fit: this run's adapter has"
            raise ConfigError(f"{source.key} {whose} the tensor '{odd[0]}' ({len(odd)} such), {what}: {advice}")
    for shift in source.adapter.shifts:
        if odd := [m for m in shift.spec.ranks if m not in drawn.spec.ranks]:
            raise ConfigError(f"{source.key} has merged a change of '{odd[0]}', which this run does not adapt: {advice}")
    for state in (earlier, *source.adapter.shifts):
        for name, tensor in state.tensors.items():
            if name not in drawn.tensors:
                raise ModelError(f"{source.key} has the tensor '{name}' in a shift, which is not part of LoRA: the file is damaged")
            got, wanted, module = list(tensor.shape), list(drawn[name].shape), name.rpartition(".")[0]
            if name.endswith((_A, _B)) and module in state.spec.ranks:
                wanted[0 if name.endswith(_A) else 1] = state.spec.ranks[module]
            if got != wanted:
                raise ConfigError(f"{source.key} has '{name}' of the shape {tuple(got)}, but this run needs {tuple(wanted)}: {advice}")
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise ModelError(f"{source.key}: '{name}' has values that are not finite numbers: take an adapter of an earlier round")


def _advice(source: Source, earlier: AdapterState, config: Config) -> str:
    """The settings that differ, as advice."""
    if source.config is None:
        kinds = sorted({m.rpartition(".")[2] for m in earlier.spec.ranks})
        return f"set peft.targets=[{','.join(kinds)}], or take the backbone and the task that the adapter was trained for"
    before, settings = source.config, []
    if before.task.kind != config.task.kind:
        settings.append(f"task={before.task.kind}")
    for key in _SHAPES:
        if (value := getattr(before.peft, key)) != getattr(config.peft, key):
            settings.append(f"peft.{key}={json.dumps(value).replace(' ', '') if isinstance(value, list) else value}")
    return f"set {' '.join(settings)}, as its run did" if settings else "it is damaged, or belongs to another backbone"


def _continued(source: Source, earlier: AdapterState, drawn: AdapterState, config: Config) -> AdapterState:
    """The earlier tensors, with the ranks and scaling of `drawn`."""
    tensors: dict[str, Tensor] = {}
    for name, like in drawn.tensors.items():
        module, kind = name.rpartition(".")[0], name[name.rfind(".") :]
        value = earlier[name].to(like.dtype)
        if kind not in (_A, _B) or module not in earlier.spec.ranks:
            tensors[name] = value.contiguous()
            continue
        rank, own = earlier.spec.ranks[module], drawn.spec.ranks[module]
        if rank > own:
            pattern, most = " or peft.rank_pattern" if config.peft.rank_pattern else "", max(earlier.spec.ranks.values())
            raise ConfigError(
                f"{source.key} has rank {rank} at '{module}', but this run's rank is {own}, and a smaller rank would change the model: set"
                f" peft.rank={most}{pattern}"
            )
        if kind == _A:
            tensors[name] = torch.cat([value, like[rank:]])
        else:
            growth = earlier.spec.scaling[module] / drawn.spec.scaling[module]
            tensors[name] = torch.cat([value if growth == 1 else value * growth, torch.zeros_like(like[:, rank:])], 1)
    return drawn.replace(tensors, version=0, basis=earlier.spec.basis)


def _with_head(earlier: AdapterState, drawn: AdapterState) -> AdapterState:
    """The drawn factors, and every other tensor from the earlier adapter."""
    head = {n: earlier[n].to(t.dtype) for n, t in drawn.tensors.items() if not n.endswith((_A, _B))}
    return drawn.replace({**drawn.tensors, **head}, version=0)


def _one_shift(states: Sequence[AdapterState], drawn: AdapterState) -> tuple[AdapterState, ...]:
    """The sum of these products as one shift of version 0; empty for none."""
    if not states:
        return ()
    tensors, ranks = dict[str, Tensor](), dict[str, int]()
    for module in drawn.spec.ranks:
        parts = [(s.spec.scaling[module], s[module + _A].double(), s[module + _B].double()) for s in states if module in s.spec.ranks]
        if parts:
            a, b = stack(parts)
            tensors |= {module + _A: a.float().contiguous(), module + _B: b.float().contiguous()}
            ranks[module] = len(a)
    spec = AdapterSpec(method="lora", base=drawn.spec.base, ranks=ranks, scaling=dict.fromkeys(ranks, 1.0))
    return (AdapterState(tensors, spec),)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


__all__ = ["fit"]
