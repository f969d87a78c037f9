"""Converts configs to plain JSON types and back."""

import dataclasses
import types
import typing
from typing import Any

from fedtune.config.rules import check
from fedtune.config.schema import Config, DeviceClass
from fedtune.errors import ConfigError


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON types, as stored with a run and sent to clients."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`.

    Raises:
        ConfigError: A key is unknown, or a value is out of range.
    """
    return check(_build(Config, values, ""))


def _build(kind: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'config'} must be a mapping, got {type(values).__name__}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(map(str, values)) - set(known)):
        raise ConfigError(f"unknown config key {prefix}{unknown[0]}: known are {', '.join(known)}")
    hints = typing.get_type_hints(kind)
    out = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = _build(typing.cast(type, hint), value, f"{prefix}{name}.")
        elif hint == dict[str, DeviceClass]:
            value = {k: _build(DeviceClass, v, f"{prefix}{name}.{k}.") for k, v in value.items()}
        elif hint is not Any:
            value = typed(hint, value, prefix + name)
        out[name] = value
    return kind(**out)


def typed(hint: Any, value: Any, key: str) -> Any:
    """Return `value` if it has the type `hint` (an integer is accepted as a float), else raise a ConfigError that names `key`."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(a) or a for a in allowed)
    if float in plain and type(value) is int:
        return float(value)
    if type(value) not in plain:
        wanted = " or ".join("none" if p is type(None) else p.__name__ for p in plain)
        raise ConfigError(f"{key}={value!r} has the wrong type: wanted {wanted}")
    return value
