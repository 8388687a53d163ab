"""Names that users give: what they mean, and what they may have meant."""

import math
from collections.abc import Callable

import pytest

from mcnotes import data, matching, models
from mcnotes.names import resolve, suggest
from tools import presets


def test_a_name_that_is_close_is_suggested_whatever_its_capitals() -> None:
    assert suggest("ResNet21", ["mlp", "resnet20"]) == "; did you mean 'resnet20'?"
    assert suggest("relu", ["GELU", "ReLU"]) == "; did you mean 'ReLU'?"
    assert suggest(3, ["a", "b"]) == "; there are: a, b"
    assert suggest("x" * 10**6, ["a", "b"]) == "; there are: a, b"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: data.load("CIFAR-10"),
            "got 'CIFAR-10', expected a data set; did you mean 'cifar1",
        ),
        (
            lambda: models.build("Resnet-20", num_classes=2, in_channels=1),
            "got 'Resnet-20', expected a network; did you mean 'resnet20'",
        ),
        (lambda: presets.load("smok"), "no preset 'smok' .*; did you mean 'smoke'"),
        (lambda: presets.load("zzz"), "no preset 'zzz' .*; there are: .*laptop"),
    ],
)
def test_everybody_says_it_in_the_same_words(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_what_a_path_names() -> None:
    assert resolve("math:pi") == math.pi
    assert resolve("mcnotes.matching:match") is matching.match
    for path, text in (
        ("math", "cannot import 'math'"),
        ("math:no", "no attribute 'no'.*expected module:name on PYTHONPATH"),
        ("no_such:thing", "No module named 'no_such'"),
    ):
        with pytest.raises(ValueError, match=text):
            resolve(path)
