"""The import is repeatable, respects staff, and finds the old database's rows, not doubles them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from io import StringIO
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext

from billing.models import Account, Tier
from swapper import catalogue_sync
from swapper.catalogue_sync import (
    ASSUMED_CONTEXT_TOKENS,
    PROVIDER_NAMES,
    TASK_TYPES,
    Report,
    seed_task_types,
    sync_catalogue,
)
from swapper.models import Model, Price, Provider, TaskType
from swapper.price_import import PROVIDER_TYPES, SOURCE, Catalogue, ImportedModel, catalogue
from swapper.pricing import PriceSchedule, flat_rates

pytestmark = pytest.mark.django_db
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


def run(provider_type: str, **options: Any) -> Report:
    [report] = sync_catalogue([provider_type], **options)
    return report


def writes(queries: CaptureQueriesContext) -> list[str]:
    verbs = ("INSERT", "UPDATE", "DELETE")
    return [q["sql"] for q in queries.captured_queries if q["sql"].startswith(verbs)]


def adopted(provider: Provider, name: str, prompt: str = "0.001", **columns: Any) -> Model:
    """A row as the old database has it: priced in its columns, without a price row."""
    return Model.objects.create(
        provider=provider,
        name=name,
        capabilities=["chat", "completion"],
        context_length=columns.pop("context_length", 100_000),
        cost_per_1k_prompt_tokens=Decimal(prompt),
        cost_per_1k_completion_tokens=Decimal(prompt) * 4,
        **columns,
    )


@pytest.fixture
def anthropic() -> Provider:
    return Provider.objects.create(name="Anthropic", provider_type="anthropic", api_key="sealed")


@pytest.fixture
def edit_wheel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let the wheel say something else of one model: ``edit_wheel(type, name, field=value)``."""

    def edit(provider_type: str, name: str, **fields: Any) -> None:
        def edited(today: date) -> Catalogue:
            models = dict(catalogue(today).models)
            models[provider_type, name] = replace(models[provider_type, name], **fields)
            return Catalogue(models)

        monkeypatch.setattr(catalogue_sync, "catalogue", edited)

    yield edit


def imported(provider_type: str, name: str) -> ImportedModel:
    return catalogue(date(2026, 11, 23)).models[provider_type, name]


def test_every_type_gets_a_provider_and_every_model_of_the_wheel_a_row() -> None:
    reports = list(sync_catalogue())
    assert [report.provider_type for report in reports] == list(PROVIDER_TYPES)
    for report in reports:
        provider = Provider.objects.get(provider_type=report.provider_type)
        assert (provider.name, provider.enabled) == (PROVIDER_NAMES[report.provider_type], True)
        assert (provider.api_key, provider.account) == ("", None)
        assert report.created == provider.models.count() > 0
        assert report.priced == provider.models.filter(price__isnull=False).count()
        assert report.unpriced == provider.models.filter(price=None).count()
        assert not report.updated + report.unchanged + report.kept_staff_prices
    assert not Model.objects.filter(price=None, enabled=True).exists()
    assert not Model.objects.filter(enabled=True, capabilities=[]).exists()


def test_what_is_stored_charges_what_the_wheel_says() -> None:
    list(sync_catalogue())
    wheel = catalogue(date.today())
    rows = Model.objects.select_related("price", "provider")
    for row in rows.filter(price__isnull=False):
        price = row.price
        assert price is not None
        source = wheel.models[row.provider.provider_type, row.name]
        assert PriceSchedule.from_json(price.schedule) == source.schedule, row.name
        assert price.source == SOURCE
        assert price.prompt_per_1k == row.cost_per_1k_prompt_tokens
        assert price.completion_per_1k == row.cost_per_1k_completion_tokens
    for row in rows.filter(price=None):
        assert row.cost_per_1k_prompt_tokens == row.cost_per_1k_completion_tokens == 0
        assert row.metadata["catalogue"]["reason"] == "no price per token"


def test_the_flat_columns_show_the_base_price_exactly() -> None:
    run("anthropic")
    run("huggingface")
    haiku = Model.objects.get(name="claude-haiku-5-5")
    assert haiku.cost_per_1k_prompt_tokens == Decimal("0.0001")
    assert haiku.price is not None
    assert haiku.price.schedule["periods"][0]["input"] == {
        "base": "0.0001",
        "tiers": [{"above": 100000, "rate": "0.0005"}],
    }
    exact = Model.objects.get(name="deepseek-ai/DeepSeek-V4-Flash-0731:together")
    assert exact.cost_per_1k_prompt_tokens == Decimal("0.00013999999999999999")


def test_a_second_run_writes_nothing() -> None:
    first = list(sync_catalogue())
    with CaptureQueriesContext(connection) as queries:
        second = list(sync_catalogue())
    assert writes(queries) == []
    for before, after in zip(first, second, strict=True):
        assert (after.created, after.updated, after.priced) == (0, 0, 0)
        assert after.unchanged == before.created
        assert after.unpriced == before.unpriced


def test_an_import_takes_few_statements() -> None:
    with CaptureQueriesContext(connection) as queries:
        report = run("openai")
    assert report.created > 100
    assert len(queries) < 20


def test_the_old_databases_rows_are_priced_not_doubled(anthropic: Provider) -> None:
    same = adopted(anthropic, "claude-3-5-haiku-latest", "0.0008", context_length=200_000)
    dated = adopted(anthropic, "claude-haiku-4-5-20251001", "0.9", context_length=90_000)
    report = run("anthropic")
    assert report.updated == 2
    assert Provider.objects.filter(provider_type="anthropic").count() == 1
    assert not Model.objects.filter(name="claude-haiku-4-5").exists()
    assert Model.objects.filter(name__startswith="claude-3-5-haiku").count() == 1
    for row in (same, dated):
        row.refresh_from_db()
        assert row.enabled
        assert row.price is not None
        assert row.price.source == SOURCE
    assert dated.cost_per_1k_prompt_tokens == Decimal("0.001")
    assert dated.context_length == 90_000, "what the old database says of a model stays"
    assert dated.capabilities == ["chat", "completion"]
    assert report.retired == ["claude-3-5-haiku-latest"], "staff are told, the row is left enabled"


def test_another_model_of_the_same_price_does_not_stand_for_it() -> None:
    openai = Provider.objects.create(name="OpenAI", provider_type="openai", api_key="sealed")
    adopted(openai, "gpt-5.1-codex")
    run("openai")
    assert Model.objects.get(name="gpt-5.1").price is not None
    assert Model.objects.get(name="gpt-5.1-codex").price is not None


def test_a_model_that_the_wheel_does_not_know_is_left_alone(anthropic: Provider) -> None:
    own = adopted(anthropic, "our-own-model", "0.5")
    report = run("anthropic")
    assert report.not_in_wheel == ["our-own-model"]
    before = own.updated_at
    own.refresh_from_db()
    assert (own.price, own.updated_at) == (None, before)
    assert own.cost_per_1k_prompt_tokens == Decimal("0.5")


def test_a_users_provider_is_not_touched(anthropic: Provider) -> None:
    tier = Tier.objects.first() or Tier.objects.create(code="FREE", rank=0)
    alice = Account.objects.create(external_id="alice", tier=tier)
    owned = Provider.objects.create(
        name="Alice's", provider_type="anthropic", api_key="sealed", account=alice
    )
    unattached = Provider.objects.create(
        name="Old", provider_type="anthropic", api_key="x", metadata={"user_managed": True}
    )
    rows = [adopted(provider, "claude-haiku-4-5") for provider in (owned, unattached)]
    run("anthropic")
    assert owned.models.count() == unattached.models.count() == 1
    assert anthropic.models.count() > 20
    for row in rows:
        row.refresh_from_db()
        assert (row.price, row.cost_per_1k_prompt_tokens) == (None, Decimal("0.001"))


def test_a_second_provider_of_ours_keeps_to_its_own_models(anthropic: Provider) -> None:
    second = Provider.objects.create(name="Spare key", provider_type="anthropic", api_key="sealed")
    adopted(second, "claude-haiku-4-5")
    run("anthropic")
    assert second.models.count() == 1
    assert second.models.get().price is not None
    assert anthropic.models.filter(name="claude-haiku-4-5").exists()


def test_a_changed_price_is_a_new_row_and_the_old_one_stays(edit_wheel: Any) -> None:
    run("anthropic")
    row = Model.objects.get(name="claude-opus-5")
    old = row.price
    assert old is not None
    schedule = PriceSchedule.flat(Decimal("0.006"), Decimal("0.03"))
    edit_wheel("anthropic", "claude-opus-5", schedule=schedule)
    report = run("anthropic")
    assert (report.priced, report.updated, report.created) == (1, 1, 0)
    row.refresh_from_db()
    assert row.price is not None
    assert row.price.pk != old.pk
    assert row.cost_per_1k_prompt_tokens == Decimal("0.006")
    assert row.price.effective_from > old.effective_from
    kept = Price.objects.get(pk=old.pk)
    assert (kept.schedule, kept.prompt_per_1k) == (old.schedule, old.prompt_per_1k)
    assert run("anthropic").unchanged == 27


def test_a_price_that_differs_only_above_a_tier_is_a_change(edit_wheel: Any) -> None:
    run("anthropic")
    schedule = imported("anthropic", "claude-haiku-5-5").schedule
    assert schedule is not None
    text = json.dumps(schedule.to_json())
    dearer = PriceSchedule.from_json(json.loads(text.replace('"0.0025"', '"0.0026"')))
    assert flat_rates(dearer, NOON) == flat_rates(schedule, NOON)
    edit_wheel("anthropic", "claude-haiku-5-5", schedule=dearer)
    assert run("anthropic").priced == 1


def test_what_staff_decided_stays(edit_wheel: Any) -> None:
    run("anthropic")
    name = "claude-opus-5"
    row = Model.objects.get(name=name)
    flat = PriceSchedule.flat(Decimal(1), Decimal(2))
    row.price = Price.objects.create(
        model=row, schedule=flat.to_json(), prompt_per_1k=1, completion_per_1k=2, source="staff"
    )
    row.cost_per_1k_prompt_tokens, row.cost_per_1k_completion_tokens = Decimal(1), Decimal(2)
    row.enabled, row.context_length, row.capabilities = False, 50_000, ["chat"]
    row.metadata["note"] = "contract price"
    row.save()

    edit_wheel("anthropic", name, context_length=2_000_000, capabilities=("chat", "tools"))
    report = run("anthropic")
    assert (report.kept_staff_prices, report.priced) == (1, 0)
    row.refresh_from_db()
    assert (row.enabled, row.context_length, row.capabilities) == (False, 50_000, ["chat"])
    assert (row.cost_per_1k_prompt_tokens, row.metadata["note"]) == (Decimal(1), "contract price")
    assert run("anthropic").updated == 0

    report = run("anthropic", overwrite_staff=True)
    assert (report.kept_staff_prices, report.priced) == (0, 1)
    row.refresh_from_db()
    assert not row.enabled
    assert row.price is not None
    assert row.price.source == SOURCE
    schedule = imported("anthropic", name).schedule
    assert schedule is not None
    assert row.cost_per_1k_prompt_tokens == flat_rates(schedule, row.updated_at)[0]


def test_a_price_just_edited_in_its_columns_is_kept() -> None:
    """The admin writes the columns; that this is a price of staff is recorded a moment later."""
    run("anthropic")
    Model.objects.filter(name="claude-opus-5").update(cost_per_1k_prompt_tokens=Decimal("0.5"))
    report = run("anthropic")
    assert (report.kept_staff_prices, report.priced) == (1, 0)
    row = Model.objects.get(name="claude-opus-5")
    assert row.cost_per_1k_prompt_tokens == Decimal("0.5")
    assert run("anthropic", overwrite_staff=True).priced == 1


def test_what_nobody_changed_follows_the_wheel(edit_wheel: Any) -> None:
    run("mistral")
    assumed = Model.objects.get(name="mistral-medium-latest")
    assert assumed.context_length == ASSUMED_CONTEXT_TOKENS
    assert assumed.metadata["catalogue"]["context_assumed"] is True
    edit_wheel("mistral", "mistral-medium-latest", context_length=262_144, capabilities=("chat",))
    assert run("mistral").updated == 1
    assumed.refresh_from_db()
    assert (assumed.context_length, assumed.capabilities) == (262_144, ["chat"])
    assert "context_assumed" not in assumed.metadata["catalogue"]


def test_what_should_not_be_chosen_unseen_comes_in_disabled() -> None:
    run("mistral")
    run("openrouter")
    run("qwen")
    reasons = {
        "devstral-2512": "retired or deprecated by the provider",
        "mistral-ocr-latest": "no price per token",
        "openai/gpt-5:batch": "answers in batches, not while a user waits",
        "qwen3-8b": "open weights: the price is another host's",
    }
    for name, reason in reasons.items():
        row = Model.objects.get(name=name)
        assert not row.enabled, name
        assert row.metadata["catalogue"]["reason"] == reason
    free = Model.objects.get(name="google/gemma-4-31b-it:free")
    assert free.price is not None, "free is a price, unlike unknown"
    assert (free.enabled, free.price.prompt_per_1k) == (False, Decimal(0))


def test_a_disabled_model_is_not_enabled_by_a_better_wheel(edit_wheel: Any) -> None:
    edit_wheel("openai", "gpt-5.2", reason="no price per token", schedule=None)
    run("openai")
    assert not Model.objects.get(name="gpt-5.2").enabled
    fixed = imported("openai", "gpt-5.2")
    edit_wheel("openai", "gpt-5.2", reason=None, schedule=fixed.schedule)
    run("openai")
    row = Model.objects.get(name="gpt-5.2")
    assert row.price is not None
    assert not row.enabled


def test_a_dry_run_reports_and_writes_nothing() -> None:
    report = run("deepseek", dry_run=True)
    assert (report.created, report.priced) == (8, 8)
    assert seed_task_types(dry_run=True) == len(TASK_TYPES)
    assert not Provider.objects.exists()
    assert not Model.objects.exists()
    assert not Price.objects.exists()
    assert not TaskType.objects.filter(name="planning").exists()


def test_task_types_are_seeded_once_and_staffs_requirements_stay() -> None:
    TaskType.objects.all().delete()
    TaskType.objects.create(name="chat", description="Ours", metadata={"owner": "support"})
    TaskType.objects.create(name="planning", metadata={"required_capabilities": ["tools"]})
    assert seed_task_types() == 14
    assert seed_task_types() == 0
    assert set(TaskType.objects.values_list("name", flat=True)) == set(TASK_TYPES)
    assert len(TASK_TYPES) == 15
    chat = TaskType.objects.get(name="chat")
    assert chat.metadata == {"owner": "support", "required_capabilities": ["chat"]}
    assert chat.description == "Ours"
    planning = TaskType.objects.get(name="planning")
    assert planning.metadata == {"required_capabilities": ["tools"]}
    embedding = TaskType.objects.get(name="embedding")
    assert embedding.metadata["required_capabilities"] == ["embedding"]


def test_every_task_type_has_models_that_can_do_it() -> None:
    list(sync_catalogue())
    for name, (_, needs) in TASK_TYPES.items():
        able = Model.objects.filter(enabled=True, price__isnull=False, capabilities__contains=needs)
        assert able.count() >= 3, name


def test_the_command_shows_what_it_did() -> None:
    out = StringIO()
    call_command("sync_catalog", "--provider", "deepseek", "--no-progress", stdout=out)
    assert SOURCE in out.getvalue()
    assert "8 created, 0 updated, 0 unchanged; 8 new prices" in out.getvalue()
    assert "task types: 15 written" in out.getvalue()
    assert not Provider.objects.exclude(provider_type="deepseek").exists()


@pytest.mark.django_db(transaction=True)
def test_two_imports_at_once_make_each_row_once() -> None:
    """Without the lock both see an empty table, and every model is there twice."""
    start = threading.Barrier(2)

    def import_deepseek(_: int) -> int:
        try:
            start.wait(5)
            seed_task_types()
            return run("deepseek").created
        finally:
            connection.close()

    with ThreadPoolExecutor(2) as pool:
        created = list(pool.map(import_deepseek, range(2)))
    assert sorted(created) == [0, 8]
    assert Provider.objects.filter(provider_type="deepseek").count() == 1
    assert Model.objects.count() == Price.objects.count() == 8
