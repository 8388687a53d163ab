"""Experiments: parameters by name; one configuration, one entry; the shipped networks are true."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mcnotes import attacks, cache, evaluate, train
from mcnotes.cache import StoreWarning
from mcnotes.lab import Experiment, frames
from mcnotes.lab.experiment import curve_seed
from mcnotes.matching import pam

TINY = Experiment(width=2, epochs=1, curve_epochs=1, points=3, statistics=100, match_images=100)
PAM = {"p_epochs": 1, "images": 200, "probe": 100, "samples": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the two networks of TINY."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCNOTES_STORE", str(folder))
        for seed in (1, 2):
            TINY.endpoint(seed)
    return folder


@pytest.fixture
def store(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, that is used here; nothing is taken from elsewhere."""
    folder = shutil.copytree(trained, tmp_path / "store")
    monkeypatch.setenv("MCNOTES_STORE", str(folder))
    monkeypatch.setenv("MCNOTES_ZOO", str(tmp_path / "none"))
    return folder


def test_parameters_by_name() -> None:
    names = {"epochs": 3, "width": 4, "np": np, "_hidden": 1, "In": [], "pairs": [[1, 2]]}
    assert Experiment.of(names, also=["pairs"]) == Experiment(epochs=3, width=4)
    with pytest.raises(ValueError, match=r"'epoch' is not a parameter.*did you mean 'epochs'"):
        Experiment.of({"epoch": 3})


@pytest.mark.usefixtures("store")
def test_the_permutation_that_was_found_first_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    first = TINY.aligned(1, 2)
    found = TINY.matching(1, 2)
    other = replace(found, perm=TINY.sym.identity())
    monkeypatch.setattr(Experiment, "matching", lambda *_: other)
    again = replace(TINY)
    for name, p in first.items():
        assert torch.equal(p, found.perm[name])
        assert torch.equal(again.aligned(1, 2)[name], p)
    expected = TINY.sym.permute(TINY.endpoint(2), first)
    for name, x in again.pair(1, 2, "aligned")[1].items():
        assert torch.equal(x, expected[name])


def test_no_two_pairs_share_a_seed() -> None:
    """The pairs of data/zoo keep theirs; others meet neither these nor the seeds of networks."""
    assert curve_seed(1, 2) == 1002
    seeds = [-1, *range(40), 998, 999, 1000, 1001, 2001, 2**40]
    pairs = [curve_seed(a, b) for a in seeds for b in seeds if a != b]
    assert len(set(pairs)) == len(pairs)
    assert not {s for s in pairs if s < 1000}, "a pair has the seed of a network"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="method: got 'best', expected one of"):
        TINY.pair(1, 2, "best")
    with pytest.raises(ValueError, match="shape: got 'spline', expected one of"):
        TINY.curve(1, 2, "unaligned", "spline")


def test_stored_configurations_still_name_their_files() -> None:
    """A file whose configuration does not hash to its name is out of date."""
    entries = [p for p in cache.zoo().iterdir() if p.suffix in (".safetensors", ".json")]
    assert entries, "the zoo is empty: run `make zoo`"
    for path in entries:
        assert cache.file_name(cache.read_config(path), path.suffix) == path.name


def test_unfinished_runs_of_the_zoo_can_be_read_and_are_not_finished() -> None:
    for path in (cache.zoo() / "unfinished").glob("*"):
        entry = path.name.removesuffix(".checkpoint")
        assert entry != path.name
        assert cache.file_name(cache.read(path).config, Path(entry).suffix) == entry
        assert not (cache.zoo() / entry).exists(), f"remove {path.name}: its entry is there"


def test_of_what_joins_two_networks_the_zoo_has_both() -> None:
    """The same seeds may give other networks elsewhere, which an old curve would not join."""
    there = {path.stem.removeprefix("endpoint-") for path in cache.zoo().glob("endpoint-*")}
    joined = {
        path.name: cache.read_config(path)["ends"]
        for kind in ("curve-*.safetensors", "matching-*.json", "unfinished/curve-*")
        for path in cache.zoo().glob(kind)
    }
    assert len(joined) > 20
    assert {n: ends for n, ends in joined.items() if not {*ends} <= there} == {}


def test_default_experiment_is_in_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a default changes and the zoo was not rebuilt."""
    monkeypatch.setenv("MCNOTES_STORE", str(tmp_path))
    laptop = Experiment()
    for seed in range(1, 7):
        assert laptop.endpoint(seed)
    for a, b in ((1, 2), (3, 4), (5, 6)):
        for method in ("unaligned", "aligned"):
            for shape in ("line", "bezier"):
                laptop.path(a, b, method, shape)
    assert not list(tmp_path.glob("*.*")), "something was computed: run `make zoo`"


def test_stored_network_is_what_training_gives() -> None:
    """A network of the zoo, trained again: its scores."""
    laptop = Experiment(device="cpu")
    theta = laptop.endpoint(1)
    again = train.fit(laptop.net, laptop.task, laptop.recipe(laptop.epochs), seed=1).theta
    stored, fresh = (evaluate.score(laptop.net, x, laptop.task.test) for x in (theta, again))
    gap = max((theta[n] - again[n]).abs().max().item() for n in theta if "weight" in n)
    print(f"largest difference in a weight {gap:.2e}; accuracy {stored} {fresh}")
    # On another processor rounding grows until the network differs as one from another seed does.
    ends = [evaluate.score(laptop.net, laptop.endpoint(s), laptop.task.test) for s in range(1, 7)]
    spread = np.std(ends, axis=0, ddof=1)
    assert (np.abs(np.subtract(stored, fresh)) < 4 * spread).all(), spread


def test_stored_path_is_what_evaluation_gives() -> None:
    laptop = Experiment(device="cpu")
    path = laptop.path(1, 2, "unaligned", "line")
    middle = len(path.t) // 2
    theta = laptop.curve(1, 2, "unaligned", "line")(float(path.t[middle]))
    images = laptop.task.train.first(laptop.statistics)
    theta = evaluate.batchnorm(laptop.net, theta, images)
    score = evaluate.score(laptop.net, theta, laptop.task.test)
    assert score.loss == pytest.approx(path.loss[middle], rel=1e-3)
    assert score.accuracy == pytest.approx(path.accuracy[middle], abs=2e-3)


@pytest.mark.usefixtures("store")
def test_pam_is_kept_with_its_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curve, record and path; the curve ends in network b, permuted by alignment and then PAM."""
    lab = replace(TINY, pam_options=PAM)
    path = lab.path(1, 2, "pam-aligned")
    monkeypatch.setattr(pam, "fit", None)
    curve, record = lab.curve(1, 2, "pam-aligned"), lab.proximal(1, 2, "pam-aligned")
    aligned = lab.pair(1, 2, "aligned")[1]
    end = lab.sym.permute(aligned, record.perm)
    for theta in (curve.points[-1], lab.pair(1, 2, "pam-aligned")[1]):
        assert all(torch.equal(theta[n], end[n]) for n in end)
    assert len(record.history) == 1
    assert curve.points[1].keys() == end.keys()
    np.testing.assert_array_equal(lab.path(1, 2, "pam-aligned").loss, path.loss)
    assert lab.curve(1, 2, "pam-aligned", "line").degree == 1


def test_a_pam_curve_that_could_not_be_kept_leaves_nothing_wrong(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that is full for the curve, its record is still right, and the curve is trained."""
    lab = replace(TINY, pam_options=PAM)
    real, trained = cache.write_atomic, []

    def full(path: Path, content: bytes) -> None:
        if path.name.startswith("curve-"):
            raise OSError(28, "No space left on device")
        real(path, content)

    fit = pam.fit
    monkeypatch.setattr(pam, "fit", lambda *a, **k: trained.append(1) or fit(*a, **k))
    monkeypatch.setattr(cache, "write_atomic", full)
    with pytest.warns(StoreWarning, match="No space left"):
        record = lab.proximal(1, 2, "pam-unaligned")
    assert trained == [1]
    assert not list(store.glob("curve-*"))
    monkeypatch.setattr(cache, "write_atomic", real)
    curve = lab.curve(1, 2, "pam-unaligned")
    end = lab.sym.permute(lab.endpoint(2), record.perm)
    assert all(torch.equal(curve.points[-1][n], end[n]) for n in end)
    assert lab.proximal(1, 2, "pam-unaligned").history == record.history


def test_a_record_is_of_a_curve_that_pam_trained() -> None:
    for method, shape in (("aligned", "bezier"), ("pam-aligned", "line"), ("best", "chain")):
        with pytest.raises(ValueError, match="PAM trains a 'bezier' or a 'chain' by"):
            TINY.proximal(1, 2, method, shape)
    with pytest.raises(ValueError, match="shape: got 'spline'"):
        TINY.proximal(1, 2, "pam-aligned", "spline")


def test_pam_spends_as_many_epochs_on_the_curve_as_plain_training() -> None:
    for epochs in (1, 3, 12, 250):
        for schedule in ("linear", "paper"):
            settings = replace(TINY, curve_epochs=epochs, schedule=schedule).pam_settings()
            assert (settings.epochs, settings.p_epochs) == ((epochs,), min(4, epochs))


@pytest.mark.usefixtures("store")
def test_everything_is_kept_and_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {s: TINY.path(1, 2, "aligned", s) for s in ("line", "bezier", "chain")}
    monkeypatch.setattr(train, "fit", None)
    monkeypatch.setattr(train, "fit_curve", None)
    monkeypatch.setattr(evaluate, "profile", None)
    for shape, path in first.items():
        again = replace(TINY, device="cpu").path(1, 2, "aligned", shape)
        np.testing.assert_array_equal(again.loss, path.loss)
    curve = TINY.curve(1, 2, "aligned")
    assert torch.equal(curve(0.0)["head.weight"], TINY.endpoint(1)["head.weight"])


def test_every_parameter_that_changes_more_than_rounding_is_in_the_configuration() -> None:
    robust = replace(TINY, epsilon=0.1, attack_steps=2, attack_step=0.01)
    for name, default in asdict(TINY).items():
        other = {
            "dataset": "cifar10",
            "network": "resnet20",
            "schedule": "paper",
            "device": "cuda",
            "precision": "bfloat16",
            "augment": True,
            "validation": 7,
            "between": (TINY, robust),
            "compile": True,
            "epsilon": 0.2,
            "attack_step": 0.02,
            "pam_options": {"samples": 3},
        }.get(name) or default + 1
        same = replace(robust, **{name: other}).config() == robust.config()
        assert same == (name in ("device", "compile")), name
    assert replace(TINY, attack_steps=9).config() == TINY.config(), "no attack, no change"


@pytest.mark.parametrize(
    ("capability", "computes", "precision"),
    [("AVX512", True, "bfloat16"), ("AVX512", False, "float32"), ("AVX2", True, "float32")],
)
def test_automatic_precision_is_the_native_one_and_is_named(
    capability: str, computes: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: computes)
    lab = replace(TINY, precision="auto", device="cpu")
    assert lab.precision == lab.recipe(1).precision == precision
    assert lab.config() == replace(TINY, precision=precision).config()


def test_robust_experiments_have_names_of_their_own() -> None:
    """Standard ones keep theirs, whatever attack they would use."""
    standard, robust = TINY, replace(TINY, epsilon=0.1)
    assert replace(TINY, attack_steps=9).endpoint_config(1) == standard.endpoint_config(1)
    assert robust.endpoint_config(1) != standard.endpoint_config(1)
    assert robust.perturb
    assert robust.perturb.step == pytest.approx(0.05)
    assert replace(robust, attack_step=0.05) != robust
    assert standard.perturb is None
    mixed = replace(standard, between=(standard, robust))
    names = {
        cache.key(lab.curve_config(1, 2, "unaligned", shape))
        for lab in (standard, robust, mixed, replace(robust, between=(standard, robust)))
        for shape in ("line", "bezier")
    }
    assert len(names) == 7, "the two mixed lines are one and the same"


@pytest.mark.usefixtures("store")
def test_a_robust_mixed_curve() -> None:
    robust = replace(TINY, epsilon=0.1, attack_steps=1)
    mixed = replace(robust, between=(TINY, robust))
    curve = mixed.curve(1, 2, "aligned")
    assert torch.equal(curve(0.0)["head.bias"], TINY.endpoint(1)["head.bias"])
    assert torch.equal(curve(1.0)["head.bias"], robust.endpoint(2)["head.bias"])
    attack = attacks.PGD(0.1, 2)
    clean, hard, other = (
        mixed.path(1, 2, "aligned", split="val", images=60, attack=p, statistics_attack=q)
        for p, q in ((None, None), (attack, None), (attack, attack))
    )
    assert (hard.accuracy <= clean.accuracy).all()
    assert (hard.loss > clean.loss).all()
    assert not np.array_equal(hard.loss, other.loss)


def test_a_chapters_value_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCNOTES_STORE", str(tmp_path))
    calls = []

    def sums(lab: Experiment, a: int, b: int, times: int, attack: attacks.PGD) -> object:
        calls.append((lab.width, a, b, times))
        return {"sum": np.array([a + b]) * times, "last": (torch.tensor(2.5), "x")}

    lab, other = Experiment(), Experiment(width=4)
    strong, weak = attacks.PGD(0.1, 3), attacks.PGD(0.05, 3)
    for _ in range(2):
        found = lab.keep(sums, 1, 2, times=3, attack=strong)
        assert found == {"sum": [9], "last": [2.5, "x"]}
    assert calls == [(8, 1, 2, 3)]
    lab.keep(sums, 1, 2, times=4, attack=strong)  # each of what it depends on makes another value
    lab.keep(sums, 1, 2, times=3, attack=weak)
    lab.keep(sums, 2, 1, times=3, attack=strong)
    other.keep(sums, 1, 2, times=3, attack=strong)
    assert len(calls) == 5
    with pytest.raises(TypeError, match="JSON values only"):
        lab.keep(sums, 1, object(), times=3, attack=strong)


def test_paths_of_augmented_networks_have_names_of_their_own() -> None:
    """BatchNorm is recomputed on images as training showed them."""
    plain, augmented = TINY, replace(TINY, augment=True)
    assert "batchnorm" not in plain.config()
    for config in (
        augmented.config(),
        augmented.endpoint_config(1),
        augmented.path_config(1, 2, "aligned", "line"),
    ):
        assert config["batchnorm"] == "augmented images"
    assert torch.equal(plain.known.images, plain.task.train.first(plain.statistics).images)
    assert not torch.equal(plain.known.images, augmented.known.images)


def test_a_path_over_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="images"):
        TINY.path(1, 2, "unaligned", "line", images=0)


def test_paths_as_a_tidy_frame() -> None:
    lab, pairs = Experiment(), [[1, 2], [3, 4]]
    frame = lab.paths(pairs, shapes=["line"])
    assert list(frame) == ["pair", "method", "shape", "t", "arc", "loss (nats)", "accuracy (%)"]
    assert len(frame) == 2 * 2 * lab.points
    here = frame[(frame["pair"] == "3–4") & (frame["method"] == "aligned")]
    path = lab.path(3, 4, "aligned", "line")
    assert (here["loss (nats)"] == path.loss).all()
    once = lab.paths(iter(pairs), iter(["unaligned", "aligned"]), iter(["line"]))
    assert once.equals(frame), "what can be gone through once gives all rows, too"
    barriers = frames.summary(frame)["barrier (nats)"]
    assert barriers[3] == pytest.approx(path.barrier)
