"""What the parameters of experiments, chapters and presets may be: the table of rules.

`lab.Experiment` holds its fields against it, and a chapter's or a step's further parameters.
"""

from mcnotes import checkpoints, checks, data, models, train
from mcnotes.matching import pam

ALIGNMENTS = ("unaligned", "aligned", "pam-unaligned", "pam-aligned")
SHAPES = ("line", "bezier", "chain")
SEED = checks.whole(0, 2**32 - 1)
PAM_OPTIONS = {name: rule for name, rule in pam.OPTIONS.items() if name != "epochs"}


def a_pair(value: object) -> str:
    """A list or tuple of two different seeds."""
    if isinstance(value, list | tuple) and len(value) == 2 and not any(map(SEED, value)):
        return "" if value[0] != value[1] else checks.got(value, "two different seeds")
    return checks.got(value, "a pair of seeds such as [1, 2], whole numbers of at least 0")


def some_pairs(value: object) -> str:
    """A list of pairs, no two networks twice, in either order."""
    if fault := checks.listed(a_pair)(value):
        return fault
    assert isinstance(value, list | tuple)
    if len({frozenset(pair) for pair in value}) < len(value):
        return checks.got(value, "every two networks once: [1, 2] and [2, 1] are the same")
    return ""


# First the fields of `Experiment`, then what chapters and the steps of a run have besides. Only
# `Experiment` itself can tell what `between` may be; the data settles `Experiment.check_size`.
ALLOWED: dict[str, checks.Rule] = {
    "dataset": checks.one_of(data.SOURCES),
    "network": checks.one_of(models.BUILDERS),
    "width": checks.number(0, above=True),
    "epochs": checks.whole(1),
    "curve_epochs": checks.whole(1),
    "batch_size": checks.whole(1),
    "lr": checks.number(0, above=True),
    "schedule": checks.one_of(train.SCHEDULES),
    "augment": checks.flag,
    "precision": checks.one_of([*train.PRECISIONS, "auto"]),
    "compile": checks.flag,
    "validation": checks.optional(checks.whole(0)),
    "points": checks.whole(2),  # both ends
    "statistics": checks.whole(2),  # one image has no variance
    "match_images": checks.whole(2),
    "device": checks.one_of(["auto", "cpu", "cuda"]),
    "epsilon": checks.number(0, 1),
    "attack_steps": checks.whole(1),
    "attack_step": checks.number(0, 1),
    "pam_options": checks.mapping(PAM_OPTIONS),
    "pairs": some_pairs,
    "seed": SEED,
    "a": SEED,
    "b": SEED,
    "method": checks.one_of(ALIGNMENTS),
    "methods": checks.listed(checks.one_of(ALIGNMENTS)),
    "shape": checks.one_of(SHAPES),
    "shapes": checks.listed(checks.one_of(SHAPES)),
    "forks": checks.listed(checks.whole(0)),
    "plane_images": checks.whole(1),
    "plane_points": checks.whole(2),
    "candidates": checks.whole(2),
    "budgets": checks.listed(checks.whole(1)),
    "widths": checks.listed(checks.whole(1)),
    "deep": checks.listed(checks.whole(1), once=False),
    "draws": checks.whole(1),
    "robust_epochs": checks.whole(1),
    "robust_curve_epochs": checks.whole(1),
    "test_images": checks.whole(1),
    "learn_epochs": checks.whole(1),
    "letter_epochs": checks.whole(1),
    "learn_lr": checks.number(0, above=True),
    "image_size": checks.optional(checks.whole(1)),
    "mean": checks.optional(checkpoints.NORMALISATION["mean"]),
    "std": checks.optional(checkpoints.NORMALISATION["std"]),
}
