"""The parts of the lean training step have the gradients of autograd, in float64."""

from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtune.models.lean import functions, loss, places
from fedtune.models.lean.functions import ACTIVATIONS, Linears, Norm, States, attend, attend_backward, rotate
from fedtune.models.lean.loss import cross_entropy
from fedtune.models.lean.places import Places, rounded


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor | None, want: Tensor, within: float = 1e-10) -> None:
    assert got is not None and got.shape == want.shape
    assert float((got - want).detach().abs().max()) <= within * float(want.detach().abs().max())


class Adapted(nn.Module):
    """A linear layer in the form of PEFT's, float64."""

    def __init__(self, width: int, out: int, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = nn.Linear(width, out, dtype=torch.float64).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width, rank, bias=False, dtype=torch.float64)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False, dtype=torch.float64)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout) if dropout else nn.Identity()})
        self.lora_magnitude_vector = {}
        self.scaling = {"default": scaling}

    def forward(self, x: Tensor) -> Tensor:
        a, b, drop = (m["default"] for m in (self.lora_A, self.lora_B, self.lora_dropout))
        return self.base_layer(x) + self.scaling["default"] * b(a(drop(x)))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_linear_layers_share_an_input(dropout: float) -> None:
    torch.manual_seed(0)
    modules = [Adapted(6, 5, 2, 0.5, dropout), nn.Linear(6, 4, dtype=torch.float64), Adapted(6, 3, 4, 2.0, dropout)]
    x, dys = draw(7, 6).requires_grad_(), [draw(7, n, seed=n) for n in (5, 4, 3)]
    torch.manual_seed(1)
    want = [m(x) for m in modules]
    torch.autograd.backward(want, dys)
    after = torch.get_rng_state()
    linears, states = Linears(*modules), States()
    pairs = [layer.factors for layer in linears.layers]
    with torch.no_grad():
        torch.manual_seed(1)
        got = linears.forward(x, pairs, states)
        assert torch.equal(torch.get_rng_state(), after)
        again = linears.forward(x, pairs, states)  # with the same noise
        dx, grads = linears.backward(dys, x, pairs, [(True, True, False)] * 3, states)
        assert torch.equal(torch.get_rng_state(), after)
        none, some = linears.backward(dys, x, pairs, [(True, False, False), (False, False, False), (False, True, False)], states, dx=False)
    for y, z, right in zip(got, again, want, strict=True):
        close(y, right)
        close(z, right)
    close(dx, cast(Tensor, x.grad))
    wanted = [f.grad for m in (modules[0], modules[2]) for f in (m.lora_A["default"].weight, m.lora_B["default"].weight)]
    for g, right in zip((g for g in grads if g is not None), wanted, strict=True):
        close(g, right)
    assert none is None and [g is None for g in some] == [False, True, True, True, True, True, True, False, True]


def test_the_computed_positions_are_all_tokens_and_some_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    real, x = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool(), torch.arange(8)
    whole = Places(real.shape, real)
    assert not whole.packs and whole.pack(x) is x and whole.unpack(x) is x and whole.by_group(x) is x  # 3 + 1 is rounded up to 16
    monkeypatch.setattr(places, "rounded", lambda n, least: n)
    monkeypatch.setattr(places, "OF_CLIENTS", 0.0)
    one, two = Places(real.shape, real), Places(real.shape, real, clients=2, group=2)
    assert one.pack(x).tolist() == [0, 1, 4, 2] and one.unpack(one.pack(x)).tolist() == [0, 1, 2, 2, 4, 2, 2, 2]
    assert two.pack(x).tolist() == [0, 1, 2, 2, 4, 2] and two.unpack(two.pack(x)).tolist() == [0, 1, 2, 2, 4, 2, 2, 2]
    assert two.by_group(torch.tensor([10, 20])).tolist() == [10, 10, 20]


def test_numbers_of_rows_are_rounded_up() -> None:
    assert [rounded(n) for n in (1, 16, 17, 1000, 1025, 4097)] == [16, 16, 32, 1008, 1056, 4224]
    assert rounded(1000, 64) == 1024


@pytest.mark.parametrize(("offset", "early"), [(0.0, True), (0.0, False), (1.0, False)])
def test_an_rms_norm(offset: float, early: bool) -> None:
    x, w, dy = draw(5, 8).float().requires_grad_(), draw(8, seed=1).float(), draw(5, 8, seed=2).float()
    y = F.rms_norm(x, (8,), w + offset, 1e-3)
    y.backward(dy)
    norm = Norm(w, 1e-3, offset, early)
    with torch.no_grad():
        close(norm.forward(x), y, 1e-6)
        close(norm.backward(dy, x), cast(Tensor, x.grad), 1e-6)


@pytest.mark.parametrize("rotated", [4, 6])
def test_a_rotation_and_its_transpose(rotated: int) -> None:
    x, cos, sin, dy = (
        draw(2, 3, 4, 6).requires_grad_(),
        draw(1, 3, rotated, seed=1),
        draw(1, 3, rotated, seed=2),
        draw(2, 4, 3, 6, seed=3),
    )
    part, rest = x.transpose(1, 2).split([rotated, 6 - rotated], dim=-1)
    one, two = part.chunk(2, dim=-1)
    y = torch.cat([part * cos[:, None] + torch.cat([-two, one], dim=-1) * sin[:, None], rest], dim=-1)
    y.backward(dy)
    with torch.no_grad():
        close(rotate(x, cos, sin), y)
        close(rotate(dy, cos, sin, back=True), cast(Tensor, x.grad))


@pytest.mark.parametrize("scores", [1 << 22, 200, 30])  # all at once; row by row; head by head
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_shared_heads(cap: float | None, causal: bool, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "SCORES", scores)
    q, dy = draw(3, 4, 5, 6).requires_grad_(), draw(3, 4, 5, 6, seed=1)
    k, v = (draw(3, 2, 5, 6, seed=s).requires_grad_() for s in (2, 3))
    given = None if causal else draw(3, 1, 5, 5, seed=4)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1) if given is None else given
    raw = q @ k.repeat_interleave(2, 1).mT * 0.3
    y = (raw if cap is None else cap * torch.tanh(raw / cap)).add(mask).softmax(-1) @ v.repeat_interleave(2, 1)
    want = torch.autograd.grad(y, (q, k, v), dy)
    with torch.no_grad():
        close(attend(q, k, v, given, 0.3, cap), y)
        for g, right in zip(attend_backward(dy, q, k, v, given, 0.3, cap), want, strict=True):
            close(g, right)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_an_activation(name: str) -> None:
    from transformers.activations import ACT2FN

    x, dy = draw(50).mul_(3).requires_grad_(), draw(50, seed=1)
    y = ACT2FN[name](x)
    y.backward(dy)
    act, backward = ACTIVATIONS[name]
    with torch.no_grad():
        close(act(x), y)
        close(backward(dy, x), cast(Tensor, x.grad))


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_loss_in_pieces(cap: float | None, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "ROWS", rows)
    monkeypatch.setattr(loss, "PIECE", 1)
    monkeypatch.setattr(loss, "_CACHED", 2 * 11)
    h, w, b, targets = draw(8, 6).float().requires_grad_(), draw(11, 6, seed=1).float(), draw(11, seed=2).float(), torch.arange(8)
    logits = F.linear(h, w, b)
    want = F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="sum")
    (wanted,) = torch.autograd.grad(want / 7, h)
    got = cross_entropy(h, w, b, targets, cap).sum()
    close(got, want, 1e-6)
    close(torch.autograd.grad(got / 7, h)[0], wanted, 1e-5)


def test_the_loss_of_no_row_and_of_an_impossible_target() -> None:
    h, w = torch.zeros(0, 4, requires_grad=True), torch.randn(5, 4)
    total = cross_entropy(h, w, None, torch.zeros(0, dtype=torch.int64)).sum()
    total.backward()
    assert total.item() == 0.0 and cast(Tensor, h.grad).shape == (0, 4)
    one = torch.tensor([[1.0]], requires_grad=True)
    total = cross_entropy(one, torch.tensor([[300.0], [0.0]]), None, torch.tensor([1])).sum()
    assert total.item() == 300.0  # by hand: log(e^300 + e^0) - 0


def test_the_last_client_of_a_stack_is_one_group() -> None:
    real = torch.arange(10)[None] < torch.tensor([9, 5, 1, 7])[:, None]
    places, factors = Places(real.shape, real, clients=1, group=16), torch.randn(1, 3, 4)
    assert places.packs and places.by_group(factors) is factors
