"""A server with OpenAI's API for fedtune's models."""
