"""fedtune's advice can be followed: every setting, flag and command in it exists, and following it resolves the error."""

import argparse
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.cli import client, server
from fedtune.cli import main as cli
from fedtune.config import Config, from_dict, to_dict
from fedtune.config.compose import _is_known, choices, compose
from fedtune.data import load_federation
from fedtune.errors import ConfigError, FedtuneError
from fedtune.rounds.find_strategy import make_strategy
from tests.advice import HOLE, SETTING, Sentence, sentences, ways
from tests.cli.test_simulate import REFUSED
from tests.data.test_bad_input import CASES

PROGRAMS = ("simulations/benchmarks/", "simulations/studies/")  # programs with commands and options of their own
OTHERS = {
    "--federation-config",
    "--ink",
    "--good",
    "--muted",
    "--soft",
    "--bad",
    "--rule",
    "--page",
    "--card",
}  # options of Flower, and colors of the report
NEEDS = {"model=hub": ["model.name=x"], "data=hub": ["data.name=x"], "data=local": ["data.path=x"]}


@functools.cache
def product_sentences() -> list[Sentence]:
    return [s for s in sentences() if not s.where.startswith(PROGRAMS)]


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))  # type: ignore[return-value]


COMMANDS = subcommands(cli._parser())
PARSERS = {"fedtune-server": server._parser(), "fedtune-client": client._parser(), "fedtune": cli._parser()}


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a command and of its actions."""
    inner = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return parser._option_string_actions.keys() | {flag for choice in inner for action in choice.values() for flag in flags(action)}


def settings_in_advice() -> Iterator[tuple[str, str, str]]:
    for sentence in product_sentences():
        for key, value in SETTING.findall(sentence.text):
            yield sentence.where, key, value


def test_advice_is_found() -> None:
    assert len(product_sentences()) > 1000 and len(list(settings_in_advice())) > 200


@pytest.mark.slow
def test_every_setting_in_advice_exists() -> None:
    roots = to_dict(Config()).keys() | {"conf"}
    arguments = {name for choice in choices("strategy") for name in compose([f"strategy={choice}"])[0].config.strategy}
    wrong = []
    for where, key, _ in settings_in_advice():
        path = key.replace(HOLE, "text").split(".")
        if path[0] not in roots:
            continue
        known = path[0] == "conf" or _is_known(path, Config) or key.startswith("data.columns.")
        if path[0] == "strategy" and len(path) > 1:
            known = path[1] in arguments | {"text"}
        if not known and HOLE not in key:
            wrong.append(f"{where}: {key}")
    assert not wrong


@pytest.mark.slow
def test_every_value_in_advice_is_valid() -> None:
    roots, wrong, tried = to_dict(Config()).keys(), [], set()
    for where, key, value in settings_in_advice():
        value = value.rstrip(".")
        if HOLE in key + value or not value or re.fullmatch(r"[A-Z]+|%s|\S*[\[\]|+]\S*", value) or key.split(".")[0] not in roots:
            continue
        if key.startswith("strategy.") or key == "resume" or (setting := f"{key}={value}") in tried:
            continue
        tried.add(setting)
        try:
            compose([*NEEDS.get(setting, []), setting])
        except ConfigError as bad:
            if re.search(r"unknown config key|is not known|wrong type|out of range|cannot read", str(bad)):
                wrong.append(f"{where}: {setting}: {bad}")
    assert not wrong
    assert len(tried) > 40


def test_every_flag_in_advice_exists() -> None:
    known = {"--help", "--version", "--multirun", "--cfg"} | OTHERS
    for parser in (*PARSERS.values(), *COMMANDS.values()):
        known |= flags(parser)
    named = {(s.where, flag) for s in product_sentences() for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", s.text)}
    assert len(named) > 50
    assert not [f"{where}: {flag}" for where, flag in sorted(named) if flag not in known]


def test_every_command_in_advice_accepts_its_flags() -> None:
    seen, wrong = set(), []
    for s in product_sentences():
        for program, rest in re.findall(r"(?:`|\b(?:with|run|by|use it:|status:) )(fedtune(?:-server|-client)?)\b([^`\n(]*)", s.text):
            name = next(iter(rest.split()), "")
            if program == "fedtune" and name not in COMMANDS:
                if name and HOLE not in name:
                    wrong.append(f"{s.where}: {program} {name}")
                continue
            parser = COMMANDS[name] if program == "fedtune" else PARSERS[program]
            seen.add((program, name if program == "fedtune" else ""))
            named = re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest)
            wrong += [f"{s.where}: {program} {name} {flag}" for flag in named if flag not in flags(parser)]
    assert not wrong
    assert {("fedtune", "keys"), ("fedtune", "export")} <= seen


COMBINATIONS = [
    ["task=causal_lm"], ["peft.init=loftq", "peft=ia3"], ["peft.init=loftq"],
    ["peft.init=loftq", "model.precision=nf4", "model.compute=auto"],
    ["peft.init=loftq", "model.precision=nf4"], ["late=use"], ["late=use", "privacy=user", "round_timeout_s=9"],
    ["privacy=record", "privacy.epsilon=null"], ["privacy=record", "privacy.adaptive=true"], ["privacy=record", "privacy.where=client"],
    ["privacy=user", "privacy.adaptive=true", "privacy.where=client"], ["privacy.epsilon=3"], ["traffic.stochastic=true"],
    ["traffic.error_feedback=true"], ["traffic=topk", "strategy=flora"], ["strategy=fedavg"], ["strategy=flora", "privacy=user"],
    ["strategy=scaffold", "privacy=record", "devices=none"], ["strategy=scaffold", "traffic=topk", "devices=none"],
    ["strategy=fedpeptao", "traffic=topk", "devices=none"], ["strategy=flora", "late=use", "round_timeout_s=9"], ["strategy=slora"],
    ["strategy=fedsa", "privacy=user", "devices=none"], ["strategy=krum", "min_clients=1", "devices=none"], ["strategy=scaffold"],
    ["strategy=fednova"], ["strategy=fedpeptao"], ["strategy=flora", "peft=ia3"], ["strategy=flexlora", "peft=prefix"],
    ["strategy=hetlora", "peft=adapter"], ["strategy=fedex", "peft=ia3", "devices=none"], ["strategy=fedsa", "peft=ia3", "devices=none"],
    ["strategy=ffa_lora", "peft=ia3", "devices=none"], ["data.prompt=x", "data.answer=null"], ["devices.deadline_s=1", "devices=none"],
]  # fmt: skip
BY_NAME = [pytest.param([f"strategy={choice}"], marks=pytest.mark.slow) for choice in choices("strategy")]


def refusal(args: list[str]) -> str:
    """The error of these settings; "" if there is none."""
    try:
        make_strategy(compose([a for a in args if a != "-m"], multirun="-m" in args)[0].config)
    except FedtuneError as bad:
        return str(bad)
    return ""


@pytest.mark.parametrize("args", [*COMBINATIONS, *BY_NAME, *(args for args, _ in REFUSED if args[0][:2] != "--")], ids=" ".join)
def test_each_suggested_setting_resolves_the_error(args: list[str]) -> None:
    error = refusal(args)
    for way in ways(error) if not error.startswith("cannot read") else ():
        keys = [setting.partition("=")[0] for setting in way.split(" ")]
        same = {*keys, *(f"{key}.{end}" for key in keys for end in ("kind", "method", "_target_"))}
        kept = [a for a in args if a.lstrip("+").partition("=")[0] not in same]
        then = refusal([*kept, *way.split(" ")])
        assert then != error and not re.search("unknown|is not known|wrong type|out of range", then), f"{error}\n{way} leads to: {then}"


def test_suggestions_are_found_in_errors() -> None:
    assert ways("task.kind=causal_lm does not fit data=demo, take task=instruction or classification") == [
        "task=instruction", "task=classification"
    ]  # fmt: skip
    assert ways("set traffic.up=fp32 traffic.topk=null") == ["traffic.up=fp32 traffic.topk=null"]
    assert ways(refusal(["peft=ia3"])) and ways(refusal(["privacy.epsilon=3"])) and ways(refusal(["strategy=scaffold", "traffic=topk"]))


@pytest.mark.parametrize("case", [case for case, (*_, sentence) in CASES.items() if "=" in sentence])
def test_each_suggested_setting_resolves_bad_data(tmp_path: Path, case: str) -> None:
    name, content, settings, _, _ = CASES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def error(*more: str) -> str:
        values = settings | {"data": {"source": "local", "path": str(tmp_path / name)} | settings.get("data", {})}
        for way in more:
            key, _, value = way.partition("=")
            group, _, field = key.partition(".")
            values = values | {group: values.get(group, {}) | {field: {"true": True}.get(value, value)}}
        try:
            load_federation(from_dict(values))
        except FedtuneError as bad:
            return str(bad)
        return ""

    for way in ways(error()):
        if "." in way.partition("=")[0]:
            assert error(way) != error(), f"{error()}\n{way} leads to the same"
