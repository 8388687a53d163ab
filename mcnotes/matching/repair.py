"""REPAIR: units of an averaged network get the means and deviations of its ends (chapter 9)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mcnotes import evaluate
from mcnotes.calls import call, stated
from mcnotes.checks import got, number, require
from mcnotes.curves import Theta
from mcnotes.data import Split
from mcnotes.symmetry.activations import listen

ChannelMoments = tuple[Tensor, Tensor]  # mean and deviation of each channel, float64 [channels]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def repair(
    net: nn.Module, theta: Theta, ends: tuple[Theta, Theta], images: Split, t: float = 0.5
) -> Theta:
    """REPAIR (Jordan et al. 2023): hidden units vary as they do at the ends.

    theta: the network at `t` between `ends`, which are aligned. Units of an averaged network vary
    less than at either end. Layer by layer in the order in which they work, each channel of a
    linear or convolution layer is scaled and shifted so that its mean and deviation on `images`
    are those of the ends, weighted by 1 − t and t. The last layer stays. Networks with BatchNorm
    need `evaluate.batchnorm` instead. Raises ValueError for layers without a bias, which cannot be
    shifted, for layers whose weight is computed or shared, for networks that hold less than two
    layers, and for states that do not fit the network.
    """
    given = {"images": images, "t": t, "ends": ends}
    require("repair", given, {"images": evaluate.batched, "t": number(0, 1), "ends": _two})
    ends = (
        stated("repair", net, ends[0], images.device),
        stated("repair", net, ends[1], images.device),
    )
    theta = stated("repair", net, theta, images.device)
    layers = _layers(net, theta, images)[:-1]
    if not layers:
        raise ValueError(
            "repair: found no linear or convolution layer before the last; there is nothing to "
            "repair. Fix: use the average as it is"
        )
    for layer in layers:
        _check_layer(net, layer)
    goal = [channel_moments(net, end, images, layers) for end in ends]
    out = dict(theta)
    for layer in layers:
        mean, deviation = channel_moments(net, out, images, [layer])[layer]
        (mean_a, dev_a), (mean_b, dev_b) = (found[layer] for found in goal)
        scale = ((1 - t) * dev_a + t * dev_b) / deviation.clamp_min(1e-12)
        weight, bias = out[f"{layer}.weight"], out[f"{layer}.bias"]
        factor = scale.to(weight)
        out[f"{layer}.weight"] = weight * factor.view(-1, *[1] * (weight.ndim - 1))
        shift = (1 - t) * mean_a + t * mean_b - scale * mean
        out[f"{layer}.bias"] = bias * factor + shift.to(bias)
    return out


def _two(value: object) -> str:
    fits = isinstance(value, tuple | list) and len(value) == 2
    return "" if fits else got(value, "two networks' states")


def _check_layer(net: nn.Module, layer: str) -> None:
    """Raise ValueError unless weight and bias of a layer are parameters of its own."""
    own = net.get_submodule(layer)._parameters
    if own.get("weight") is None:
        raise ValueError(
            f"repair: the weight of {layer!r} is computed from other parameters, so that it cannot "
            "be scaled. Fix: remove the parametrization or the pruning, in both networks"
        )
    if own.get("bias") is None:
        raise ValueError(
            f"repair: {layer!r} has no bias to shift. Fix: build the network with one, or use "
            "evaluate.batchnorm if it has BatchNorm"
        )
    for name, x in net.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] != layer and any(x is y for y in own.values()):
            raise ValueError(
                f"repair: {layer!r} shares a parameter with {name!r}, and units of both cannot be "
                "scaled apart. Fix: use the average as it is"
            )


def channel_moments(
    net: nn.Module, theta: Theta, images: Split, layers: Sequence[str] | None = None
) -> dict[str, ChannelMoments]:
    """Mean and deviation of each channel of what these layers give, over images and places.

    layers: names of linear and convolution layers; default: all, in the order in which they work.
    By layer, two float64 tensors [channels].
    """
    require("channel_moments", {"images": images}, {"images": evaluate.batched})
    theta = stated("channel_moments", net, theta, images.device)
    every = _layers(net, theta, images)
    layers = every if layers is None else layers
    if unknown := [name for name in layers if name not in every]:
        raise ValueError(
            f"channel_moments: no linear or convolution layer {unknown[0]!r} is at work; there "
            f"are {every}"
        )
    sums: dict[str, list[Tensor]] = {name: [] for name in layers}
    axes = {n: 1 if isinstance(net.get_submodule(n), CONVOLUTIONS) else -1 for n in layers}

    def take(name: str, y: Tensor) -> None:
        x = y.movedim(axes[name], -1).flatten(0, -2).double()
        count = x.new_tensor(len(x)).expand(x.shape[1])
        sums[name].append(torch.stack([count, x.sum(0), x.square().sum(0)]))

    with _listening(net, layers, take), evaluate.mode(net, training=False), torch.no_grad():
        for x, _ in images.batches(500):
            call(net, theta, x)
    totals = {name: torch.stack(parts).sum(0) for name, parts in sums.items()}
    means = {name: s[1:] / s[0] for name, s in totals.items()}
    return {name: (m[0], (m[1] - m[0] ** 2).clamp_min(0).sqrt()) for name, m in means.items()}


def _layers(net: nn.Module, theta: Theta, images: Split) -> list[str]:
    """Names of the linear and convolution layers, in the order in which they work."""
    if not len(images):
        raise ValueError("repair: images: got none, expected at least one")
    kinds = (nn.Linear, *CONVOLUTIONS)
    names = [name for name, m in net.named_modules() if isinstance(m, kinds)]
    order: list[str] = []

    def take(name: str, _: Tensor) -> None:
        order.append(name)

    with _listening(net, names, take), evaluate.mode(net, training=False), torch.no_grad():
        call(net, theta, next(images.first(2).batches(2))[0])
    return list(dict.fromkeys(order))


@contextmanager
def _listening(
    net: nn.Module, layers: Sequence[str], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """For a while, `take` gets the name and the output of each of `layers` whenever it has run."""
    hooks = listen(net, [(name, "out") for name in layers], lambda spot, y: take(spot[0], y))
    try:
        yield
    finally:
        for hook in hooks.values():
            hook.remove()
