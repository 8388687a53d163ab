"""The book's prose as an experiment: what is trained on, what is tested on, and what is kept."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mcnotes import cache, evaluate
from mcnotes.lab import prose
from mcnotes.lab.prose import Prose

PROSE = Prose(width=8, device="cpu")
SHORT = replace(PROSE, recipe=replace(PROSE.recipe, epochs=1))


def text_of(batches: list[tuple[Tensor, Tensor]]) -> str:
    """All passages, one after the other, with their last letters."""
    rows = torch.cat([torch.cat([x, y[:, -1:]], 1) for x, y in batches])
    return "\n".join("".join(prose.LETTERS[i] for i in row) for row in rows.tolist())


def test_every_letter_is_known() -> None:
    assert {*PROSE.text} <= {*prose.LETTERS}
    assert "\n" not in PROSE.text


def test_targets_are_the_next_letters() -> None:
    x, y = next(iter(PROSE.task.test.source))
    assert x.shape == y.shape == (PROSE.recipe.batch_size, PROSE.context)
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_no_letter_of_the_test_is_trained_on() -> None:
    """Passages overlap, so the test begins behind the last letter of training."""
    known, unknown = (text_of([*part.source]).split("\n") for part in PROSE.task[:2])
    ends = max(PROSE.text.index(passage) + len(passage) for passage in known)
    assert ends <= min(PROSE.text.rindex(passage) for passage in unknown)
    assert len(unknown) * 8 < len(known) < len(unknown) * 10


def test_a_network_is_kept(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCNOTES_STORE", str(tmp_path))
    net = replace(SHORT, context=8).endpoint(1)
    again = replace(SHORT, context=8).endpoint(1)
    assert all(torch.equal(x, again[name]) for name, x in net.items())
    guess = torch.tensor(len(prose.LETTERS)).log()
    small = replace(SHORT, context=8)
    assert evaluate.score(small.net, net, small.task.test).loss < float(guess)


@pytest.mark.parametrize(
    "changed",
    [
        {"width": 12},
        {"context": 32},
        {"norm": "layer"},
        {"recipe": replace(PROSE.recipe, lr=0.1)},
    ],
)
def test_a_key_names_what_a_network_depends_on(changed: dict[str, object]) -> None:
    key = cache.key(PROSE.endpoint_config(1))
    assert cache.key(replace(PROSE, **changed).endpoint_config(1)) != key  # type: ignore[arg-type]
    assert cache.key(PROSE.endpoint_config(2)) != key
    assert cache.key(replace(PROSE, points=3).endpoint_config(1)) == key
    assert replace(PROSE, points=3).config() != PROSE.config()
