"""What a parameter may be: rules that say in words what was got and what is expected.

A rule takes a value and returns what is wrong with it, "" where nothing is. Rules are made by the
functions below, and of one another: `listed(whole(1))`. The book's table is `parameters.ALLOWED`.
Most rules do without PyTorch, which takes seconds to import: those that need it import it.
"""

from collections.abc import Callable, Collection, Mapping

from mcnotes.names import suggest

Rule = Callable[[object], str]
# What a whole number and a factor may be at most unless a rule says less. No run has more images,
# units or steps; either fits what it is used for: 32 bits, float32, JSON, a division of floats.
MOST = 2**31 - 1
LARGEST = 2.0**127


def faults(values: Mapping[str, object], rules: Mapping[str, Rule]) -> list[str]:
    """What is wrong with `values`, each after the name of its own; those without a rule pass."""
    found = {name: rules[name](value) for name, value in values.items() if name in rules}
    return [f"{name}: {fault}" for name, fault in found.items() if fault]


def require(
    who: str,
    values: Mapping[str, object],
    rules: Mapping[str, Rule],
    error: type[ValueError] = ValueError,
) -> None:
    """Raise an error, whose text begins with `who`, unless the rules take all `values`."""
    if found := faults(values, rules):
        raise error(f"{who}: {'; '.join(found)}")


def got(value: object, expected: str) -> str:
    """The text of a fault."""
    try:
        shown = f"{value!r:.200}"
    except Exception:  # of thousands of digits, or of a type whose repr fails
        shown = f"a value of type {type(value).__name__}"
    return f"got {shown}, expected {expected}"


def form(value: object) -> str:
    """The type and the shape of a tensor; the kind of anything else."""
    import torch

    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {[*value.shape]}"
    return type(value).__name__


def whole(least: int, most: int = MOST) -> Rule:
    """An `int` (True and 2.0 are none) from `least` to `most`, which is named if it is exceeded."""

    def rule(value: object) -> str:
        limits = f"of at least {least}"
        if isinstance(value, int) and not isinstance(value, bool):
            if least <= value <= most:
                return ""
            limits = f"from {least} to {most}" if value > most else limits
        return got(value, f"a whole number {limits}") + _quoted(value)

    return rule


def number(least: float, most: float = LARGEST, *, above: bool = False) -> Rule:
    """A finite `int` or `float` (True is none) from `least`, or above it, to `most`."""

    def rule(value: object) -> str:
        exceeded = False
        if isinstance(value, int | float) and not isinstance(value, bool):
            inside = (least < value if above else least <= value) and value <= most  # NaN is not
            if inside:
                return ""
            exceeded = value > most
        limits = f"{'above' if above else 'of at least'} {least:g}"
        limits += f" and at most {most:g}" if exceeded or most < LARGEST else ""
        return got(value, f"a number {limits}") + _quoted(value)

    return rule


def flag(value: object) -> str:
    """True or False."""
    return "" if isinstance(value, bool) else got(value, "True or False")


def text(value: object) -> str:
    """Some text."""
    return "" if isinstance(value, str) and value else got(value, "some text")


def a(kind: type | tuple[type, ...], words: str) -> Rule:
    """A value of this type; words: how to call it."""

    def rule(value: object) -> str:
        found = f"a {type(value).__name__}"
        return "" if isinstance(value, kind) else f"got {found}, expected {words}"

    return rule


def device(value: object) -> str:
    """A device of this computer as PyTorch names it, or "auto"."""
    import torch

    try:
        place = torch.device("cpu" if value == "auto" else value)  # type: ignore[call-overload]
        torch.empty(1, device=place).tolist()  # fails on "meta", where nothing has a value
    except (AssertionError, RuntimeError, TypeError):
        there = ["auto", "cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
        return got(value, f"a device of this computer: {', '.join(there)}")
    return ""


def function(value: object) -> str:
    """Something to call."""
    return "" if callable(value) else got(value, "a function")


def one_of(known: Collection[str]) -> Rule:
    """A name in `known`, as it is when the rule is asked."""

    def rule(value: object) -> str:
        if isinstance(value, str) and value in known:
            return ""
        close = suggest(value, known)
        return got(value, f"one of {', '.join(known)}") + (close if "did you mean" in close else "")

    return rule


def optional(other: Rule) -> Rule:
    """None, or what `other` takes."""

    def rule(value: object) -> str:
        return "" if value is None or not (fault := other(value)) else f"{fault}, or None"

    return rule


def listed(other: Rule, *, once: bool = True) -> Rule:
    """A list of one value or more, all such as `other` takes; `once`: none of them twice."""

    def rule(value: object) -> str:
        if not isinstance(value, list | tuple) or not value:
            return got(value, "a list of one value or more, such as [a, b]")
        if fault := next((fault for item in value if (fault := other(item))), ""):
            return fault
        twice = [item for i, item in enumerate(value) if item in value[:i]]
        return got(value, f"{twice[0]!r} only once") if once and twice else ""

    return rule


def mapping(rules: Mapping[str, Rule]) -> Rule:
    """Names and values, each name in `rules` and its value such as its rule takes."""

    def rule(value: object) -> str:
        if not isinstance(value, Mapping):
            return got(value, f"names and values; names: {', '.join(rules)}")
        unknown = [name for name in value if name not in rules]
        odd = [f"got name {name!r}{suggest(name, rules)}" for name in unknown]
        return "; ".join(odd + faults(value, rules))

    return rule


def mapping_of(other: Rule, least: int = 0) -> Rule:
    """Names, at least so many, and values such as `other` takes."""

    def rule(value: object) -> str:
        if not isinstance(value, Mapping) or len(value) < least:
            return got(value, f"{least} names or more, each with its value")
        named = {str(name): other(each) for name, each in value.items()}
        return "; ".join(f"{name!r}: {fault}" for name, fault in named.items() if fault)

    return rule


def _quoted(value: object) -> str:
    """What to do about a number that YAML took for text."""
    if not isinstance(value, str):
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return " (it is text: YAML reads numbers without quotes, and 1.0e-3, not 1e-3)"
