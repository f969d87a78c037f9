"""Hydra YAML: scenarios at the top, one folder a group."""

if __name__ == "conf":
    raise ImportError("import this package as fedtune.conf: the bare name is not a package of its own")
