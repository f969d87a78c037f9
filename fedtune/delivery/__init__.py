"""Delivered models on a device: their versions, and the server that answers from the current one."""
