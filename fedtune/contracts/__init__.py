"""What the rooms of fedtune agree on: adapter state, plan and update, strategy, exchange, task, messages. They import only settings."""
