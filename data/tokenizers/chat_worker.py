"""The process that renders chat templates: see chat.py. It needs jinja2 and nothing of ours.

Reads requests as lines of JSON and answers each with one. A request that takes too long kills it.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MEMORY = 1 << 29
"""Bytes of address space, the interpreter's own included."""
LONGEST = 1 << 24
"""Letters of a rendered chat."""


class Generation(jinja2.ext.Extension):
    """{% generation %} marks what the model says, for masks of training; it renders as it is."""

    tags = {"generation"}  # noqa: RUF012, jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    """Without the HTML escapes of jinja2's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """The template in the environment that transformers renders in."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now
    return environment.from_string(source)


def answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        text = compiled(request["template"]).render(request["variables"])
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MB of memory"}
    except Exception as error:  # a template may raise whatever Python does
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    if len(text) > LONGEST:
        return {"error": f"it wrote {len(text)} letters, at most {LONGEST} are taken"}
    return {"text": text}


def limit() -> None:
    """Memory for this process, and no files written, whatever gets out of the sandbox."""
    for kind, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, most = resource.getrlimit(kind)
        resource.setrlimit(kind, (value, most))


def main() -> None:
    limit()
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        signal.setitimer(signal.ITIMER_REAL, 30 * request["seconds"])
        reply = json.dumps(answer(request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
