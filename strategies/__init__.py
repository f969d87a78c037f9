"""Aggregation methods, one per file."""

if __name__ == "strategies":
    raise ImportError("import this package as fedtune.strategies: the bare name is not a package of its own")
