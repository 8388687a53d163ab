"""Prepare and check models and batches of users before any computation (see `api`).

What does not fit is refused with an InputError that says what was found and what was expected.
"""

import inspect
import random
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mcnotes import calls, checkpoints, evaluate, symmetry, train
from mcnotes.calls import InputError, Inputs
from mcnotes.checkpoints import Numbers
from mcnotes.checks import form
from mcnotes.curves import Theta, check_same_space
from mcnotes.data import Loader, Sets
from mcnotes.data.arrays import failure
from mcnotes.data.loader import widened
from mcnotes.evaluate import Quantity
from mcnotes.symmetry import Bases, Symmetry
from mcnotes.symmetry.execute import tensors_in
from mcnotes.symmetry.find import relative_difference
from mcnotes.train import Loss

Metric = Callable[[Any, Any], Any]  # outputs and targets of a batch → their mean
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
VERIFIED = 1e-4  # relative; some networks compute in float32 for inputs of any dtype
KEPT = "it keeps something of its weights that is neither a parameter nor a buffer"


class Prepared(NamedTuple):
    """Models of one architecture and batches for them, on one device, in float32 or float64.

    who: the public function that was called; error messages begin with it.
    """

    who: str
    net: nn.Module  # a copy of the first model, in evaluation mode
    thetas: list[Theta]
    data: Loader
    outputs: list[list[Tensor]]  # of each model, for the first batch

    def __repr__(self) -> str:
        kind, number = type(self.net).__name__, len(self.thetas)
        return f"Prepared({number} models of {kind} for {self.who}, {self.data!r})"

    def add(self, name: str, other: nn.Module) -> None:
        """Add the state and the outputs of another model.

        Raises InputError unless it is of the architecture of the first.
        """
        who, theta = self.who, state(other)
        try:
            check_same_space(self.thetas[0], theta, f"{who}: {name}")
        except ValueError as error:
            raise InputError(str(error)) from error
        if tied(other) != tied(self.net):
            raise InputError(
                f"{who}: {name} ties different parameters than model_a, expected two models of "
                "one architecture"
            )
        found = first_outputs(who, name, other, self.data)
        if not alike(found, first_outputs(who, name, self.net, self.data, theta)):
            raise InputError(
                f"{who}: model_a with the parameters of {name} gives different outputs than "
                f"{name}, expected two models of one architecture; or {KEPT}"
            )
        self.thetas.append(theta)
        self.outputs.append(found)

    def symmetry(self) -> tuple[Symmetry, float]:
        """The symmetry, and the relative difference of outputs when it was verified.

        Raises SymmetryError if it cannot be found, or does not hold.
        """
        sym = symmetry.find(self.net, self.example)
        return sym, sym.verify(self.net, self.example, tolerance=VERIFIED)

    def bases(self, kinds: Collection[str]) -> tuple[Bases, float]:
        """As `symmetry`, with these kinds of groups."""
        found = symmetry.find(self.net, self.example, kinds=kinds)
        return found, found.verify(self.net, self.example, tolerance=VERIFIED)

    @property
    def example(self) -> Inputs:
        """The first inputs of the first batch, without labels."""
        few: Inputs = calls.first(unlabelled(self.data.head[0]), 4)
        return few

    def check_unchanged(self, k: int, theta: Theta) -> None:
        """Raise InputError unless parameters give the outputs of model k for the first batch."""
        found = first_outputs(self.who, "the result", self.net, self.data, theta)
        if not alike(found, self.outputs[k]):
            raise InputError(
                f"{self.who}: the result gives different outputs, although its symmetry was "
                "verified: its weights are too ill-conditioned for their precision. Fix: "
                "model.double(), or fewer kinds of symmetry"
            )

    def moved(self, k: int, model: nn.Module, theta: Theta) -> tuple[nn.Module, float]:
        """A copy of `model`, which is model k, with other parameters of the same function.

        With it the relative difference of its outputs from the model's, for the first batch; that
        of 16-bit floats is due to rounding. Raises InputError if the function is another, or if
        rounding leaves less than half of the digits.
        """
        self.check_unchanged(k, theta)
        made = filled(self.who, model, theta)
        net = working_copy(self.who, "the result", made, self.data.device)
        found = first_outputs(self.who, "the result", net, self.data)
        difference = relative_difference(self.outputs[k], found)
        own = max((p.dtype for p in made.parameters()), key=lambda kind: torch.finfo(kind).eps)
        if not alike(found, self.outputs[k], own):
            why = f"rounding to {own} changes them by {difference:.0e}. Fix: model.float()"
            raise InputError(
                f"{self.who}: the result gives different outputs, although its symmetry was "
                f"verified: {KEPT if own.itemsize > 2 else why}"
            )
        return made, difference


def prepare(
    who: str,
    models: Sequence[nn.Module],
    batches: Any,
    device: str | torch.device = "auto",
    *,
    once: bool = False,
    labels: bool = False,
) -> Prepared:
    """Copies of the models on `device` ("auto": CUDA if there is one, else where the first is).

    once: the batches are needed for one pass only. labels: pass "labels" to models that take them.
    Raises InputError unless the batches fit and all models are of one architecture, which means
    that each gives the same outputs as the first one does with that model's parameters.
    """
    names = [f"model_{chr(ord('a') + k)}" for k in range(len(models))]
    plain = [module(who, name, model) for name, model in zip(names, models, strict=True)]
    place = _device(device, plain[0])
    net = working_copy(who, names[0], plain[0], place)
    data = Loader(batches, place, once=once, labels=labels and takes_labels(net))
    _refuse_more(who, net, data)
    ready = Prepared(who, net, [state(net)], data, [first_outputs(who, names[0], net, data)])
    for name, model in [*zip(names, plain, strict=True)][1:]:
        ready.add(name, working_copy(who, name, model, place))
    return ready


def _device(wanted: str | torch.device, model: nn.Module) -> torch.device:
    """The device that is wanted; for "auto" CUDA if available, and otherwise the model's own."""
    if wanted != "auto":
        return torch.device(wanted)
    own = next(model.parameters()).device
    return torch.device("cuda") if own.type == "cpu" and torch.cuda.is_available() else own


def _refuse_more(who: str, net: nn.Module, data: Loader) -> None:
    """Raise InputError for batches of three values or more, if the second may be an input."""
    inputs, takes = data.head[0], inspect.signature(net.forward).parameters.values()
    places = [p for p in takes if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if data.values > 2 and isinstance(inputs, Tensor) and len(places) > 1:
        raise InputError(
            f"{who}: the batches hold {data.values} values, of which the second is the target or "
            f"the network's {places[1].name!r}; expected (inputs, targets), or several inputs in a "
            "tuple of their own, ((first, second), targets)"
        )


def choose_loss(ready: Prepared, given: Loss | None) -> Loss:
    """`given`, else the model's own loss if it gets labels, else the cross-entropy of its logits.

    Raises InputError if the loss fails on the first batch.
    """
    inputs, targets = ready.data.head
    if given is not None:
        return _checked(ready, "the loss", given)
    labelled = isinstance(inputs, Mapping) and "labels" in inputs
    if labelled and isinstance(calls.field(_outputs(ready), "loss"), Tensor):
        return own_loss
    if targets is None:
        raise InputError(
            f"{ready.who}: the batches hold no targets, expected (inputs, targets), or "
            "a loss (outputs, targets) that needs none"
        )
    if any(_equal(x, targets) for x in tree_leaves(inputs)):
        raise InputError(
            f"{ready.who}: the targets are the inputs, expected different ones for the "
            "cross-entropy, such as the next tokens for a language model. Fix: shift the "
            "targets, or pass a loss"
        )
    return _checked(ready, "the cross-entropy", train.cost)


def own_loss(outputs: Any, _: Any) -> Tensor:
    """The loss that a model returns if it gets labels, as models of `transformers` do."""
    loss: Tensor = calls.field(outputs, "loss")
    return loss


def of_labels(ready: Prepared) -> Quantity:
    """The model's own loss, where each batch counts by its labels, of which that is the mean.

    Without this the result would depend on how texts of several lengths are cut into batches.
    Models that foretell the next token drop the first label of each text, and others do not: what
    comes closer to the loss on the first batch tells which. What are no labels of places (of
    images, or numbers to be fitted) count by samples.
    """
    outputs, y = _outputs(ready), ready.data.head[1]
    z, loss = calls.field(outputs, "logits"), float(own_loss(outputs, y))
    places = isinstance(z, Tensor) and isinstance(y, Tensor) and z.dim() == 3
    if not places or y.is_floating_point() or z.shape[:2] != y.shape:
        return evaluate.averaged(own_loss)

    def apart(first: int) -> float:
        total, seen = evaluate.entropy(z[:, : z.shape[1] - first], y[:, first:])
        return abs(float(total) / max(int(seen), 1) - loss)

    start = min((0, 1), key=apart)

    def measured(outputs: Any, y: Tensor, _: int) -> tuple[Tensor, Tensor]:
        seen = (y[:, start:] != evaluate.IGNORED).sum()
        mean = own_loss(outputs, y)
        return (mean * seen if seen else torch.zeros_like(mean)), seen

    return measured


def quantities(
    ready: Prepared, loss: Loss | None, metrics: Mapping[str, Metric] | None
) -> dict[str, Quantity]:
    """The quantities to measure: the loss first, then the metrics.

    The accuracy is added if neither is given. For a model that computes its own loss, which may
    shift the targets, this needs one target for each sample. Raises InputError for a function that
    fails on the first batch.
    """
    used = choose_loss(ready, loss)
    standard = used is train.cost
    wanted = {"loss": evaluate.entropy if standard else evaluate.averaged(used)}
    if used is own_loss:
        wanted["loss"] = of_labels(ready)
    for name, metric in (metrics or {}).items():
        if name in ("t", "arc", "loss"):
            raise InputError(
                f"{ready.who}: the name {name!r} of a metric is reserved. Fix: rename it"
            )
        wanted[name] = evaluate.averaged(_checked(ready, f"metric {name!r}", metric))
    if metrics is None and loss is None:
        targets, z = ready.data.head[1], calls.field(_outputs(ready), "logits")
        plain = isinstance(z, Tensor) and z.dim() == 2 and targets.shape == z.shape[:1]
        if standard or (plain and not targets.is_floating_point()):
            wanted["accuracy"] = evaluate.hits
    return wanted


def check_slope(ready: Prepared, loss: Loss, *, frozen: bool = False) -> None:
    """Raise InputError unless the loss has a gradient in the parameters.

    frozen: those with requires_grad=False count, too, for symmetries move them.
    """
    inputs, targets = ready.data.head
    free = {name for name, p in ready.net.named_parameters() if p.requires_grad or frozen}
    theta = {n: x.clone().requires_grad_(n in free) for n, x in ready.thetas[0].items()}
    with evaluate.mode(ready.net, training=False), torch.enable_grad():
        value = loss(calls.call(ready.net, theta, inputs), targets)
    if not (isinstance(value, Tensor) and value.requires_grad):
        raise InputError(
            f"{ready.who}: the loss has no gradient in the parameters, expected a "
            "differentiable loss, and parameters with requires_grad"
        )


def _checked(ready: Prepared, what: str, function: Metric) -> Metric:
    """The function itself, after a trial call. Raises InputError unless it returns a number."""
    outputs, targets = _outputs(ready), ready.data.head[1]
    try:
        with warnings.catch_warnings():
            # PyTorch repeats targets [N] for outputs [N, 1] to [N, N], and only warns.
            warnings.filterwarnings("error", "Using a target size", UserWarning)
            value = torch.as_tensor(function(outputs, targets))
    except (Exception, SystemExit) as error:  # of the user's function
        raise InputError(
            f"{ready.who}: {what} fails on the first batch ({failure(error)}); it was called "
            f"with outputs, {form(outputs)}, and targets, {form(targets)}"
        ) from error
    if value.dim() or value.is_complex():
        raise InputError(
            f"{ready.who}: {what} returns numbers of shape {[*value.shape]} and {value.dtype}, "
            "expected a single real one, the mean over the batch"
        )
    return function


def for_inputs(
    net: nn.Module,
    sets: Sets,
    mean: Numbers | None = None,
    std: Numbers | None = None,
) -> nn.Module:
    """The network for batches of `sets`, with (x − mean) / std in front if these are images.

    With numbers for three channels, grey images are first repeated to three channels. Raises
    InputError if the numbers do not fit the images, and CheckpointError if they cannot be the mean
    and standard deviation of pixels in [0, 1].
    """
    given = {n: x for n, x in {"mean": mean, "std": std}.items() if x is not None}
    if sets.task is None:
        if given:
            raise InputError(
                "mean and std are for pictures, and these data come in batches, which are not "
                "changed. Fix: leave mean and std out, and normalise where the batches are made"
            )
        return net
    sizes = {n: len(x) for n, x in given.items() if isinstance(x, list | tuple) and len(x) > 1}
    if len({*sizes.values()}) > 1:
        raise InputError(f"got numbers for {sizes} channels, expected as many in mean and std")
    channels, has = max(sizes.values(), default=0), sets.task.example.shape[1]
    if has not in (1, channels) and channels:
        raise InputError(f"got mean and std of {channels} channels for pictures of {has}")
    return checkpoints.normalised(net, channels=channels, **given)


def module(who: str, name: str, model: Any) -> nn.Module:
    """The module without its wrappers. Raises InputError if it cannot be used."""
    model = checkpoints.unwrapped(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"{who}: {name} is a {type(model).__name__}, expected an nn.Module")
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        raise InputError(
            f"{who}: {name} is compiled by torch.jit, and its parameters cannot be replaced; give "
            "the module that it was made of"
        )
    found: dict[str, Tensor] = dict(model.named_parameters())
    if not found:
        raise InputError(f"{who}: {name} has no parameters, expected a network with some")
    found |= dict(model.named_buffers())
    for what, x in found.items():
        if x.is_meta or nn.parameter.is_lazy(x):
            raise InputError(f"{who}: {name}'s {what!r} has no values. Fix: load them first")
        if x.is_complex() or x.is_quantized or (x.is_floating_point() and x.dtype not in FLOATS):
            raise InputError(f"{who}: {name}'s {what!r} is {x.dtype}, expected 16 to 64-bit floats")
    if len(kinds := {x.dtype for x in map(widened, model.parameters())}) > 1:
        raise InputError(f"{who}: {name} has parameters of {sorted(map(str, kinds))}, expected one")
    if len(places := {str(x.device) for x in found.values()}) > 1:
        raise InputError(f"{who}: {name} lies on {sorted(places)}, expected one device")
    return model


def copied(who: str, name: str, model: nn.Module) -> nn.Module:
    """A copy that shares no memory and has no gradients. Raises InputError if copying fails."""
    original = module(who, name, model)
    try:
        made = calls.duplicate(original)
    except InputError as error:
        raise InputError(f"{who}: {name}: {error}") from error
    made.zero_grad()
    return made


def working_copy(who: str, name: str, model: nn.Module, device: torch.device) -> nn.Module:
    """A copy on the device, in evaluation mode, with 16-bit floats converted to float32."""
    net: nn.Module = copied(who, name, model)._apply(lambda x: widened(x).to(device))
    # The cache that language models of `transformers` return would count as outputs, and would pin
    # the units of attention.
    if getattr(config := getattr(net, "config", None), "use_cache", False):
        config.use_cache = False  # type: ignore[union-attr]
    return net.eval()


def state(net: nn.Module) -> Theta:
    """All parameters and buffers; tied ones under each of their names."""
    found: dict[str, Tensor] = dict(net.named_parameters(remove_duplicate=False))
    found |= dict(net.named_buffers(remove_duplicate=False))
    return {name: x.detach() for name, x in found.items()}


def filled(who: str, model: nn.Module, theta: Theta) -> nn.Module:
    """A copy of `model` with the values `theta`, in the dtypes and on the device of `model`."""
    made = copied(who, "the model", model)
    for name, x in state(made).items():
        if theta[name].isnan().any():
            raise InputError(
                f"{who}: {name!r} of the result is NaN, computed from the batches; look for NaN "
                "and for infinite numbers in their inputs"
            )
        x.copy_(theta[name])
    with evaluate.mode(made, training=True):  # in training mode, modules drop what they cached
        return made


def tied(net: nn.Module) -> list[list[str]]:
    """For each parameter, the list of its names."""
    names: dict[int, list[str]] = {}
    for name, x in net.named_parameters(remove_duplicate=False):
        names.setdefault(id(x), []).append(name)
    return sorted(names.values())


def takes_labels(net: nn.Module) -> bool:
    return "labels" in inspect.signature(net.forward).parameters


def _outputs(ready: Prepared) -> Any:
    """The first model's outputs for the first batch, of the form that a loss gets."""
    with evaluate.mode(ready.net, training=False), torch.no_grad():
        return _call(ready.who, "the model", ready.net, ready.thetas[0], ready.data.head[0])


def first_outputs(
    who: str, name: str, net: nn.Module, data: Loader, theta: Theta | None = None
) -> list[Tensor]:
    """The output tensors for the first batch without its labels.

    Raises InputError if there are none, or if they hold NaN.
    """
    inputs = unlabelled(data.head[0])
    with evaluate.mode(net, training=False), torch.no_grad():
        torch.manual_seed(0)
        theta = state(net) if theta is None else theta
        found = [*tensors_in(_call(who, name, net, theta, inputs))]
    if not found:
        raise InputError(
            f"{who}: {name} returns no tensor, expected one, or a sequence, mapping or "
            "dataclass of tensors"
        )
    if any(x.isnan().any() for x in found):
        raise InputError(
            f"{who}: {name} gives NaN for the first batch. Fix: look for NaN in its weights "
            "and in the inputs"
        )
    return found


def unlabelled(inputs: Inputs) -> Inputs:
    """Inputs without their labels, if these stand among them."""
    if isinstance(inputs, Mapping):
        return {n: x for n, x in inputs.items() if n != "labels"}
    return inputs


def _call(who: str, name: str, net: nn.Module, theta: Theta, inputs: Any) -> Any:
    try:
        return calls.call(net, theta, inputs)
    except (Exception, SystemExit) as error:  # of the user's network
        raise InputError(
            f"{who}: {name} fails on the first batch ({failure(error)}), expected batches "
            "of its inputs, or of (inputs, targets)"
        ) from error


def alike(xs: list[Tensor], ys: list[Tensor], rounded: torch.dtype = torch.float64) -> bool:
    """Whether two lists of outputs agree up to rounding, in half of their digits.

    rounded: to what the parameters of one were rounded, if that has fewer digits than the outputs.
    """
    return len(xs) == len(ys) and all(_near(x, y, rounded) for x, y in zip(xs, ys, strict=True))


def _near(x: Tensor, y: Tensor, rounded: torch.dtype) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype or not x.is_floating_point():
        return _equal(x, y)
    largest = float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 0.0
    tolerance = max(torch.finfo(x.dtype).eps, torch.finfo(rounded).eps) ** 0.5
    return torch.allclose(x, y, rtol=tolerance, atol=tolerance * largest)


def _equal(x: Any, y: Any) -> bool:
    both = isinstance(x, Tensor) and isinstance(y, Tensor)
    return both and x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)


@contextmanager
def untouched(batches: Any, seed: int) -> Iterator[None]:
    """Seed all random generators with `seed`, and restore their states at the end.

    These are the generators of torch, Python and NumPy, and the one that a DataLoader may hold.
    """
    own = getattr(batches, "generator", None)
    kept = own.get_state() if isinstance(own, torch.Generator) else None
    plain, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(cuda):
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(legacy)  # noqa: NPY002
            if isinstance(own, torch.Generator) and kept is not None:
                own.set_state(kept)
