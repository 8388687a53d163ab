"""REPAIR: give the units of an averaged network the statistics of its ends (chapter 9)."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from mcnotes import evaluate
from mcnotes.calls import call
from mcnotes.curves import Theta
from mcnotes.data import Split

Statistics = tuple[Tensor, Tensor]  # mean and deviation of each channel, float64
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def repair(
    net: nn.Module, theta: Theta, ends: tuple[Theta, Theta], images: Split, t: float = 0.5
) -> Theta:
    """REPAIR (Jordan et al. 2023): hidden units get the statistics that they have at the ends.

    theta: the network at `t` between `ends`, which are aligned. Units of an averaged network vary
    less than at either end. Layer by layer in the order in which they work, each channel of a
    linear or convolution layer is scaled and shifted so that its mean and deviation on `images`
    are those of the ends, weighted by 1 − t and t. The last layer stays. Networks with BatchNorm
    need `evaluate.batchnorm` instead. Raises ValueError for layers without a bias, which cannot be
    shifted, and for networks that hold less than two layers.
    """
    layers = _layers(net, theta, images)[:-1]
    if not layers:
        raise ValueError("repair: found no linear or convolution layer before the last; there is "
                         "nothing to mend")  # fmt: skip
    for layer in layers:
        if f"{layer}.bias" not in theta:
            raise ValueError(f"repair: {layer!r} has no bias to shift; build the network with one, "
                             "or use evaluate.batchnorm if it has BatchNorm")  # fmt: skip
    goal = [channel_statistics(net, end, images, layers) for end in ends]
    out = dict(theta)
    for layer in layers:
        mean, deviation = channel_statistics(net, out, images, [layer])[layer]
        (mean_a, dev_a), (mean_b, dev_b) = (found[layer] for found in goal)
        scale = ((1 - t) * dev_a + t * dev_b) / deviation.clamp_min(1e-12)
        weight, bias = out[f"{layer}.weight"], out[f"{layer}.bias"]
        factor = scale.to(weight)
        out[f"{layer}.weight"] = weight * factor.view(-1, *[1] * (weight.ndim - 1))
        shift = (1 - t) * mean_a + t * mean_b - scale * mean
        out[f"{layer}.bias"] = bias * factor + shift.to(bias)
    return out


def channel_statistics(
    net: nn.Module, theta: Theta, images: Split, layers: list[str] | None = None
) -> dict[str, Statistics]:
    """Mean and deviation of each channel of what these layers give, over images and places.

    layers: names of linear and convolution layers; default: all, in the order in which they work.
    """
    layers = layers or _layers(net, theta, images)
    sums: dict[str, list[Tensor]] = {name: [] for name in layers}

    def take(name: str, module: nn.Module, _: object, y: Tensor) -> None:
        x = y.movedim(1 if isinstance(module, CONVOLUTIONS) else -1, -1).flatten(0, -2).double()
        count = x.new_tensor(len(x)).expand(x.shape[1])
        sums[name].append(torch.stack([count, x.sum(0), x.square().sum(0)]))

    with _heard(net, layers, take), evaluate.mode(net, training=False), torch.no_grad():
        for x, _ in images.batches(500):
            call(net, theta, x)
    totals = {name: torch.stack(parts).sum(0) for name, parts in sums.items()}
    means = {name: s[1:] / s[0] for name, s in totals.items()}
    return {name: (m[0], (m[1] - m[0] ** 2).clamp_min(0).sqrt()) for name, m in means.items()}


def _layers(net: nn.Module, theta: Theta, images: Split) -> list[str]:
    """Names of the linear and convolution layers, in the order in which they work."""
    kinds, order = (nn.Linear, *CONVOLUTIONS), list[str]()
    names = [name for name, m in net.named_modules() if isinstance(m, kinds)]

    def take(name: str, *_: object) -> None:
        order.append(name)

    with _heard(net, names, take), evaluate.mode(net, training=False), torch.no_grad():
        call(net, theta, next(images.first(2).batches(2))[0])
    return list(dict.fromkeys(order))


@contextmanager
def _heard(
    net: nn.Module, layers: list[str], take: Callable[[str, nn.Module, object, Tensor], None]
) -> Iterator[None]:
    """For a while, `take` gets name, layer, inputs and output whenever one of `layers` ran."""
    with ExitStack() as stack:
        for name in layers:
            handle = net.get_submodule(name).register_forward_hook(partial(take, name))
            stack.callback(handle.remove)
        yield
