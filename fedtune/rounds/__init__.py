"""The round loop: membership, messages to clients and their replies, and which of them count."""
