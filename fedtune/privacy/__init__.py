"""Differential privacy for single rows (`dpsgd`) or whole clients (`user`), and the ledger of the privacy cost."""
