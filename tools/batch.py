"""Full-scale runs: the functions behind `experiments/Snakefile`, and the command for one step.

python -m tools.batch run [--config FILE] [--set NAME=VALUE ...] [-- SNAKEMAKE OPTIONS]
    check everything, then let Snakemake run what is missing (`make figures` calls it)
python -m tools.batch step NOTEBOOK OUT NAME=VALUE ...
    run one notebook through papermill; its executed copy appears at OUT once it is complete
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import FileLock, Timeout

from mcnotes import checks
from mcnotes.__main__ import Terminated, sigterm_interrupts
from tools import chapters, notebooks, presets

ROOT = presets.ROOT
STEPS = ROOT / "experiments"
ROOM = 2**20  # bytes that each folder must have room for
PATIENCE = 60  # seconds that a stopped step may take to end
DEFAULTS: dict[str, Any] = {
    "presets": ["smoke"],  # files of experiments/presets
    "parameters": {},  # changes to the presets
    "methods": ["unaligned", "aligned"],
    "shapes": ["bezier"],
    "runs_per_gpu": 4,  # small networks leave most of a GPU idle
    "out": "_build/runs",  # executed notebooks
    "results": "data/results",  # numbers for chapter 11
}


OWN = {  # the parameters of each step besides those of the experiment
    "endpoint": ["seed"],
    "alignment": ["a", "b"],
    "curve": ["a", "b", "method", "shape"],
    "results": ["preset", "methods", "shapes", "out"],
}
_LATER = {"pairs", "points", "statistics", "pam_options"}  # no network depends on these
UNUSED = {  # parameters that a step does not depend on, and need not run again for
    "endpoint": _LATER | {"curve_epochs", "match_images"},
    "alignment": _LATER | {"curve_epochs"},
    "curve": {"pairs"},
    "results": set(),
}


class PlanError(ValueError):
    """The configuration of a run is wrong; the message says what is, and what is expected."""


def plan(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters of each preset that `config` names. Raises PlanError before anything runs."""
    from mcnotes.lab import parameters  # imports PyTorch, which a step leaves to its notebook

    rules = {
        "presets": checks.listed(named),
        "parameters": names_and_values,
        "methods": parameters.ALLOWED["methods"],
        "shapes": parameters.ALLOWED["shapes"],
        "runs_per_gpu": checks.whole(1),
        "out": folder,
        "results": folder,
    }
    if fault := checks.mapping(rules)(config):
        raise PlanError(f"the configuration: {fault}")
    found = {}
    for preset in (DEFAULTS | config)["presets"]:
        values = chosen(config, preset)
        for step in OWN:
            known = notebooks.parameters(notebooks.read(STEPS / f"{step}.ipynb"))
            if faults := presets.check(values, known) or presets.impossible(known | values):
                raise PlanError(f"preset {preset!r} for {step}.ipynb: {'; '.join(faults)}")
        found[preset] = known | values
    return found


def named(value: object) -> str:
    """The rule of a preset's name."""
    return checks.text(value) or (
        "" if is_plain(value) else checks.got(value, "printable characters without braces")
    )


def is_plain(value: object) -> bool:
    """Whether Snakemake takes a text as it stands: it would read braces as wildcards."""
    return isinstance(value, str) and value.isprintable() and not set("{}") & set(value)


def names_and_values(value: object) -> str:
    """The rule of `parameters`; the notebooks know which names there are."""
    expected = "names and values such as {epochs: 3}"
    return "" if isinstance(value, dict) else checks.got(value, expected)


def folder(value: object) -> str:
    """The rule of a folder for outputs."""
    expected = "the name of a folder, of printable characters without braces and no - in front"
    if not (value and is_plain(value)) or str(value).startswith("-"):
        return checks.got(value, expected)
    path = ROOT / str(value)
    above = [path, *path.parents]
    there = next(path for path in above if path.exists())
    return "" if there.is_dir() else checks.got(value, f"a folder: {there} is a file")


def chosen(config: dict[str, Any], preset: str) -> dict[str, Any]:
    """The parameters of a preset, with the changes that `config` makes."""
    return merged(presets.load(preset), (DEFAULTS | config)["parameters"])


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The values with the changes; of two mappings, each name on its own, at any depth."""
    found = values | changes
    for name in values.keys() & changes.keys():
        both = values[name], changes[name]
        if isinstance(both[0], dict) and isinstance(both[1], dict):
            found[name] = merged(*both)
    return found


def words(step: str, values: dict[str, Any]) -> str:
    """Those of the parameters `values` that `step` depends on, as words for a shell."""
    used = {name: value for name, value in values.items() if name not in UNUSED[step]}
    return shlex.join(f"{name}={_dump(value)}" for name, value in used.items())


def _dump(value: Any) -> str:
    """YAML in one line, of printable ASCII."""
    text: str = yaml.dump(value, Dumper=_Line, default_flow_style=True, width=float("inf"))
    return text.splitlines()[0]  # a second one would say "..."


class _Line(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Writes text with line breaks in double quotes, where they are escaped."""


_Line.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    ),
)


def check_machine(
    runs: dict[str, dict[str, Any]], folders: Collection[Path] = (), *, gpu_here: bool = True
) -> None:
    """Raise PlanError unless the data is present, and a GPU where a run here needs one.

    folders: where outputs go; they, and the store, through which steps get each other's results,
    must take files.
    """
    import torch

    from mcnotes import cache
    from mcnotes.data import SOURCES, default_folder, sources

    for place in (cache.folder(), *folders):
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(bytes(ROOM))
        except OSError as error:
            raise PlanError(
                f"{place}: {error}. Fix: choose a folder that can be written"
            ) from error
    for preset, values in runs.items():
        if gpu_here and values["device"] == "cuda" and not torch.cuda.is_available():
            raise PlanError(
                f"preset {preset!r} needs a GPU, and PyTorch finds none on this machine. Fix: "
                "run it elsewhere, or set device=cpu (slow)"
            )
        name = values["dataset"]
        try:
            there = sources.read(name, default_folder(), SOURCES[name].torchvision, download=False)
            presets.experiment(values).check_size(len(there["train_images"]))
        except (sources.DataError, ValueError) as error:
            raise PlanError(f"preset {preset!r}: {error}") from error


def step(notebook: Path, out: Path, values: dict[str, Any]) -> None:
    """Run `notebook`; `out` appears once all of it has run. Raises RuntimeError as `execute`."""
    if out.is_dir():
        raise PlanError(f"{out}: is a folder, expected the name of a file")
    faults = presets.check(values, notebooks.parameters(notebooks.read(notebook)))
    if faults:
        raise PlanError(f"{notebook.name}: {'; '.join(faults)}")
    running = out.with_suffix(".running.ipynb")
    with gpu(values.get("device", "auto")):
        chapters.execute(notebook, running, values)
    os.replace(running, out)


@contextlib.contextmanager
def gpu(device: str) -> Iterator[None]:
    """Make a GPU with a free slot the only one that this process sees, if there are several.

    `$MCNOTES_RUNS_PER_GPU` says how many runs share a GPU. On a cluster the choice is made already.
    """
    if device == "cpu" or "SLURM_JOB_ID" in os.environ:
        yield
        return
    import torch

    if (count := torch.cuda.device_count()) < 2:
        yield
        return
    slots = chapters.setting("MCNOTES_RUNS_PER_GPU", 1) or 1
    locks = ROOT / "_build" / "gpus"
    locks.mkdir(parents=True, exist_ok=True)
    for slot in range(slots):
        for number in range(count):
            lock = FileLock(locks / f"{number}-{slot}.lock", timeout=0)
            with contextlib.suppress(Timeout), lock:
                os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
                yield
                return
    yield  # more runs than slots: PyTorch takes the first GPU


def run(config_file: Path, changes: dict[str, Any], options: list[str]) -> int:
    """Check the configuration, then call Snakemake and return its exit status."""
    import torch

    config = merged(presets.read(config_file), changes)
    chapters.cell_timeout()  # raises before anything runs
    runs = plan(config)  # the graph checks the machine when it starts
    slots = max(1, torch.cuda.device_count()) * (DEFAULTS | config)["runs_per_gpu"]
    command = [str(Path(sys.executable).with_name("snakemake")), "-s", str(STEPS / "Snakefile")]
    command += ["--rerun-incomplete", "--nolock", "--resources", f"gpu={slots}"]
    if not any(option.startswith(("-c", "--cores", "-j", "--jobs")) for option in options):
        command += ["--cores", str(os.cpu_count() or 1)]
    # Snakemake would parse `--config` in its own way, so it gets the merged file.
    text = yaml.safe_dump(config)
    whole = ROOT / "_build" / f"batch-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
    whole.parent.mkdir(exist_ok=True)
    whole.write_text(text, "utf8")
    again = [word for path in incomplete(config, runs) for word in ("--forcerun", path)]
    command += [*options, *again, "--configfile", str(whole)]
    with sigterm_interrupts(), psutil.Popen(command, cwd=ROOT) as graph:
        try:
            return int(graph.wait())
        except KeyboardInterrupt as reason:
            stop(graph, told=not isinstance(reason, Terminated))
            raise


def stop(graph: psutil.Popen, told: bool) -> None:
    """End Snakemake and its steps; each keeps its last epoch. Kernels end with their steps.

    told: Ctrl-C in a terminal has reached all of them. SIGTERM reaches the first process only. It
    is what all are sent, since a job in the background of a script ignores SIGINT.
    """
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
        family = [*graph.children(recursive=True), graph]
        for process in () if told else family:
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(process.pid) == os.getsid(0):  # a kernel has a session of its own
                    send(process, signal.SIGTERM)
        _, left = psutil.wait_procs(family, timeout=PATIENCE)
        for process in left:
            send(process, signal.SIGKILL)


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def incomplete(config: dict[str, Any], runs: dict[str, dict[str, Any]]) -> list[str]:
    """The results files that are there, and lack something that the configuration asks for.

    A file without the steps behind it, as in a fresh clone, is as good as new to Snakemake.
    """
    from mcnotes.lab import results

    asked = DEFAULTS | config
    files = {preset: f"{asked['results']}/{preset}.json" for preset in runs}
    found = []
    for preset, file in files.items():
        if not (ROOT / file).exists():
            continue
        try:
            record = results.read(ROOT / file)
        except results.ResultsError:
            record = None
        lab, pairs = presets.experiment(runs[preset]), runs[preset]["pairs"]
        wanted = (lab, pairs, asked["methods"], asked["shapes"])
        if record is None or not results.holds(record, *wanted):
            found.append(file)
    return found


def assignments(words: list[str]) -> dict[str, Any]:
    """Parse `name=value` words into a dict; values are read as YAML, mappings of a name merged."""
    found: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign:
            raise PlanError(f"got {word!r}, expected NAME=VALUE")
        value = presets.parse(text, name)
        if name in found and not (isinstance(value, dict) and isinstance(found[name], dict)):
            raise PlanError(f"{name}: got two values, {found[name]!r} and {value!r}, expected one")
        found = merged(found, {name: value})
    return found


def main(arguments: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="check, then run what is missing")
    runs.add_argument("--config", type=Path, default=STEPS / "full-scale.yaml")
    runs.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="NAME=VALUE", dest="changes"
    )
    one = commands.add_parser("step", help="run one notebook")
    one.add_argument("notebook", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("values", nargs="*", metavar="NAME=VALUE")
    at = arguments.index("--") if "--" in arguments else len(arguments)
    args, options = parser.parse_args(arguments[:at]), arguments[at + 1 :]
    chapters.settle_folders()
    if args.command == "run":
        return run(args.config, assignments(args.changes), options)
    with sigterm_interrupts():
        step(args.notebook, args.out, assignments(args.values))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt as reason:
        print("stopped: the same command goes on from the last epochs", file=sys.stderr)
        number = signal.SIGTERM if isinstance(reason, Terminated) else signal.SIGINT
        sys.exit(128 + number)
