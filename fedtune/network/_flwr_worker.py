"""All private Flower names that a client's worker uses; `_flwr_client` has those of the node, whose imports would take 20 MB more."""

from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["ErrorCode", "MessageProto", "TaskIdentity", "message_from_proto", "message_to_proto"]
