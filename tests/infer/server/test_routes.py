"""The table of routes: what the page of documentation and /openapi.json say of it."""

import re
from pathlib import Path

from infer.server.app import ROUTES
from infer.server.openapi import openapi

PAGE = Path(__file__).resolve().parents[3] / "docs/serving.md"


def test_the_documentation_lists_every_route_and_no_other():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    listed = {pair for row in rows for pair in re.findall(r"`(GET|POST) (/[^`]*)`", row)}
    assert listed == {(route.method, route.path.replace(":path}", "}")) for route in ROUTES}


def test_every_body_is_described_by_a_schema_that_is_there():
    described = openapi(ROUTES)
    schemas = described["components"]["schemas"]
    for route in ROUTES:
        operation = described["paths"][route.path.replace(":path}", "}")][route.method.lower()]
        if route.body is not None:
            content = operation["requestBody"]["content"]["application/json"]
            name = content["schema"]["$ref"].rpartition("/")[2]
            assert schemas[name]["additionalProperties"] is False
    references = set(re.findall(r"#/components/schemas/(\w+)", str(described)))
    assert references <= set(schemas)


def test_only_probes_and_the_page_are_open_to_all():
    assert {route.path for route in ROUTES if route.is_public} == {"/health", "/ready", "/"}
