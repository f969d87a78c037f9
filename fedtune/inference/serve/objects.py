"""The base of all JSON objects in requests."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Object(BaseModel):
    """A JSON object of a request: no unknown fields, no conversions; null in an optional field means that it is absent."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = {name for name, info in cls.model_fields.items() if not info.is_required()}
        return {name: value for name, value in values.items() if value is not None or name not in optional}
