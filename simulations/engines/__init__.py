"""Engines for virtual clients: in one process, on Ray, and with several clients in one batch."""
