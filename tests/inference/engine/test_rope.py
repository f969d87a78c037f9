from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedtune.errors import ModelError
from fedtune.inference.engine.rope import Floats, Rope, frequencies, pairs
from fedtune.inference.engine.shape import RopeShape, read_shape
from tests.inference.engine.tiny import SHAPES


def draw(*size: int) -> Floats:
    return np.random.default_rng(0).standard_normal(size, np.float32)


def theirs(name: str) -> Any:
    """transformers' own rotary embedding of a tiny model."""
    return AutoModelForCausalLM.from_config(SHAPES[name]()).model.rotary_emb


@pytest.mark.parametrize("name", ["llama", "llama_linear", "llama_dynamic", "llama3", "llama_yarn", "llama_yarn_mscale", "qwen3"])
def test_the_tables_equal_those_of_transformers(name: str) -> None:
    shape = read_shape(SHAPES[name]().to_dict())
    n = shape.context + 9 if shape.rope.kind == "dynamic" else 40
    cos, sin = theirs(name)(torch.zeros(1), torch.arange(n)[None])
    rows = Rope(shape).rows(0, n)[:, 0]
    half = shape.head_dim // 2
    np.testing.assert_allclose(rows.real, cos[0, :, :half], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(rows.imag, sin[0, :, :half], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("linear", {"factor": 1e-320}),
        ("yarn", {"factor": 4.0, "beta_fast": 1e308, "original_max_position_embeddings": 64}),
        ("longrope", {"short_factor": (1.0,) * 3, "original_max_position_embeddings": 1, "max_position_embeddings": 64}),
    ],
)
def test_settings_without_finite_rotations_give_a_one_sentence_error(kind: str, numbers: dict[str, Any]) -> None:
    shape = read_shape(SHAPES["llama"]().to_dict())
    with pytest.raises(ModelError, match=f"rope_type='{kind}' give no finite rotations"):
        Rope(shape, RopeShape(kind=kind, numbers=tuple(numbers.items())))


def test_channels_of_a_rotation_are_adjacent() -> None:
    # two heads of four channels: in each, channels 0 and 2 rotate together, and 1 and 3
    assert pairs(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_rotation_equals_the_papers_rotate_half() -> None:
    shape = read_shape(SHAPES["llama"]().to_dict())
    rope, order = Rope(shape), pairs(1, shape.head_dim)
    x = draw(5, 3, shape.head_dim)
    angles = np.arange(7, 12, dtype=np.float32)[:, None] * frequencies(shape.rope, shape.head_dim)[0]
    cos, sin = (np.concatenate([t, t], 1)[:, None] for t in (np.cos(angles), np.sin(angles)))
    first, second = np.split(x, 2, -1)
    want = x * cos + np.concatenate([-second, first], -1) * sin
    assert want.dtype == np.float32
    np.testing.assert_allclose(rope.rotate(x[..., order], 7), want[..., order], atol=1e-5, rtol=1.3e-6)  # torch's bounds of float32
    np.testing.assert_allclose(rope.rotate(x[..., order], np.arange(7, 12)), want[..., order], atol=1e-5, rtol=1.3e-6)


def test_positions_may_have_any_order_and_grow() -> None:
    rope = Rope(read_shape(SHAPES["llama3"]().to_dict()))
    x = draw(4, 2, 12)
    at = np.array([900, 3, 3, 0])
    want = np.concatenate([rope.rotate(x[i : i + 1], int(p)) for i, p in enumerate(at)])
    assert np.array_equal(Rope(read_shape(SHAPES["llama3"]().to_dict())).rotate(x, at), want)
    assert np.array_equal(rope.rotate(x[3:], 0), x[3:])  # position 0 rotates nothing


@pytest.mark.parametrize("name", ["llama", "llama_yarn_mscale"])
def test_unrotate_inverts_rotate(name: str) -> None:
    rope = Rope(read_shape(SHAPES[name]().to_dict()))
    x = draw(6, 2, 12)
    np.testing.assert_allclose(rope.rotate(rope.unrotate(x, 4), 4), x, atol=1e-5, rtol=1.3e-6)


def test_only_dynamic_scaling_depends_on_the_length_and_only_beyond_the_context() -> None:
    dynamic = Rope(read_shape(SHAPES["llama_dynamic"]().to_dict()))  # context 16
    assert np.array_equal(dynamic.rows(3, 1), dynamic.rows(0, 16)[3:4])
    assert not np.allclose(dynamic.rows(0, 17)[3:4], dynamic.rows(3, 1))
    at = np.array([2, 16])
    x = draw(2, 1, 12)
    whole = dynamic.rotate(np.concatenate([np.repeat(x[:1], 16, 0), x[1:]]), 0)
    np.testing.assert_allclose(dynamic.rotate(x, at), whole[at], atol=1e-5, rtol=1.3e-6)
