"""The round loop: membership, messages to clients, and the checks of their replies."""
