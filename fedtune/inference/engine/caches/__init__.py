"""KV caches, one policy per file."""
