"""How fast the living figure answers, as on a phone: `python benchmarks/permuter.py`.

In a headless browser slowed down to a quarter of this processor's speed, 32 units and 1,000 images:
the milliseconds of one swap of two units (13 losses, and everything that is drawn), as medians of
200, beside the 16.7 ms that a frame lasts, and beside the multiplications alone at the speed of one
loop over as many numbers in the same browser, which is the limit. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from mcnotes import models, train  # noqa: E402
from mcnotes.data import Split  # noqa: E402
from mcnotes.lab.permuter import Permuter  # noqa: E402
from tools.browser import browser  # noqa: E402

UNITS, IMAGES, CLASSES, PLACES = 32, 1000, 10, 11  # places between the ends
FRAME = 1000 / 60
SWAP = """(() => {
  const units = [...document.querySelectorAll('.unit')];
  const times = [];
  for (let k = 0; k < 200; k++) {
    const [i, j] = [k % 32, (7 * k + 3) % 32];
    units[i].click();
    const start = performance.now();
    units[i === j ? (j + 1) % 32 : j].click();
    times.push(performance.now() - start);
  }
  return times.sort((a, b) => a - b)[100];
})()"""
NUMBERS = 4 * IMAGES * (CLASSES + 1) * PLACES
LIMIT = """(() => {
  const a = new Float64Array(NUMBERS).fill(1.5), b = new Float64Array(NUMBERS).fill(0.5);
  const times = [];
  for (let k = 0; k < 50; k++) {
    const start = performance.now();
    for (let i = 0; i < NUMBERS; i++) a[i] += 0.5 * b[i];
    times.push(performance.now() - start);
  }
  return times.sort((a, b) => a - b)[25];
})()""".replace("NUMBERS", str(NUMBERS))


def page(folder: Path) -> Path:
    """A page with the figure of two networks that were not trained."""
    net = models.MLP(CLASSES, 784, hidden=(UNITS,))
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 1, 28, 28), dtype=torch.uint8, generator=g)
    split = Split(images, torch.randint(0, CLASSES, (IMAGES,), generator=g))
    figure = Permuter(net, train.initialise(net, 1), train.initialise(net, 2), split)
    path = folder / "figure.html"
    path.write_text(f"<!doctype html><html><body>{figure._repr_html_()}</body></html>", "utf8")
    return path


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with browser(folder / "profile") as shown:
            shown.open(page(folder).as_uri(), 1200, 1600)
            shown.wait("document.querySelectorAll('.unit').length > 0")
            shown.send("Emulation.setCPUThrottlingRate", rate=4)
            shown.run(SWAP)  # compiled
            swap, limit = shown.run(SWAP), shown.run(LIMIT)
    found = {"swap_ms": swap, "of_a_frame": swap / FRAME, "limit_ms": limit}
    print(
        f"one swap: {swap:.1f} ms of the {FRAME:.1f} ms of a frame; the products alone {limit:.1f}"
    )
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))


if __name__ == "__main__":
    main()
