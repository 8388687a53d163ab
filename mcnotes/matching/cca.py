"""Matching by canonical correlations: what is left of units once others are discounted (chapter 9).

Two units that do the same as several others correlate with each of their partners. Canonical
correlation analysis looks at all units of a layer together: it whitens the activations of both
networks, so that no unit is counted twice, and correlates what is left. Horoi et al. (2024) merge
networks by the invertible linear map between the whitened spaces. That map mixes units, and no
network keeps its function when units are mixed before a ReLU. So this is a *permutation version*:
units are paired one to one, by how much their whitened activations correlate.
"""

import torch
from torch import Tensor

from mcnotes.calls import Batches
from mcnotes.matching.activations import At, Streams, stream
from mcnotes.matching.pair import Pair

RIDGE = 0.1
"""What is added to each unit's variance of 1 before whitening.

Directions in which units hardly vary are noise, and would count as much as all others.
"""


def canonical(
    pair: Pair, images: Batches, moments: Streams, *, at: At, batch_size: int | None
) -> dict[str, Tensor]:
    """By group, how much the whitened units correlate, summed over the taps: [U, U] on the CPU.

    moments: those of A and B on the same images, as `stream` gives them; those of A with itself,
    and of B, take two passes more.
    """
    own = [
        stream(Pair(pair.net, pair.sym, theta, theta), images, at=at, batch_size=batch_size)
        for theta in (pair.theta_a, pair.theta_b)
    ]
    similar = {}
    for name, taps in moments.items():
        if taps:
            both = zip(taps, own[0][name], own[1][name], strict=True)
            whitened = (
                _whitening(a.correlation()) @ ab.correlation() @ _whitening(b.correlation())
                for ab, a, b in both
            )
            similar[name] = torch.stack([*whitened]).sum(0).cpu()
    return similar


def _whitening(correlation: Tensor) -> Tensor:
    """The symmetric matrix [U, U] that takes the correlations away, up to the ridge.

    Of all matrices that do, it changes the units least (Kessy et al. 2018), so that a whitened unit
    is still that unit. A dead one stays 0.
    """
    values, vectors = torch.linalg.eigh((correlation + correlation.T) / 2)
    scale: Tensor = (values.clamp_min(0) + RIDGE).rsqrt()
    whitening: Tensor = (vectors * scale) @ vectors.T
    return whitening
