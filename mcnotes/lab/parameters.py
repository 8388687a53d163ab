"""What the parameters of experiments, chapters and presets may be: the table of rules.

`lab.Experiment` holds its fields against it, and a chapter's or a step's further parameters.
"""

from mcnotes import attacks, cache, checkpoints, checks, data, evaluate, models, train
from mcnotes.matching import pam

ALIGNMENTS = ("unaligned", "aligned", "pam-unaligned", "pam-aligned")
SHAPES = ("line", "bezier", "chain")
SPLITS = ("train", "val", "held_out", "test")
SEED = checks.whole(0, 2**32 - 1)  # 64 bits hold all that is made of it (`train`, `pam`)
EPOCHS = train.OPTIONS["epochs"]
WIDTH = checks.whole(1, models.WIDEST)
ATTACK = checks.optional(
    checks.a((attacks.Attack, attacks.Ensemble), "a PGD, Square or Ensemble of mcnotes.attacks")
)
PAM_OPTIONS = {name: rule for name, rule in pam.OPTIONS.items() if name != "epochs"}


def named_function(value: object) -> str:
    """A function by whose name a value can be kept: one of its own, and none of the store's."""
    name = getattr(value, "__name__", None)
    if not (callable(value) and isinstance(name, str) and name.isidentifier()):
        return checks.got(value, "a function with a name (def), by which its value is kept")
    kinds = ", ".join(sorted(cache.KINDS))
    return checks.got(name, f"another name than {kinds}") if name in cache.KINDS else ""


def two_seeds(value: object) -> str:
    """A list or tuple of two seeds."""
    if isinstance(value, list | tuple) and len(value) == 2 and not any(map(SEED, value)):
        return ""
    return checks.got(value, "a pair of seeds such as [1, 2], whole numbers from 0 to 4294967295")


def a_pair(value: object) -> str:
    """A list or tuple of two different seeds."""
    if fault := two_seeds(value):
        return fault
    assert isinstance(value, list | tuple)
    return "" if value[0] != value[1] else checks.got(value, "two different seeds")


def some_pairs(value: object) -> str:
    """A list of pairs, no two networks twice, in either order."""
    if fault := checks.listed(a_pair)(value):
        return fault
    assert isinstance(value, list | tuple)
    if len({frozenset(pair) for pair in value}) < len(value):
        return checks.got(value, "every two networks once: [1, 2] and [2, 1] are the same")
    return ""


# First the fields of `Experiment`, then what its methods take, and chapters and the steps of a run
# have besides. Only `Experiment` itself can tell what `between` may be, and which fields go
# together; the data settles `Experiment.check_size`.
ALLOWED: dict[str, checks.Rule] = {
    "dataset": checks.one_of(data.SOURCES),
    "network": checks.one_of(models.BUILDERS),
    "width": checks.number(0, models.WIDEST, above=True),
    "epochs": EPOCHS,
    "curve_epochs": EPOCHS,
    "batch_size": checks.whole(1),
    "lr": checks.number(0, above=True),
    "schedule": checks.one_of(train.SCHEDULES),
    "augment": checks.flag,
    "precision": checks.one_of([*train.PRECISIONS, "auto"]),
    "compile": checks.flag,
    "validation": checks.optional(checks.whole(0)),
    "points": evaluate.ARGUMENTS["points"],
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
    "split": checks.one_of(SPLITS),
    "images": checks.optional(checks.whole(1)),
    "attack": ATTACK,
    "statistics_attack": ATTACK,
    "compute": named_function,
    "forks": checks.listed(checks.whole(0, train.EPOCHS)),
    "plane_images": checks.whole(1),
    "plane_points": evaluate.ARGUMENTS["resolution"],
    "candidates": checks.whole(2),
    "budgets": checks.listed(EPOCHS),
    "widths": checks.listed(WIDTH),
    "deep": checks.listed(WIDTH, once=False),
    "draws": checks.whole(1),
    "robust_epochs": EPOCHS,
    "robust_curve_epochs": EPOCHS,
    "test_images": checks.whole(1),
    "learn_epochs": EPOCHS,
    "letter_epochs": EPOCHS,
    "learn_lr": checks.number(0, above=True),
    "image_size": data.tasks.OPTIONS["image_size"],
    "mean": checks.optional(checkpoints.NORMALISATION["mean"]),
    "std": checks.optional(checkpoints.NORMALISATION["std"]),
}
