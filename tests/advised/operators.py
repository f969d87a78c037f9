"""The advice of `fedtune serve` to its operator."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.advised.models import run_of
from tests.advised.rows import Place, command, follows
from tests.advised.serving import engine_of
from tests.export.test_huggingface import CLASSES
from tests.inference.serve.servers import tiny_model


def quiet_serve(place: Place) -> dict[str, str]:
    """Servers that stop before they take requests; also their model, and an adapter for it."""
    place.patch.setattr("fedtune.inference.serve.server.Server.serve_on", lambda self, listener: None)
    engine_of(place)
    return {"model": str(place.kept / "served")}


SERVE = "fedtune serve {model} --port 0 "


@follows("--kv-budget {} is too small for this model: give at least {}")
def _(place: Place) -> Iterator[str]:
    model = quiet_serve(place)["model"]
    serve = ["fedtune", "serve", model, "--port", "0", "--kv-budget"]
    refusal = place.run(*serve, "1kB")
    yield refusal
    yield place.run(*serve, *refusal.rpartition("at least ")[2].split())


command("cannot listen on {}:{}: {}; give another {}", "fedtune serve {model} --host 203.0.113.1 --port 0",
        ready=quiet_serve, host="127.0.0.1", port="0 --host 127.0.0.1")  # fmt: skip


@follows("correct or remove its chat template")
def _(place: Place) -> Iterator[str]:
    quiet_serve(place)
    model = tiny_model(place.folder / "model")
    template = model / "chat_template.jinja"
    whole = template.read_text()
    template.write_text("{{ 1 / 0 }}")
    yield place.run("fedtune", "serve", model, "--port", "0")
    template.write_text(whole)
    yield place.run("fedtune", "serve", model, "--port", "0")
    template.unlink()
    yield place.run("fedtune", "serve", model, "--port", "0")


# -- adapters that requests choose --------------------------------------------------------------------------------------------------------


def package(place: Place, name: str, *flags: str) -> Path:
    """An edge package of a run, and its run's adapter."""
    out = place.keep(name, lambda path: place.run("fedtune", "export", run_of(place), "--to", "edge", "--out", path, *flags))
    assert out.is_dir()
    return out


def serve_error(place: Place, model: Path, *named: str) -> str:
    return place.run("fedtune", "serve", model, "--port", "0", "--adapters", *named)


@follows("--adapters {} is invalid: write NAME=FOLDER")
def _(place: Place) -> Iterator[str]:
    quiet_serve(place)
    model, adapter = package(place, "plain"), run_of(place) / "adapter"
    yield serve_error(place, model, str(adapter))
    yield serve_error(place, model, f"a-name.of_1={adapter}")


@follows("--adapters uses the name '{}' twice: give each adapter its own name")
def _(place: Place) -> Iterator[str]:
    quiet_serve(place)
    model, adapter = package(place, "plain"), run_of(place) / "adapter"
    yield serve_error(place, model, f"one={adapter}", f"one={adapter}")
    yield serve_error(place, model, f"one={adapter}", f"two={adapter}")


@follows("the model already has an adapter named '{}': give this one another name")
def _(place: Place) -> Iterator[str]:
    quiet_serve(place)
    model, adapter = package(place, "apart", "--separate"), run_of(place) / "adapter"
    (own,) = (path.stem for path in (model / "adapters").iterdir())
    yield serve_error(place, model, f"{own}={adapter}")
    yield serve_error(place, model, f"other={adapter}")


@follows("separate adapters do not fit: export the model with --method rtn or gptq", slow=True)
def _(place: Place) -> Iterator[str]:
    quiet_serve(place)
    (place.folder / "text.txt").write_text("turn on the light in the kitchen\n" * 40)
    flags = ["--quantize", "int8", "--calibrate", str(place.folder / "text.txt"), "--method"]
    adapter = run_of(place) / "adapter"
    refusal = serve_error(place, package(place, "folded", *flags, "awq"), f"one={adapter}")
    yield refusal
    for method in refusal.rpartition("--method ")[2].strip().split(" or "):
        yield serve_error(place, package(place, method, *flags, method), f"one={adapter}")


@follows("changes more than LoRA's factors: merge it with `fedtune export`")
def _(place: Place) -> Iterator[str]:
    quiet_serve(place)
    run = Path(shutil.copytree(run_of(place, CLASSES), place.folder / "run"))
    yield serve_error(place, package(place, "plain"), f"one={run / 'adapter'}")
    yield place.run("fedtune", "export", run / "adapter", "--out", place.folder / "out")
