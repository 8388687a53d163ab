"""Arrays, data sets and loaders of your own as a `Split`, validated before use."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from mcnotes.data.sources import DataError, fair_order
from mcnotes.data.tasks import Split

COLOURS = 4  # channels at most, where the sizes must tell which axis holds them
MOST_CLASSES = 100_000
SHOWN = 200  # characters of what others say, in a message


def split(one: Any, image_size: int | None, who: str) -> Split:
    """Images with their labels in fair order, on the CPU and channels last in memory.

    one: a `Split`, (images, labels), a Dataset of such, or an iterable of such batches; as in
    `data.dataset`. Raises DataError, which begins with `who`, for anything else.
    """
    images, labels = _gathered(one, who)
    x, y = _pixels(images, who), _labels(labels, who)
    if len(x) != len(y):
        raise DataError(f"{who} has {len(x)} images and {len(y)} labels, expected one for each")
    order = torch.from_numpy(fair_order(x.contiguous().numpy(), y.numpy()))
    x, y = x[order].movedim(3, 1), y[order]
    if image_size and x.shape[2:] != (image_size, image_size):
        x = interpolate(_middle(x), (image_size, image_size), mode="bilinear", antialias=True)
    return Split(x, y)


def _middle(x: Tensor) -> Tensor:
    """The largest square in the middle of images [N, C, H, W]."""
    height, width = x.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return x[:, :, top : top + side, left : left + side]


def _gathered(one: Any, who: str) -> tuple[Tensor, Tensor]:
    """All images and all labels, not yet checked or converted."""
    if isinstance(one, Split):
        return one.images, one.labels
    batches = one
    if isinstance(one, tuple | list) and one and _is_array(one[0]):
        batches = [one]
    elif isinstance(one, Dataset):
        batches = DataLoader(one, 256)
    elif not isinstance(one, Iterable) or isinstance(one, Mapping | str | bytes) or _is_array(one):
        kind = type(one).__name__
        raise DataError(f"{who} is a {kind}, expected (images, labels), a Dataset or a DataLoader")
    try:
        pairs = [_pair(batch, who) for batch in batches]
        if not pairs:
            raise DataError(f"{who} gives no batch, expected images with labels")
        images, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    except DataError:
        raise
    except (Exception, SystemExit) as error:  # of the user's data set, or of batches that differ
        raise DataError(f"{who} cannot be read ({failure(error)})") from error
    return images, labels


def _is_array(x: Any) -> bool:
    return isinstance(x, Tensor | np.ndarray)


def _pair(batch: Any, who: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one batch."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return _tensor(batch[0], "images", who), _tensor(batch[1], "labels", who)
    got = f"a {type(batch).__name__}"
    if isinstance(batch, Mapping):
        got += f" with {', '.join(map(str, batch)):.{SHOWN}}"
    elif isinstance(batch, tuple | list):
        got += f" of {len(batch)} values"
    elif _is_array(batch):
        got += f" {[*batch.shape]}"
    fix = "return the two alone from the data set, or in its collate_fn"
    raise DataError(f"{who} gives {got}, expected pairs (images, labels). Fix: {fix}")


def _tensor(values: Any, what: str, who: str) -> Tensor:
    """A tensor of plain numbers on the CPU."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise DataError(f"{who} has {what} of which some are masked. Fix: leave these images out")
    try:
        x = torch.as_tensor(native(values)).detach()
        if x.layout != torch.strided or x.is_meta:
            raise TypeError(f"they are {x.layout} on {x.device}")
        return x.cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        cause = f"{who} has {what} that are no tensor of numbers ({failure(error)})"
        raise DataError(f"{cause}, expected a tensor or an array") from error


def native(values: Any) -> Any:
    """An array that PyTorch takes: of any byte order and strides, or not to be written to.

    Also of what NumPy can make an array of, such as columns of pandas; anything else as it is.
    """
    if isinstance(values, Tensor) or not hasattr(values, "__array__"):
        return values
    array = np.asarray(values)
    return np.require(array, array.dtype.newbyteorder("="), ["C", "W"])


def _pixels(x: Tensor, who: str) -> Tensor:
    """Images uint8 [N, H, W, C]."""
    shape, kinds = [*x.shape], "[N, H, W], [N, C, H, W] or [N, H, W, C]"
    if x.ndim not in (3, 4) or x.numel() == 0:
        raise DataError(f"{who} has images {shape}, expected some of shape {kinds}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        expected = "torch.uint8 from 0 to 255, or floats in [0, 1]"
        raise DataError(f"{who} has pixels of {x.dtype}, expected {expected}. Fix: convert them")
    if x.ndim == 3:
        x = x[..., None]
    elif max(shape[1], shape[3]) <= COLOURS:
        cause = f"{who} has images {shape}, in which the channels could stand first or last"
        fix = "a series [N, C, L] is no image; pass batches of it to mcnotes.align"
        raise DataError(f"{cause}, expected a height and width above {COLOURS}. Fix: {fix}")
    elif shape[3] > COLOURS:
        x = x.movedim(1, 3)
    if x.is_floating_point():
        return _bytes(x, who)
    if int(x.max()) == 1:
        cause = f"{who} has pixels of torch.uint8 from {int(x.min())} to 1, expected up to 255"
        raise DataError(f"{cause}. Fix: convert them to floats, or multiply them by 255")
    return x


def _bytes(x: Tensor, who: str) -> Tensor:
    """Floats in [0, 1] as uint8."""
    if not x.isfinite().all():
        raise DataError(f"{who} has pixels that are NaN or infinite. Fix: remove these images")
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        fix = "leave out Normalize, and use checkpoints.normalised"
        if low >= 0:
            fix = f"divide them by the largest value that a pixel can have; or {fix}"
        cause = f"{who} has pixels from {low:.2f} to {high:.2f}, expected [0, 1]"
        raise DataError(f"{cause}. Fix: {fix}")
    if 0 < high < 1.5 / 255:
        cause = f"{who} has pixels from 0 to {high:.4f}, expected up to 1"
        raise DataError(f"{cause}. Fix: divide them by 255 once only")
    return (255 * x).round().byte()


def _labels(y: Tensor, who: str) -> Tensor:
    """Labels int64 [N], the numbers of the classes."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise DataError(f"{who} has labels {[*y.shape]}, {_several(y)}")
    if y.is_floating_point() or y.is_complex():
        cause = f"{who} has labels of {y.dtype}, expected whole numbers, one class for each image"
        fix = "convert classes with .astype(int); values to predict (regression) are no classes"
        raise DataError(f"{cause}. Fix: {fix}")
    y = y.long()
    wrong = y[(y < 0) | (y >= MOST_CLASSES)]
    if len(wrong):
        cause = f"{who} has the label {wrong[0]}, expected 0 to at most {MOST_CLASSES - 1}"
        fix = "leave out images without a class, and number the classes from 0"
        raise DataError(f"{cause}. Fix: {fix}")
    return y


def _several(y: Tensor) -> str:
    """What labels that are no vector seem to be, and what to do."""
    expected = "expected the number of one class for each image, [N]"
    if y.ndim == 2 and y.shape[1] > 1 and bool(((y == 0) | (y == 1)).all()):
        if bool((y.sum(1) == 1).all()):
            return f"which look one-hot, {expected}. Fix: labels.argmax(1)"
        return f"which look like several classes for one image (multi-label), {expected}"
    return expected


def failure(error: BaseException) -> str:
    """What went wrong in code of others, in one line."""
    first = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {first:.{SHOWN}}"
