"""Composes a checked `Config` from command-line arguments: scenarios, Hydra overrides, sweeps, and resumed runs.

Hydra composes. Every fault becomes a ConfigError with one sentence, before torch or any data is loaded. Hydra creates no folders and
configures no logging here, because fedtune makes its own run directories.
"""

import copy
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # split_arguments is Hydra's own reading of `a=1,2`: no public name
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedtune import config as schema
from fedtune.config import Config, check, reference
from fedtune.config.bounds import require
from fedtune.config.stored import read_config
from fedtune.errors import ConfigError, FedtuneError
from fedtune.storage.parsing import read_text, reason

DEFAULT_SCENARIO = "heterogeneous"
_BASE = "base"  # conf/base.yaml, the base of every scenario: the schema and a default choice for each group
_CONF = "fedtune.conf"
_OWN_STRATEGIES = "fedtune.strategies."  # not just `fedtune.`, which in a checkout also covers folders beside the packages


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One run that a command starts: one point of a sweep, or the only run without a sweep.

    Args:
        label: The swept overrides of this run; "" without a sweep.
        config: The checked config.
        fixed: The overrides that all runs of the sweep share.
    """

    label: str
    config: Config
    fixed: str = ""


def compose(args: Sequence[str], *, multirun: bool = False) -> list[SweepJob]:
    """Compose and check one job, or with `multirun` one job for each point of the sweep.

    Args:
        args: `conf=NAME`, `conf=path/to/file.yaml`, or nothing; then Hydra overrides. Or `resume=RUN`, optionally with `rounds=N` and the
            settings that allow foreign code: `model.trust_remote_code=true`, `strategy._target_=CLASS`.
        multirun: Whether `a=1,2` is a sweep.

    Raises:
        ConfigError: An unknown scenario, group choice or key, a wrong type, a value out of range, or an invalid combination.
        CheckpointError: `resume=RUN` is not a run directory.
    """
    conf, overrides = _split(args)
    if "resume=" in overrides:
        raise ConfigError("resume= is empty: give the run directory to continue, such as resume=outputs/NAME/RUN")
    if any(o.startswith("resume=") and o != "resume=null" for o in overrides):
        return [SweepJob(label="", config=_resumed(conf, overrides, multirun))]
    try:
        with _composer(DEFAULT_SCENARIO if conf is None else conf) as (name, folder):
            overrides = [_open(o) for o in overrides]
            parsed = [_parse(o) for o in overrides]
            for override in parsed:
                _check_key(override)
                if override.is_sweep_override() and not multirun:
                    raise ConfigError(f"'{override.input_line}' is a sweep over several values: add --multirun, or quote the comma")
            swept = {o.get_key_element() for o in parsed if o.is_sweep_override()}
            points = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0] if multirun else [overrides]
            jobs = []
            for point in points:
                _check_choices(point, folder)
                label, fixed = (" ".join(o for o in point if (o.partition("=")[0] in swept) == yes) for yes in (True, False))
                jobs.append(SweepJob(label=label, config=_config(name, point, folder), fixed=fixed))
                _check_private(point, jobs[-1].config)
            return jobs
    except (
        HydraException,
        OmegaConfBaseException,
        yaml.YAMLError,
        ValueError,
    ) as bad:  # Hydra raises ValueError for malformed defaults lists
        raise ConfigError(_describe(bad)) from None
    except RecursionError as bad:
        raise ConfigError(f"the scenario or a setting of the command line is {reason(bad)}: reduce its nesting") from None


def scenarios() -> dict[str, str]:
    """Scenario → its description, which is the second comment line of its file."""
    found = {}
    for file in sorted(resources.files(_CONF).iterdir(), key=lambda f: f.name):
        name = file.name.removesuffix(".yaml")
        if name not in (file.name, _BASE):
            lines = file.read_text(encoding="utf-8").splitlines()
            found[name] = lines[1].removeprefix("#").strip() if len(lines) > 1 else ""
    return found


def groups() -> dict[str, list[str]]:
    """Config group → its choices."""
    return {f.name: found for f in dataclasses.fields(Config) if (found := choices(f.name))}


def choices(group: str, *folders: Path) -> list[str]:
    """The choices of one group, from the package and the user's own `folders`."""
    places = [resources.files(_CONF) / group, *(folder / group for folder in folders)]
    return sorted({f.name.removesuffix(".yaml") for place in places if place.is_dir() for f in place.iterdir() if f.name.endswith(".yaml")})


# -- reading the arguments ----------------------------------------------------------------------------------------------------------------


def _split(args: Sequence[str]) -> tuple[str | None, list[str]]:
    confs = [a.removeprefix("conf=") for a in args if a.startswith("conf=")]
    if len(confs) > 1:
        raise ConfigError(f"conf= is given {len(confs)} times: name one scenario")
    return (confs[0] if confs else None), [a for a in args if not a.startswith("conf=")]


def _open(text: str) -> str:
    """Let `data.columns.label=x`, `peft.rank_pattern={q_proj: 4}` and `strategy.settings.mu=1` add keys: these have no fixed keys."""
    open_keys = ("data.columns", "peft.rank_pattern", "strategy.settings")
    return f"++{text}" if text.startswith(tuple(f"{key}{end}" for key in open_keys for end in ".=")) else text


def _parse(text: str) -> Override:
    if ("=" not in text and not text.startswith("~")) or text.startswith("="):
        raise ConfigError(f"cannot read '{text}': settings are written KEY=VALUE, such as rounds=3")
    try:
        return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides([text])[0]
    except HydraException:
        raise ConfigError(f"cannot read '{text}': settings are written KEY=VALUE, with quotes around values that hold , = {{ [") from None


def _check_key(override: Override) -> None:
    key = override.key_or_group
    if key.partition(".")[0].partition("/")[0] == "hydra":
        raise ConfigError(f"{key} has no effect here: fedtune creates run directories and logs itself (see output_dir and name)")
    if not _is_known(key.split("."), Config):
        raise ConfigError(_unknown(key))


def _check_private(point: Iterable[str], config: Config) -> None:
    """Raises ConfigError if privacy is off but one of its settings is given: the user would believe that it has an effect."""
    keys = [o.partition("=")[0].lstrip("+") for o in point]
    if config.privacy.kind == "none" and (dead := [k for k in keys if k.startswith("privacy.") and k != "privacy.kind"]):
        raise ConfigError(f"{dead[0]} has no effect with privacy=none: add privacy=record or privacy=user")


def _unknown(key: str) -> str:
    known = [row[0] for row in reference()]
    if key.startswith("devices.classes."):
        known = [f"{key.rpartition('.')[0]}.{f.name}" for f in dataclasses.fields(schema.DeviceClass)]
    last = key.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == last] or difflib.get_close_matches(key, known, n=1)
    return f"unknown config key {key}: " + (f"did you mean {near[0]}?" if near else "--help lists those that exist")


def _is_known(path: list[str], kind: Any) -> bool:
    if not path or kind is Any or kind in (dict[str, str], dict[str, int]):
        return True
    if kind == dict[str, schema.DeviceClass]:
        return _is_known(path[1:], schema.DeviceClass)
    return dataclasses.is_dataclass(kind) and path[0] in (hints := typing.get_type_hints(kind)) and _is_known(path[1:], hints[path[0]])


def _check_choices(point: Iterable[str], folder: Path | None) -> None:
    for override in map(_parse, point):
        group, value = override.key_or_group, override.value()
        known = choices(group, *([folder] if folder else []))
        if known and not isinstance(value, dict) and not override.is_delete():  # a mapping sets single keys of the group
            for chosen in value if isinstance(value, list) else [value]:
                require(group, "null" if chosen is None else chosen, choices=known)


def _resumed(conf: str | None, overrides: list[str], multirun: bool) -> Config:
    given = {key: value for key, _, value in (o.partition("=") for o in overrides)}
    allowed = ("resume", "rounds", "model.trust_remote_code", "strategy._target_")
    others = [f"conf={conf}"] * (conf is not None) + [k for k in given if k not in allowed] + ["--multirun"] * multirun
    if others:
        raise ConfigError(f"resume uses the run's own config, in which only rounds can change: leave out {others[0]}")
    config = dataclasses.replace(read_config(Path(given["resume"])), resume=given["resume"])
    if "rounds" in given:
        if not given["rounds"].isdecimal():
            raise ConfigError(f"rounds={given['rounds']} has the wrong type: wanted a whole number")
        config.rounds = int(given["rounds"])
    if (trust := given.get("model.trust_remote_code", "false").lower()) not in ("true", "false"):
        raise ConfigError(f"model.trust_remote_code={trust} has the wrong type: wanted true or false")
    config.model.trust_remote_code = trust == "true"
    _check_target(config, given.get("strategy._target_"))
    return check(config)


def _check_target(config: Config, today: str | None) -> None:
    """Raises ConfigError if a run's config.yaml names a strategy class outside fedtune that the command line does not name: importing the
    class runs its code."""
    target = str(config.strategy["_target_"])
    if today not in (None, target):
        raise ConfigError(f"resume uses the run's own strategy, {target}, not strategy._target_={today}: leave that setting out")
    if today is None and not target.startswith(_OWN_STRATEGIES):
        raise ConfigError(
            f"the strategy of {config.resume} is {target}, which is not part of fedtune: read its code, then allow it with"
            f" strategy._target_={target}"
        )


# -- Hydra --------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _composer(conf: str) -> Iterator[tuple[str, Path | None]]:
    """Set up Hydra for one scenario. Yields its config name and, for a user's file, its folder, which may have groups too."""
    if not conf.endswith((".yaml", ".yml")) and "/" not in conf:
        if conf not in scenarios() and conf != _BASE:
            near = difflib.get_close_matches(conf, scenarios(), n=1)
            hint = f"did you mean {near[0]}, of " if near else "choose one of "
            raise ConfigError(f"there is no scenario '{conf}': {hint}{', '.join(scenarios())}; or give the path of a YAML file")
        with hydra.initialize_config_module(_CONF, version_base="1.3"):
            yield conf, None
        return
    path = Path(conf).expanduser().resolve()
    if not path.is_file() or path.suffix != ".yaml":
        known = ", ".join(scenarios())
        raise ConfigError(f"there is no scenario file {conf}: give the path of a file that ends in .yaml, or one of {known}")
    try:
        read_text(path)
    except (OSError, UnicodeDecodeError) as bad:
        raise ConfigError(f"cannot read the scenario file {conf}: {bad}") from None
    with hydra.initialize_config_dir(str(path.parent), version_base="1.3"):
        yield path.stem, path.parent


def _config(name: str, overrides: list[str], folder: Path | None) -> Config:
    settings = {text: parsed for text in overrides if _is_setting(parsed := _parse(text))}
    rest = [text for text in overrides if text not in settings]
    if folder is not None or any(text[0] in "+~" for text in rest):  # a user's files may change, and the order of added keys counts
        node = _compose(name, tuple(overrides))
    else:
        node = copy.deepcopy(_compose_cached(name, tuple(rest)))
        for each in settings.values():
            OmegaConf.update(node, each.key_or_group, each.value(), merge=True)
    if OmegaConf.get_type(node) is not Config:
        raise ConfigError(f"{name}.yaml does not start from fedtune's schema: open it with `defaults: [{_BASE}, _self_]`")
    return check(typing.cast(Config, OmegaConf.to_object(node)))


def _is_setting(override: Override) -> bool:
    """Whether the override sets one value, which Hydra applies last, and does not choose from a group or add or delete a key."""
    plain = override.type is OverrideType.CHANGE and override.package is None
    return plain and ("." in override.key_or_group or not choices(override.key_or_group))


def _compose(name: str, overrides: tuple[str, ...]) -> DictConfig:
    # search fedtune's folder after the user's; if fedtune's is the first already, this changes nothing
    return hydra.compose(name, overrides=[*overrides, f"hydra.searchpath=[pkg://{_CONF}]"])


_compose_cached = functools.lru_cache(maxsize=128)(_compose)  # a sweep's jobs mostly differ in settings, and composing the choices is slow


def _describe(bad: BaseException) -> str:
    """One sentence for an error of Hydra, OmegaConf or YAML, without their hints about their own options."""
    chain: list[BaseException] = [bad]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for error in chain:
        if isinstance(error, FedtuneError):
            return str(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}, is not YAML: {error.problem}"
        if isinstance(error, MissingConfigException) and error.options:
            return f"{_first_line(str(error))}: choose one of {', '.join(error.options)}"
    for error in reversed(chain):
        if isinstance(error, OmegaConfBaseException) and error.full_key:
            key, text = error.full_key, _first_line(error.msg or str(error))
            if re.search(r"not in struct|^Key '.*' not in '", text):
                return _unknown(key)
            if match := re.match(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+)", text):
                wanted = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}.get(match[2], match[2])
                return f"{key}={match[1]} has the wrong type: wanted {wanted}" + " (null for none)" * (match[1].lower() in ("none", ""))
            if "is not a subclass of DeviceClass" in text:
                return f"there is no device class '{key}' here: add classes in a YAML file, as conf/devices/mixed.yaml does"
            return f"{key}: {text}"
    return _first_line(reason(bad))


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "the config cannot be composed")


def _package_folder(path: str) -> str:
    """Resolve `${package:name/sub/folder}`: a folder inside an installed package, which is not imported."""
    name, _, rest = path.partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the package {name} is not installed: run pip install 'fedtune[studies]'")
    return str(Path(spec.submodule_search_locations[0]) / rest)


ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("package", _package_folder, replace=True)
OmegaConf.register_new_resolver("product", lambda a, b: a * b, replace=True)
OmegaConf.register_new_resolver("share", lambda whole, share: int(whole * share), replace=True)
