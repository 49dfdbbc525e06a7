"""What is known of a model's name: summed up here, shared as a file, and only a beginning."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from django.core.management import CommandError, call_command

from billing.models import Account
from swapper.learned import Copy
from swapper.models import (
    GlobalPerformance,
    Installation,
    SharedPerformance,
    TaskPerformance,
)
from tests.conftest import Caller, Shelf, make_model, make_own_key, make_provider
from tests.test_learning_store import WORDS, chosen, learn, use

OTHERS = "0f6d1a5e-8f0e-4c63-9f5c-6d7e1b1f0a11"
CELL = {
    "task_type": "chat",
    "provider_type": "openai",
    "model_name": "large",
    "quality": 0.1,
    "weight": 150.0,
    "success_rate": 0.9,
    "avg_latency_ms": 2000,
    "avg_cost_usd": "0.02",
    "calls": 300,
}


def shared(path: Path, *cells: dict[str, Any], **head: Any) -> Path:
    """A file as another installation writes it."""
    file = {
        "format": "modelswapper-performance",
        "version": 1,
        "installation": OTHERS,
        "exported_at": "2026-01-31T12:00:00Z",
        "cells": cells,
        **head,
    }
    path.write_text(json.dumps(file))
    return path


def export(path: Path) -> dict[str, Any]:
    call_command("performance", "export", path)
    return dict(json.loads(path.read_text()))


def take_in(path: Path) -> None:
    call_command("performance", "import", path)


def totals(name: str = "large") -> tuple[Any, ...]:
    """(installations, calls, mean quality) of chat."""
    row = GlobalPerformance.objects.get(model_name=name)
    return row.installations, row.sample_size, row.good / row.weight if row.weight else 0.0


def everything() -> list[Any]:
    tables: list[Any] = [GlobalPerformance, SharedPerformance, Installation]
    return [list(table.objects.order_by("pk").values()) for table in tables]


# --- Summed up here --------------------------------------------------------------------------


def test_system_keys_outcomes_of_all_accounts_are_summed_up_once(
    automodel: Caller, alice: Account, bob: Account, shelf: Shelf
):
    use(automodel, quality=0.5, latency_ms=800)
    learn()
    use(automodel, quality=1.0, latency_ms=400, user_id="bob")
    # The same model at another provider of ours is the same name.
    twin = make_model(make_provider("openai two", provider_type="openai"), "large", "0.01", "0.03")
    selection = automodel.select(priority="critical", user_id="bob").json()
    automodel.report(
        {**selection, "selected_model_id": str(twin.pk)}, **WORDS, error_kind="other", latency_ms=0
    )
    learn()
    learn()
    row = GlobalPerformance.objects.get()
    assert (row.task_type, row.provider_type, row.model_name) == ("chat", "openai", "large")
    assert (row.sample_size, row.installations, row.good, row.weight) == (3, 1, 1.5, 3)
    assert float(row.success_rate) == pytest.approx(2 / 3)
    assert row.avg_latency == 600, "of the calls whose time is known"
    assert sum(cell.sample_size for cell in TaskPerformance.objects.all()) == 3


def test_what_own_keys_showed_stays_with_their_account(
    automodel: Caller, alice: Account, shelf: Shelf, tmp_path: Path
):
    own = make_model(make_own_key(alice), "mine-alone", "0.001")
    selection = automodel.select(use_user_keys=True).json()
    assert selection["selected_model_id"] == str(own.pk)
    automodel.report(selection)
    learn()
    assert TaskPerformance.objects.get().model == own
    assert not GlobalPerformance.objects.exists()
    assert export(tmp_path / "file.json")["cells"] == []


def test_an_own_key_begins_from_what_system_keys_showed(
    automodel: Caller, alice: Account, shelf: Shelf
):
    for _ in range(20):
        use(automodel, quality=0.1)
    key = make_own_key(alice)
    make_model(key, "large", "0.01", "0.03", reliability=Decimal("0.999"))
    make_model(key, "unknown", "0.01", "0.03", reliability=Decimal("0.95"))

    def own() -> str:
        return chosen(automodel, use_user_keys=True)

    assert own() == "large"
    learn()
    assert own() == "unknown"


# --- Shared ----------------------------------------------------------------------------------


def test_a_file_holds_averages_and_nothing_of_who_asked_what(
    automodel: Caller, alice: Account, shelf: Shelf, tmp_path: Path
):
    use(automodel, quality=0.5, latency_ms=800)
    what = {"error_kind": "other", "error": "what alice had asked", "latency_ms": 0}
    use(automodel, **WORDS, **what)
    learn()
    take_in(shared(tmp_path / "theirs.json", CELL))
    file = export(tmp_path / "ours.json")
    assert file == {
        "format": "modelswapper-performance",
        "version": 1,
        "installation": str(Installation.objects.get(ours=True).pk),
        "exported_at": file["exported_at"],
        "cells": [
            {
                "task_type": "chat",
                "provider_type": "openai",
                "model_name": "large",
                "quality": 0.25,
                "weight": 2.0,
                "success_rate": 0.5,
                "avg_latency_ms": 800,
                "avg_cost_usd": "0.0115",
                "calls": 2,
            }
        ],
    }
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["ours.json", "theirs.json"]


def test_a_file_counts_once_however_often_it_is_taken_in(
    automodel: Caller, alice: Account, shelf: Shelf, tmp_path: Path
):
    use(automodel, quality=0.7)
    learn()
    path = shared(tmp_path / "theirs.json", CELL)
    take_in(path)
    expected = (0.7 + 0.1 * 150) / 151
    assert totals() == (2, 301, pytest.approx(expected))
    take_in(path)
    assert totals() == (2, 301, pytest.approx(expected))
    use(automodel, quality=0.7)
    learn()
    assert totals() == (2, 302, pytest.approx((1.4 + 0.1 * 150) / 152))
    take_in(shared(path, CELL, installation=str(uuid4())))
    assert totals()[:2] == (3, 602)
    # A later file of the first replaces all that it said: another model now, and not this one.
    take_in(shared(path, {**CELL, "model_name": "medium", "calls": 5}))
    assert totals()[:2] == (2, 302) and totals("medium") == (1, 5, pytest.approx(0.1))
    call_command("performance", "forget", OTHERS)
    assert totals("medium") == (0, 0, 0.0)
    with pytest.raises(CommandError, match="Nothing was imported"):
        call_command("performance", "forget", OTHERS)


def test_others_figures_are_only_where_untried_models_begin(
    automodel: Caller, alice: Account, shelf: Shelf, tmp_path: Path
):
    assert chosen(automodel) == "large"
    take_in(shared(tmp_path / "theirs.json", {**CELL, "weight": 1e8, "calls": 10**9}))
    assert chosen(automodel) != "large"
    assert GlobalPerformance.objects.get().weight == 200
    for _ in range(40):
        use(automodel, quality=1.0)
    learn()
    assert chosen(automodel) == "large", "what was seen here outweighs it"


def test_two_installations_tell_each_other(
    automodel: Caller, alice: Account, shelf: Shelf, tmp_path: Path
):
    """What one writes the other reads, and says no more of itself for it."""
    use(automodel, quality=0.5)
    learn()
    ours = export(tmp_path / "ours.json")
    # The other one: nothing learned, another id.
    TaskPerformance.objects.all().delete()
    GlobalPerformance.objects.all().delete()
    Installation.objects.all().delete()
    take_in(tmp_path / "ours.json")
    assert totals() == (1, 1, 0.5)
    again = export(tmp_path / "theirs.json")
    assert again["cells"] == [] and again["installation"] != ours["installation"]


BAD: dict[str, tuple[Any, str]] = {
    "no json": ("{", "not JSON"),
    "binary": (b"\xff\xfe\x00", "not JSON"),
    "another kind": ("[]", "not a file of the format"),
    "another version": ({"version": 2}, "version 2"),
    "no installation": ({"installation": "here"}, "installation"),
    "unknown field": ({"accounts": []}, "accounts"),
    "quality": ({"quality": 1.5}, "cells[1].quality"),
    "negative calls": ({"calls": 0}, "cells[1].calls"),
    "no name": ({"model_name": ""}, "cells[1].model_name"),
    "infinite": ({"avg_cost_usd": "Infinity"}, "cells[1]"),
    "not a number": ({"avg_cost_usd": "NaN"}, "cells[1]"),
    "text": ({"weight": "many"}, "cells[1].weight"),
    "twice": ({}, "more than once"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_whole_with_the_reason(
    automodel: Caller, alice: Account, shelf: Shelf, tmp_path: Path, case: str
):
    path = tmp_path / "theirs.json"
    take_in(shared(path, CELL))
    before = everything()
    content, reason = BAD[case]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    elif content.keys() <= CELL.keys():
        other = {**CELL, "model_name": "medium"}
        shared(path, other, {**other, **content})
    else:
        shared(path, CELL, **content)
    with pytest.raises(CommandError, match="Nothing was changed") as refused:
        take_in(path)
    assert reason in str(refused.value)
    assert everything() == before


def test_neither_ones_own_file_nor_none_is_taken_in(db: None, tmp_path: Path):
    export(tmp_path / "ours.json")
    with pytest.raises(CommandError, match="by this installation"):
        take_in(tmp_path / "ours.json")
    with pytest.raises(CommandError, match="No such file"):
        take_in(tmp_path / "nothing.json")
    with pytest.raises(CommandError, match="No such file"):
        export(tmp_path / "nowhere" / "ours.json")


def test_an_import_reaches_the_other_processes_as_what_changed(
    automodel: Caller, alice: Account, shelf: Shelf, tmp_path: Path
):
    use(automodel)
    learn()
    copy = Copy()
    copy.refresh()
    take_in(shared(tmp_path / "theirs.json", CELL))
    assert copy.refresh() and not copy.refresh()
    found = copy.learned.globals["chat", "openai", "large"]
    assert found.good == pytest.approx(16) and (found.weight, found.observations) == (151, 301)
