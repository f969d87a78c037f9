"""Engines that run virtual clients: in one process, on Ray, and several clients in one batch."""
