"""Reads untrusted files and text, and writes files atomically: atomic writes, JSON and YAML, typed records, client names."""
