"""Contracts between the packages of fedtune: adapter state, plan, update, strategy, exchange, task, messages."""
