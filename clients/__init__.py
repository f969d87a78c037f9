"""What runs on a device: the ClientApp, the local trainer, the device classes."""

if __name__ == "clients":
    raise ImportError("import this package as fedtune.clients: the bare name is not a package of its own")
