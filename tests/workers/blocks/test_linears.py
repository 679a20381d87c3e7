"""Layers that read the same input, as one product: the room that gradients ride back in."""

from __future__ import annotations

import torch
from torch import nn

from workers.blocks.linears import Branch, Group, Layer, Read
from workers.blocks.room import among_zeros, lying_wide, rows_at, widened, with_room_behind
from workers.blocks.weights import widen


def test_room_is_found_where_it_was_made_and_else_made() -> None:
    made = with_room_behind(torch.zeros(3, 1), 5, 4)
    assert widened(made, 4).data_ptr() == made.data_ptr()
    whole = torch.arange(60.0).view(5, 12)
    # The same steps from row to row, in memory that is somebody else's.
    three_rows = torch.arange(36.0).view(3, 12)
    assert torch.equal(widened(three_rows[:, 4:], 4)[:, :8], three_rows[:, 4:])
    for strange in (whole[:3, :8], whole[2:, :8], whole[2:, 4:], torch.ones(3, 8), torch.ones(3, 1).expand(3, 8)):
        before = whole.clone()
        found = widened(strange, 4)
        assert found.shape == (3, 12)
        assert torch.equal(found[:, :8], strange)
        found.zero_()
        assert torch.equal(whole, before)


def test_rows_are_taken_and_put_back_with_room_behind_them() -> None:
    whole_TH, places_N = torch.randn(7, 5), torch.tensor([6, 1, 2])
    taken_NH = rows_at(whole_TH[:, :3], places_N, 4)
    assert torch.equal(taken_NH, whole_TH[places_N, :3])
    back_TH = among_zeros(taken_NH, places_N, 7, 2)
    assert torch.equal(back_TH[places_N], taken_NH)
    assert not back_TH[[0, 3, 4, 5]].any()
    assert lying_wide(taken_NH, 4) is not None
    assert lying_wide(back_TH, 2) is not None


def test_gradients_are_the_same_with_room_and_without() -> None:
    torch.manual_seed(3)
    modules = [nn.Linear(6, 5, bias=False), nn.Linear(6, 3, bias=False)]
    branches = [
        Branch(nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(module.out_features, 2)), 0.5)
        for module in modules
    ]
    layers = [Layer(6, module.out_features, None, one) for module, one in zip(modules, branches, strict=True)]
    group = Group(layers, widen(modules), torch.float32)
    for source, target, factor in group.copies():
        target.copy_(source.detach() * factor)
    x, gradient = torch.randn(4, 6, requires_grad=True), torch.randn(4, 8)
    out = torch.cat(
        [module(x) + x @ one.down.T @ one.up.T * one.scale for module, one in zip(modules, branches, strict=True)], 1
    )
    expected = torch.autograd.grad(out, [x, *group.parameters()], gradient)

    roomy = with_room_behind(gradient, 8, group.room)
    roomy.copy_(gradient)
    x_roomy = with_room_behind(x, 6, group.room)
    x_roomy.copy_(x.detach())
    for given in (x.detach(), x_roomy, widened(x.detach(), group.room)):
        torch.testing.assert_close(group.forward(given)[0], out.detach())
    read = Read(x.detach(), group.thin(x.detach()))
    for given in (gradient, roomy):
        by_input, by_parameters = group.backward(given, read)
        assert by_input is not None
        for found, wanted in zip((by_input, *by_parameters), expected, strict=True):
            torch.testing.assert_close(found, wanted)
