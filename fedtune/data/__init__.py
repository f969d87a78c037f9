"""Data of a federation: sources (hub, local files, the demo), partition over clients, tokenise, collate."""

from fedtune.data.encode import Example, collate, encode, pad_id, prompts
from fedtune.data.federation import ClientRows, Federation, load_federation, load_test

__all__ = ["ClientRows", "Example", "Federation", "collate", "encode", "load_federation", "load_test", "pad_id", "prompts"]
