"""The living figure: the reader permutes the units of a network, and the barrier follows.

For one hidden layer everything is exact and small: pre-activations move in straight lines (chapter
5), so that the loss at every t, for every order of the units, follows from the pre-activations of
some images and the two output layers. The page computes it itself, offline (`barrier.js`).
"""

from __future__ import annotations

import base64
import html
import io
import json
import uuid
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from mcnotes import curves, evaluate, matching, symmetry
from mcnotes.curves import Theta
from mcnotes.data import Split
from mcnotes.lab import figures

SHOWN, ACROSS = 40, 8  # images whose faults are drawn, and how many in a row
SIDE = 14  # pixels of a unit's picture, at most
SIZES = ("width", "height", "across", "tile", "shown", "norms")  # of data: what the layout needs


class Permuter:
    """Two networks of one hidden layer, whose units the reader permutes (chapters 3 to 5).

    net: Linear, ReLU, Linear, whatever stands before them; theta_a, theta_b: two states of it.
    split: images that are not the ones it was trained on; the first `images` of them are used.
    bound: draw the theorem's bound of chapter 5 as well. Raises ValueError if the network is not
    such a network, or has more units than a reader can move (64).
    """

    def __init__(
        self,
        net: nn.Module,
        theta_a: Theta,
        theta_b: Theta,
        split: Split,
        *,
        images: int = 1000,
        bound: bool = False,
    ) -> None:
        some = split.first(images)
        hidden, head = _layers(net)
        a, b = (_seen(net, theta, some, hidden, head) for theta in (theta_a, theta_b))
        self.units = len(a["A"])
        if self.units > 64:
            raise ValueError(f"permuter: {self.units} hidden units, expected at most 64")
        labels = some.labels.flatten().tolist()
        data: dict[str, Any] = {"labels": labels}
        for number, of in (("1", a), ("2", b)):
            data[f"z{number}"], data[f"scales{number}"] = _packed(of["z"])
            data[f"A{number}"] = of["A"].tolist()
            data[f"b{number}"] = of["b"].tolist()
        pictures = next(some.batches(min(SHOWN, len(some))))[0]
        data |= _unit_pictures(a["W"], b["W"], tuple(pictures.shape[1:]))
        data |= _sheet(pictures)
        if bound:
            data["norms"] = sum(float(np.linalg.norm(x["A"], 2)) for x in (a, b))
        self.data = data
        sym = symmetry.find(net, next(some.first(2).batches(2))[0].cpu())
        self.picture = _picture(net, theta_a, theta_b, some, sym)

    def __repr__(self) -> str:
        return f"Permuter({self.units} units, {len(self.data['labels'])} images)"

    def _repr_html_(self) -> str:
        here = Path(__file__).parent
        maths, interface, style = (
            (here / name).read_text("utf8")
            for name in ("barrier.js", "permuter.js", "permuter.css")
        )
        name = f"permuter-{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(self.data)).hex[:8]}"
        alt = html.escape(
            "Test loss on the straight line from A to B: the units as given, and aligned."
        )
        data = json.dumps(self.data, separators=(",", ":"))
        sizes = {key: self.data[key] for key in SIZES if key in self.data}
        return (
            f"<style>{style}</style>"
            f'<div class="permuter" id="{name}"><img alt="{alt}" src="{self.picture}"></div>'
            f"<script>window[{json.dumps(name)}]={data};</script>"
            f"<script>(() => {{{_plain(maths)}\n{_plain(interface)}\n"
            f"const name = {json.dumps(name)}, units = {self.units};\n"
            f"const sizes = {json.dumps(sizes)};\n{START}}})();</script>"
        )


# Until the figure comes near, the picture stands in its place, and nothing is computed. The numbers
# may come later, from a file of their own: the book's pages move large ones there. A figure in view
# keeps its place meanwhile: it is laid out for one image and units that are all alike, unseen.
START = """
const box = document.getElementById(name);
const start = () => permuter(box, window[name]);
const near = () => box.getBoundingClientRect().top < innerHeight + 300;
const outline = () => {
  const each = (value) => Array(units).fill(value);
  const half = { scales1: each(0), b1: [0], A1: each([0]), z1: btoa("ab".repeat(units)) };
  const other = { scales2: each(1), b2: [0], A2: each([0]), z2: half.z1 };
  const picturesA = btoa("a".repeat(units * sizes.width * sizes.height));
  const rest = { labels: [0], picturesA, picturesB: picturesA, sheet: sizes.shown ? "data:," : "" };
  return { ...sizes, ...half, ...other, ...rest };
};
const wait = () => {
  box.style.visibility = "";
  if (near() || typeof IntersectionObserver === "undefined") return start();
  const eye = new IntersectionObserver(([entry]) => {
    if (!entry.isIntersecting) return;
    eye.disconnect();
    start();
  }, { rootMargin: "300px" });
  eye.observe(box);
};
if (Object.hasOwn(window, name)) wait(); // else it is the box: windows know elements by their ids
else {
  if (near()) {
    permuter(box, outline());
    box.style.visibility = "hidden";
  }
  addEventListener("DOMContentLoaded", wait);
}
"""


def _plain(script: str) -> str:
    """A script without its lines of comment."""
    kept = (line for line in script.splitlines() if not line.lstrip().startswith("//"))
    return "\n".join(kept)


def _layers(net: nn.Module) -> tuple[str, str]:
    """The names of the hidden layer and of the output layer."""
    named = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if len(named) != 2:
        raise ValueError(
            f"permuter: {type(net).__name__} has {len(named)} Linear layers, expected two"
        )
    return named[0], named[1]


def _seen(
    net: nn.Module, theta: Theta, some: Split, hidden: str, head: str
) -> dict[str, NDArray[np.float64]]:
    """Pre-activations z [images, units] and weights: A [units, classes], b [classes], W."""
    found: list[Tensor] = []
    module = net.get_submodule(hidden)
    handle = module.register_forward_hook(lambda _m, _i, z: found.append(z))
    x = next(some.batches(len(some)))[0]
    try:
        with torch.no_grad(), evaluate.mode(net, training=False):
            logits = functional_call(net, theta, (x,)).double().cpu()
    finally:
        handle.remove()
    z = found[0].double().cpu()
    A = theta[f"{head}.weight"].double().cpu().T
    b = theta.get(f"{head}.bias", torch.zeros(A.shape[1])).double().cpu()
    again = z.relu() @ A + b if z.ndim == 2 and z.shape[1] == len(A) else logits + torch.inf
    if not torch.allclose(again, logits, atol=1e-4 * float(logits.abs().max()), rtol=0):
        raise ValueError(
            f"permuter: {type(net).__name__} is not {head}(relu({hidden}(…))); expected one hidden "
            "layer with a ReLU, and nothing after the second Linear"
        )
    W = theta[f"{hidden}.weight"].double().cpu()
    return {"z": z.numpy(), "A": A.numpy(), "b": b.numpy(), "W": W.numpy()}


def _packed(z: NDArray[np.float64]) -> tuple[str, list[float]]:
    """z [images, units] unit by unit as 16-bit integers in base64, and each unit's scale."""
    scales = np.maximum(np.abs(z).max(0), 1e-9) / 32767
    whole = np.round(z / scales).astype("<i2").T
    return base64.b64encode(np.ascontiguousarray(whole).tobytes()).decode(), scales.tolist()


def _unit_pictures(
    one: NDArray[np.float64], two: NDArray[np.float64], shape: tuple[int, ...]
) -> dict[str, Any]:
    """Incoming weights as small pictures, one byte a pixel; none if inputs are no pictures."""
    if len(shape) != 3 or one.shape[1] != np.prod(shape):
        return {"width": 0, "height": 0}
    drawn: dict[str, Any] = {}
    for name, weights in (("picturesA", one), ("picturesB", two)):
        w = torch.from_numpy(weights).reshape(-1, *shape).mean(1, keepdim=True)
        small = min(SIDE, shape[1]), min(SIDE, shape[2])
        w = nn.functional.adaptive_avg_pool2d(w, small).flatten(1)
        w = w / w.abs().amax(1, keepdim=True).clamp_min(1e-12)
        code = (w * 127 + 128).round().to(torch.uint8).numpy()
        drawn[name] = base64.b64encode(code.tobytes()).decode()
        drawn |= {"height": small[0], "width": small[1]}
    return drawn


def _sheet(pictures: Tensor) -> dict[str, Any]:
    """The first images as one PNG, for the figure to ring those that are wrong."""
    if pictures.ndim != 4:
        return {}
    n, _, height, width = pictures.shape
    tile = max(height, width)
    grey = pictures.double().mean(1)
    grey = (grey - grey.min()) / (grey.max() - grey.min()).clamp_min(1e-12)
    sheet = np.zeros((-(-n // ACROSS) * tile, ACROSS * tile), np.uint8)
    for k, picture in enumerate((255 * grey).round().to(torch.uint8).cpu().numpy()):
        top, left = k // ACROSS * tile, k % ACROSS * tile
        sheet[top : top + height, left : left + width] = picture
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "png", optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode()
    return {"sheet": f"data:image/png;base64,{text}", "across": ACROSS, "tile": tile, "shown": n}


def _picture(
    net: nn.Module, theta_a: Theta, theta_b: Theta, some: Split, sym: symmetry.Symmetry
) -> str:
    """What stands in place of the figure where scripts are off: the line, before and after."""
    perm = matching.match(matching.Pair(net, sym, theta_a, theta_b), some).perm
    figure, ax = plt.subplots(figsize=(5.2, 2.8))
    for method, end in (("unaligned", theta_b), ("aligned", sym.permute(theta_b, perm))):
        line = curves.line(theta_a, end)
        found = evaluate.profile(net, line, some, points=9, statistics=None)
        ax.plot(found.t, found.loss, color=figures.color(method), label=method)
    ax.set(xlabel="$t$, from A to B", ylabel="test loss (nats)", ylim=(0, None))
    ax.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    plt.close(figure)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
