"""Names that peers give themselves: what they may be, and the names of the files that are kept for a client."""

import hashlib
import re

LONGEST_ID = 200  # characters
LONGEST_NAME = 64  # of what a client says about itself: every line of the metrics holds it
_LONGEST_FILE = 200  # bytes; file systems take 255, and endings come after it


def flaw(client: str) -> str:
    """What is wrong with a logical id, as the end of a sentence; "" if nothing is.

    Ids are shown in tables and logs and sent between peers: what cannot be seen would make two clients of one name.
    """
    if not client.strip():
        return "is empty"
    if len(client) > LONGEST_ID:
        return f"has {len(client)} characters, at most {LONGEST_ID} are allowed"
    if bad := next((c for c in client if not c.isprintable()), ""):
        return f"holds a character that cannot be printed (U+{ord(bad):04X})"
    return ""


def file_name(client: str) -> str:
    """A name for files of this client, another for each id: what is no plain character is written as its code point.

    A name that would be too long ends in a dot and a hash; no other holds a dot.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", lambda m: f"%{ord(m[0]):06x}", client)
    if len(name) <= _LONGEST_FILE:
        return name
    return f"{name[: _LONGEST_FILE - 17]}.{hashlib.sha256(client.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def shown(client: str) -> str:
    """An id fit for a message, whatever it holds."""
    return "".join(c if c.isprintable() else " " for c in client[:40]) + "…" * (len(client) > 40)


def short(name: str) -> bool:
    """Whether a peer's name for something is fit for a log and a table."""
    return len(name) <= LONGEST_NAME and name.isprintable()


def is_run_name(name: str) -> bool:
    """Whether a client can name a folder after this run."""
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}", name) is not None
