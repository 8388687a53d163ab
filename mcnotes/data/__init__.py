"""Data sets and users' images as tensors on the device, with train, validation and test apart.

Read `tasks` first: a `Split` is a tensor of images with their labels, a `Task` is three of them.
`sources` says where the images come from, `augment` changes them on the device, and `folders` takes
in pictures, arrays and loaders of your own. `loader` is for batches that are not to become images;
its `sets` takes in all of these by name, its `passages` a text.
"""

from mcnotes.data.augment import Augment
from mcnotes.data.folders import dataset
from mcnotes.data.loader import Cut, Loader, Sets, passages, sets, take
from mcnotes.data.sources import DataError
from mcnotes.data.tasks import HOME, SOURCES, Split, Task, default_folder, load

__all__ = [
    "HOME",
    "SOURCES",
    "Augment",
    "Cut",
    "DataError",
    "Loader",
    "Sets",
    "Split",
    "Task",
    "dataset",
    "default_folder",
    "load",
    "passages",
    "sets",
    "take",
]
