"""Training: it learns; plain PyTorch agrees; curves; resuming is bit-identical; errors."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from small import Checkpointed, Stopped, agree, normed, plain, task, terms
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from mcnotes import curves, evaluate, train
from mcnotes.cache import Checkpoint, StoreWarning
from mcnotes.curves import Theta
from mcnotes.data.augment import Augment
from mcnotes.train import Recipe, TrainingError

RECIPE = Recipe(epochs=3, batch_size=32, lr=0.05, schedule="linear")


def equal(a: Theta, b: Theta) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("make", [plain, normed])
def test_learns_and_repeats(make: object) -> None:
    net, data = make(), task()  # type: ignore[operator]
    before = {n: x.clone() for n, x in net.state_dict().items()}
    fit = train.fit(net, data, RECIPE, seed=1)
    assert len(fit.losses) == 3
    assert fit.losses[-1] < fit.losses[0]
    assert evaluate.score(net, fit.theta, data.test).accuracy > 0.8
    assert equal(before, net.state_dict()), "the module itself was changed"
    assert net.training
    assert equal(fit.theta, train.fit(net, data, RECIPE, seed=1).theta)
    assert not equal(fit.theta, train.fit(net, data, RECIPE, seed=2).theta)


def flat_normed() -> nn.Module:
    """BatchNorm over images alone, which has no variance for one; with dropout."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(144, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)
    )


def test_a_last_batch_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where BatchNorm cannot take it, it is left out; where it can, it is trained on."""
    recipe = Recipe(epochs=2, batch_size=32, lr=0.05, schedule="linear")
    one_more = task(65)
    fit = train.fit(flat_normed(), one_more, recipe, seed=1)
    assert len(fit.losses) == 2
    assert all(x.isfinite().all() for x in fit.theta.values())
    curve = curves.bezier(*(train.initialise(flat_normed(), seed) for seed in (1, 2)))
    assert len(train.fit_curve(flat_normed(), curve, one_more, recipe, seed=1).losses) == 2
    shown, step = [0, 0], train.Step.__call__
    for k, net in enumerate((normed(), flat_normed())):

        def count(self: train.Step, x: Tensor, *rest: Any, k: int = k) -> Tensor:
            shown[k] += len(x)
            return step(self, x, *rest)

        monkeypatch.setattr(train.Step, "__call__", count)
        train.fit(net, one_more, recipe, seed=1)
    assert shown == [2 * 65, 2 * 64]


def test_batches_of_one_image_alone() -> None:
    with pytest.raises(TrainingError, match=r"cannot train on batches of one image.*at least 2"):
        train.fit(flat_normed(), task(12), Recipe(1, batch_size=1), seed=1)
    fit = train.fit(plain(), task(12), Recipe(1, batch_size=1, lr=0.01), seed=1)
    assert len(fit.losses) == 1


def test_agrees_with_a_plain_pytorch_loop() -> None:
    """Same batches, same schedule, torch.optim.SGD on the module's own parameters."""
    net, data = normed(), task()
    init = train.initialise(net, 1)
    fit = train.fit(net, data, RECIPE, seed=1)
    net.load_state_dict(init)
    net.train()
    optimiser = torch.optim.SGD(
        net.parameters(), 1.0, momentum=0.9, nesterov=True, weight_decay=RECIPE.weight_decay
    )
    for epoch in range(RECIPE.epochs):
        g = torch.Generator().manual_seed(1_000_003 + epoch)
        torch.rand(3, generator=g, dtype=torch.float64)  # the curve's t
        for i, (x, y) in enumerate(data.train.batches(RECIPE.batch_size, generator=g)):
            optimiser.param_groups[0]["lr"] = RECIPE.lr * train.SCHEDULES["linear"](
                epoch + i / 3, RECIPE.epochs
            )
            optimiser.zero_grad()
            cross_entropy(net(x), y).backward()
            optimiser.step()
    count = 9 * 32 * 144  # terms of nine gradients: each pixel of 32 images
    for name, p in net.named_parameters():
        agree(p, fit.theta[name], count, scale=moved(init, fit.theta))


def moved(start: Theta, end: Theta) -> float:
    """How far training moved an entry of a parameter at most."""
    return max(float((end[n] - x).abs().max()) for n, x in start.items() if "running" not in n)


@pytest.mark.parametrize("make", [curves.bezier, curves.chain])
def test_curve_moves_only_its_inner_points(make: object) -> None:
    net, data = normed(), task()
    a, b = (train.fit(net, data, RECIPE, seed=s).theta for s in (1, 2))
    curve = make(a, b)  # type: ignore[operator]
    fitted = train.fit_curve(net, curve, data, RECIPE, seed=3).curve
    assert fitted.kind == curve.kind
    assert equal(fitted.points[0], a)
    assert equal(fitted.points[-1], b)
    assert not equal(fitted.points[1], curve.points[1])
    line = evaluate.profile(net, curve, data.train, statistics=data.train, points=9)
    path = evaluate.profile(net, fitted, data.train, statistics=data.train, points=9)
    assert path.loss.max() < line.loss.max()


def test_curve_gradient_is_the_chain_rule() -> None:
    """One SGD step at a known t moves the inner point by −lr w(t) ∂/∂θ [L + ½λ‖θ‖²]."""
    net, data = plain(), task()
    a, b = (train.initialise(net, s) for s in (1, 2))
    curve = curves.bezier(a, b)
    recipe = Recipe(epochs=1, lr=0.1, momentum=0.0, weight_decay=0.01)
    step = train.Step(net, curve, slice(1, -1), recipe, data.device)
    x, y = next(data.train.batches(32))
    w = curve.weights(torch.tensor(0.3))
    loss = step(x, y, w, 0.1)
    after = step.points(curve)[1]

    middle = {n: v.clone().requires_grad_() for n, v in curve.points[1].items()}
    theta = {n: w[0] * a[n] + w[1] * middle[n] + w[2] * b[n] for n in a}
    expected = cross_entropy(functional_call(net, theta, (x,)), y)
    penalty = 0.005 * sum((v**2).sum() for v in theta.values())
    grads = torch.autograd.grad(expected + penalty, list(middle.values()))
    agree(loss, expected, terms(net) + len(y))
    for (name, v), g in zip(middle.items(), grads, strict=True):
        agree(after[name], v - 0.1 * g, terms(net) + len(y))


class Draws(nn.Module):
    """A linear network that keeps what it draws while it trains, where others draw dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(144, 3), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(torch.rand(4, dtype=torch.float64))
        z: Tensor = self.linear(x.flatten(1))
        return z


@pytest.mark.parametrize("seed", [0, 1, -3, 4000])
def test_dropout_is_independent_of_the_shuffling(seed: int) -> None:
    """Each epoch has two streams: one for t, order and augmentation, one for the network."""
    net = Draws()
    train.fit(net, task(), replace(RECIPE, batch_size=96), seed=seed)
    assert len(net.seen) == RECIPE.epochs
    starts = {tuple(x.tolist()) for x in net.seen}
    for s in (seed, *(seed * 1_000_003 + epoch for epoch in range(RECIPE.epochs))):
        g = torch.Generator().manual_seed(s)
        starts.add(tuple(torch.rand(4, generator=g, dtype=torch.float64).tolist()))
    # For seed 0 the first epoch has the seed from which the network was drawn.
    assert len(starts) == 2 * RECIPE.epochs + (seed != 0)


def test_attacks_draw_as_when_the_zoo_was_trained() -> None:
    seen = []

    def perturb(model: object, x: Tensor, y: Tensor) -> Tensor:
        seen.append(torch.rand(4, dtype=torch.float64))
        return x

    train.fit(plain(), task(), replace(RECIPE, batch_size=96), seed=5, perturb=perturb)
    for epoch, got in enumerate(seen):
        g = torch.Generator().manual_seed(5 * 1_000_003 + epoch)
        assert torch.equal(got, torch.rand(4, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_run_is_bit_identical(stop: int, tmp_path: Path) -> None:
    net, data = normed(dropout=0.3), task(augment=Augment(padding=1, flip=True))
    whole = train.fit(net, data, RECIPE, seed=1)

    with pytest.raises(KeyboardInterrupt):
        train.fit(net, data, RECIPE, seed=1, checkpoint=Stopped(tmp_path / "c", stop))
    resumed = train.fit(net, data, RECIPE, seed=1, checkpoint=Checkpoint(tmp_path / "c"))
    assert equal(whole.theta, resumed.theta)
    assert whole.losses == resumed.losses


MISFITS = {
    "phi broadcasts": lambda s: s | {"phi": torch.zeros(1, 1)},
    "another precision": lambda s: s | {"phi": s["phi"].double()},
    "too many epochs": lambda s: s | {"losses": torch.zeros(5, dtype=torch.float64)},
    "no epoch": lambda s: s | {"losses": torch.zeros(0, dtype=torch.float64)},
    "losses of low precision": lambda s: s | {"losses": s["losses"].float()},
    "losses in a row": lambda s: s | {"losses": s["losses"][None]},
    "another name": lambda s: {("rows" if n == "phi" else n): x for n, x in s.items()},
    "no losses": lambda s: {n: x for n, x in s.items() if n != "losses"},
    "another network": lambda s: s | {"buffer.1.running_mean": torch.zeros(7)},
    "a buffer more": lambda s: s | {"buffer.2.running_mean": torch.zeros(6)},
    "empty": lambda _: {},
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_a_checkpoint_that_does_not_fit_is_set_aside(
    change: Callable[[Theta], Theta], tmp_path: Path
) -> None:
    """A state of older code, or of another network: never used, never in the way."""
    net, data, recipe = normed(), task(), replace(RECIPE, epochs=2)
    whole = train.fit(net, data, recipe, seed=1)
    with pytest.raises(KeyboardInterrupt):
        train.fit(net, data, recipe, seed=1, checkpoint=Stopped(tmp_path / "c", 1))
    checkpoint = Checkpoint(tmp_path / "c")
    state = checkpoint.load()
    assert state
    checkpoint.save(change(state))
    with pytest.warns(StoreWarning, match="set aside as c.broken"):
        fit = train.fit(net, data, recipe, seed=1, checkpoint=checkpoint)
    assert equal(fit.theta, whole.theta)
    assert fit.losses == whole.losses
    assert (tmp_path / "c.broken").exists()


@pytest.mark.parametrize("stop", [1, 2])
def test_the_time_of_a_resumed_run_counts_in_whole(stop: int, tmp_path: Path) -> None:
    first = Checkpoint(tmp_path / "c")
    first._start -= 1000  # as if it had taken so long
    first.save({"x": torch.zeros(1)})
    for _ in range(stop):
        again = Checkpoint(tmp_path / "c")
        assert again.load()
        again.save({"x": torch.zeros(1)})
        assert again.load()
    assert 1000 <= again.seconds < 1100


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from small import normed, task
from mcnotes import cache, evaluate, train
epochs = int(sys.argv[3])
class Deadly(cache.Checkpoint):
    def save(self, state):
        super().save(state)
        if len(state["losses"]) == epochs:
            os.kill(os.getpid(), signal.SIGKILL)
recipe = train.Recipe(epochs=3, batch_size=32, lr=0.05, schedule="linear")
fit = train.fit(normed(), task(), recipe, seed=1, checkpoint=Deadly(Path(sys.argv[2])))
cache.write_atomic(Path(sys.argv[2] + ".done"), cache._pack(fit.theta, {}, {}))
"""


def test_killed_process_goes_on_where_it_was(tmp_path: Path) -> None:
    here, file = str(Path(__file__).parent), tmp_path / "c"
    command = [sys.executable, "-c", KILLED, here, str(file)]
    assert subprocess.run([*command, "2"], check=False).returncode == -9
    kept = Checkpoint(file).load()
    assert kept is not None
    assert len(kept["losses"]) == 2
    assert subprocess.run([*command, "99"], check=False).returncode == 0
    from mcnotes.cache import read_tensors

    whole = train.fit(normed(), task(), RECIPE, seed=1).theta
    assert equal(read_tensors(tmp_path / "c.done"), whole)


def test_perturb_sees_evaluation_mode_and_changes_the_batch() -> None:
    net, data = normed(), task()
    seen: list[bool] = []

    def perturb(model: object, x: Tensor, y: Tensor) -> Tensor:
        seen.append(net.training)
        assert model(x).shape == (len(y), 3)  # type: ignore[operator]
        return torch.rand(x.shape, generator=torch.Generator().manual_seed(0))

    fit = train.fit(net, data, RECIPE, seed=1, perturb=perturb)
    assert seen == [False] * 9
    assert not equal(fit.theta, train.fit(net, data, RECIPE, seed=1).theta)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(144, 144)
            self.b = nn.Linear(144, 144)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.flatten(1)).relu())[:, :3]

    theta = train.fit(Tied(), task(), RECIPE, seed=1).theta
    assert torch.equal(theta["a.weight"], theta["b.weight"])


needs_compiler = pytest.mark.skipif(not which("c++"), reason="needs a C++ compiler")


@pytest.mark.parametrize(
    ("option", "count", "dtype"),
    [
        ({"precision": "bfloat16"}, 9, torch.bfloat16),  # nine steps, summed in float32
        pytest.param(
            {"compile": True},
            9 * 32 * 144,
            torch.float32,
            marks=needs_compiler,
        ),
        pytest.param(
            {"precision": "bfloat16", "compile": True},
            9,
            torch.bfloat16,
            marks=needs_compiler,
        ),
    ],
)
def test_low_precision_and_compilation_train_too(
    option: dict, count: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The compiler's cache takes no notice of the instructions that PyTorch is allowed to use.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    net, data = plain(), task()
    exact = train.fit(net, data, RECIPE, seed=1).theta
    close = train.fit(net, data, replace(RECIPE, **option), seed=1).theta
    scale = moved(train.initialise(net, 1), exact)
    for n in exact:
        agree(close[n], exact[n], count, scale=scale, dtype=dtype)


class Seen(TorchDispatchMode):
    """Collects what is computed: (operator, are there numbers of type bfloat16?)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[tuple[Any, bool]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        low = any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in args)
        self.calls.add((func, low))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("build", [plain, normed, lambda: Checkpointed(plain())])
@pytest.mark.parametrize("native", ["float32", "bfloat16"])
def test_bfloat16_is_rounded_in_float32_where_it_is_not_native(
    native: str, build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "native_precision", lambda device: native)
    net, data = build(), task()
    exact = train.fit(net, data, RECIPE, seed=1).theta
    with Seen() as seen:
        close = train.fit(net, data, replace(RECIPE, precision="bfloat16"), seed=1).theta
    products = {low for func, low in seen.calls if func in train.PRODUCTS}
    assert (True in products) == (native == "bfloat16")
    scale = moved(train.initialise(net, 1), exact)
    assert not equal(close, exact)
    for n in exact:
        if "num_batches" not in n:
            agree(close[n], exact[n], 9, scale=scale, dtype=torch.bfloat16)


F = nn.functional
DIMENSIONS = (1, 2, 3)
PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    **{
        f"conv{d}d": (getattr(F, f"conv{d}d"), [(2, 3, *[5] * d), (4, 3, *[3] * d), (4,)])
        for d in DIMENSIONS
    },
    **{
        f"conv_transpose{d}d": (
            getattr(F, f"conv_transpose{d}d"),
            [(2, 3, *[5] * d), (3, 4, *[3] * d), (4,)],
        )
        for d in DIMENSIONS
    },
    "linear": (F.linear, [(6, 5), (4, 5), (4,)]),
    "linear of a sequence": (F.linear, [(2, 3, 5), (4, 5), (4,)]),
    "matmul": (torch.matmul, [(2, 3, 5), (5, 4)]),
    "@": (lambda a, b: a @ b, [(3, 5), (5, 4)]),
    "bmm": (torch.bmm, [(2, 3, 5), (2, 5, 4)]),
    "baddbmm": (torch.baddbmm, [(2, 3, 4), (2, 3, 5), (2, 5, 4)]),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), [(2, 3, 5), (2, 5, 4)]),
}
"""Each product: the function, and the shapes of its operands."""


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_rounded_once(name: str) -> None:
    """The exact result of rounded operands, rounded: forwards, and for each gradient.

    The sums are whole numbers, exact in float32, and most have more bits than bfloat16.
    """
    func, shapes = PRODUCTS[name]
    draw = torch.Generator().manual_seed(1)

    def numbers(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(-200, 201, shape, generator=draw).double()

    exact = [numbers(shape).requires_grad_() for shape in shapes]
    given = [(x.detach().float() * (1 + 2**-12)).requires_grad_() for x in exact]
    right = func(*exact)
    slope = numbers(tuple(right.shape))
    with Seen() as seen, train.InFloat32():
        with torch.autocast("cpu", torch.bfloat16):
            out = func(*given)
        out.backward(slope.to(out.dtype))
    right.backward(slope)
    assert not [func for func, low in seen.calls if low and func in train.PRODUCTS]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, right.bfloat16())
    for x, wanted in zip(given, exact, strict=True):
        assert torch.equal(x.grad, wanted.grad.bfloat16().float())
    assert not torch.equal(out.double(), right), "it had to be rounded"
    assert not torch.equal(given[1].grad.double(), exact[1].grad)


class Sequence(nn.Module):
    """Attention and a recurrent layer, whose products stand deep in PyTorch."""

    def __init__(self, recurrent: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.recurrent = recurrent(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.recurrent(self.attention(x))[0]
        return z.mean(1)


@pytest.mark.parametrize("recurrent", [nn.GRU, nn.LSTM, nn.RNN])
def test_products_deep_in_pytorch_are_taken_in_float32(recurrent: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    net, x = Sequence(recurrent), torch.randn(4, 5, 8)
    found = []
    for low in (False, True):
        with Seen() as seen, train.InFloat32():
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                out = net(x)
            slopes = torch.autograd.grad(out.float().square().sum(), list(net.parameters()))
        assert not [func for func, half in seen.calls if half and func in train.PRODUCTS]
        found.append(torch.cat([g.flatten() for g in slopes]))
    assert 0 < (found[0] - found[1]).norm() < 0.05 * found[0].norm()


def test_the_softmax_of_attention_stays_in_float32() -> None:
    draw = torch.Generator().manual_seed(1)
    wide = [torch.randn(1, 2, 6, 8, generator=draw).bfloat16() for _ in range(3)]
    wide[0] *= 64  # the logarithms of the sums are far from 0, where bfloat16 is coarse
    slopes = []
    for dtype in (torch.float64, torch.bfloat16):
        given = [x.to(dtype).requires_grad_() for x in wide]
        with train.InFloat32():
            out = F.scaled_dot_product_attention(*given)
            out.backward(torch.ones_like(out).cumsum(-1))
        slopes.append(torch.cat([x.grad.double().flatten() for x in given]))
    assert (slopes[1] - slopes[0]).norm() < 0.03 * slopes[0].norm()


def test_what_is_not_asked_to_be_rounded_is_not() -> None:
    x = torch.full((2, 2), 1 + 2**-12)
    whole = torch.eye(2).long()
    with torch.autocast("cpu", torch.bfloat16), train.InFloat32():
        assert (x @ x == 2).all()
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(x @ x, torch.full((2, 2), 2 * (1 + 2**-12) ** 2))
        with torch.autocast("cpu", torch.float16):
            assert (x @ x).dtype == torch.float16
        assert torch.equal(whole @ whole, whole)
        out = torch.zeros(2, 2)
        torch.matmul(whole.float(), whole.float(), out=out)
        assert torch.equal(out, whole.float())


def test_schedules() -> None:
    paper, linear, robust = (train.SCHEDULES[n] for n in ("paper", "linear", "robust"))
    assert paper(0, 250) == 1
    assert paper(45, 250) == pytest.approx(0.25 * 0.9996**45)
    assert linear(1, 10) == pytest.approx(0.9)
    assert linear(10, 10) == 0
    assert robust(99, 200) == 1
    assert robust(140, 200) == pytest.approx(1 - 0.99 / 2)
    assert robust(180, 200) == pytest.approx(0.01)


@pytest.mark.parametrize("seed", [2**60, 2**64 - 1, -(2**63)])
def test_every_seed_that_is_allowed_trains(seed: int) -> None:
    net, data = plain(), task()
    fit = train.fit(net, data, RECIPE, seed=seed)
    assert equal(fit.theta, train.fit(net, data, RECIPE, seed=seed).theta)
    assert not equal(fit.theta, train.fit(net, data, RECIPE, seed=seed // 3).theta)


def test_errors_come_before_the_work() -> None:
    net, data = plain(), task()
    theta = train.initialise(net, 1)
    with pytest.raises(TrainingError, match="degree 1 has no inner point"):
        train.fit_curve(net, curves.line(theta, theta), data, RECIPE, seed=1)
    with pytest.raises(ValueError, match="schedule: got 'cosine', expected one of"):
        Recipe(epochs=1, schedule="cosine")
    with pytest.raises(ValueError, match="epochs: got 0, expected a whole number of at least 1"):
        Recipe(epochs=0)
    for name, value in {"epochs": 10**400, "lr": 1e308, "weight_decay": 1e39}.items():
        with pytest.raises(ValueError, match=f"^Recipe: {name}: got .* (to|at most) "):
            Recipe(**{"epochs": 1, name: value})
    with pytest.raises(ValueError, match="expected one of float32, bfloat16"):
        Recipe(epochs=1, precision="float16")
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf).*lower lr"):
        train.fit(net, data, Recipe(epochs=5, lr=1e9), seed=1)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(TrainingError, match="no module draws 'scale'"):
        train.initialise(Odd(), 1)


class WithHead(nn.Module):
    """A network with an auxiliary head in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.extra = plain(), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = self.body(x)
        return (self.head(x), self.extra(x)) if self.training else self.head(x)


def test_auxiliary_heads_count_three_tenths() -> None:
    z, y = torch.randn(3, 5, 4), torch.tensor([0, 1, 2, 3, 0])
    parts = [torch.nn.functional.cross_entropy(each, y) for each in z]
    assert train.cost(z[0], y) == parts[0]
    agree(train.cost(tuple(z), y), parts[0] + 0.3 * (parts[1] + parts[2]), 3 * len(y))
    before = train.initialise(WithHead(), 1)
    after = train.fit(WithHead(), task(), train.Recipe(epochs=1, lr=0.05), seed=1).theta
    assert not torch.equal(before["extra.weight"], after["extra.weight"])


NARROW = """
import warnings
import torch
from small import pictures
from mcnotes import curves, evaluate, models, train

warnings.filterwarnings("ignore", "TF32")  # `flags` sets this one, too
torch.backends.disable_global_flags()  # as programs do that test PyTorch itself
net = models.build("resnet20", num_classes=3, in_channels=1, width=4)
theta = train.initialise(net, 1)
step = train.Step(net, curves.Curve((theta,)), slice(0, 1), train.Recipe(1), torch.device("cpu"))
x, _ = next(pictures(32).batches(32))
y = torch.arange(32) % 3
with evaluate.mode(net, training=True):
    for _ in range(5):
        _, found = step.gradient(x, y, torch.ones(1))
    assert torch.backends.mkldnn.enabled, "as it was before"
    with torch.backends.mkldnn.flags(enabled=False):
        _, exact = step.gradient(x, y, torch.ones(1))
assert (found - exact).norm() <= 1e-3 * exact.norm(), float((found - exact).norm() / exact.norm())
"""


def test_gradients_of_narrow_residual_networks_are_sound_on_every_processor() -> None:
    """With AVX2 alone, oneDNN's kernel for their shortcuts ends the process (its issue 6035)."""
    processor = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", NARROW],
        env=os.environ | processor | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,  # without the guard it may wait for ever
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_batchnorm_sees_what_training_showed() -> None:
    """Augmented images have other statistics: with those of plain ones accuracy may be lost."""
    net, images = normed(), task(augment=Augment(padding=4, rotation=15))
    recipe = train.Recipe(1, 32, lr=0.01, schedule="linear", augment=True)
    theta = train.fit(net, images, recipe, seed=1).theta
    shown = images.train.augmented(images.augment)
    again = evaluate.batchnorm(net, theta, shown)
    plain = evaluate.batchnorm(net, theta, images.train)
    name = "1.running_mean"
    assert torch.equal(theta[name], again[name])
    assert not torch.allclose(theta[name], plain[name], atol=1e-3)
    without = train.fit(net, images, replace(recipe, augment=False), seed=1).theta
    assert torch.equal(without[name], evaluate.batchnorm(net, without, images.train)[name])
