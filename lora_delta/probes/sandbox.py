"""Renders chat templates in a separate process: ``python sandbox.py``, a request on stdin, the answer on stdout.

A chat template comes with a checkpoint and is an untrusted program. Jinja's sandbox keeps it from Python's internals,
but not from endless loops and unbounded strings: the operating system does that, by ending this process. This file
imports nothing from this package, which would import torch.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


def render(request: dict[str, Any]) -> dict[str, Any]:
    """What the template makes of each conversation, in ``texts``; or why it fails, in ``error``.

    Args:
        request: ``source``, the template; ``conversations``, lists of messages; ``variables``, for all of them;
            ``most_characters`` of a text.
    """
    try:
        template = environment().from_string(request["source"])
    except TemplateSyntaxError as error:
        return {"error": f"is not valid Jinja, line {error.lineno}: {error.message}"}
    except Exception as error:  # one that is nested too deeply, a constant that cannot be computed
        return {"error": f"is not valid Jinja, {type(error).__name__}: {error}"}
    try:
        rendered = (template.generate(**request["variables"], messages=one) for one in request["conversations"])
        return {"texts": [_joined(pieces, request["most_characters"]) for pieces in rendered]}
    except MemoryError:
        return {"error": "failed: MemoryError: it takes more than the limit"}
    except Exception as error:  # a template can raise whatever Python can
        return {"error": f"failed: {type(error).__name__}: {error}"}


def _joined(pieces: Iterable[str], most: int) -> str:
    whole, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > most:
            raise ValueError(f"a text of more than {most:,} characters")
        whole.append(piece)
    return "".join(whole)


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}``: the words to train on; here a plain block."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _TemplateNamespace(Namespace):
    """Jinja's ``namespace()`` without names that mean something to Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self` may be a name in the namespace
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template's namespace cannot hold the name {name!r}")


def environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers gives to chat templates (transformers.utils.chat_template_utils)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    # Jinja's own tojson escapes for HTML.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _TemplateNamespace
    # The class itself would let a template call dict.update on what it must not change.
    environment.globals["dict"] = _make_dict
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _limit(seconds: int, most_bytes: int) -> None:
    """Have the system end this process if it takes more."""
    try:
        import resource
    except ImportError:  # not a POSIX system: the process that waits for this one limits its time
        return
    for kind, limit in ((resource.RLIMIT_AS, most_bytes), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is already set
            resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    _limit(seconds=int(sys.argv[1]), most_bytes=int(sys.argv[2]))
    sys.stdout.write(json.dumps(render(json.load(sys.stdin))))
