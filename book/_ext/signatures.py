"""Signatures on the API page read like the source: `Theta` and `Loss`, not what they stand for.

autodoc takes annotations as Python has evaluated them, where names of types are gone and a default
may read `<factory>`. Here arguments and results are taken from the syntax tree of the source. A
constant shows its value if that is short and can be written down; tables of rules for arguments
are left out, as the text of an error says what they hold.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from importlib import import_module
from typing import Any

from sphinx.ext.autodoc import DataDocumenter

PACKAGE, LONGEST = "mcnotes", 90  # letters of a value


def definition(obj: Any) -> Any:
    """The syntax tree of a function or a class, without its decorators' wrappers."""
    source = inspect.getsource(inspect.unwrap(obj))
    return ast.parse(textwrap.dedent(source)).body[0]


def arguments(function: Any, *, method: bool) -> ast.arguments:
    """The arguments of a function as written, without the first one of a method."""
    found: ast.arguments = definition(function).args
    if method:
        del (found.posonlyargs or found.args)[0]
    for argument in ast.walk(found):
        if isinstance(argument, ast.arg):
            argument.annotation = unquoted(argument.annotation)
    return found


def unquoted(annotation: ast.expr | None) -> ast.expr | None:
    """The annotation, without the quotes around a class that is defined further down."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return ast.parse(annotation.value, mode="eval").body
    return annotation


def default(value: ast.expr | None) -> ast.expr | None:
    """The default of a field: of `field(default_factory=dict)` it is `dict()`."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if factory := given.get("default_factory"):
            return ast.Call(factory, [], []) if isinstance(factory, ast.Name) else ast.Name("...")
        return given.get("default")
    return value


def fields(cls: type) -> str:
    """The arguments of a data class or a named tuple, those of its bases first."""
    found = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith(PACKAGE):
            lines = [line for line in definition(base).body if isinstance(line, ast.AnnAssign)]
            found |= {ast.unparse(line.target): line for line in lines}
    names = [name for name in inspect.signature(cls).parameters if name in found]
    values = [default(found[name].value) for name in names]
    return ", ".join(
        f"{name}: {ast.unparse(found[name].annotation)}"
        + (f" = {ast.unparse(value)}" if value else "")
        for name, value in zip(names, values, strict=True)
    )


def of_class(cls: type) -> str:
    """What a class is made from; nothing if neither it nor a base of ours says so."""
    for base in cls.__mro__:
        if not base.__module__.startswith(PACKAGE):
            continue
        if hasattr(cls, "__dataclass_fields__") or hasattr(cls, "_fields"):
            return fields(cls)
        if getattr(start := vars(base).get("__init__"), "__module__", "").startswith(PACKAGE):
            return ast.unparse(arguments(start, method=True))
    return ""


def as_written(
    app: Any,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    known: str | None,
    result: str | None,
) -> tuple[str, str] | None:
    """The signature of `obj` as its source has it, for autodoc-process-signature."""
    if what == "class":
        given = of_class(obj)
        return (f"({given})", "") if given else ("", "")
    if what not in ("function", "method") or known is None:
        return None
    returns = unquoted(definition(obj).returns)
    given = ast.unparse(arguments(obj, method=what == "method"))
    return f"({given})", ast.unparse(returns) if returns else ""


class Constant(DataDocumenter):
    """A constant, with its value if that can be read."""

    def should_suppress_value_header(self) -> bool:
        value = repr(self.object)
        readable = len(value) <= LONGEST and "<" not in value
        return not readable or super().should_suppress_value_header()


def skip_rules(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out tables that hold a rule of `mcnotes.checks` for each argument."""
    rules = list(obj.values()) if isinstance(obj, dict) else []
    return True if any(getattr(r, "__module__", "") == "mcnotes.checks" for r in rules) else None


def find_by_name(app: Any, env: Any, node: Any, text: Any) -> Any:
    """The link from a name in a signature, as the module that uses it knows it."""
    module, target = node.get("py:module") or "", node.get("reftarget", "")
    if node.get("refdomain") != "py" or not module.startswith(PACKAGE):
        return None
    found: Any = import_module(module)
    for part in target.split("."):
        found = getattr(found, part, None)
    if not (inspect.isclass(found) and found.__module__.startswith(PACKAGE)):
        return None
    home = f"{found.__module__}.{found.__qualname__}"
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "class", home, node, text)


def setup(app: Any) -> dict[str, bool]:
    app.add_autodocumenter(Constant, override=True)
    app.connect("autodoc-process-signature", as_written)
    app.connect("autodoc-skip-member", skip_rules)
    app.connect("missing-reference", find_by_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
