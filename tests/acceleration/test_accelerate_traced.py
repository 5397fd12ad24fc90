"""accelerate on modules of unknown classes: what torch.fx may rewrite, and what it must not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdiff
from accelerate_tools import assert_close, replaced

pytestmark = pytest.mark.usefixtures("seeded")


class Film(nn.Module):
    """Of no known class: norm·(1 + scale) + shift, then SiLU, in one forward."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.GroupNorm(2, 8), nn.SiLU()
        self.film = nn.Linear(4, 16)
        self.norm2, self.out = nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1)

    def forward(self, x, emb):
        scale, shift = self.film(emb)[..., None, None].chunk(2, dim=1)
        h = self.act(self.norm(x) * (1 + scale) + shift)
        return self.out(F.silu(self.norm2(h)))


class FilmOfPositions(Film):
    def forward(self, x, emb):
        scale, shift = self.film(emb)[..., None, None].chunk(2, dim=1)
        h = self.act(self.norm(x) * (scale + x.mean(dim=1, keepdim=True) + 1) + shift)
        return self.out(F.silu(self.norm2(h)))


@pytest.mark.parametrize("kind", [Film, FilmOfPositions])
def test_a_forward_that_can_be_traced(kind):
    model = nn.ModuleDict({"film": kind()})
    x, emb = torch.randn(2, 8, 5, 4), torch.randn(2, 4)
    expected = model["film"](x, emb)
    fastdiff.accelerate(model)
    assert replaced(model) == {"film": "norm and activation in one (traced)"}
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "group_norm", lambda *args: calls.append(args))
        actual = model["film"](x, emb)
    assert not calls
    assert_close(actual, expected)
    model["film"].norm.eps = 0.5  # is read at every call
    other = model["film"](x, emb)
    fastdiff.restore(model)
    assert_close(other, model["film"](x, emb))
    assert not torch.allclose(other, actual)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.gain = nn.GroupNorm(2, 4), 2.0


class Branches(Normed):
    def forward(self, x):
        return F.silu(self.norm(x)) if x.sum() > 0 else self.norm(x)


class ByMode(Normed):
    def forward(self, x):
        return F.dropout(F.silu(self.norm(x)), 0.5, self.training)


class OwnTensor(Normed):
    def forward(self, x):
        return F.silu(self.norm(x)) + torch.rand(1)


class InPlace(Normed):
    def forward(self, x):
        h = F.silu(self.norm(x))
        h.add_(x)
        return h


class Augmented(Normed):
    def forward(self, x):
        h = F.silu(self.norm(x))
        y = h
        y += x
        return h


class Optional(Normed):
    def forward(self, x, emb=None):
        h = F.silu(self.norm(x))
        return h if emb is None else h + emb


class Attribute(Normed):
    def forward(self, x):
        return self.gain * F.silu(self.norm(x))


class Remembers(Normed):
    def forward(self, x):
        self.last = F.silu(self.norm(x))
        return self.last


class Asserts(Normed):
    def forward(self, x):
        assert isinstance(x, torch.Tensor)
        return F.silu(self.norm(x))


class Grad(Normed):
    def forward(self, x):
        return F.silu(self.norm(x)) if torch.is_grad_enabled() else x


@pytest.mark.parametrize(
    "kind",
    [
        *(Branches, ByMode, OwnTensor, InPlace, Augmented, Optional, Attribute, Remembers, Asserts),
        Grad,
    ],
)
def test_what_is_not_understood_keeps_its_forward(kind):
    model = kind()
    x = torch.randn(2, 4, 5, 5)
    torch.manual_seed(1)
    expected = model(x)
    fastdiff.accelerate(model)
    torch.manual_seed(1)
    assert_close(model(x), expected)
    model.gain = 3.0
    model(x)
    with torch.no_grad():
        model(x)
    (left,) = fastdiff.report(model).left
    assert "its forward" in left.how and "one by one" in left.how
    assert replaced(model) == {"norm": "norm in the layout of its input"}
