"""Contracts between fedtune's packages: adapter state, plan, update, strategy, exchange, task, messages.

Of fedtune, they import only config, errors and storage.
"""
