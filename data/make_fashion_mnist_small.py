"""Make fashion-mnist-small.npz, the data set that comes with the repository.

    python data/make_fashion_mnist_small.py FOLDER        # FOLDER holds the four original IDX files
    python data/make_fashion_mnist_small.py --download    # or let torchvision fetch them

Of each of the ten classes it takes 1,200 training and 300 test images of Fashion-MNIST: the first
in the order of `mcnotes.data.sources.fair_order`, that is, by the hash of their pixels. Images that
occur more than once, in either set, are left out. The same files give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcnotes.data.sources import fair_order

HERE = Path(__file__).resolve().parent
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PREFIX = {"train": "train", "test": "t10k"}


def read_idx(folder: Path, stem: str) -> NDArray[np.uint8]:
    """The bytes of an IDX file, gzipped or not, as an array of the shape its header states."""
    plain, zipped = folder / stem, folder / f"{stem}.gz"
    if not plain.exists() and not zipped.exists():
        raise SystemExit(f"no {plain} and no {zipped.name} beside it; pass the folder of the files")
    raw = plain.read_bytes() if plain.exists() else gzip.decompress(zipped.read_bytes())
    shape = tuple(np.frombuffer(raw, ">u4", count=raw[3], offset=4))
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def balanced(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], per_class: int
) -> NDArray[np.int64]:
    """Indices of the first `per_class` images of each class, in fair order."""
    order = fair_order(images, labels)
    members = [order[labels[order] == label][:per_class] for label in range(len(CLASS_NAMES))]
    chosen = np.concatenate(members)
    return chosen[fair_order(images[chosen], labels[chosen])]


def make(folder: Path, per_class: dict[str, int]) -> bytes:
    """The .npz file made from the IDX files in `folder`, with so many images of each class."""
    sets = {
        split: (
            read_idx(folder, f"{p}-images-idx3-ubyte"),
            read_idx(folder, f"{p}-labels-idx1-ubyte"),
        )
        for split, p in PREFIX.items()
    }
    everything = np.concatenate([images for images, _ in sets.values()])
    _, which, count = np.unique(
        everything.reshape(len(everything), -1), axis=0, return_inverse=True, return_counts=True
    )
    single = np.split(count[which] == 1, [len(sets["train"][0])])
    arrays: dict[str, NDArray[Any]] = {"class_names": np.array(CLASS_NAMES)}
    for (split, (images, labels)), keep in zip(sets.items(), single, strict=True):
        images, labels = images[keep], labels[keep]
        chosen = balanced(images, labels, per_class[split])
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[chosen], labels[chosen]
    return npz_bytes(arrays)


def npz_bytes(arrays: dict[str, NDArray[Any]]) -> bytes:
    """A compressed .npz file without dates in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")
            archive.writestr(info, member.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="where the four IDX files are")
    parser.add_argument("--download", action="store_true", help="fetch them with torchvision")
    parser.add_argument("--out", type=Path, default=HERE / "fashion-mnist-small.npz")
    parser.add_argument("--train", type=int, default=1_200, help="training images of each class")
    parser.add_argument("--test", type=int, default=300, help="test images of each class")
    args = parser.parse_args()
    if args.download:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(HERE / "downloads", download=True)
        args.folder = HERE / "downloads" / "FashionMNIST" / "raw"
    if args.folder is None:
        parser.error("pass the folder of the IDX files, or --download")
    content = make(args.folder, {"train": args.train, "test": args.test})
    args.out.write_bytes(content)
    print(f"{args.out}: {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
