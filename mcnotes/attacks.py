"""Attacks on a classifier: FGSM, PGD, a search without gradients, several in turn (chapter 8).

An attack is a value. Called with (model, images, labels) it returns images in [0, 1] no further
than `eps` from those given, to the last bit. `model`: any callable from images [B, C, H, W] in
[0, 1] to logits, in evaluation mode. Randomness is torch's global generator's: seed it to repeat.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mcnotes.checks import Rule, a, flag, form, listed, number, one_of, optional, require, whole

Model = Callable[[Tensor], Tensor]
Perturb = Callable[[Model, Tensor, Tensor], Tensor]


def margin(z: Tensor, y: Tensor) -> Tensor:
    """The largest other logit less that of class y, positive where y is not predicted.

    z: logits [B, classes]; y: int64 [B]. Returns [B].
    """
    own = y[:, None]
    return (z.scatter(1, own, -torch.inf).amax(1, keepdim=True) - z.gather(1, own))[:, 0]


def dlr(z: Tensor, y: Tensor) -> Tensor:
    """The margin over the gap from the 1st to the 3rd logit (Croce and Hein 2020, eq. 6).

    z: logits [B, classes], of three classes or more; y: int64 [B]. Returns [B]. Raises ValueError
    for fewer classes.
    """
    if z.dim() != 2 or z.shape[1] < 3:
        raise ValueError(
            f"dlr: got logits of shape {[*z.shape]}, expected at least 3 classes. Fix: use the "
            "loss 'margin' or 'ce'"
        )
    top = z.topk(3, dim=1).values
    return margin(z, y) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": lambda z, y: cross_entropy(z, y, reduction="none"),
    "margin": margin,
    "dlr": dlr,
}
STEP_SCHEDULES = ("constant", "linear")  # linear: down to 0
FAR = 10_000.0  # no two images of [0, 1] are further apart: √pixels, of up to 4096 · 4096 · 3
OPTIONS: dict[str, Rule] = {
    "eps": number(0, FAR),
    "steps": whole(1),
    "norm": one_of(["linf", "l2"]),
    "restarts": whole(1),
    "loss": one_of(LOSSES),
    "targeted": flag,
    "step": optional(number(0, FAR)),
    "schedule": one_of(STEP_SCHEDULES),
    "start": flag,
    "best": flag,
}
"""What the fields of an attack may be."""


@dataclass(frozen=True)
class Attack:
    """What PGD and random search have in common. Raises ValueError for what no attack can be."""

    eps: float  # in units of [0, 1]
    steps: int = 5
    norm: str = "linf"  # or "l2", over all pixels and channels of an image
    restarts: int = 1
    loss: str = "ce"  # a name in `LOSSES`
    targeted: bool = False  # the labels are classes to reach, not to leave
    step: float | None = None  # default 2.5 · eps / steps
    schedule: str = "constant"  # of the step, a name in `STEP_SCHEDULES`
    start: bool = True  # at a random point of the ball
    best: bool = True  # the worst point met, x included (to evaluate), or the last (to train)

    def __post_init__(self) -> None:
        require("attack", vars(self), OPTIONS)
        if self.restarts > 1 and not (self.best and self.start):
            raise ValueError("attack: several restarts need start=True and best=True")

    def config(self) -> dict[str, Any]:
        """JSON values that describe the attack."""
        return {"attack": type(self).__name__, **asdict(self)}

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """What the attack makes large: [B]."""
        return LOSSES[self.loss](z, y) * (-1 if self.targeted else 1)


class PGD(Attack):
    """Projected gradient ascent: steepest step, projection (Madry et al. 2018, section 2.1)."""

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """The attacked images [B, C, H, W]. x: images in [0, 1]; y: their labels, int64 [B].

        Raises ValueError for what is neither.
        """
        _check_batch(x, y)
        ball = Ball(x, self.eps, self.norm)
        worst = Worst(self, model, x, y) if self.best else None
        size = 2.5 * self.eps / self.steps if self.step is None else self.step
        for _ in range(self.restarts):
            u = ball.random() if self.start else x
            for i in range(self.steps):
                with torch.enable_grad():
                    u = u.detach().requires_grad_()
                    z = model(u)
                    (slope,) = torch.autograd.grad(self.value(z, y).sum(), u)
                if worst:
                    worst.take(u.detach(), z.detach())
                factor = 1 - i / self.steps if self.schedule == "linear" else 1.0
                u = ball.project(u.detach() + factor * size * ball.steepest(slope))
            if worst:
                worst.take(u)
        return worst.x if worst else u


def fgsm(eps: float, *, targeted: bool = False) -> PGD:
    """The fast gradient sign method (Goodfellow et al. 2015): one step, as long as allowed."""
    return PGD(eps, 1, step=eps, start=False, best=False, targeted=targeted)


class Square(Attack):
    """Random search with squares of ±eps (Andriushchenko et al. 2020), ℓ∞ only; no gradients.

    An image that fools the network here and not under PGD is a sign of masked gradients. Works best
    with loss="margin". Raises ValueError for another norm than "linf".
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "linf":
            raise ValueError(f"Square: got norm {self.norm!r}, expected 'linf'")

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """As `PGD`."""
        _check_batch(x, y)
        ball, worst = Ball(x, self.eps, self.norm), Worst(self, model, x, y)
        halve = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # the area, in 10,000 steps
        extent = torch.tensor(x.shape[2:], device=x.device)
        rows, columns = (torch.arange(int(n), device=x.device) for n in extent)
        for _ in range(self.restarts):
            run = Worst(self, model, x, y)
            run.take(ball.project(x + self.eps * torch.randn_like(x[:, :, :1]).sign()))  # stripes
            for i in range(self.steps):
                area = 0.8 / 2 ** sum(10_000 * i / self.steps > k for k in halve) * extent.prod()
                side = area.sqrt().round().clamp_min(1).minimum(extent)
                low = (torch.rand(len(x), 2, device=x.device) * (extent - side + 1)).floor()
                down, right = rows - low[:, :1], columns - low[:, 1:]
                inside = ((down >= 0) & (down < side[0]))[:, None, :, None]
                inside = inside & ((right >= 0) & (right < side[1]))[:, None, None, :]
                noise = self.eps * torch.randn_like(x[:, :, :1, :1]).sign()
                run.take(ball.project(torch.where(inside, x + noise, run.x)))
            worst.take(run.x)
        return worst.x


@dataclass(frozen=True)
class Ensemble:
    """One attack after the other, each on the images that all before it left standing.

    Raises ValueError for what is no attack.
    """

    attacks: tuple[PGD | Square, ...]

    def __post_init__(self) -> None:
        require("Ensemble", vars(self), {"attacks": listed(a(Attack, "an attack"), once=False)})

    def config(self) -> dict[str, Any]:
        """JSON values that describe the attacks."""
        return {"attack": "Ensemble", "of": [attack.config() for attack in self.attacks]}

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """As `PGD`."""
        _check_batch(x, y)
        u = x.clone()
        for attack in self.attacks:
            with torch.no_grad():
                right = model(u).argmax(1) == y
            if isinstance(attack, PGD) and attack.targeted:
                right = ~right  # the labels are those to reach
            (standing,) = right.nonzero(as_tuple=True)
            if len(standing):
                u[standing] = attack(model, x[standing], y[standing])
        return u


def strong(eps: float, *, steps: int = 50, restarts: int = 2, squares: int = 500) -> Ensemble:
    """The attack that a claim of robustness must withstand: PGD on two losses, then `Square`.

    In the spirit of AutoAttack (Croce and Hein 2020). eps: ℓ∞ radius in units of [0, 1]; steps and
    restarts: of each PGD; squares: steps of the random search. Raises ValueError for other values.
    """
    require(
        "strong", {"eps": eps, "steps": steps, "squares": squares}, OPTIONS | {"squares": whole(1)}
    )
    one = PGD(eps, steps, restarts=restarts, schedule="linear", step=eps / 2)
    return Ensemble((one, replace(one, loss="dlr"), Square(eps, squares, loss="margin")))


class Ball:
    """The images of [0, 1] within `eps` of x [B, C, H, W], image by image."""

    def __init__(self, x: Tensor, eps: float, norm: str) -> None:
        self.x, self.eps, self.norm = x, eps, norm
        self.low, self.high = self._end(-eps), self._end(eps)
        # Rounding x + d may add to the length of d (ℓ2).
        self.radius = max(0.0, eps * (1 - 1e-6) - x[0].numel() ** 0.5 * 2**-24)

    def _end(self, d: float) -> Tensor:
        """x + d in [0, 1], and no further from x than `eps`, to the last bit (ℓ∞)."""
        end = (self.x.double() + d).to(self.x.dtype)
        too_far = (end.double() - self.x.double()).abs() > self.eps  # rounded outwards
        return torch.where(too_far, end.nextafter(self.x), end).clamp(0, 1)

    def project(self, u: Tensor) -> Tensor:
        """The nearest point of the ball, then of [0, 1] (which leads no further from x)."""
        if self.norm == "linf":
            return u.clamp(self.low, self.high)
        d = u - self.x
        return torch.clamp(self.x + d * (self.radius / length(d)).clamp_max(1), 0, 1)

    def random(self) -> Tensor:
        """A uniformly random point of the ball, projected to [0, 1]."""
        if self.norm == "linf":
            return self.project(self.x + self.eps * (2 * torch.rand_like(self.x) - 1))
        d, share = torch.randn_like(self.x), torch.rand_like(self.x[:, :1, :1, :1])
        return self.project(self.x + self.eps * share ** (1 / self.x[0].numel()) * d / length(d))

    def steepest(self, slope: Tensor) -> Tensor:
        """The step of length 1 along which a linear function rises most."""
        return slope.sign() if self.norm == "linf" else slope / length(slope)


class Worst:
    """For each image the worst point so far: a fooling one first, then one of larger value."""

    def __init__(self, attack: Attack, model: Model, x: Tensor, y: Tensor) -> None:
        self.attack, self.model, self.y, self.x = attack, model, y, x
        self.fooled, self.value = torch.zeros_like(y, dtype=torch.bool), x.new_full(y.shape, -1e30)
        self.take(x)

    @torch.no_grad()
    def take(self, u: Tensor, z: Tensor | None = None) -> None:
        """Keep u [B, C, H, W] where it is worse; z: its logits, if known."""
        z = self.model(u) if z is None else z
        hit, value = z.argmax(1) == self.y, self.attack.value(z, self.y)
        fooled = hit == self.attack.targeted
        worse = (fooled > self.fooled) | ((fooled == self.fooled) & (value > self.value))
        self.x = torch.where(worse[:, None, None, None], u, self.x)
        self.fooled = torch.where(worse, fooled, self.fooled)
        self.value = torch.where(worse, value, self.value)


def length(d: Tensor) -> Tensor:
    """Euclidean length of each image, never quite 0: [B, 1, 1, 1]."""
    return d.square().sum((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)


def _check_batch(x: object, y: object) -> None:
    """Raise ValueError unless these are images of floats and as many labels."""
    if not (isinstance(x, Tensor) and x.dim() > 1 and x.is_floating_point()):
        raise ValueError(f"attack: images: got {form(x)}, expected floats in [0, 1], [B, C, H, W]")
    if not (isinstance(y, Tensor) and y.dtype == torch.int64 and y.shape[:1] == x.shape[:1]):
        raise ValueError(f"attack: labels: got {form(y)}, expected torch.int64 [{len(x)}]")
