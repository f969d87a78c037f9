"""Engines for virtual clients, benchmarks and studies."""

if __name__ == "simulations":
    raise ImportError("import this package as fedtune.simulations: the bare name is not a package of its own")
