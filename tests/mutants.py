"""Bugs to plant: small changes to a source file, found in its syntax tree and made in its text.

Nothing is changed that no test could, or should, notice: docstrings, annotations, error and warning messages, progress
bars, ``__repr__``, ``__all__``, assertions and other code for type checkers only, and the device of a tensor, since
everything runs on a CPU. F-strings are left alone: before Python 3.12 the tree does not say where their parts are.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

ARITHMETIC: dict[type, tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip
COMPARISONS: dict[type, tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
}  # fmt: skip
_PAIRS = (
    "min max", "any all", "amin amax", "minimum maximum", "argmin argmax", "floor ceil", "cos sin", "sum mean",
    "exp expm1", "rsqrt sqrt", "zeros ones", "zeros_like ones_like", "new_zeros new_ones", "add_ sub_", "mul_ div_",
    "sorted list", "startswith endswith", "square abs", "clamp_min clamp_max", "is_file exists", "is_dir exists",
    "keys values", "removeprefix removesuffix", "union intersection",
    "logsumexp amax", "softmax log_softmax", "bmm matmul", "partition rpartition", "split rsplit",
)  # fmt: skip
EXCHANGED = {a: b for pair in _PAIRS for a, b in (pair.split(), reversed(pair.split()))}
DROPPED_METHODS = frozenset((
    "contiguous", "clone", "detach", "float", "double", "to", "copy", "strip", "lower", "resolve", "expanduser",
    "absolute", "flatten", "squeeze", "unsqueeze", "transpose", "expand", "clamp", "clamp_min", "round", "abs", "neg",
    "square", "sqrt", "tolist", "flush", "reshape",
))  # fmt: skip
DROPPED_FUNCTIONS = frozenset(("abs", "sorted", "reversed", "frozenset", "set", "tuple", "round", "float", "int"))
COMMUTATIVE = frozenset(("min", "max", "minimum", "maximum", "equal", "gcd", "logaddexp"))
ASKING = frozenset(("isinstance", "issubclass", "getattr", "hasattr"))
QUIET_CALLS = frozenset(("tqdm", "set_postfix", "cast", "TypeVar", "NewType", "namedtuple"))
TEXT_CALLS = frozenset(("warn", "warning", "print", "info", "debug", "error", "exit", "add_parser", "add_argument"))
# Their values only matter on a GPU, on other systems, in messages, or when something is already wrong.
QUIET_KEYWORDS = frozenset((
    "device", "map_location", "non_blocking", "pin_memory", "strict", "encoding", "stacklevel", "help", "description",
    "metavar", "prog", "desc", "category", "file", "flush", "progress", "quiet",
))  # fmt: skip
TYPE_WORDS = ("Callable", "tuple[", "dict[", "list[", " | ")


@dataclass(frozen=True)
class Mutant:
    """One change to one file: the bytes from ``start`` to ``end`` become ``new``.

    ``statement`` holds the first and last line of the enclosing statement; None outside functions, where code runs when
    the file is imported. ``before`` and ``after`` are the lines that differ, stripped.
    """

    path: str
    function: str
    kind: str
    line: int
    statement: tuple[int, int] | None
    start: int
    end: int
    new: str
    before: str
    after: str
    number: int = 0  # tells apart changes in a function that read the same

    @property
    def key(self) -> str:
        """Identifies the change, and stays the same while other lines change."""
        return "\n".join((self.path, self.function, f"- {self.before}", f"+ {self.after}", str(self.number)))

    def order(self, seed: int) -> bytes:
        """Its sort key in a draw with this seed, independent of other changes."""
        return hashlib.sha256(f"{seed}\n{self.key}".encode()).digest()

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]


def mutants(path: str, source: bytes) -> list[Mutant]:
    """All changes to a file, including some that do not parse or change nothing: see :func:`is_bug`."""
    found: dict[str, Mutant] = {}
    seen = Counter[str]()
    for mutant in _Finder(path, source).find():
        numbered = replace(mutant, number=seen[mutant.key])
        seen[mutant.key] += 1
        found[numbered.key] = numbered
    return list(found.values())


def is_bug(mutant: Mutant, source: bytes) -> bool:
    """Whether the changed file parses, to a different syntax tree."""
    try:
        changed = ast.parse(mutant.apply(source))
    except SyntaxError:
        return False
    return ast.dump(changed) != ast.dump(ast.parse(source))


class _Finder:
    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.tree = ast.parse(source)
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.scopes: list[ast.FunctionDef | ast.AsyncFunctionDef] = []
        self.names: list[str] = []
        self.statement: tuple[int, int] | None = None
        self.groups: dict[int, list[dict[str, int]]] = {}
        self.found: list[Mutant] = []

    def find(self) -> list[Mutant]:
        self._body(self.tree.body)
        return self.found

    # Places and texts.

    def _span(self, node: ast.AST) -> tuple[int, int]:
        at: ast.expr = node  # type: ignore[assignment]
        last, end = at.end_lineno or 0, at.end_col_offset or 0
        return self.starts[at.lineno - 1] + at.col_offset, self.starts[last - 1] + end

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self.source[start:end].decode()

    def _whole(self, node: ast.AST) -> str:
        """An expression's text, in parentheses where it needs them inside another."""
        text = self._text(node)
        atom = (ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript, ast.List, ast.Dict, ast.Set, ast.Tuple)
        return text if isinstance(node, atom) and text[:1] != "-" else f"({text})"

    def _add(self, kind: str, start: int, end: int, new: str) -> None:
        source = self.source
        first = source.rfind(b"\n", 0, start) + 1
        last = source.find(b"\n", end)
        last = len(source) if last < 0 else last
        lines = (source[first:last], source[first:start] + new.encode() + source[end:last])
        before, after = ([line.strip() for line in part.decode().splitlines()] for part in lines)
        while len(before) > 1 and len(after) > 1 and before[-1] == after[-1]:
            del before[-1], after[-1]
        line = source.count(b"\n", 0, start) + 1
        while len(before) > 1 and len(after) > 1 and before[0] == after[0]:
            del before[0], after[0]
            line += 1
        function = ".".join(self.names) or "<module>"
        self.found.append(
            Mutant(
                self.path, function, kind, line, self.statement, start, end, new, "\n".join(before), "\n".join(after)
            )
        )

    def _replace(self, kind: str, node: ast.AST, new: str) -> None:
        self._add(kind, *self._span(node), new)

    def _between(self, kind: str, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Exchange the operator between two nodes."""
        start, end = self._span(left)[1], self._span(right)[0]
        text = self.source[start:end].decode()
        if text.count(old) == 1 and "#" not in text:
            at = start + len(text[: text.index(old)].encode())
            self._add(kind, at, at + len(old.encode()), new)

    def _without(self, kind: str, items: list[ast.AST], index: int) -> None:
        """Drop one of several comma-separated items."""
        start, end = self._span(items[index])
        if index:
            start = self._span(items[index - 1])[1]
        elif len(items) > 1:
            end = self._span(items[1])[0]
        self._add(kind, start, end, "")

    # Statements.

    def _body(self, body: list[ast.stmt]) -> None:
        for number, statement in enumerate(body):
            outer = self.statement
            if self.scopes:
                self.statement = _lines(statement)
            self._statement(statement, number, body)
            self.statement = outer

    def _statement(self, node: ast.stmt, number: int, body: list[ast.stmt]) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._function(node)
            case ast.ClassDef():
                self.names.append(node.name)
                self._body(node.body)
                self.names.pop()
            case ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Global() | ast.Nonlocal():
                pass
            case ast.Raise():
                self._replace("check dropped", node, "pass")
            case ast.Assert():
                if not _tells_a_type(node.test):
                    self._replace("check dropped", node, "pass")
                    self._expression(node.test)
            case ast.Break() | ast.Continue():
                self._replace("statement dropped", node, "pass")
                self._replace("early end", node, "continue" if isinstance(node, ast.Break) else "break")
            case ast.Expr(value=ast.Constant()):
                pass
            case ast.Expr():
                if not _is_quiet(node.value):
                    self._replace("statement dropped", node, "pass")
                    self._expression(node.value)
            case ast.AugAssign():
                self._replace("statement dropped", node, "pass")
                if type(node.op) in ARITHMETIC and not isinstance(node.op, ast.BitOr):
                    old, new = ARITHMETIC[type(node.op)]
                    self._between("arithmetic", node.target, node.value, old + "=", new + "=")
                self._replace("statement dropped", node, f"{self._text(node.target)} = {self._text(node.value)}")
                self._expression(node.value)
            case ast.Assign():
                self._assign(node)
            case ast.AnnAssign():
                if node.value is not None and "TypeAlias" not in self._text(node.annotation):
                    self._expression(node.value)
            case ast.Return():
                if node.value is not None:
                    self._returned(node)
                    self._expression(node.value)
            case ast.If() | ast.While():
                self._branch(node)
            case ast.For() | ast.AsyncFor():
                self._expression(node.iter)
                self._body(node.body)
                self._body(node.orelse)
            case ast.With() | ast.AsyncWith():
                for item in node.items:
                    self._expression(item.context_expr)
                self._body(node.body)
            case ast.Try():
                self._body(node.body)
                for handler in node.handlers:
                    if isinstance(handler.type, ast.Tuple):
                        self._expression(handler.type)
                    self._body(handler.body)
                self._body(node.orelse)
                if node.finalbody:
                    self._body(node.finalbody)
            case ast.Delete():
                self._replace("statement dropped", node, "pass")
            case ast.Match():
                for case in node.cases:
                    self._body(case.body)
        function = self.scopes[-1] if self.scopes else None
        if isinstance(function, ast.FunctionDef) and body is function.body and _returns_nothing(function) and number:
            at = self._span(node)[0]
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                indent = at - self.source.rfind(b"\n", 0, at) - 1
                self._add("early end", at, at, "return\n" + " " * indent)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if node.name == "__repr__" or any("overload" in self._text(one) for one in node.decorator_list):
            return
        self.names.append(node.name)
        given = [*node.args.posonlyargs, *node.args.args]
        optional = [*given[len(given) - len(node.args.defaults) :], *node.args.kwonlyargs]
        for argument, default in zip(optional, (*node.args.defaults, *node.args.kw_defaults), strict=True):
            if default is not None and argument.arg not in QUIET_KEYWORDS:
                self._expression(default)
        self.scopes.append(node)
        self._body(node.body)
        self.scopes.pop()
        self.names.pop()

    def _assign(self, node: ast.Assign) -> None:
        target = node.targets[0]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for one in node.value.elts:
                self._expression(one)
            return
        if isinstance(target, ast.Name) and (target.id == "__all__" or self._is_text(target.id)):
            return
        is_type = isinstance(node.value, ast.Subscript | ast.BinOp) and self._text(target)[:1].isupper()
        if not self.scopes and is_type and any(word in self._text(node.value) for word in TYPE_WORDS):
            return
        if isinstance(target, ast.Attribute | ast.Subscript):
            self._replace("statement dropped", node, "pass")
        self._expression(node.value)

    def _is_text(self, name: str) -> bool:
        """Whether a local name is read only in error and warning messages."""
        if not self.scopes:
            return False
        scope = self.scopes[-1]
        reads = {id(node) for node in ast.walk(scope) if isinstance(node, ast.Name) and node.id == name
                 and isinstance(node.ctx, ast.Load)}  # fmt: skip
        texts = {id(inner) for node in ast.walk(scope)
                 if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and _name_of(node.func) in TEXT_CALLS)
                 for inner in ast.walk(node)}  # fmt: skip
        return bool(reads) and reads <= texts

    def _returned(self, node: ast.Return) -> None:
        """Return an argument of the return type instead."""
        function = self.scopes[-1]
        out = function.returns and self._text(function.returns)
        for one in function.args.args:
            if node.value is not None and one.annotation is not None and self._text(one.annotation) == out:
                self._replace("early end", node.value, one.arg)
                return

    def _branch(self, node: ast.If | ast.While) -> None:
        text = self._text(node.test)
        if "TYPE_CHECKING" in text or "__name__" in text:
            return
        self._negate(node.test)
        self._replace("branch", node.test, "False")
        if isinstance(node, ast.If):
            self._replace("branch", node.test, "True")
        self._expression(node.test)
        self._body(node.body)
        self._body(node.orelse)

    def _negate(self, test: ast.expr) -> None:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            self._replace("condition negated", test, self._text(test.operand))
        else:
            self._replace("condition negated", test, f"not {self._whole(test)}")

    # Expressions.

    def _expression(self, node: ast.AST) -> None:
        match node:
            case ast.JoinedStr():
                return
            case ast.Call():
                self._call(node)
                return
            case ast.BinOp():
                self._binary(node)
            case ast.BoolOp():
                for left, right in pairwise(node.values):
                    old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
                    self._between("and, or", left, right, f" {old} ", f" {new} ")
                for index in range(len(node.values)):
                    rest = node.values[:index] + node.values[index + 1 :]
                    if len(rest) == 1:
                        self._replace("term dropped", node, self._whole(rest[0]))
                    else:
                        joined = f" {'and' if isinstance(node.op, ast.And) else 'or'} "
                        self._replace("term dropped", node, joined.join(self._whole(one) for one in rest))
            case ast.Compare():
                for left, op, right in zip((node.left, *node.comparators), node.ops, node.comparators, strict=False):
                    old, new = COMPARISONS[type(op)]
                    old, new = (f" {old} ", f" {new} ") if old.isalpha() or " " in old else (old, new)
                    self._between("comparison", left, right, old, new)
            case ast.UnaryOp(op=ast.USub()):
                self._replace("arithmetic", node, self._text(node.operand))
            case ast.IfExp():
                self._negate(node.test)
                self._replace("branch", node, self._whole(node.body))
                self._replace("branch", node, self._whole(node.orelse))
            case ast.Constant():
                self._constant(node)
            case ast.Subscript(slice=ast.Slice()):
                self._slice(node)
            case ast.Name(ctx=ast.Load()):
                self._name(node)
            case ast.Attribute(attr="mT"):
                self._replace("call dropped", node, self._whole(node.value))
            case ast.Tuple(elts=[first, second]) if self._text(node).startswith("("):
                for one in (first, second):
                    self._replace("entry dropped", node, f"({self._text(one)},)")
            case ast.List() | ast.Set() | ast.Tuple():
                if len(node.elts) > 1 and self._text(node)[0] in "([{":
                    for index in range(len(node.elts)):
                        self._without("entry dropped", list(node.elts), index)
            case ast.Dict():
                self._dict(node)
            case ast.GeneratorExp() | ast.ListComp() | ast.SetComp() | ast.DictComp():
                for generator in node.generators:
                    for test in generator.ifs:
                        self._negate(test)
                        self._replace("branch", test, "True")
            case ast.Lambda():
                self._expression(node.body)
                return
        inner = isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple)
        for child in ast.iter_child_nodes(node):
            if inner and child is node.slice:  # type: ignore[attr-defined]
                for one in child.elts:
                    self._expression(one)
            elif isinstance(child, ast.comprehension):
                for part in (child.iter, *child.ifs):
                    self._expression(part)
            elif isinstance(child, ast.expr):
                self._expression(child)

    def _binary(self, node: ast.BinOp) -> None:
        texts = (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp, ast.Dict)
        joins = any(isinstance(one, texts) or _is_string(one) for one in (node.left, node.right))
        if not joins and type(node.op) in ARITHMETIC:
            self._between("arithmetic", node.left, node.right, *ARITHMETIC[type(node.op)])
        if _is_string(node.left) or isinstance(node.left, ast.JoinedStr):
            return
        self._replace("term dropped", node, self._whole(node.left))
        self._replace("term dropped", node, self._whole(node.right))
        if isinstance(node.op, ast.MatMult | ast.Sub | ast.Div):
            op = "@" if isinstance(node.op, ast.MatMult) else ARITHMETIC[type(node.op)][0]
            self._replace("swapped", node, f"{self._whole(node.right)} {op} {self._whole(node.left)}")

    def _constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._replace("option ignored", node, str(not value))
        elif isinstance(value, int):
            self._replace("constant", node, str(value + 1))
            self._replace("constant", node, f"({value - 1})" if value < 1 else str(value - 1))
        elif isinstance(value, float):
            self._replace("constant", node, repr(value * 2 if value else 1.0))
            self._replace("constant", node, repr(value / 2 if value else 0.5))

    def _slice(self, node: ast.Subscript) -> None:
        part = node.slice
        assert isinstance(part, ast.Slice)
        lower, upper = part.lower, part.upper
        if upper is not None and lower is None:
            self._replace("slice", part, f"-{self._whole(upper)}:")
        for bound in (lower, upper):
            if bound is not None:
                self._replace("slice", bound, f"{self._whole(bound)} + 1")
                self._replace("slice", bound, f"{self._whole(bound)} - 1")
        if upper is not None or lower is not None:
            self._replace("slice", part, ":")

    def _name(self, node: ast.Name) -> None:
        """Use another local name of the same kind, or an option's default."""
        if not self.scopes or self.statement is None:
            return
        function = self.scopes[-1]
        arguments = function.args
        given = [*arguments.posonlyargs, *arguments.args]
        defaults: dict[str, ast.expr | None] = dict(
            zip((one.arg for one in reversed(given)), reversed(arguments.defaults), strict=False)
        )
        defaults.update(zip((one.arg for one in arguments.kwonlyargs), arguments.kw_defaults, strict=True))
        default = defaults.get(node.id)
        if isinstance(default, ast.Constant) and node.id not in QUIET_KEYWORDS:
            self._replace("option ignored", node, self._text(default))
        for other, line in self._alike(function, node.id).items():
            if line <= self.statement[1]:
                self._replace("swapped", node, other)

    def _alike(self, function: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> dict[str, int]:
        """The other local names of the same kind, with the lines that bind them: arguments with the same annotation,
        and names that are unpacked together."""
        key = id(function)
        if key not in self.groups:
            arguments = function.args
            groups: dict[str, dict[str, int]] = {}
            for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                if one.annotation is not None:
                    groups.setdefault(self._text(one.annotation), {})[one.arg] = one.lineno
            for target in ast.walk(function):
                if isinstance(target, ast.Tuple) and isinstance(target.ctx, ast.Store):
                    names = [one for one in target.elts if isinstance(one, ast.Name)]
                    groups[f"{target.lineno} {target.col_offset}"] = {one.id: one.lineno for one in names}
            self.groups[key] = list(groups.values())
        return {
            other: line for group in self.groups[key] if name in group for other, line in group.items() if other != name
        }

    def _dict(self, node: ast.Dict) -> None:
        items: list[tuple[int, int]] = []
        for key, value in zip(node.keys, node.values, strict=True):
            end = self._span(value)[1]
            start = self._span(value)[0] - 2 if key is None else self._span(key)[0]
            items.append((start, end))
        if len(items) > 1:
            for index, (start, end) in enumerate(items):
                if index:
                    self._add("entry dropped", items[index - 1][1], end, "")
                else:
                    self._add("entry dropped", start, items[1][0], "")

    def _call(self, node: ast.Call) -> None:
        name = _name_of(node.func)
        if name in QUIET_CALLS or name in TEXT_CALLS:
            return
        if isinstance(node.func, ast.Attribute):
            moves = name == "to" and any("device" in self._text(one) for one in node.args)
            if name in DROPPED_METHODS and not moves:
                self._replace("call dropped", node, self._whole(node.func.value))
        elif name in DROPPED_FUNCTIONS and len(node.args) == 1 and not node.keywords:
            self._replace("call dropped", node, self._whole(node.args[0]))
        if name in EXCHANGED and not (name == "sorted" and node.keywords):
            end = self._span(node.func)[1]
            self._add("function exchanged", end - len(name), end, EXCHANGED[name])
        arguments: list[ast.AST] = sorted((*node.args, *node.keywords), key=self._span)
        for keyword in node.keywords:
            if keyword.arg is not None and keyword.arg not in QUIET_KEYWORDS:
                self._without("option ignored", arguments, arguments.index(keyword))
        if name in ("min", "max", "range") and len(node.args) > 1:
            for index in range(len(node.args)):
                self._without("term dropped", arguments, index)
        if name not in ASKING and name not in COMMUTATIVE:
            for left, right in pairwise(node.args):
                if not isinstance(left, ast.Starred) and not isinstance(right, ast.Starred):
                    (start, to), (since, end) = self._span(left), self._span(right)
                    middle = self.source[to:since].decode()
                    self._add("swapped", start, end, self._text(right) + middle + self._text(left))
        if isinstance(node.func, ast.Attribute):
            self._expression(node.func.value)
        elif not isinstance(node.func, ast.Name):
            self._expression(node.func)
        for argument in node.args:
            self._expression(argument.value if isinstance(argument, ast.Starred) else argument)
        for keyword in node.keywords:
            if keyword.arg not in QUIET_KEYWORDS:
                self._expression(keyword.value)


def _lines(node: ast.stmt) -> tuple[int, int]:
    """The first and last line of a statement; a compound one ends before its body."""
    body = getattr(node, "body", None)
    last = node.end_lineno or node.lineno
    if isinstance(node, ast.Match):
        last = node.lineno
    elif body:
        last = max(node.lineno, body[0].lineno - 1)
    return node.lineno, last


def _name_of(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_quiet(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _name_of(node.func) in QUIET_CALLS


def _tells_a_type(test: ast.expr) -> bool:
    """Whether an assertion is there for a type checker."""
    parts: Iterator[ast.expr] = iter(test.values if isinstance(test, ast.BoolOp) else [test])
    return all(
        (isinstance(one, ast.Compare) and isinstance(one.ops[0], ast.IsNot))
        or (isinstance(one, ast.Call) and _name_of(one.func) == "isinstance")
        for one in parts
    )


def _returns_nothing(function: ast.FunctionDef) -> bool:
    return isinstance(function.returns, ast.Constant) and function.returns.value is None
