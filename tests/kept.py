"""What the kept values of a chapter depend on without saying so, found in its code."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator

Definition = ast.FunctionDef | ast.ClassDef


def numbers(node: ast.AST) -> bool:
    """Does an expression hold a number, except in an index?"""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and not isinstance(node.value, bool)
    if isinstance(node, ast.Subscript):
        return numbers(node.value)
    return any(map(numbers, ast.iter_child_nodes(node)))


def reads(node: ast.AST) -> set[str]:
    """The names that `node` reads and does not define itself."""
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    own |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    own |= {n.name for n in ast.walk(node) if isinstance(n, Definition)}
    return {n.id for n in names} - own - set(dir(builtins))


def calls_of_keep(tree: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="keep"), args=[ast.Name(), *_]):
                yield node


def assigned(tree: ast.Module) -> dict[str, list[ast.expr]]:
    """What each global name of a chapter is set to, outside of its functions."""
    found: dict[str, list[ast.expr]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            stored = [n for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            for name in stored:
                found.setdefault(name.id, []).append(node.value)
    return found


def unnamed(source: str, parameters: set[str]) -> set[str]:
    """Globals with numbers in them that a kept value depends on, and its key does not name.

    parameters: the names that are fields of the experiment. What stands in the call of `keep`, the
    experiment itself among it, is named.
    """
    tree = ast.parse(source)
    defined = {n.name: n for n in tree.body if isinstance(n, Definition)}
    values, found = assigned(tree), set()
    for call in calls_of_keep(tree):
        (kept, *_), said = call.args, reads(call) | parameters
        assert isinstance(kept, ast.Name)
        todo, seen = {kept.id}, set(said) - {kept.id}
        while todo:
            seen.add(name := todo.pop())
            parts = [defined[name]] if name in defined else values.get(name, [])
            found |= {name} if name not in defined and any(map(numbers, parts)) else set()
            todo |= set().union(*map(reads, parts)) - seen
    return found
