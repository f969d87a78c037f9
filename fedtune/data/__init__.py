"""Data of a federation: sources (hub, local files, the demo), partition over clients, tokenise, collate."""

from fedtune.data.encode import Example, collate, encode, pad_id, prompts
from fedtune.data.federation import ClientRows, Federation, load_federation
from fedtune.data.partition import partition

__all__ = ["ClientRows", "Example", "Federation", "collate", "encode", "load_federation", "pad_id", "partition", "prompts"]
