"""A server that speaks OpenAI's protocol, for the engine in this package."""
