"""Client side: the ClientApp, the local trainer and the device profiles."""

if __name__ == "clients":
    raise ImportError("import this package as fedtune.clients: the bare name is not a package of its own")
