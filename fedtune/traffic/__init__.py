"""Codecs for tensors on the network: small messages of known sizes, with error feedback against lost precision."""

from fedtune.traffic.broadcast import decode_broadcast, encode_broadcast
from fedtune.traffic.codec import Codec
from fedtune.traffic.rules import blank_reply, broadcaster, with_codec
from fedtune.traffic.update import decode_update, encode_update

__all__ = [
    "Codec",
    "blank_reply",
    "broadcaster",
    "decode_broadcast",
    "decode_update",
    "encode_broadcast",
    "encode_update",
    "with_codec",
]
