"""/openapi.json, made of the routes and their bodies' schemas."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema


@dataclass(frozen=True)
class Described:
    """A path, and what its body is."""

    method: str
    path: str
    summary: str
    body: type[BaseModel] | None


ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
        }
    },
}


def openapi(routes: Sequence[Described]) -> dict[str, Any]:
    """The interface as OpenAPI 3.1 describes it."""
    bodies = {route.body for route in routes if route.body is not None}
    _, definitions = models_json_schema(
        [(body, "validation") for body in sorted(bodies, key=lambda b: b.__name__)],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Moesaic", "version": "1"},
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {}) | {"Error": ERROR}},
    }


def _operation(route: Described, path: str) -> dict[str, Any]:
    error = {"schema": {"$ref": "#/components/schemas/Error"}}
    made: dict[str, Any] = {
        "summary": route.summary,
        "responses": {
            "200": {"description": "the answer"},
            "default": {"description": "an error", "content": {"application/json": error}},
        },
    }
    if "{" in path:
        name = path.partition("{")[2].partition("}")[0]
        schema = {"type": "string", "minLength": 1}
        made["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema}]
    if route.body is not None:
        schema = {"$ref": f"#/components/schemas/{route.body.__name__}"}
        made["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return made
