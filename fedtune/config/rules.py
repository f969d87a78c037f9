"""Checks a config before anything is loaded: first the range of every value, then invalid combinations."""

import dataclasses
from typing import Any

from fedtune.config.bounds import require
from fedtune.config.method_files import METHODS, adapts_experts, inits_of
from fedtune.config.registry import TASKS
from fedtune.config.schema import Config
from fedtune.errors import ConfigError
from fedtune.storage.ids import LONGEST_NAME, flaw, short, shown


def check(config: Config) -> Config:
    """Return `config` if all values and their combinations are valid.

    Raises:
        ConfigError: Names the key, its value, and the valid values.
    """
    if config.eval.where == "door":  # its name in earlier runs and scenarios
        config.eval.where = "server"
    _check_fields(config, "")
    _check_together(config)
    return config


def _check_fields(node: Any, prefix: str) -> None:
    for f in dataclasses.fields(node):
        key, value, rules = prefix + f.name, getattr(node, f.name), f.metadata
        if dataclasses.is_dataclass(value):
            _check_fields(value, key + ".")
        elif isinstance(value, dict) and value and all(dataclasses.is_dataclass(v) for v in value.values()):
            for name, child in value.items():
                _check_fields(child, f"{key}.{name}.")
        elif rules:
            require(key, value, **{name: bound for name, bound in rules.items() if name != "help"})


def _check_together(c: Config) -> None:
    def refuse(wrong: bool, sentence: str) -> None:
        if wrong:
            raise ConfigError(sentence)

    refuse(c.peft.from_ == "", "peft.from is empty: give the directory of a finished run or an adapter folder, or leave it out")
    refuse(c.model.source == "hub" and not c.model.name, "model=hub needs model.name: a hub name or a local folder")
    refuse(c.data.source == "hub" and not c.data.name, "data=hub needs data.name: the name of a hub data set")
    refuse(c.partition.kind == "one" and c.data.client is None, "partition.kind=one needs data.client: the client that owns the rows")
    if c.data.client is not None and (wrong := flaw(c.data.client)):
        raise ConfigError(f"data.client='{shown(c.data.client)}' {wrong}: give the client another id")
    refuse((c.data.prompt is None) != (c.data.answer is None), "data.prompt and data.answer go together: set both or neither")
    refuse(c.client.steps is None and c.client.epochs is None, "client.steps and client.epochs are both none: set one of them")
    refuse(
        c.min_clients > c.clients_per_round,
        f"min_clients={c.min_clients} is more than clients_per_round={c.clients_per_round}: no round would count",
    )
    refuse(not c.name or "/" in c.name or c.name.startswith("."), f"name='{c.name}' must be a plain folder name")
    TASKS.find(c.task.kind)(c.task).check(c)
    refuse(
        bool(c.devices.classes) and sum(d.share for d in c.devices.classes.values()) <= 0,
        "devices.classes: every share is 0, so no client could get a class",
    )
    for name, device in c.devices.classes.items():
        refuse(
            not short(name),
            f"the name of the device class '{shown(name)}' is too long or not printable: use at most {LONGEST_NAME} printable characters",
        )
        refuse(
            device.rank is not None and device.rank > c.peft.rank,
            f"devices.classes.{name}.rank={device.rank} is more than peft.rank={c.peft.rank}, the largest of the cohort",
        )
    refuse(
        c.engine.batched not in ("auto", "none") and not (c.engine.batched.isdecimal() and int(c.engine.batched) > 0),
        f"engine.batched={c.engine.batched} is not known: choose auto, none, or a number of clients from 1",
    )
    refuse(
        c.late == "use" and c.round_timeout_s is None and c.devices.deadline_s is None,
        "late=use has no effect, because rounds wait for all clients: set round_timeout_s, or devices.deadline_s in a simulation",
    )
    _check_loftq(c)
    _check_experts(c)
    _check_packing(c)
    p = c.privacy
    refuse(
        c.late == "use" and p.kind == "user",
        "late=use cannot be combined with privacy=user, whose noise is computed for the clients of one round: set late=drop",
    )
    refuse(
        p.kind != "none" and p.epsilon is None and p.noise is None,
        f"privacy={p.kind} has neither an epsilon nor a noise level: set privacy.epsilon or privacy.noise",
    )
    refuse(p.adaptive and p.kind != "user", "privacy.adaptive adapts the clip norm of whole updates: it needs privacy=user")
    refuse(
        p.where == "client" and p.kind == "record",
        "privacy.where=client is for privacy=user: with privacy=record clients always add the noise, so leave it out",
    )
    refuse(
        p.adaptive and p.where == "client",
        "privacy.adaptive needs privacy.where=server: a client does not know the norms of the others' updates",
    )
    t = c.traffic
    refuse(
        t.stochastic and t.up == t.down == "fp32",
        "traffic.stochastic=true has no effect with fp32: set traffic.up or traffic.down to fp16, bf16, int8 or nf4",
    )
    refuse(
        t.error_feedback and t.up == "fp32" and t.topk in (None, 1.0),
        "traffic.error_feedback=true has no effect, because updates are sent exactly: set traffic.topk, or a traffic.up below fp32",
    )
    refuse(not (isinstance(c.strategy, dict) and "_target_" in c.strategy), "strategy needs a _target_: pick one with strategy=NAME")


def _check_packing(c: Config) -> None:
    if not c.task.packing:
        return
    for wrong, sentence in (
        (not TASKS.find(c.task.kind).packs, f"the rows of task.kind={c.task.kind} cannot be joined"),
        (c.privacy.kind == "record", "privacy=record clips the gradient of each row"),
        (c.engine.cache_layers > 0, "engine.cache_layers keeps the activations of each row"),
    ):
        if wrong:
            raise ConfigError(f"{sentence}: set task.packing=false")
    if c.engine.batched != "none":
        raise ConfigError("task.packing=true trains one client at a time: set engine.batched=none")


def _check_experts(c: Config) -> None:
    names = ",".join(c.peft.target_parameters)
    if not names:
        return
    where = f"peft.target_parameters=[{names}]"
    if not adapts_experts(c.peft.method):
        raise ConfigError(f"{where} adapts experts with LoRA factors, which peft.method={c.peft.method} does not have: take peft=lora")
    if c.peft.dropout > 0:
        raise ConfigError(f"{where} changes the experts' weights and not their inputs, which dropout needs: set peft.dropout=0")
    if c.peft.init != "default":
        raise ConfigError(f"{where} has no peft.init={c.peft.init}, because experts are not quantized: set peft.init=default")
    if c.privacy.kind == "record":
        raise ConfigError(f"{where} mixes the rows of a batch, so privacy=record has no gradient per row: take privacy=user")


def _check_loftq(c: Config) -> None:
    if c.peft.init != "loftq":
        return
    if c.peft.init not in inits_of(c.peft.method):
        others = " or ".join(name for name in METHODS if c.peft.init in inits_of(name))
        raise ConfigError(f"peft.init=loftq initializes LoRA factors, which peft.method={c.peft.method} does not have: take peft={others}")
    if c.model.precision not in ("nf4", "int8"):
        raise ConfigError(
            f"peft.init=loftq needs a quantized backbone, but model.precision={c.model.precision}: set model.precision=nf4 or int8"
        )
    if c.model.compute == "auto":
        raise ConfigError(
            "peft.init=loftq needs the same model.compute on every machine, but auto lets each choose: set model.compute=bf16 or fp32"
        )
    if c.devices.classes:
        raise ConfigError("peft.init=loftq fits one precision, but device classes may choose another: set devices=none")
