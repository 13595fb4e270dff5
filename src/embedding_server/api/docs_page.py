# SPDX-License-Identifier: MIT OR Apache-2.0
"""The OpenAPI document: as JSON, and as a page that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any
from urllib.parse import quote

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from embedding_server.api.headers import single_header
from embedding_server.api.state import state_of

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

_PAGE = Template(files(__package__).joinpath("docs.html").read_text(encoding="utf-8"))
_STYLE = files(__package__).joinpath("docs.css").read_text(encoding="utf-8")
_STYLE_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    # A browser loads and runs nothing, even if the page were to contain it.
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_STYLE_DIGEST}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}

# Host headers that are safe in a shell command.
_HOST = re.compile(r"[A-Za-z0-9._-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?")

# No coroutines: these routes take long, so that FastAPI runs them in threads.


@router.get("/openapi.json")
def openapi(request: Request) -> Response:
    """The document."""
    return Response(orjson.dumps(request.app.openapi()), media_type="application/json")


@router.get("/docs")
def docs(request: Request) -> Response:
    """The page, with commands that work as they are on this server."""
    state = state_of(request)
    document = request.app.openapi()
    model = next(iter(state.registry.status()))
    keyed = bool(state.api_keys)
    curl = _Curl(document, base=_base_url(request, document), model=model, keyed=keyed)
    return HTMLResponse(_page(document, curl, keyed=keyed), headers=_HEADERS)


def _base_url(request: Request, document: Mapping[str, Any]) -> str:
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        host = "localhost:5000"
    forwarded = single_header(request.scope, b"x-forwarded-proto")
    https = request.url.scheme == "https" or forwarded == b"https"
    prefix = "".join(server["url"] for server in document.get("servers", ()))
    return f"{'https' if https else 'http'}://{host}{prefix}"


class _Curl:
    """Commands for a server at ``base`` that serves ``model``."""

    def __init__(self, document: Mapping[str, Any], *, base: str, model: str, keyed: bool) -> None:
        self._schemas = document["components"]["schemas"]
        self._base = base
        self._model = model
        self._keyed = keyed

    def command(self, path: str, method: str, operation: Mapping[str, Any]) -> str:
        url = self._base + path.replace("{name}", quote(self._model))
        lines = [f"curl {shlex.quote(url)}"]
        if self._keyed and "security" in operation:
            lines.append('-H "Authorization: Bearer $API_KEY"')
        if "requestBody" in operation:
            schema = self._schemas[_body_schema(operation)]
            fields = {
                name: schema["properties"][name]["examples"][0] for name in schema["required"]
            }
            body = json.dumps({**fields, "model": self._model}, ensure_ascii=False)
            if method != "post":  # which -d would make of it
                lines.append(f"-X {method.upper()}")
            lines.append("-H 'Content-Type: application/json'")
            lines.append(f"-d {shlex.quote(body)}")
        return " \\\n  ".join(lines)


def _page(document: Mapping[str, Any], curl: _Curl, *, keyed: bool) -> str:
    groups: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, operations in document["paths"].items():
        for method, operation in sorted(operations.items(), reverse=True):  # POST first
            groups.setdefault(operation["tags"][0], []).append((path, method, operation))
    schemas = document["components"]["schemas"]
    bodies = {
        _body_schema(operation)
        for group in groups.values()
        for _, _, operation in group
        if "requestBody" in operation
    }
    contents, sections = [], []
    for tag, group in groups.items():
        links = (f"<a href='#{o['operationId']}'>{_route(p, m)}</a>" for p, m, o in group)
        contents.append(_links(tag, links))
        sections.append(f"<h2>{_title(tag)}</h2>")
        for path, method, operation in group:
            command = curl.command(path, method, operation)
            sections += _operation(path, method, operation, schemas, command)
    objects = [name for name in schemas if name not in bodies]
    contents.append(_links("objects", (f"<a href='#{name}'>{name}</a>" for name in objects)))
    sections.append("<h2>Objects</h2>")
    for name in objects:
        sections.append(f"<h3 id='{name}'>{name}</h3>")
        sections.append(f"<p>{_prose(schemas[name].get('description', ''))}</p>")
        sections.append(_fields(schemas[name]))
    key = (
        "<p>This server asks for a key, but for health: set <code>API_KEY</code> in the shell "
        "for the examples.</p>"
    )
    return _PAGE.substitute(
        title=escape(document["info"]["title"]),
        description=_prose(document["info"]["description"]),
        style=_STYLE,
        key=key if keyed else "",
        contents="\n".join(contents),
        sections="\n".join(sections),
    )


def _operation(
    path: str,
    method: str,
    operation: Mapping[str, Any],
    schemas: Mapping[str, Any],
    curl: str,
) -> Iterator[str]:
    yield f"<h3 id='{operation['operationId']}'>{_route(path, method)} "
    yield f"<span class='soft'>{escape(operation['summary'])}</span></h3>"
    yield f"<p>{_prose(operation['description'])}</p>"
    yield f"<pre><code>{escape(curl)}</code></pre>"
    yield "<h4>Parameters</h4>"
    yield _table(
        ("name", "in", "type", "meaning"),
        (
            (f"<code>{escape(one['name'])}</code>", one["in"], _type(one["schema"]),
             _prose(one.get("description", "")))
            for one in operation["parameters"]
        ),
    )  # fmt: skip
    if "requestBody" in operation:
        name = _body_schema(operation)
        if method == "post":
            yield f"<h4 id='{name}'>Fields of the body, a JSON object</h4>"
            yield _fields(schemas[name])
        else:
            yield f"<h4>Body</h4><p>The same as that of <a href='#{name}'>POST</a>.</p>"
    yield "<h4>Answers</h4>"
    yield _table(("status", "body", "headers", "when"), _answers(operation))


def _answers(operation: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for status, answer in operation["responses"].items():
        body = " or ".join(_type(content["schema"]) for content in answer["content"].values())
        headers = (f"<code>{name}</code>" for name in answer["headers"] if name != "x-request-id")
        when = "The request is answered." if status == "200" else answer["description"]
        yield status, body, ", ".join(headers), _prose(when)


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    return _table(
        ("field", "type", "meaning"),
        (
            (f"<code>{name}</code>" + (" *" if name in required else ""), _type(field),
             _prose(field.get("description", "")))
            for name, field in schema["properties"].items()
        ),
    ) + ("<p class='soft'>* never left out</p>" if required else "")  # fmt: skip


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"<a href='#{name}'>{name}</a>"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(map(_type, schema[several]))
    values = schema.get("enum", [schema["const"]] if "const" in schema else ())
    if values:
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), Mapping):
        return f"object of {_type(schema['additionalProperties'])}"
    at_least = f" from {schema['minimum']:g}" if "minimum" in schema else ""
    return f"{schema.get('type', 'anything')}{at_least}"


def _body_schema(operation: Mapping[str, Any]) -> str:
    reference: str = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return reference.rpartition("/")[2]


def _route(path: str, method: str) -> str:
    return f"<code><span class='{method}'>{method.upper()}</span> {escape(path)}</code>"


def _links(title: str, links: Iterable[str]) -> str:
    items = "".join(f"<li>{link}</li>" for link in links)
    return f"<h2>{_title(title)}</h2><ul>{items}</ul>"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in heading)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"


def _title(word: str) -> str:
    return escape(word[:1].upper() + word[1:])


def _prose(text: str) -> str:
    """``text`` as HTML, with the parts in backticks as code."""
    return re.sub(r"`+([^`]+)`+", r"<code>\1</code>", escape(text, quote=False))
