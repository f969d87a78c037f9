"""All private Flower names that the server uses; `_flwr_client` and `_flwr_worker` have a client's.

`tests/contracts/test_flower.py` checks them.
"""

import math
import time

from alembic.script import ScriptDirectory
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import HEARTBEAT_PATIENCE, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore import sql_mixin
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.corestate.sql_corestate import SqlCoreState
from flwr.supercore.date import now
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes, uses_nist_ec_curve, verify_signature
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.retry import RetryInvoker
from flwr.supercore.run import Run
from flwr.supercore.state.alembic.utils import ALEMBIC_DIR, run_migrations
from flwr.supercore.state.schema.corestate_models import ObjectPushSession, ObjectPushSessionRoot
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes
from flwr.supercore.state.schema.linkstate_models import Node as NodeRow
from flwr.supercore.state.schema.objectstore_models import ObjectChild, StoredObject
from flwr.supercore.utils import uint64_to_int64
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app


def newest_migrations() -> set[str]:
    """The contents of `alembic_version` in a fully migrated database."""
    return set(ScriptDirectory(str(ALEMBIC_DIR)).get_heads())


def set_lock_timeout(seconds: float) -> None:
    """Set SQLite's busy timeout. Flower sets 5 s, which is too short on a busy machine."""
    used = sql_mixin.__dict__  # a name that `sql_mixin` imports and reads for each connection
    used["SQLITE_PRAGMAS"] = tuple({**dict(used["SQLITE_PRAGMAS"]), "busy_timeout": str(round(1000 * seconds))}.items())


_end_silent_tasks = SqlCoreState._cleanup_expired_task_tokens


def throttle_task_cleanup(seconds: float) -> None:
    """Limit Flower's cleanup of tasks without a heartbeat (limit: one minute) to once in `seconds`.

    Flower runs it at nearly every request, with an UPDATE that locks the database and blocks all other requests.
    """

    def throttled(self: SqlCoreState) -> None:
        now_s = time.monotonic()
        if now_s - vars(self).get("_fedtune_cleaned", -math.inf) >= seconds:
            vars(self)["_fedtune_cleaned"] = now_s
            _end_silent_tasks(self)

    SqlCoreState._cleanup_expired_task_tokens = throttled  # type: ignore[method-assign]


__all__ = [
    "FLEET_HTTP_PUBLIC_KEY_HEADER",
    "FLEET_HTTP_SIGNATURE_HEADER",
    "HEARTBEAT_PATIENCE",
    "NOOP_ACCOUNT_NAME",
    "NOOP_FEDERATION_ID",
    "NOOP_FLWR_AID",
    "PROTOBUF_REQUEST_TYPES",
    "TIMESTAMP_HEADER",
    "Fab",
    "HttpGrid",
    "LinkState",
    "MessageIns",
    "MessageRes",
    "NoOpControlAuthnPlugin",
    "NodeRow",
    "NodeStatus",
    "ObjectChild",
    "ObjectPushError",
    "ObjectPushSession",
    "ObjectPushSessionRoot",
    "PushMessagesRequest",
    "RetryInvoker",
    "Run",
    "StoredObject",
    "SendTaskHeartbeatRequest",
    "SuperLinkLifespan",
    "SuperLinkLifespanConfig",
    "TaskType",
    "build_fab_from_files",
    "bytes_to_public_key",
    "create_app",
    "get_object_head_values_from_object_content",
    "newest_migrations",
    "now",
    "set_lock_timeout",
    "public_key_to_bytes",
    "run_migrations",
    "throttle_task_cleanup",
    "uint64_to_int64",
    "uses_nist_ec_curve",
    "verify_signature",
]
