"""Models and batches of users, made ready for work and checked before any (see `api`).

What does not fit is refused by an InputError of one sentence: what was found, what was expected.
"""

import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mcnotes import calls, checkpoints, evaluate, symmetry, train
from mcnotes.calls import InputError
from mcnotes.checkpoints import Numbers
from mcnotes.curves import Theta, check_same_space
from mcnotes.data import Loader, Sets
from mcnotes.data.arrays import failure
from mcnotes.data.loader import widened
from mcnotes.evaluate import Quantity
from mcnotes.symmetry import Symmetry
from mcnotes.symmetry.execute import tensors_in
from mcnotes.symmetry.find import relative_difference
from mcnotes.train import Loss

Metric = Callable[[Any, Any], Any]  # outputs and targets of a batch → the mean over it
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
VERIFIED = 1e-4  # relative; some networks compute in float32 whatever they are given
KEPT = "it keeps something of its weights that is neither a parameter nor a buffer"


class Prepared(NamedTuple):
    """Models of one architecture, and batches for them: all on one device, floats of 32 or 64 bits.

    Its functions take `who`, the one that asks, from here: their errors begin with it.
    """

    who: str
    net: nn.Module  # a copy of the first model, in evaluation mode
    thetas: list[Theta]
    data: Loader
    outputs: list[list[Tensor]]  # of each model, for the first batch

    def symmetry(self) -> tuple[Symmetry, float]:
        """What may be permuted, and by how much outputs differed when it was verified.

        SymmetryError if it cannot be found, or does not hold.
        """
        example = calls.first(self.data.head[0], 4)
        sym = symmetry.find(self.net, example)
        return sym, sym.verify(self.net, example, tolerance=VERIFIED)

    def check_result(self, model: nn.Module, expected: list[Tensor]) -> float:
        """The relative difference of `model`'s outputs for the first batch from those expected.

        Raises InputError unless they are the same but for rounding.
        """
        net = working_copy(self.who, "the result", model, self.data.device)
        found = first_outputs(self.who, "the result", net, self.data)
        if not alike(found, expected):
            raise InputError(
                f"{self.who}: in the new order the model gives other outputs, though "
                f"its symmetry was verified: {KEPT}"
            )
        return relative_difference(expected, found)


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

    once: the batches are needed once only. labels: models that take "labels" get them. Raises
    InputError unless all are of one architecture, which the batches fit: each model gives the same
    outputs as the first does with that model's parameters.
    """
    names = [f"model_{chr(ord('a') + k)}" for k in range(len(models))]
    plain = [module(who, name, model) for name, model in zip(names, models, strict=True)]
    own = next(plain[0].parameters()).device
    if device == "auto":
        device = "cuda" if own.type == "cpu" and torch.cuda.is_available() else own
    net = working_copy(who, names[0], plain[0], torch.device(device))
    data = Loader(batches, torch.device(device), once=once, labels=labels and takes_labels(net))
    _refuse_more(who, net, data)
    thetas, outputs = [state(net)], [first_outputs(who, names[0], net, data)]
    for name, model in list(zip(names, plain, strict=True))[1:]:
        other = working_copy(who, name, model, data.device)
        theta = state(other)
        try:
            check_same_space(thetas[0], theta, f"{who}: {name}")
        except ValueError as error:
            raise InputError(str(error)) from error
        if tied(other) != tied(net):
            raise InputError(
                f"{who}: {name} ties other parameters than {names[0]}, expected two "
                "models of one architecture"
            )
        found = first_outputs(who, name, other, data)
        if not alike(found, first_outputs(who, name, net, data, theta)):
            raise InputError(
                f"{who}: {names[0]} with the parameters of {name} gives other outputs "
                f"than {name}, expected two models of one architecture; or {KEPT}"
            )
        thetas.append(theta)
        outputs.append(found)
    return Prepared(who, net, thetas, data, outputs)


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
    """`given`, or the model's own loss if it gets labels, or the cross-entropy of its logits.

    Raises InputError if it does not fit the first batch.
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
            f"{ready.who}: the targets are the inputs, expected others for the "
            "cross-entropy: of a language model those of the next place; or pass a "
            "loss"
        )
    return _checked(ready, "the cross-entropy", train.cost)


def own_loss(outputs: Any, _: Any) -> Tensor:
    """What a model that was given labels says of its loss, as those of `transformers` do."""
    loss: Tensor = calls.field(outputs, "loss")
    return loss


def quantities(
    ready: Prepared, loss: Loss | None, metrics: Mapping[str, Metric] | None
) -> dict[str, Quantity]:
    """What to measure: the loss first, then the metrics; accuracy where both are left open.

    But a model that computes its own loss may shift its targets: then only if there is one for each
    sample. Raises InputError for what does not fit the first batch.
    """
    used = choose_loss(ready, loss)
    standard = used is train.cost
    wanted = {"loss": evaluate.entropy if standard else evaluate.averaged(used)}
    for name, metric in (metrics or {}).items():
        if name in ("t", "arc", "loss"):
            raise InputError(f"{ready.who}: a metric is called {name!r}, expected another name")
        wanted[name] = evaluate.averaged(_checked(ready, f"metric {name!r}", metric))
    if metrics is None and loss is None:
        targets, z = ready.data.head[1], calls.field(_outputs(ready), "logits")
        plain = isinstance(z, Tensor) and z.dim() == 2 and targets.shape == z.shape[:1]
        if standard or (plain and not targets.is_floating_point()):
            wanted["accuracy"] = evaluate.hits
    return wanted


def check_slope(ready: Prepared, loss: Loss) -> None:
    """Raise InputError unless the loss can be followed downhill."""
    inputs, targets = ready.data.head
    free = {name for name, p in ready.net.named_parameters() if p.requires_grad}
    theta = {n: x.clone().requires_grad_(n in free) for n, x in ready.thetas[0].items()}
    with evaluate.mode(ready.net, training=False), torch.enable_grad():
        value = loss(calls.call(ready.net, theta, inputs), targets)
    if not (isinstance(value, Tensor) and value.requires_grad):
        raise InputError(
            f"{ready.who}: the loss has no slope in the parameters, expected a "
            "differentiable loss, and parameters with requires_grad"
        )


def _checked(ready: Prepared, what: str, function: Metric) -> Metric:
    """The function itself, after one call. InputError if it fails or gives no number."""
    outputs, targets = _outputs(ready), ready.data.head[1]
    try:
        with warnings.catch_warnings():
            # PyTorch repeats targets [N] for outputs [N, 1] to [N, N], and only warns.
            warnings.filterwarnings("error", "Using a target size", UserWarning)
            value = torch.as_tensor(function(outputs, targets))
    except (Exception, SystemExit) as error:  # of the user's function
        raise InputError(
            f"{ready.who}: {what} fails on the first batch ({failure(error)}); it gets "
            f"outputs, {_said(outputs)}, and targets, {_said(targets)}"
        ) from error
    if value.dim() or value.is_complex():
        raise InputError(
            f"{ready.who}: {what} gives numbers {[*value.shape]} of {value.dtype}, expected a "
            "real one: the mean over the batch"
        )
    return function


def _said(x: Any) -> str:
    return f"{x.dtype} {[*x.shape]}" if isinstance(x, Tensor) else type(x).__name__


def for_inputs(
    net: nn.Module,
    sets: Sets,
    mean: Numbers | None = None,
    std: Numbers | None = None,
) -> nn.Module:
    """The network for batches of `sets`; if these are images in [0, 1], (x − mean) / std first.

    Three numbers also make a grey image one in colours. Raises InputError where they do not fit,
    CheckpointError where they are no mean and deviation of pixels.
    """
    given = {n: x for n, x in {"mean": mean, "std": std}.items() if x is not None}
    if sets.task is None:
        if given:
            raise InputError(
                "mean and std are for pictures, and these data come in batches, which are taken as "
                "they are: leave mean and std out, and normalise where the batches are made"
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
    """The module itself, out of its wrappers. InputError if it cannot be used."""
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
            raise InputError(f"{who}: {name}'s {what!r} has no values; load them first")
        if x.is_complex() or x.is_quantized or (x.is_floating_point() and x.dtype not in FLOATS):
            raise InputError(f"{who}: {name}'s {what!r} is {x.dtype}, expected 16 to 64-bit floats")
    if len(kinds := {x.dtype for x in map(widened, model.parameters())}) > 1:
        raise InputError(f"{who}: {name} has parameters of {sorted(map(str, kinds))}, expected one")
    if len(places := {str(x.device) for x in found.values()}) > 1:
        raise InputError(f"{who}: {name} lies on {sorted(places)}, expected one device")
    return model


def copied(who: str, name: str, model: nn.Module) -> nn.Module:
    """A copy that shares nothing, without gradients. InputError if that cannot be."""
    original = module(who, name, model)
    try:
        made = calls.duplicate(original)
    except InputError as error:
        raise InputError(f"{who}: {name}: {error}") from error
    made.zero_grad()
    return made


def working_copy(who: str, name: str, model: nn.Module, device: torch.device) -> nn.Module:
    """A copy to compute with: on the device, 16-bit floats as float32, in evaluation mode."""

    net: nn.Module = copied(who, name, model)._apply(lambda x: widened(x).to(device))
    # What a language model of `transformers` keeps for its next call would count as its outputs,
    # and hold the units of attention in their places.
    if getattr(config := getattr(net, "config", None), "use_cache", False):
        config.use_cache = False  # type: ignore[union-attr]
    return net.eval()


def state(net: nn.Module) -> Theta:
    """All parameters and buffers, by all their names."""
    found: dict[str, Tensor] = dict(net.named_parameters(remove_duplicate=False))
    found |= dict(net.named_buffers(remove_duplicate=False))
    return {name: x.detach() for name, x in found.items()}


def filled(who: str, model: nn.Module, theta: Theta) -> nn.Module:
    """A copy of `model` with the values `theta`, in its own types, on its own device."""
    made = copied(who, "the model", model)
    for name, x in state(made).items():
        if theta[name].isnan().any():
            raise InputError(
                f"{who}: {name!r} of the result is NaN, computed from the batches; look for NaN "
                "and for infinite numbers in their inputs"
            )
        x.copy_(theta[name])
    with evaluate.mode(made, training=True):  # in which it forgets what it computed from others
        return made


def tied(net: nn.Module) -> list[list[str]]:
    """The names of each parameter."""
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
    """The tensors that come out for the first batch without its labels; InputError if none do."""
    inputs = data.head[0]
    if isinstance(inputs, Mapping):
        inputs = {n: x for n, x in inputs.items() if n != "labels"}
    with evaluate.mode(net, training=False), torch.no_grad():
        torch.manual_seed(0)
        theta = state(net) if theta is None else theta
        found = [*tensors_in(_call(who, name, net, theta, inputs))]
    if not found:
        raise InputError(
            f"{who}: {name} gives no tensor, expected one, or a sequence, mapping or "
            "dataclass of some"
        )
    if any(x.isnan().any() for x in found):
        raise InputError(
            f"{who}: {name} gives NaN for the first batch; look for NaN in its weights "
            "or in the inputs"
        )
    return found


def _call(who: str, name: str, net: nn.Module, theta: Theta, inputs: Any) -> Any:
    try:
        return calls.call(net, theta, inputs)
    except (Exception, SystemExit) as error:  # of the user's network
        raise InputError(
            f"{who}: {name} fails on the first batch ({failure(error)}), expected batches "
            "of its inputs, or of (inputs, targets)"
        ) from error


def alike(xs: list[Tensor], ys: list[Tensor]) -> bool:
    """Whether two lists of outputs are the same but for rounding: half of their digits agree."""
    return len(xs) == len(ys) and all(map(_near, xs, ys))


def _near(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype or not x.is_floating_point():
        return _equal(x, y)
    largest = float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 0.0
    tolerance = torch.finfo(x.dtype).eps ** 0.5
    return torch.allclose(x, y, rtol=tolerance, atol=tolerance * largest)


def _equal(x: Any, y: Any) -> bool:
    both = isinstance(x, Tensor) and isinstance(y, Tensor)
    return both and x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)


@contextmanager
def untouched(batches: Any, seed: int) -> Iterator[None]:
    """Randomness from `seed` for a while; then all generators are as they were.

    Those of torch, of Python, of NumPy, and one that a DataLoader holds.
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
