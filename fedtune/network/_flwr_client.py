"""All private Flower names that a client's node uses; `_flwr_worker` has its worker's, and `_flwr` the server's.

They are separate because Flower's SuperLink (FastAPI, SQLAlchemy) would enlarge the node by half.
"""

from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import (
    array_record_from_proto,
    array_record_to_proto,
    message_from_proto,
    message_to_proto,
    recorddict_from_proto,
    recorddict_to_proto,
)
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.proto.recorddict_pb2 import ArrayRecord as ArrayRecordProto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    pull_and_inflate_object_from_tree,
    push_object_contents_from_iterable,
)
from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes, public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

__all__ = [
    "ActivateNodeRequest",
    "ApiErrorCode",
    "ArrayRecordProto",
    "ConfirmMessageReceivedRequest",
    "DeactivateNodeRequest",
    "ErrorCode",
    "FleetHttpClient",
    "FlowerError",
    "GetRunRequest",
    "NodeAuthHttpInterceptor",
    "NodeProto",
    "ObjectPullError",
    "ObjectPushError",
    "ObjectTree",
    "ObjectUnavailableError",
    "ProtobufCall",
    "ProtobufRequestContext",
    "PullMessagesRequest",
    "PullObjectRequest",
    "PushMessagesRequest",
    "PushObjectRequest",
    "RecordDictProto",
    "RegisterNodeFleetRequest",
    "RuntimeVersionMetadata",
    "SendNodeHeartbeatRequest",
    "array_record_from_proto",
    "array_record_to_proto",
    "generate_key_pairs",
    "get_all_nested_objects",
    "get_object_tree",
    "iterate_object_tree",
    "make_message",
    "message_from_proto",
    "message_to_proto",
    "no_object_id_recompute",
    "private_key_to_bytes",
    "public_key_to_bytes",
    "pull_and_inflate_object_from_tree",
    "push_object_contents_from_iterable",
    "recorddict_from_proto",
    "recorddict_to_proto",
    "remove_content_from_message",
]
