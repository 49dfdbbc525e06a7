"""The stand-ins: the provider answers as the documented APIs do; AutoModel's books add up."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest

from standin.provider import (
    DIALECTS,
    Bucket,
    Config,
    Provider,
    Request,
    Response,
    base_url,
    known_models,
    listening,
)
from standin.traffic import (
    TIERS,
    Account,
    Options,
    Simulation,
    accounts_for,
    arrivals,
    percentile,
    summary,
    trace_rows,
)

Client = httpx2.AsyncClient
AT_ONCE = Config(latency_scale=0)
OPENAI_TYPES = ["openai", "mistral", "deepseek", "qwen", "openrouter", "huggingface"]


def with_provider(
    talk: Callable[[Client, str], Awaitable[Any]], config: Config = AT_ONCE, timeout: float = 5
) -> Any:
    """Run ``talk(client, root)`` against a provider of its own."""

    async def run() -> Any:
        async with (
            listening(Provider(config)) as root,
            Client(trust_env=False, timeout=timeout) as client,
        ):
            return await talk(client, root)

    return asyncio.run(run())


async def chat(
    client: Client,
    root: str,
    provider_type: str = "openai",
    *,
    standin: dict[str, str] | None = None,
    key: str = "sk-test",
    **body: Any,
) -> httpx2.Response:
    """A call in the provider's dialect; ``body`` replaces parts of a good request."""
    good: dict[str, Any] = {"model": "m-1", "messages": [{"role": "user", "content": "Hello"}]}
    headers = {f"x-standin-{name}": value for name, value in (standin or {}).items()}
    if provider_type == "anthropic":
        good["max_tokens"] = 100
        headers |= {"x-api-key": key, "anthropic-version": "2023-06-01"}
        path = "/messages"
    else:
        headers["authorization"] = f"Bearer {key}"
        path = "/chat/completions"
    sent = {name: value for name, value in {**good, **body}.items() if value is not None}
    return await client.post(base_url(root, provider_type) + path, json=sent, headers=headers)


def test_chat_completion_has_the_documented_shape() -> None:
    answer = with_provider(
        lambda client, root: chat(
            client,
            root,
            standin={"prompt-tokens": "2000", "cached-tokens": "512", "completion-tokens": "7"},
        )
    ).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "m-1"
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].split() == ["word"] * 7
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        2000,
        7,
        2007,
    )
    assert usage["prompt_tokens_details"]["cached_tokens"] == 512


def test_message_has_anthropics_shape_and_counts_the_cache_apart() -> None:
    answer = with_provider(
        lambda client, root: chat(
            client,
            root,
            "anthropic",
            standin={"prompt-tokens": "2000", "cached-tokens": "512", "completion-tokens": "7"},
        )
    ).json()
    assert (answer["type"], answer["role"], answer["stop_reason"]) == (
        "message",
        "assistant",
        "end_turn",
    )
    assert answer["content"][0]["type"] == "text"
    usage = answer["usage"]
    assert usage["input_tokens"] == 2000 - 512
    assert usage["cache_read_input_tokens"] == 512
    assert usage["cache_creation_input_tokens"] == 0
    assert usage["output_tokens"] == 7


def test_deepseek_names_its_cache_in_its_own_way() -> None:
    usage = with_provider(
        lambda client, root: chat(
            client,
            root,
            "deepseek",
            standin={"prompt-tokens": "2000", "cached-tokens": "512"},
        )
    ).json()["usage"]
    assert usage["prompt_cache_hit_tokens"] == 512
    assert usage["prompt_cache_miss_tokens"] == 2000 - 512


@pytest.mark.parametrize("provider_type", sorted(DIALECTS))
def test_every_provider_answers_under_its_own_prefix(provider_type: str) -> None:
    response = with_provider(lambda client, root: chat(client, root, provider_type))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("provider_type", "cap_name"),
    [("openai", "max_completion_tokens"), ("mistral", "max_tokens"), ("anthropic", "max_tokens")],
)
def test_never_more_completion_tokens_than_the_cap(provider_type: str, cap_name: str) -> None:
    cap: dict[str, Any] = {cap_name: 9}

    async def many(client: Client, root: str) -> list[httpx2.Response]:
        asked = chat(client, root, provider_type, standin={"completion-tokens": "500"}, **cap)
        drawn = [chat(client, root, provider_type, **cap) for _ in range(40)]
        return [await asked, *(await asyncio.gather(*drawn))]

    answers = [response.json() for response in with_provider(many)]
    name = "output_tokens" if provider_type == "anthropic" else "completion_tokens"
    assert max(answer["usage"][name] for answer in answers) == 9
    if provider_type == "anthropic":
        assert answers[0]["stop_reason"] == "max_tokens"
    else:
        assert answers[0]["choices"][0]["finish_reason"] == "length"


def test_metadata_directs_the_tokens_as_headers_do() -> None:
    answer = with_provider(
        lambda client, root: chat(client, root, metadata={"standin_completion_tokens": "3"})
    ).json()
    assert answer["usage"]["completion_tokens"] == 3


def test_the_same_seed_and_tag_draw_the_same_answer_in_any_order() -> None:
    async def ask(client: Client, root: str, tags: list[str]) -> dict[str, Any]:
        got = {}
        for tag in tags:
            response = await chat(client, root, standin={"tag": tag})
            got[tag] = (response.status_code, response.json().get("usage"))
        return got

    config = Config(latency_scale=0, fail_rate=0.3, hang_seconds=0, seed=5)
    tags = [str(number) for number in range(30)]

    async def quiet(client: Client, root: str, order: list[str]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for tag in order:
            try:
                kept |= await ask(client, root, [tag])
            except (httpx2.RequestError, ValueError) as error:
                kept[tag] = type(error).__name__
        return kept

    forwards = with_provider(lambda client, root: quiet(client, root, tags), config)
    backwards = with_provider(lambda client, root: quiet(client, root, tags[::-1]), config)
    assert forwards == backwards
    other = with_provider(
        lambda client, root: quiet(client, root, tags),
        Config(latency_scale=0, fail_rate=0.3, hang_seconds=0, seed=6),
    )
    assert forwards != other


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": None},
        {"model": 7},
        {"messages": None},
        {"messages": []},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"max_tokens": 0},
        {"max_tokens": "many"},
        {"max_tokens": True},
        {"temperature": 9},
        {"stream": True},
    ],
)
@pytest.mark.parametrize("provider_type", ["openai", "anthropic", "mistral"])
def test_wrong_requests_are_refused_with_400_or_422(
    provider_type: str, wrong: dict[str, Any]
) -> None:
    response = with_provider(lambda client, root: chat(client, root, provider_type, **wrong))
    assert response.status_code == DIALECTS[provider_type].invalid, response.text


def test_a_wrong_field_is_named() -> None:
    error = with_provider(lambda client, root: chat(client, root, max_tokens=0)).json()["error"]
    assert error["param"] == "max_tokens"
    assert error["type"] == "invalid_request_error"
    unknown = with_provider(lambda client, root: chat(client, root, "anthropic", extra=1)).json()
    assert "extra" in unknown["error"]["message"]


def test_reasoning_models_take_the_new_cap_only() -> None:
    response = with_provider(lambda client, root: chat(client, root, model="o3-mini", max_tokens=5))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_parameter"


def test_a_missing_or_wrong_key_is_401_in_the_providers_words() -> None:
    async def talk(client: Client, root: str) -> list[httpx2.Response]:
        return [
            await chat(client, root, key="sk-invalid"),
            await chat(client, root, "anthropic", key="sk-invalid"),
            await client.post(f"{root}/openai/v1/chat/completions", json={}),
            await client.get(f"{root}/openai/v1/models"),
        ]

    openai, anthropic, missing, listing = with_provider(talk)
    assert [r.status_code for r in (openai, anthropic, missing, listing)] == [401] * 4
    assert openai.json()["error"]["code"] == "invalid_api_key"
    assert anthropic.json()["type"] == "error"
    assert anthropic.json()["error"]["type"] == "authentication_error"
    assert anthropic.json()["request_id"] == anthropic.headers["request-id"]


def test_only_the_given_keys_and_models_are_known() -> None:
    config = Config(latency_scale=0, keys=frozenset({"sk-1"}), models=frozenset({"m-1"}))

    async def talk(client: Client, root: str) -> list[int]:
        asked = [("sk-1", "m-1"), ("sk-2", "m-1"), ("sk-1", "m-2")]
        return [(await chat(client, root, key=k, model=m)).status_code for k, m in asked]

    assert with_provider(talk, config) == [200, 401, 404]


def test_an_unknown_model_is_404_model_not_found() -> None:
    async def talk(client: Client, root: str) -> list[httpx2.Response]:
        return [
            await chat(client, root, t, model="no-such-model-1") for t in ("openai", "anthropic")
        ]

    openai, anthropic = with_provider(talk)
    assert (openai.status_code, anthropic.status_code) == (404, 404)
    assert openai.json()["error"]["code"] == "model_not_found"
    assert anthropic.json()["error"]["type"] == "not_found_error"


def test_anthropic_wants_its_version_header() -> None:
    async def talk(client: Client, root: str) -> httpx2.Response:
        body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
        return await client.post(f"{root}/v1/messages", json=body, headers={"x-api-key": "k"})

    response = with_provider(talk)
    assert response.status_code == 400
    assert "anthropic-version" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("provider_type", "status"), [("openai", 503), ("anthropic", 529), ("openrouter", 503)]
)
def test_overload_is_the_providers_own_status(provider_type: str, status: int) -> None:
    response = with_provider(
        lambda client, root: chat(client, root, provider_type, standin={"fail": "overloaded"})
    )
    assert response.status_code == status
    error = response.json()["error"]
    expected = {"anthropic": ("type", "overloaded_error"), "openrouter": ("code", 503)}
    name, value = expected.get(provider_type, ("type", "server_error"))
    assert error[name] == value


def test_mistrals_errors_are_flat() -> None:
    body = with_provider(
        lambda client, root: chat(client, root, "mistral", standin={"fail": "500"})
    ).json()
    assert body["object"] == "error"
    assert set(body) == {"object", "message", "type", "param", "code"}


def test_a_key_is_limited_in_requests_and_another_is_not() -> None:
    config = Config(latency_scale=0, rpm=3)

    async def talk(client: Client, root: str) -> list[httpx2.Response]:
        mine = [await chat(client, root, key="sk-1") for _ in range(4)]
        return [*mine, await chat(client, root, key="sk-2")]

    *passed, refused, other = with_provider(talk, config)
    assert [r.status_code for r in passed] == [200] * 3
    assert passed[0].headers["x-ratelimit-limit-requests"] == "3"
    assert passed[0].headers["x-ratelimit-remaining-requests"] == "2"
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    # Three a minute: the next fits after at most twenty seconds.
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert other.status_code == 200


def test_a_key_is_limited_in_tokens_counting_the_cap() -> None:
    config = Config(latency_scale=0, tpm=1000)

    async def talk(client: Client, root: str) -> list[httpx2.Response]:
        asked: dict[str, Any] = {"standin": {"prompt-tokens": "100"}, "max_tokens": 600}
        return [await chat(client, root, "anthropic", **asked) for _ in range(2)]

    passed, refused = with_provider(talk, config)
    assert passed.headers["anthropic-ratelimit-tokens-limit"] == "1000"
    assert passed.headers["anthropic-ratelimit-tokens-remaining"] == "300"
    assert passed.headers["anthropic-ratelimit-tokens-reset"].endswith("Z")
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_a_bucket_refills_with_time() -> None:
    bucket = Bucket(6000)
    bucket.seconds_until(6000)
    bucket.level = 0
    wait = bucket.seconds_until(5)
    assert 0.03 < wait <= 0.05
    time.sleep(wait)
    assert bucket.seconds_until(5) == 0


def test_fail_rate_is_met_and_fails_in_every_way() -> None:
    config = Config(latency_scale=0, fail_rate=0.5, hang_seconds=0, seed=1)

    async def talk(client: Client, root: str) -> list[str]:
        async def one() -> str:
            try:
                response = await chat(client, root)
                return str(response.status_code) if response.json() else ""
            except (httpx2.RequestError, ValueError) as error:
                return type(error).__name__

        return [await one() for _ in range(400)]

    seen = with_provider(talk, config)
    assert 0.4 < sum(result != "200" for result in seen) / 400 < 0.6
    assert {"429", "500", "503", "JSONDecodeError", "RemoteProtocolError"} <= set(seen)


def test_a_hang_outlasts_the_clients_patience() -> None:
    async def talk(client: Client, root: str) -> None:
        await chat(client, root, standin={"fail": "hang"})

    with pytest.raises(httpx2.ReadTimeout):
        with_provider(talk, timeout=0.2)


def test_longer_answers_take_longer() -> None:
    async def talk(client: Client, root: str, tokens: str) -> float:
        started = time.perf_counter()
        await chat(client, root, standin={"completion-tokens": tokens, "tag": "same"})
        return time.perf_counter() - started

    config = Config(latency_scale=0.01)
    short = with_provider(lambda client, root: talk(client, root, "1"), config)
    long = with_provider(lambda client, root: talk(client, root, "3000"), config)
    assert long > short + 0.1


def test_embeddings_have_the_documented_shape() -> None:
    async def talk(client: Client, root: str) -> list[httpx2.Response]:
        async def embed(provider_type: str = "openai", **body: Any) -> httpx2.Response:
            return await client.post(
                base_url(root, provider_type) + "/embeddings",
                json={"model": "e-1", "input": ["one", "two"], "dimensions": 8, **body},
                headers={"authorization": "Bearer k"},
            )

        return [
            await embed(),
            await embed(encoding_format="base64"),
            await embed(input=[]),
            await embed("deepseek"),
        ]

    floats, base64, empty, absent = with_provider(talk)
    answer = floats.json()
    assert answer["object"] == "list"
    assert [row["index"] for row in answer["data"]] == [0, 1]
    first, second = (row["embedding"] for row in answer["data"])
    assert len(first) == 8
    assert first != second
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-6)
    assert answer["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    assert isinstance(base64.json()["data"][0]["embedding"], str)
    assert empty.status_code == 400
    assert absent.status_code == 404


def test_model_lists_are_the_catalogues_and_anthropics_is_paged() -> None:
    async def talk(client: Client, root: str) -> tuple[Any, list[str]]:
        bearer = {"authorization": "Bearer k"}
        listed = await client.get(f"{root}/v1/models", headers=bearer)
        names: list[str] = []
        more = True
        while more:
            params = {"limit": "5"} | ({"after_id": names[-1]} if names else {})
            headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
            page = (await client.get(f"{root}/v1/models", params=params, headers=headers)).json()
            names += [entry["id"] for entry in page["data"]]
            more = page["has_more"]
        return listed.json(), names

    openai, anthropic = with_provider(talk)
    assert openai["object"] == "list"
    assert [entry["id"] for entry in openai["data"]] == known_models("openai")
    assert anthropic == known_models("anthropic")
    assert len(anthropic) > 5
    for provider_type in OPENAI_TYPES:
        assert known_models(provider_type), provider_type


@pytest.mark.parametrize("provider_type", sorted(DIALECTS))
def test_keys_that_say_so_are_refused_where_keys_are_checked(provider_type: str) -> None:
    """In the shapes of the pages that the adapters of ``keys.providers`` cite."""

    async def talk(client: Client, root: str) -> list[httpx2.Response]:
        url = base_url(root, provider_type)
        urls = [f"{url}/models"]
        if provider_type == "openrouter":
            urls.append(f"{url}/key")
        if provider_type == "huggingface":
            urls += [f"{root}/huggingface/api/whoami-v2", f"{root}/api/whoami-v2"]

        async def look(url: str, key: str) -> httpx2.Response:
            named = {"x-api-key": key, "anthropic-version": "2023-06-01"}
            bearer = {"authorization": f"Bearer {key}"}
            headers = named if provider_type == "anthropic" else bearer
            return await client.get(url, headers=headers)

        words = ("good", "invalid", "revoked", "nopermission", "ratelimited")
        return [await look(url, f"sk-{word}-0004") for url in urls for word in words]

    answers = with_provider(talk)
    assert [answer.status_code for answer in answers[:5]] == [200, 401, 401, 403, 429]
    assert int(answers[4].headers["retry-after"]) > 2
    error = answers[1].json()
    if provider_type == "huggingface":
        assert isinstance(error["error"], str)
        for good, *_, nopermission, limited in (answers[5:10], answers[10:15]):
            assert good.json()["name"]
            # Who it belongs to is told, and that it may not call models.
            assert nopermission.json()["auth"]["accessToken"]["fineGrained"]["global"] == []
            assert limited.status_code == 429
        entry = answers[0].json()["data"][0]
        assert ":" not in entry["id"]
        assert entry["providers"][0].keys() == {
            "provider",
            "status",
            "context_length",
            "supports_tools",
        }
    elif provider_type == "openrouter":
        assert error["error"]["code"] == 401
        assert [answer.status_code for answer in answers[5:]] == [200, 401, 401, 403, 429]
        assert answers[5].json()["data"]["limit_remaining"] is None
    elif provider_type == "mistral":
        entry = answers[0].json()["data"][0]
        assert entry["capabilities"]["completion_chat"] in (True, False)
        assert entry["max_context_length"] > 0
        assert error["code"] == "invalid_api_key"
    elif provider_type == "anthropic":
        types = [answer.json()["error"]["type"] for answer in answers[1:]]
        assert types == [*["authentication_error"] * 2, "permission_error", "rate_limit_error"]
    else:
        assert error["error"]["code"] == "invalid_api_key"


def test_hugging_faces_list_has_every_backend_of_a_model() -> None:
    async def talk(client: Client, root: str) -> Any:
        url = base_url(root, "huggingface") + "/models"
        return (await client.get(url, headers={"authorization": "Bearer k"})).json()

    listed = [
        f"{entry['id']}:{backend['provider']}"
        for entry in with_provider(talk)["data"]
        for backend in entry["providers"]
    ]
    assert sorted(listed) == known_models("huggingface")


def test_what_is_not_http_or_not_json_does_not_stop_the_server() -> None:
    async def talk(client: Client, root: str) -> list[int]:
        port = int(root.rsplit(":", 1)[1])
        for nonsense in (b"\x16\x03\x01\r\n\r\n", b"GET /\r\n\r\n", b"GET", b"a" * 100_000):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(nonsense)
            writer.write_eof()
            await reader.read()
            writer.close()
        url, headers = f"{root}/openai/v1/chat/completions", {"authorization": "Bearer k"}
        wrong = [
            await client.post(url, content=b"{", headers=headers),
            await client.post(url, content=b"[1]", headers=headers),
            await client.get(url, headers=headers),
            await client.post(f"{root}/nowhere", headers=headers),
        ]
        return [*(r.status_code for r in wrong), (await chat(client, root)).status_code]

    assert with_provider(talk) == [400, 400, 405, 404, 200]


# --- The stand-in AutoModel ----------------------------------------------------------------

ACCOUNTS = [Account("alice", "MEOWTRIX"), Account("bob", "FREE")]


class ModelSwapper:
    """As little of the server as the traffic needs: bob is refused, alice pays by token.

    ``forgets`` is how much of alice's spending GET usage leaves out, in USD.
    """

    def __init__(self, forgets: Decimal = Decimal(0)) -> None:
        self.spent: dict[str, Decimal] = defaultdict(lambda: Decimal(5))
        self.reports: list[dict[str, Any]] = []
        self.most_at_once = self.open = 0
        self._forgets = forgets
        self._numbers = itertools.count(1)

    async def __call__(self, request: Request) -> Response:
        route = f"{request.method} {request.path.removeprefix('/api/modelswapper/')}"
        body = json.loads(request.body or b"{}")
        if route == "GET usage":
            user = request.query["user_id"]
            if self.reports and user == "alice":
                self.spent[user] -= self._forgets
                self._forgets = Decimal(0)
            return self.json({"totals": {"month": {"cost": str(self.spent[user])}}})
        if route == "POST usage":
            self.open -= 1
            self.reports.append(body)
            cost = Decimal(body["prompt_tokens"] + body["completion_tokens"]) / 1_000_003
            cost = round(cost, 10)
            self.spent["alice"] += cost
            return self.json({"cost": str(cost)}, 201)
        if route == "POST select-model":
            return self.select(body)
        return self.json({"status": "ready"})

    def select(self, body: dict[str, Any]) -> Response:
        if body["user_id"] == "bob":
            refusal = {"code": "request_limit", "message": "", "limit": "requests_per_hour"}
            return self.json({"error": refusal}, 429)
        self.open += 1
        self.most_at_once = max(self.most_at_once, self.open)
        model = {"provider_id": "p", "estimated_cost": "0.1"}
        estimated = body.get("estimated_tokens", 0)
        return self.json(
            {
                **model,
                "request_id": f"r-{next(self._numbers)}",
                "selected_model_id": "m-1",
                "selected_model_name": "small",
                "provider_type": "openai",
                "max_completion_tokens": max(
                    1, body.get("max_completion_tokens", estimated * 3 // 10)
                ),
                "fallback_models": [
                    {**model, "id": f"m-{kind}", "name": "other", "provider_type": kind}
                    for kind in ("mistral", "openrouter")
                ],
            },
            201,
        )

    @staticmethod
    def json(body: Any, status: int = 200) -> Response:
        return Response(status, json.dumps(body).encode())


def simulated(server: ModelSwapper, fail_rate: float = 0.0, **changes: Any) -> Simulation:
    """Sixty requests as fast as they go."""

    async def run() -> Simulation:
        config = Config(latency_scale=0, fail_rate=fail_rate, hang_seconds=0)
        async with listening(server) as url, listening(Provider(config)) as provider_url:
            options = {"accounts": ACCOUNTS, "rate": 1000.0, "speed": 100.0, "requests": 60}
            simulation = Simulation(
                Options(url=url, token="t", provider_url=provider_url, **{**options, **changes})
            )
            await simulation.run()
            return simulation

    return asyncio.run(run())


def test_the_client_and_the_api_agree_to_the_last_digit() -> None:
    server = ModelSwapper()
    simulation = simulated(server)
    text, agree = summary(simulation, 1.0)
    assert agree, text
    assert simulation.ledgers["alice"].charged == server.spent["alice"] - 5
    assert simulation.ledgers["alice"].charged > 0
    assert simulation.ledgers["bob"].charged == 0
    stats = simulation.stats
    assert stats.started == 60
    assert stats.succeeded == len(server.reports)
    assert stats.refusals == {"requests_per_hour": 60 - stats.succeeded}
    assert stats.cap_broken == 0


def test_a_difference_in_the_last_digit_is_seen() -> None:
    text, agree = summary(simulated(ModelSwapper(Decimal("0.0000000001"))), 1.0)
    assert not agree
    assert "DIFFER" in text
    assert "alice" in text


def test_failures_walk_the_fallbacks_and_every_selection_is_reported() -> None:
    server = ModelSwapper()
    simulation = simulated(server, fail_rate=0.6)
    stats = simulation.stats
    assert stats.fallbacks > 0
    assert stats.all_failed > 0
    assert stats.succeeded + stats.all_failed == len(server.reports)
    assert server.open == 0
    assert {"rate_limited", "server_error"} <= set(stats.failures)
    assert not stats.errors
    assert summary(simulation, 1.0)[1]


def test_no_more_requests_at_once_than_allowed() -> None:
    server = ModelSwapper()
    simulated(server, concurrency=3)
    assert server.most_at_once <= 3


def test_a_trace_is_replayed_row_by_row(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    rows = list(trace_rows(trace))
    assert rows == [(0.0, 374, 44), (pytest.approx(4.314579), 396, 109)]
    options = Options(url="", token="", provider_url="", accounts=ACCOUNTS, trace=trace)
    replayed = list(arrivals(options, datetime.now(UTC)))
    assert [(a.at, a.prompt_tokens, a.completion_tokens) for a in replayed] == rows

    trace.write_text("when,what\n1,2\n")
    with pytest.raises(ValueError, match="ContextTokens"):
        list(trace_rows(trace))


def test_the_usual_shape_is_seeded_skewed_and_follows_the_day() -> None:
    crowd = accounts_for([], 20, seed=1)
    options = Options(url="", token="", provider_url="", accounts=crowd, rate=5.0)

    def first(seconds: float, hour: int, **other: Any) -> list[Any]:
        start = datetime(2030, 1, 1, hour, tzinfo=UTC)
        shaped = arrivals(Options(**{**vars(options), **other}), start)
        return list(itertools.takewhile(lambda arrival: arrival.at < seconds, shaped))

    night, noon = first(3000, 3), first(3000, 14)
    assert night == first(3000, 3)
    assert night != first(3000, 3, seed=1)
    assert len(noon) > 2.5 * len(night)
    equals = [account for account in crowd if account.tier == "FREE"]
    assert len(equals) > 10
    by_account = [sum(a.account == account for a in noon) for account in equals]
    assert by_account[0] > 3 * by_account[10]
    every_tier = [Account(tier, tier) for tier in TIERS]
    busy = Counter(a.account.tier for a in first(3000, 14, accounts=every_tier))
    assert [tier for tier, _ in busy.most_common()] == list(TIERS)
    assert len({arrival.task_type for arrival in noon}) == 15
    embeddings = [a for a in noon if a.task_type == "embedding"]
    assert all(arrival.completion_tokens == 0 for arrival in embeddings)


def test_demo_accounts_come_first_and_more_are_made() -> None:
    demo = [{"external_id": "free", "tier": "FREE"}, {"external_id": "top", "tier": "MEOWTRIX"}]
    assert [a.external_id for a in accounts_for(demo, None, 0)] == ["top", "free"]
    assert [a.external_id for a in accounts_for(demo, 4, 0)] == [
        "top",
        "free",
        "sim-0001",
        "sim-0002",
    ]
    assert [a.external_id for a in accounts_for(demo, 1, 0)] == ["top"]


def test_percentiles_are_of_the_samples() -> None:
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile(range(1, 101), 0.99) == 100
    assert percentile([], 0.5) != percentile([], 0.5)
