"""Config keys that are Python keywords, such as `peft.from`: a dataclass cannot declare a field of that name."""

import dataclasses
import functools
import keyword
from typing import Any, TypeVar

T = TypeVar("T")


def keyword_keys(kind: type[T]) -> type[T]:
    """Rename each field like `from_` of a dataclass to the keyword `from`.

    Code uses the attribute: `peft.from_`, `PeftConfig(from_=...)`, `replace(peft, from_=...)`. Everything that walks the fields (Hydra's
    schema, the stored config, the help) sees the key `from`.
    """
    fields: dict[str, dataclasses.Field[Any]] = vars(kind)["__dataclass_fields__"]
    keys = {name: name[:-1] for name in fields if name.endswith("_") and keyword.iskeyword(name[:-1])}
    construct = kind.__init__

    @functools.wraps(construct)
    def construct_by_key(self: Any, **given: Any) -> None:
        # `replace(peft, from_=x)` also passes the old value as `from`, so the attribute wins
        by_attribute = {attribute: given.pop(key) for attribute, key in keys.items() if key in given}
        construct(self, **{**by_attribute, **given})

    for attribute, key in keys.items():
        fields[attribute].name = key
        setattr(kind, key, _alias(attribute))
    more = {
        "__dataclass_fields__": {f.name: f for f in fields.values()},
        "__annotations__": {keys.get(name, name): hint for name, hint in kind.__annotations__.items()},
        "__init__": construct_by_key,
    }
    for name, value in more.items():
        setattr(kind, name, value)
    return kind


def _alias(attribute: str) -> property:
    return property(lambda node: getattr(node, attribute), lambda node, value: setattr(node, attribute, value))
