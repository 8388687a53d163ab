"""The command: `mcnotes report`, `align`, `symmetry` and `data`; also as `python -m mcnotes`.

`report` is chapter 10 of the book: papermill runs it, nbconvert makes a page of it. The exit
code is 0 for success, 1 if the task cannot be done, 2 for a command that cannot be understood, and
130 or 143 if it was stopped (Ctrl-C, SIGTERM). Every error is one line that says what to do.
Modules that need PyTorch are imported only when they are used, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NoReturn

from mcnotes.names import resolve

if TYPE_CHECKING:
    from torch import nn

    from mcnotes.api import Aligned, Profile
    from mcnotes.data import Sets

CHAPTER = "10_your_own_models.ipynb"
BOOK_ONLY = {"book", "remove-cell"}  # cells of the chapter that do not belong in a report
REPORT_NEEDS = "papermill and nbconvert. Fix: pip install 'mcnotes[report]'"
ON_THE_LINE = 13  # points, in the report on two folders
REFUSALS = (
    "InputError",
    "SymmetryError",
    "ExampleError",
    "CheckpointError",
    "DataError",
    "AlignmentError",
    "TrainingError",
)
LATE = 24 * 3600  # seconds for a cell's last output; the usual 4 pass where a machine is suspended
WIDGET = "application/vnd.jupyter.widget-view+json"
RAW = argparse.RawDescriptionHelpFormatter
TEXT_BARS = "import tqdm, tqdm.auto\ntqdm.auto.tqdm = tqdm.tqdm  # as text, for the terminal"

ABOUT = """\
How far apart are two networks really? Reorder the units of one so that they
match the other's, and see what is left between them.

  mcnotes report    a page on two checkpoints: symmetries, lines, curves, verdict
  mcnotes align     one checkpoint in the other's order of units, or basis
  mcnotes symmetry  which units of a network may change places
  mcnotes data      fetch a data set, or look at one of your own"""

MODEL_HELP = """\
models and data:
  --model is a Python path, module:name, of a class or function that makes the
  network; modules are looked for in this folder, too. --arguments are what it is
  called with. A and B are files written by torch.save or safetensors; the network
  is found inside them. Nothing is unpickled that could run code. `mcnotes align` also
  takes folders as save_pretrained of transformers writes them, without --model.

  --data is one of
    FOLDER            pictures: FOLDER/CLASS/x.png, or FOLDER/train/CLASS/x.png,
                      val and test
    MODULE:FUNCTION   a function without arguments that returns a DataLoader, or
                      (train, val, test) of them: anything your network takes
    NAME              a data set of the book, such as fashion-mnist-small
    TEXT.txt          for folders of language models: their tokenizer reads it

  Pictures are scaled to [0, 1]; --mean and --std normalise them as in training.
  The batches of a DataLoader are used unchanged.
"""

REPORT_EXAMPLES = """
examples:
  two checkpoints of torchvision's ResNet-18 and a folder of pictures
    mcnotes report --model torchvision.models:resnet18 \\
      --arguments '{"num_classes": 3}' a.pt b.pt --data photos --image-size 224 \\
      --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225

  your own class in mynets.py, and a function there that returns a DataLoader
    mcnotes report --model mynets:Net a.ckpt b.ckpt --data mynets:loader

  a regression: your own loss, and a metric, of (outputs, targets)
    mcnotes report --model mynets:Net a.pt b.pt --data mynets:loader \\
      --loss torch.nn.functional:mse_loss --metric torch.nn.functional:l1_loss

The page is REPORT.html; the aligned, the averaged and the best network are in the
folder REPORT beside it. If it is stopped, the same command resumes with the curves.
"""

ALIGN_EXAMPLES = """
--kinds all moves B by all symmetries that are found: scales, signs, rotations and changes
of basis, too. A then moves as well, into the same gauge, and is written beside B.

examples:
  two checkpoints of your own class: B in A's order of units
    mcnotes align --model mynets:Net a.pt b.pt --data mynets:loader --out aligned.safetensors

  two language models of transformers, and a text: ALIGNED/a, ALIGNED/b, and a report,
  ALIGNED/report.html, with the loss on the line between them before and after
    mcnotes align runs/1 runs/2 --data book.txt --kinds all --learn 10 --out aligned
"""

SYMMETRY_EXAMPLES = """
examples:
  mcnotes symmetry torchvision.models:vit_b_16
  mcnotes symmetry mynets:Net --arguments '{"classes": 3}' --shape 1 28 28
  mcnotes symmetry mynets:Text --shape 16 --tokens 30522
  mcnotes symmetry mynets:Net --data mynets:loader
"""

DATA_EXAMPLES = """
examples:
  mcnotes data                  # the data sets of the book
  mcnotes data cifar10          # fetch it, if it is not there, and look at it
  mcnotes data photos           # a folder of pictures of your own
  mcnotes data mynets:loader    # a function that returns a DataLoader
"""


class Refused(Exception):
    """The task cannot be done; the message, on one line, says why and what to do."""


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM, which stops a command as Ctrl-C does."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a single line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. For help: {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    sys.path.insert(0, os.getcwd())  # where the user's modules are
    args = parser().parse_args(arguments)
    try:
        with sigterm_interrupts():
            args.run(args)
    except Refused as error:
        return failed(args.command, str(error))
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        return failed(args.command, f"stopped{what_is_kept(args)}", 128 + number)
    except Exception as error:
        if type(error).__name__ not in REFUSALS:
            raise
        return failed(args.command, str(error))
    return 0


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise Terminated in a context, so that no notebook kernel is left behind."""

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def what_is_kept(args: argparse.Namespace) -> str:
    """From where a stopped command will resume, for the message about it."""
    if kept := unfinished(args):
        return f". Run the same command again to resume from {listed(kept)}"
    if args.command == "report":
        return " before a curve was trained. The same command starts from the beginning"
    return ""


def unfinished(args: argparse.Namespace) -> list[Path]:
    """Checkpoints of what a command began to train and did not finish."""
    if args.command == "align":
        started = args.learn and args.out and beside(args.out).exists()
        return [beside(args.out)] if started else []
    return checkpoints_in(args.out.with_suffix("")) if args.command == "report" else []


def checkpoints_in(folder: Path) -> list[Path]:
    """The curves that a report began to train and did not finish."""
    return sorted(folder.glob("*.checkpoint"))


def beside(out: Path) -> Path:
    """Where `align --learn` keeps what it has learned so far."""
    return out.with_name(f"{out.name}.checkpoint")


def listed(paths: Sequence[Path]) -> str:
    return " and ".join(f"'{path}'" for path in paths)


def failed(command: str, reason: str, code: int = 1) -> int:
    """Print the reason on one line and return the exit code."""
    print(f"mcnotes {command}: {' '.join(reason.split())}", file=sys.stderr)
    return code


# The arguments


def parser() -> Parser:
    """All commands with their help."""
    top = Parser("mcnotes", description=ABOUT, formatter_class=RAW)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], about: str, more: str) -> Parser:
        text = f"{about[0].upper()}{about[1:]}."
        made: Parser = commands.add_parser(
            name, help=about, description=text, epilog=more, formatter_class=RAW
        )
        made.set_defaults(run=run)
        return made

    made = add("report", report, "make a page on two checkpoints", MODEL_HELP + REPORT_EXAMPLES)
    pair_arguments(made)
    report_arguments(made)
    made = add("align", align, "put B's units into A's order", MODEL_HELP + ALIGN_EXAMPLES)
    pair_arguments(made, folders=True)
    align_arguments(made)
    about = "show which units may change places"
    symmetry_arguments(add("symmetry", show_symmetry, about, SYMMETRY_EXAMPLES))
    data_arguments(add("data", show_data, "fetch a data set, or look at one", DATA_EXAMPLES))
    return top


def report_arguments(made: Parser) -> None:
    """Options for what is measured, how the curves are trained, and the page."""
    loss_argument(made)
    made.add_argument(
        "--metric",
        type=python_path,
        action="append",
        default=[],
        dest="metrics",
        metavar="MODULE:FUNCTION",
        help="a function of (outputs, targets) → the mean over a batch; may be repeated; "
        "default: the accuracy, where there are classes",
    )
    made.add_argument(
        "--epochs", type=positive, default=12, help="epochs of each curve (default: 12)"
    )
    made.add_argument(
        "--lr", type=step, default=0.02, help="learning rate of the curves (default: 0.02)"
    )
    made.add_argument(
        "--points", type=several, default=25, help="points measured on a curve (default: 25)"
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="REPORT.html",
        help="the page (default: report.html)",
    )


def loss_argument(made: Parser) -> None:
    """The option for what is made small."""
    made.add_argument(
        "--loss",
        type=python_path,
        metavar="MODULE:FUNCTION",
        help="a function of (outputs, targets); default: the cross-entropy of logits, or the "
        "loss that a model of transformers computes itself",
    )


def align_arguments(made: Parser) -> None:
    """Options for what may move, and where the result is written."""
    made.add_argument(
        "--kinds",
        nargs="+",
        default=["permutations"],
        metavar="KIND",
        help="of symmetries: all, or some of permutations, scales, signs, rotations, bases "
        "(default: permutations)",
    )
    made.add_argument(
        "--learn",
        type=positive,
        metavar="EPOCHS",
        help="then go on by the loss half-way, for so many epochs; stopped, it can be resumed",
    )
    loss_argument(made)
    made.add_argument(
        "--context", type=positive, default=128, help="tokens of a passage of a text (default: 128)"
    )
    made.add_argument(
        "--out",
        type=Path,
        help="the aligned network (default: aligned.safetensors), or a new folder for both "
        "networks and the report (default: aligned)",
    )


def symmetry_arguments(made: Parser) -> None:
    """Arguments for a network and its inputs."""
    made.add_argument("model", type=python_path, metavar="MODEL", help="module:name")
    model_arguments(made)
    made.add_argument("--data", metavar="DATA", help="take the inputs from this data")
    made.add_argument(
        "--shape",
        type=positive,
        nargs="+",
        default=[3, 224, 224],
        metavar="N",
        help="use random inputs of this shape (default: 3 224 224)",
    )
    made.add_argument(
        "--tokens", type=positive, metavar="N", help="inputs are token ids below N, not floats"
    )


def data_arguments(made: Parser) -> None:
    """Arguments for the data to look at."""
    made.add_argument("data", nargs="?", metavar="DATA", help="a name, a folder, module:function")
    made.add_argument("--image-size", type=positive, help="cut pictures to this")


def pair_arguments(made: Parser, *, folders: bool = False) -> None:
    """Arguments for two checkpoints, or folders of models, their network and the data."""
    place = file_or_folder if folders else existing
    made.add_argument("checkpoint_a", type=place, metavar="A", help="a checkpoint")
    made.add_argument("checkpoint_b", type=place, metavar="B", help="another of this network")
    made.add_argument(
        "--model",
        type=python_path,
        required=not folders,
        metavar="MODULE:NAME",
        help="what makes the network" + "; not for folders" * folders,
    )
    model_arguments(made)
    made.add_argument(
        "--prefix",
        help="what stands before the network's names in the files, if several networks in them fit",
    )
    made.add_argument("--data", required=True, help="see below")
    made.add_argument("--image-size", type=positive, help="cut pictures to this")
    made.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="X",
        help="subtracted from pixels in [0, 1], by channel",
    )
    made.add_argument(
        "--std", type=float, nargs="+", metavar="X", help="what they are then divided by"
    )
    made.add_argument("--batch-size", type=positive, default=128, help="of pictures (default: 128)")
    made.add_argument(
        "--samples",
        type=positive,
        default=2000,
        help="training inputs on which units are compared and BatchNorm's statistics "
        "computed (default: 2000)",
    )
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    made.add_argument("--seed", type=int, default=1)


def model_arguments(made: Parser) -> None:
    """Options for how the network is built."""
    made.add_argument(
        "--arguments",
        type=json_object,
        default={},
        metavar="JSON",
        help="""of the network: '{"num_classes": 3}'""",
    )


def python_path(text: str) -> str:
    """module:name of something that can be called."""
    try:
        found = resolve(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except Exception as error:  # of the user's module
        reason = f"importing {text} fails ({type(error).__name__}: {error})"
        raise argparse.ArgumentTypeError(reason) from error
    if not callable(found):
        raise argparse.ArgumentTypeError(f"{text} cannot be called")
    return text


def existing(text: str) -> Path:
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, of which mcnotes align makes a page")
    return file_or_folder(text)


def file_or_folder(text: str) -> Path:
    if not (Path(text).is_file() or Path(text).is_dir()):
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of at least 1")
    return int(text)


def several(text: str) -> int:
    if (found := positive(text)) < 2:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of at least 2")
    return found


def step(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0")
    return found


def json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f"""{text} is not a JSON object, such as '{{"width": 8}}'"""
        )
    return found


# mcnotes report


def report(args: argparse.Namespace) -> None:
    """Run chapter 10 on the user's files, and write its page and the networks beside it."""
    try:
        import nbconvert  # noqa: F401
        import nbformat
        import papermill  # noqa: F401
    except ImportError as error:
        raise Refused(f"needs {REPORT_NEEDS} ({error})") from error
    if args.out.suffix != ".html":
        raise Refused(f"got --out {args.out}, expected a name that ends in .html")
    folder = made_folder(args.out.with_suffix(""))
    if kept := checkpoints_in(folder):
        print(f"mcnotes report: resumes from {listed(kept)}", flush=True)
    notebook = nbformat.read(chapter(), as_version=4)
    notebook.cells = [c for c in notebook.cells if not BOOK_ONLY.intersection(tags(c))]
    executed = folder / "report.ipynb"
    run(notebook, executed, parameters(args, folder))
    ran = nbformat.read(executed, as_version=4)
    from mcnotes import cache

    try:
        cache.write_atomic(args.out, page(ran, args).encode())
    except OSError as error:
        raise Refused(f"cannot write {args.out} ({error}); what ran is in {executed}") from error
    for path in [executed, *checkpoints_in(folder)]:
        path.unlink()
    print(f"{args.out}: the report; {folder}{os.sep}: the networks")


def made_folder(folder: Path) -> Path:
    """Create the folder of --out if it does not exist. Raises Refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"cannot make the folder {folder} ({error}). Fix: see --out") from error
    return folder


def chapter() -> Path:
    """The path of chapter 10: inside an installed package, else in the book of the clone."""
    inside = Path(__file__).parent / "book" / CHAPTER
    return inside if inside.exists() else Path(__file__).parents[1] / "book" / CHAPTER


def parameters(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The parameters of the chapter, from the command's arguments."""
    same = [
        "prefix",
        "image_size",
        "mean",
        "std",
        "loss",
        "metrics",
        "lr",
        "points",
        "device",
        "batch_size",
    ]
    return {name: getattr(args, name) for name in same} | {
        "factory": args.model,
        "factory_arguments": args.arguments,
        "checkpoint_a": str(args.checkpoint_a),
        "checkpoint_b": str(args.checkpoint_b),
        "dataset": args.data,
        "output": str(folder),
        "curve_epochs": args.epochs,
        "statistics": args.samples,
        "match_images": args.samples,
        "pairs": [[args.seed, args.seed + 1]],
    }


def run(notebook: Any, out: Path, values: dict[str, Any]) -> None:
    """Execute the notebook in the current folder. Raises Refused if it fails."""
    import nbformat
    import papermill

    watched = sys.stderr.isatty()
    if watched:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(TEXT_BARS))
    else:
        os.environ["TQDM_DISABLE"] = "1"
    os.environ["JUPYTER_PREFER_ENV_PATH"] = (
        "1"  # the kernel of this Python, whatever others the user has
    )
    try:
        papermill.execute_notebook(
            notebook,
            str(out),
            parameters=values,
            kernel_name="python3",
            language="python",
            cwd=os.getcwd(),
            progress_bar={"desc": "report", "leave": False} if watched else False,
            stderr_file=sys.stderr if watched else None,
            iopub_timeout=LATE,
            extra_arguments=["--log-level=50"],
        )
    except papermill.PapermillExecutionError as error:
        if error.ename in REFUSALS:
            raise Refused(error.evalue) from error
        raise Refused(f"{error.ename}: {error.evalue} (where: see {out})") from error
    except OSError as error:
        raise Refused(f"cannot write {out} ({error}). Fix: see --out") from error


def tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def page(ran: Any, args: argparse.Namespace) -> str:
    """A self-contained HTML page: title, figure and verdict, then what led to them."""
    from nbconvert import HTMLExporter

    ran.metadata.pop("widgets", None)  # left by progress bars
    cells = [c for c in ran.cells if c.cell_type == "markdown" or shown(c)]
    first = [c for c in cells if "summary" in tags(c)]
    rest = [c for c in cells if c not in first]
    ran.cells = [title(args), *(part for c in [*first, *rest] for part in with_caption(c))]
    for cell in ran.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source)
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_anchor_links=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    body, _ = exporter.from_notebook_node(ran)
    template = Path(__file__).with_name("report.html").read_text("utf8")
    name = f"{args.checkpoint_a.name} and {args.checkpoint_b.name}"
    return Template(template).substitute(title=escape(name), body=body)


def shown(cell: Any) -> bool:
    """Remove progress bars from the outputs. Are any outputs left?"""
    cell.outputs = [
        output
        for output in cell.outputs
        if output.get("name") != "stderr" and WIDGET not in output.get("data", {})
    ]
    return bool(cell.outputs)


def title(args: argparse.Namespace) -> Any:
    """A cell that says what the report is about and how it was made."""
    import nbformat

    about, command = made_by()
    return nbformat.v4.new_markdown_cell(
        f"# Two networks: `{args.checkpoint_a.name}` and `{args.checkpoint_b.name}`\n\n"
        f"{about}\n\n```\n{command}\n```"
    )


def made_by() -> tuple[str, str]:
    """Date and versions; and the command as it was typed."""
    import torch

    import mcnotes

    versions = f"mcnotes {mcnotes.__version__}, PyTorch {torch.__version__}"
    return f"{date.today().isoformat()}, {versions}", shlex.join(["mcnotes", *sys.argv[1:]])


def with_caption(cell: Any) -> Iterator[Any]:
    """The cell with the alternative text of its figure, then a cell with the caption, if any."""
    import nbformat

    settings = cell.metadata.get("mystnb", {})
    cell.metadata["alt"] = settings.get("image", {}).get("alt")
    yield cell
    if caption := settings.get("figure", {}).get("caption"):
        yield nbformat.v4.new_markdown_cell(f"*{caption}*")


def plain(text: str) -> str:
    """The text without what works only in the book: links to its chapters, and roles."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\.ipynb\)", r"\1 of the book", text)
    return re.sub(r"\{\w+\}(?=`)", "", text)


# mcnotes align


def align(args: argparse.Namespace) -> None:
    """Write network B aligned to A; and A in the same gauge, if more than units moved."""
    from mcnotes import api
    from mcnotes.calls import InputError
    from mcnotes.checks import require

    args.kinds = api.ALL if args.kinds == [api.ALL] else args.kinds
    require("align", {"kinds": args.kinds}, api.ARGUMENTS, InputError)
    folders = [path.is_dir() for path in (args.checkpoint_a, args.checkpoint_b)]
    if all(folders):
        align_folders(args)
    elif any(folders):
        raise Refused("got a folder and a file, expected two of one kind")
    elif args.model is None:
        raise Refused("got files without --model, which says what makes their network")
    else:
        align_files(args)


def align_files(args: argparse.Namespace) -> None:
    """`align` for two files of a network that --model makes."""
    from mcnotes import checkpoints, data, prepare, symmetry

    out = args.out = args.out or Path("aligned.safetensors")
    if args.loss and not args.learn:
        raise Refused("got --loss, which --learn alone uses for files. Fix: add --learn")
    if out.is_dir():
        raise Refused(f"got --out {out}, expected the name of a file, not of a folder")
    other = out.with_stem(f"{out.stem}_reference")
    given = {x.resolve() for x in (args.checkpoint_a, args.checkpoint_b)}
    if given & {out.resolve(), other.resolve()}:
        raise Refused(f"got --out {out}, by which A or B would be overwritten. Fix: another --out")
    made_folder(out.parent)
    net = build(args.model, args.arguments)
    found = checkpoints.load_pair(args.checkpoint_a, args.checkpoint_b, net, args.prefix)
    sets = named_sets(args)
    wrapped = prepare.for_inputs(net, sets, args.mean, args.std)
    model_a, model_b = (prepare.filled("align", wrapped, x.theta) for x in found)
    aligned = aligned_by(args, model_a, model_b, data.take(sets.train, args.samples))
    about = {"a": found[0].sha256, "b": found[1].sha256, "factory": args.model}
    files = {out: ("B aligned to A, the same function", aligned.model)}
    if isinstance(aligned.symmetry, symmetry.Bases):
        files[other] = ("A in the gauge of the aligned B, the same function", aligned.reference)
    try:
        for path, (what, model) in files.items():
            checkpoints.save(path, model.state_dict(), net, what=what, made_from=about)
    except OSError as error:
        raise Refused(f"cannot write {out} ({error}). Fix: see --out") from error
    beside(out).unlink(missing_ok=True)
    for path, (what, _) in files.items():
        print(f"{path}: {what}")


def align_folders(args: argparse.Namespace) -> None:
    """`align` for two folders of models of transformers: writes both, and a report."""
    import mcnotes
    from mcnotes import checkpoints, data, prepare

    sources = {"a": args.checkpoint_a, "b": args.checkpoint_b}
    if args.model or args.arguments or args.prefix:
        raise Refused("--model, --arguments and --prefix are for files, a folder says what it is")
    out = args.out = args.out or Path("aligned")
    if out.is_dir() and any(out.iterdir()):
        cause = f"got --out {out}, which holds files, and they would be overwritten"
        raise Refused(f"{cause}. Fix: another --out, or remove it")
    given = [checkpoints.from_folder(path) for path in sources.values()]
    one, two = (net.state_dict() for net in given)
    if all(n in two and x.dtype == two[n].dtype and x.equal(two[n]) for n, x in one.items()):
        raise Refused("A and B hold the same weights, expected two networks")
    sets = texts(args, given[0]) if Path(args.data).is_file() else named_sets(args)
    model_a, model_b = (prepare.for_inputs(net, sets, args.mean, args.std) for net in given)
    made_folder(out)
    few, seen = (data.take(x, args.samples) for x in (sets.train, sets.val))

    def line(one: nn.Module, two: nn.Module) -> Profile:
        made = mcnotes.connect(one, two, few, kind="line", device=args.device)
        return mcnotes.profile(made, seen, loss=loss_of(args), points=ON_THE_LINE)

    before = line(model_a, model_b)
    aligned = aligned_by(args, model_a, model_b, few)
    after = line(aligned.reference, aligned.model)
    print(f"barrier on the line: {before.barrier:.3g} as given, {after.barrier:.3g} aligned")
    report, written = "report.html", {"a": aligned.reference, "b": aligned.model}
    try:
        with tempfile.TemporaryDirectory(dir=out) as folder:  # so that all appears at the end
            for name, model in written.items():
                checkpoints.to_folder(Path(folder, name), model, sources[name])
            page = aligned_page(args, aligned, before, after)
            Path(folder, report).write_text(page, "utf8")
            for name in (*written, report):
                Path(folder, name).rename(out / name)
    except OSError as error:
        raise Refused(f"cannot write {out} ({error}). Fix: see --out") from error
    beside(out).unlink(missing_ok=True)
    print(f"{out / 'a'}, {out / 'b'}: the networks; {out / report}: the report")


def aligned_by(args: argparse.Namespace, a: nn.Module, b: nn.Module, few: Any) -> Aligned:
    """Align as the arguments say, and print what was found."""
    import mcnotes
    from mcnotes import symmetry

    if kept := unfinished(args):
        print(f"mcnotes align: resumes from {listed(kept)}", flush=True)
    found = mcnotes.align(
        a,
        b,
        few,
        kinds=args.kinds,
        learn=args.learn,
        loss=loss_of(args) if args.learn else None,
        device=args.device,
        seed=args.seed,
        checkpoint=beside(args.out) if args.learn else None,
    )
    print(repr(found))
    sym = found.symmetry
    if found.moves:
        print(found.table().to_string(index=False, float_format="{:+.2f}".format))
    else:
        print_pinned(sym.permutations if isinstance(sym, symmetry.Bases) else sym)
    if isinstance(sym, symmetry.Bases) and sym.refused:
        print(sym.refusals().to_string(index=False))
    return found


def loss_of(args: argparse.Namespace) -> Any:
    """The function that --loss names, or None."""
    return resolve(args.loss) if args.loss else None


def texts(args: argparse.Namespace, net: Any) -> Sets:
    """A text in passages of tokens, as both folders read it. Raises Refused."""
    from mcnotes import checkpoints, data

    read = [checkpoints.tokenizer(path) for path in (args.checkpoint_a, args.checkpoint_b)]
    known = [encode for encode in read if encode is not None]
    if not known:
        cause = f"neither A nor B has a tokenizer to read {args.data} with"
        raise Refused(f"{cause}. Fix: --data MODULE:FUNCTION with batches of tokens")
    longest = getattr(net.config, "max_position_embeddings", args.context)
    length = min(args.context, longest)
    sets = [data.passages(args.data, encode, length) for encode in known]
    if any(not same_tokens(one.train, sets[0].train) for one in sets):
        raise Refused("the tokenizers of A and B read the text differently, expected the same")
    largest = max(int(x["input_ids"].max()) for part in sets[0][:3] for x in part)
    rows = net.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        cause = f"the text has the token {largest}, and A knows {rows} tokens"
        raise Refused(f"{cause}. Fix: see that model and tokenizer belong together")
    if not causal(net, sets[0].train[0]):
        cause = f"a {type(net).__name__} sees the tokens that it is to predict"
        fix = "--data MODULE:FUNCTION with batches as in its training"
        raise Refused(f"{cause}, expected a causal language model for a text. Fix: {fix}")
    return sets[0]


def causal(net: nn.Module, batch: dict[str, Any]) -> bool:
    """Do logits in the first half of passages depend on that half alone? Raises Refused."""
    import torch

    from mcnotes import prepare
    from mcnotes.data.arrays import failure

    ids = batch["input_ids"]
    half = ids.shape[1] // 2
    other = torch.cat([ids[:, :half], (ids[:, half:] == 0).long()], 1)  # all tokens differ
    wide = prepare.working_copy("align", "A", net, torch.device("cpu"))
    try:
        with torch.no_grad():
            one, two = (wide(input_ids=x, labels=ids).logits[:, :half] for x in (ids, other))
    except Exception as error:  # of the user's network
        reason = f"A fails on the tokens of the text ({failure(error)})"
        raise Refused(f"{reason}. Fix: see its tokenizer and --context") from error
    return prepare.alike([one], [two])


def same_tokens(one: Any, two: Any) -> bool:
    """Do two lists of passages hold the same?"""
    return len(one) == len(two) and all(
        bool((x["input_ids"] == y["input_ids"]).all()) for x, y in zip(one, two, strict=True)
    )


def aligned_page(args: argparse.Namespace, found: Aligned, before: Profile, after: Profile) -> str:
    """A self-contained HTML page on two folders: the line, what moved, and what may not."""
    about, command = made_by()
    names = f"{args.checkpoint_a.name} and {args.checkpoint_b.name}"
    frame = before.frame()[["t", "loss"]].rename(columns={"loss": "loss, as given"})
    parts = [
        f"<h1>Two networks: {escape(names)}</h1><p>{about}</p><pre>{escape(command)}</pre>",
        "<h2>The line from A to B</h2>",
        f"<p>The barrier is {before.barrier:.3g} as given and {after.barrier:.3g} aligned: how "
        "far the loss rises above the straight line between its ends, on validation data.</p>",
        figure_of(before, after),
        frame.assign(**{"loss, aligned": after.loss}).to_html(
            index=False, float_format="{:.3g}".format
        ),
        "<h2>What was moved</h2>",
        found._repr_html_(),
    ]
    template = Path(__file__).with_name("report.html").read_text("utf8")
    return Template(template).substitute(title=escape(names), body="\n".join(parts))


def figure_of(before: Profile, after: Profile) -> str:
    """The loss on the line, before and after, as a picture in HTML."""
    from matplotlib.figure import Figure

    from mcnotes.lab import figures

    figures.set_style()
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    ax = figure.subplots()
    ax.plot(before.t, before.loss, color=figures.color("unaligned"), label="as given")
    ax.plot(after.t, after.loss, color=figures.color("aligned"), label="aligned")
    ax.set(xlabel="$t$, from A to B", ylabel="validation loss")
    ax.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    data = base64.b64encode(file.getvalue()).decode()
    alt = "The validation loss on the line from A to B: two curves, as given and aligned."
    return f'<img alt="{alt}" src="data:image/png;base64,{data}">'


# mcnotes symmetry, data


def show_symmetry(args: argparse.Namespace) -> None:
    """Show the verified groups of a network's units, or why there are none."""
    import torch

    from mcnotes import calls, data, symmetry
    from mcnotes.data.arrays import failure

    net = build(args.model, args.arguments)
    if args.data:
        head, _ = data.Loader(named_sets(args).train, torch.device("cpu"), once=True).head
        example = calls.first(head, 2)
    else:
        try:
            size = (2, *args.shape)
            example = torch.randint(args.tokens, size) if args.tokens else torch.randn(size)
        except (RuntimeError, ValueError) as error:  # too large for the memory, or for 64 bits
            reason = f"cannot make inputs of shape {args.shape} ({failure(error)})"
            raise Refused(f"{reason}. Fix: see --shape and --tokens") from error
    try:
        sym = symmetry.find(net, example)
    except symmetry.ExampleError as error:
        cause = error.__cause__
        reason = f"the network fails on inputs of this shape ({type(cause).__name__}: {cause})"
        raise Refused(f"{reason}. Fix: see --shape, --tokens and --data") from error
    moved = sym.verify(net, example, tolerance=1e-4)
    print(repr(sym))
    if not sym.groups:
        print_pinned(sym)
        return
    rows = [{n: row[n] for n in ("group", "groups", "units")} for row in sym.table()]
    widths = {n: max(len(str(row[n])) for row in [{n: n}, *rows]) for n in rows[0]}
    for row in [{n: n for n in rows[0]}, *rows]:
        print("  ".join(str(value).ljust(widths[n]) for n, value in row.items()).rstrip())
    print(f"Proved: with every unit moved, outputs differ by {moved:.0e} (relative).")


def print_pinned(sym: Any) -> None:
    """Print why no unit may move."""
    print("No unit of this network may change places. Why its axes stay:")
    reasons: dict[str, list[str]] = {}
    for pin in sym.pinned:
        reasons.setdefault(pin.why, []).append(pin.name)
    for why, names in reasons.items():
        print(f"  {why}: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))


def show_data(args: argparse.Namespace) -> None:
    """List the data sets, or describe one, after fetching it if necessary."""
    from mcnotes import data

    if args.data is None:
        print("\n".join(data.SOURCES))
        return
    if args.data in data.SOURCES:
        try:
            print(repr(data.load(args.data, download=True, image_size=args.image_size)))
        except ValueError as error:
            raise Refused(f"{error}. Fix: see --image-size") from error
        return
    sets = named_sets(args)
    if sets.task is not None:
        print(repr(sets.task))
        print("classes:", ", ".join(sets.task.class_names))
        return
    import torch

    for name, source in zip(("train", "val", "test"), sets, strict=False):
        loader = data.Loader(source, torch.device("cpu"))
        print(f"{name}: {loader!r}, inputs {loader.form}")


def build(factory: str, arguments: dict[str, Any]) -> nn.Module:
    """Build the user's network. Raises Refused, whatever error building it raises."""
    from mcnotes import checkpoints

    try:
        return checkpoints.build(factory, arguments)
    except checkpoints.CheckpointError:
        raise
    except ValueError as error:  # there is no such class
        reason = f"{factory} with {arguments} fails ({type(error).__name__}: {error})"
        raise Refused(f"{reason}. Fix: see --arguments") from error


def named_sets(args: argparse.Namespace) -> Sets:
    """The data sets that --data names."""
    from mcnotes import data

    sizes = {"batch_size": getattr(args, "batch_size", 128)}
    return data.sets(args.data, image_size=getattr(args, "image_size", None), device="cpu", **sizes)


if __name__ == "__main__":
    sys.exit(main())
