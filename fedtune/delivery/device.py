"""The app of a real device: it trains, and installs the models that the server delivers."""

from collections.abc import Mapping
from typing import Any

from flwr.clientapp import ClientApp

from fedtune.models.light import import_models


def make_app(settings: Mapping[str, Any]) -> ClientApp:
    """The ClientApp of this device, for the experiment of the server's last hello; `settings` are the fields of `deployed.Device`."""
    import_models()  # before the modules that import transformers
    from fedtune.clients import deployed
    from fedtune.delivery.install import Installer

    return deployed.make_app(settings, Installer)
