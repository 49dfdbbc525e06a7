"""The description of the API is complete, and every answer to anything conforms to it."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
import schemathesis
from django.core.management import call_command
from django.core.wsgi import get_wsgi_application
from django.test import Client
from hypothesis import HealthCheck
from hypothesis import settings as examples
from schemathesis.specs.openapi import checks

from billing.budgets import BUDGET_LIMITS
from billing.limits import LIMITS
from billing.models import Account
from keys import egress
from keys import messages as key_messages
from keys.models import AccessToken
from swapper import messages, openapi
from swapper.models import Provider
from tests.conftest import Caller, Shelf, caller, edit, limits
from tests.test_api_access import KEY, TABLE, make_config

schema = schemathesis.openapi.from_wsgi("/api/schema/", get_wsgi_application())
document = schema.raw_schema

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
    checks.allow_header_conformance,
    checks.negative_data_rejection,
]


# --- Nothing but what is described -----------------------------------------------------------

seen: Counter[tuple[str, int]] = Counter()


@pytest.fixture
def automodel(db: None) -> Caller:
    """Here it may do everything."""
    return caller(*AccessToken.Scope.values)


@pytest.fixture
def stage(
    transactional_db: None,
    alice: Account,
    bob: Account,
    shelf: Shelf,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alice has limits, so that refusals come too; bob has none.

    No emergency stop: reports of a hundred million tokens would end the play.
    """
    # Whatever address is made up, it is in the private network and so not called.
    monkeypatch.setattr(egress, "resolve", lambda host, port: ["10.1.2.3"])
    settings.KEYS_PER_ACCOUNT, settings.KEY_CHECKS_PER_HOUR = 9, 9
    edit(alice.tier, full_provider_config=True)
    settings.EMERGENCY_THRESHOLD_USD = settings.SYSTEM_HOURLY_LIMIT_USD = Decimal(10**9)
    limits(
        alice,
        usd_per_request="0.04",
        usd_per_day="2",
        tokens_per_request=4000,
        requests_per_hour=300,
        max_price_per_1k_usd="0.02",
    )


@schema.parametrize()
@examples(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_conforms(
    case: schemathesis.Case, stage: None, automodel: Caller, shelf: Shelf
):
    """What schemathesis makes of the schema, and the same with names that exist."""
    cases = [case]
    if case.method == case.operation.method.upper():
        cases.append(realistic(case, automodel, shelf))
    for made in cases:
        response = made.call(headers={"Authorization": f"Bearer {automodel.token}"})
        seen[f"{made.method} {made.path.rsplit('/', 1)[-1]}", response.status_code] += 1
        if response.status_code >= 500:
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "no_model", "the database is there"
        # An empty parameter counts as absent, as browsers send it; schemathesis calls it wrong.
        lenient: list[Any] = (
            [checks.negative_data_rejection] if "" in (made.query or {}).values() else []
        )
        made.validate_response(response, checks=CHECKS, excluded_checks=lenient)


def realistic(case: schemathesis.Case, automodel: Caller, shelf: Shelf) -> schemathesis.Case:
    """The same request about alice's account, real models and, in a report, an open hold."""
    query = dict(case.query) if isinstance(case.query, dict) else {}
    path_parameters = dict(case.path_parameters or {})
    about_keys = "/provider-configs" in case.path
    if about_keys or (case.operation.method in ("get", "patch") and "check" not in query):
        query["user_id"] = "alice"
    if "config_id" in path_parameters:
        account = Account.objects.get(external_id="alice")
        config, model = make_config(account)
        path_parameters["config_id"] = str(config.pk)
        if "model_id" in path_parameters:
            path_parameters["model_id"] = str(model.pk)
    body: Any = dict(case.body) if isinstance(case.body, dict) else case.body
    if isinstance(body, dict) and case.path.endswith("select-model"):
        body |= {"task_type": "chat", "user_id": "alice"}
        for name in ("user_tier", "required_capabilities", "excluded_providers"):
            if isinstance(body.get(name), str | list):
                del body[name]
        exact = ("prompt_tokens", "max_completion_tokens")
        if isinstance(body.get("estimated_tokens"), int):
            body = {name: value for name, value in body.items() if name not in exact}
        elif not body.keys() & {"estimated_tokens", *exact}:
            body["estimated_tokens"] = 1000
        for name in ("estimated_tokens", "min_context_length", *exact):
            if isinstance(body.get(name), int):
                body[name] %= 5000
    elif isinstance(body, dict) and about_keys:
        # What is made up is mostly refused; alone, each of the others has its turn.
        if "api_key" in body:
            body |= {"api_key": KEY}
        if "provider_type" in body:
            body |= {"provider_type": "openai"}
        for name in ("base_url", "user_id"):
            body.pop(name, None)
    elif case.path.endswith("/selections/{request_id}"):
        path_parameters["request_id"] = automodel.select(user_id="bob").json()["request_id"]
    elif case.path.endswith("/credentials"):
        if not Provider.objects.filter(account__external_id="bob").exists():
            make_config(Account.objects.get(external_id="bob"))
        selection = automodel.select(user_id="bob", use_user_keys=True).json()
        path_parameters["request_id"] = selection["request_id"]
        if isinstance(body, dict) and "model_id" in body:
            body |= {"model_id": selection["selected_model_id"]}
    elif isinstance(body, dict) and case.method == "POST":
        selection = automodel.select(user_id="bob", priority="low").json()
        body |= {"request_id": selection["request_id"], "model_id": str(shelf.tiny.pk)}
        if isinstance(body.get("attempts"), list):
            body["attempts"] = [
                {**attempt, "model_id": str(shelf.small.pk)}
                if isinstance(attempt, dict) and "model_id" in attempt
                else attempt
                for attempt in body["attempts"]
            ]
    return case.operation.Case(
        method=case.method,
        path_parameters=path_parameters,
        headers=case.headers,
        cookies=case.cookies,
        query=query,
        body=body,
        media_type=case.media_type,
    )


def test_the_examples_reached_what_they_should():
    """A fuzzer that only ever sees 400 proves little. (After the others, in the same process.)"""
    reached: dict[str, set[int]] = {}
    for operation, status in seen:
        reached.setdefault(operation, set()).add(status)
    if len({"GET", "POST"} & {operation.split()[0] for operation in reached}) < 2:
        pytest.skip("the examples did not all run here")
    assert reached["POST select-model"] >= {201, 400, 409, 415}
    assert reached["POST usage"] >= {201, 400, 404, 415}
    assert reached["GET usage"] >= {200, 400}
    assert reached["GET me"] >= {200, 400}
    assert reached["PATCH me"] >= {200, 400, 415}
    assert reached["GET provider-configs"] >= {200, 400, 404}
    assert reached["POST provider-configs"] >= {201, 400, 409, 415}
    assert reached["GET {config_id}"] >= {200, 400, 404}
    assert reached["PUT {config_id}"] >= {200, 400, 415}
    assert reached["PATCH {config_id}"] >= {200, 400, 415}
    assert reached["DELETE {config_id}"] >= {204, 400}
    assert reached["POST verify"] >= {200, 400, 429}
    assert reached["GET models"] >= {200, 400}
    assert reached["PATCH {model_id}"] >= {200, 400, 415}
    assert reached["POST credentials"] >= {200, 400, 404}
    assert reached["GET {request_id}"] >= {200, 404}
    assert reached["GET performance"] >= {200, 400}
    assert reached["GET health"] >= {200, 400}


# --- Nothing left out ------------------------------------------------------------------------


def test_the_description_is_valid_and_made_without_a_warning():
    out = io.StringIO()
    call_command("spectacular", "--validate", "--fail-on-warn", stdout=out)
    assert "select_model" in out.getvalue()


def test_every_route_is_described():
    described = {
        (method.upper(), path.removeprefix("/"))
        for path, item in document["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert described == {
        (method, re.sub(r"<uuid:(\w+)>", r"{\1}", path))
        for method, path in TABLE
        if path.startswith("api/modelswapper/")
    }
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation["summary"], path
            assert operation["operationId"], path


STRUCTS = [messages.SelectRequest, messages.UsageReport, messages.MeChange, *key_messages.DECODERS]


def test_every_body_is_described_by_one_of_these():
    bodies = {
        operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
        for item in document["paths"].values()
        for operation in item.values()
        if "requestBody" in operation
    }
    assert bodies == {struct.__name__ for struct in STRUCTS}


@pytest.mark.parametrize("struct", STRUCTS)
def test_a_body_is_described_by_the_struct_that_decodes_it(struct: type[msgspec.Struct]):
    described = document["components"]["schemas"][struct.__name__]
    assert list(described["properties"]) == list(struct.__struct_fields__)
    assert described["additionalProperties"] is False
    required = {f.name for f in msgspec.structs.fields(struct) if f.required}
    assert set(described.get("required", [])) == required
    bodies = [
        operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        for item in document["paths"].values()
        for operation in item.values()
        if "requestBody" in operation
    ]
    assert bodies.count(f"#/components/schemas/{struct.__name__}") == 1


def test_a_key_is_only_ever_written_and_only_lent():
    schemas = document["components"]["schemas"]
    fields = {
        (name, field): described
        for name, schema in schemas.items()
        for field, described in schema.get("properties", {}).items()
        if field in ("api_key", "key")
    }
    written = {name for (name, _), described in fields.items() if described.get("writeOnly")}
    assert written == {"ConfigCreate", "ConfigReplace", "ConfigChange"}
    assert {name for name, _ in fields} - written == {"LentKey"}


def codes(kind: type[msgspec.Struct]) -> Iterator[str]:
    """The codes of the refusals that are described: of the classes without subclasses."""
    for child in kind.__subclasses__():
        if child.__subclasses__():
            yield from codes(child)
        else:
            yield str(child.__struct_config__.tag)


def test_every_error_code_is_described():
    """Codes are read from the source; what belongs to no route is named here."""
    root = Path(openapi.__file__).parent.parent
    files = [root / "mswap_site/errors.py", *root.glob("swapper/*.py"), *root.glob("keys/*.py")]
    source = "".join(file.read_text() for file in files if file.name not in ("client.py",))
    raised = set(re.findall(r"""\bcode="(\w+)\"""", source))
    raised |= set(re.findall(r"""    (?:status, )?code = (?:\d+, )?"(\w+)\"""", source))
    raised |= {f"{name}_limit" for name in ("spending", "token", "request")}
    anywhere = {"internal", "method_not_allowed", "not_acceptable"}
    bases = {"forbidden", "conflict"}  # never raised without a code of their own
    assert raised - anywhere - bases == set(codes(openapi.Refusal))


def test_every_limit_is_described():
    assert list(openapi.Limits.__struct_fields__) == [limit.name for limit in LIMITS]
    for measure, name in (
        ("usd", "SpendingLimit"),
        ("tokens", "TokenLimit"),
        ("requests", "RequestLimit"),
    ):
        described = document["components"]["schemas"][name]["properties"]["limit"]["enum"]
        known = {limit.name for limit in (*LIMITS, *BUDGET_LIMITS) if limit.measure == measure}
        assert set(described) == known


def test_how_to_prove_who_one_is_is_described():
    schemes = document["components"]["securitySchemes"]
    assert schemes["token"]["scheme"] == "bearer"
    assert schemes["session"] | {"description": ""} == {
        "type": "apiKey",
        "in": "cookie",
        "name": "sessionid",
        "description": "",
    }
    for path, item in document["paths"].items():
        for operation in item.values():
            if path.endswith("/health"):
                assert "security" not in operation
            else:
                assert operation["security"] == [{"token": []}, {"session": []}]


def test_the_schema_is_served_as_json_and_yaml(client: Client):
    as_json = client.get("/api/schema/", headers={"Accept": "application/vnd.oai.openapi+json"})
    assert as_json.json()["openapi"].startswith("3.1")
    assert as_json.json()["info"]["title"] == "ModelSwapper"
    assert client.get("/api/schema/").content.startswith(b"openapi: 3.1")


# --- The browsable page ----------------------------------------------------------------------


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_loads_nothing_from_elsewhere(client: Client):
    page = client.get("/api/docs/").content.decode()
    links = Links()
    links.feed(page)
    assert len(links.found) >= 4
    scripts = b""
    for link in links.found:
        assert link.startswith(("/static/", "/api/docs/")), link
        response = client.get(link)
        assert response.status_code == 200, link
        content = b"".join(response)
        assert content, link
        scripts += content if link.startswith("/api/docs/") else b""
    assert "http://" not in page
    assert "https://" not in page
    assert b"/api/schema/" in scripts
