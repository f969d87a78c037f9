"""How the config.json of a GPTQ or AWQ checkpoint describes its 4-bit weights (see `gptq_awq`)."""

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Format", "Packing", "split_config"]

Format = Literal["gptq", "awq"]
# quant_method and format → what is subtracted from stored zero points
_OFFSETS: dict[Any, int] = {("gptq", ""): 1, ("gptq", "gptq"): 1, ("gptq", "gptq_v2"): 0, ("awq", ""): 0, ("awq", "gemm"): 0}


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a checkpoint's linears are stored.

    Args:
        format: `gptq` or `awq`.
        group: Columns per scale; -1: all.
        offset: What is subtracted from stored zero points.
    """

    format: Format
    group: int
    offset: int = 0


def split_config(config: dict[str, Any]) -> tuple[dict[str, Any], Packing | None]:
    """A config.json without `quantization_config`, and the packing that this describes; unchanged, and None, if it is another one."""
    own = config.get("quantization_config")
    if not isinstance(own, dict):
        return config, None
    method, group = str(own.get("quant_method")), own.get("group_size", own.get("q_group_size"))
    kind = str(own.get("checkpoint_format", own.get("format", own.get("version"))) or "").lower()
    found = _OFFSETS.get((method, kind))
    if own.get("bits", own.get("w_bit")) != 4 or found is None or type(group) is not int or not (group == -1 or group > 0):
        return config, None
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    return rest, Packing(format="gptq" if method == "gptq" else "awq", group=group, offset=found)
