"""The stage for the tests of money: tiers, purses, a fast clock, threads, and a witness.

The witness is what makes the races provable. A trigger on ``billing_hold`` notes every change of
a hold while the ledger's lock is still held, with a sequence number: the order in which the
ledger really decided. ``History.replay`` adds up the holds themselves in that order and knows
nothing of the ledger's counters, so that it can contradict them.
"""

from __future__ import annotations

import importlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, TypeVar
from uuid import NAMESPACE_OID, UUID, uuid4, uuid5

from django.apps import apps
from django.db import connection, connections

from billing import ledger
from billing.accounts import account_get_or_create
from billing.audit import find_drift
from billing.budgets import budget_set
from billing.ledger import Ended, Placed, Refused
from billing.ledger_sql import COUNTERS
from billing.limits import LIMITS, WINDOWS, Limit, LimitStates, window_start
from billing.models import Budget, Claim, Hold, Meter, Tier
from billing.money import QUANTUM, ZERO

T = TypeVar("T")

# Where nothing else is said, it is this moment: the middle of a minute, an hour and a day.
AT = datetime(2040, 5, 17, 10, 20, 30, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
TABLES = (
    "billing_account billing_tier billing_meter billing_hold billing_accounthour"
    " billing_systemhour billing_breakertrip billing_budget billing_claim billing_correction"
    " usage_logs swapper_usagehour"
).split()


def usd(text: str | int | Decimal) -> Decimal:
    return Decimal(text)


def seed_tiers() -> None:
    """The tiers of the migration: the tables are emptied after each test that commits."""
    importlib.import_module("billing.migrations.0002_tiers").seed(apps, None)


def make_tier(code: str = "TEST", /, **limits: Any) -> Tier:
    """A tier that limits nothing but what ``limits`` says, the approval gate included."""
    defaults: dict[str, Any] = dict.fromkeys(limit.name for limit in LIMITS)
    defaults |= {"rank": 100 + Tier.objects.count(), "approval_threshold_usd": usd(10**6)}
    tier, _ = Tier.objects.update_or_create(code=code, defaults={**defaults, **limits})
    return tier


@dataclass(frozen=True)
class Purse:
    """An account, with the ledger's verbs in short."""

    id: int

    def ask(
        self,
        amount: str | Decimal = "0",
        tokens: int = 0,
        *,
        at: datetime | None = AT,
        own_key: bool = False,
        **how: Any,
    ) -> tuple[UUID, Placed | Refused]:
        hold_id = uuid4()
        if own_key:
            how.setdefault("budgets", [self.own_budget()])
        result = ledger.hold(
            hold_id=hold_id, account_id=self.id, usd=usd(amount), tokens=tokens, at=at, **how
        )
        return hold_id, result

    def place(self, amount: str | Decimal = "0", tokens: int = 0, **how: Any) -> UUID:
        hold_id, result = self.ask(amount, tokens, **how)
        assert isinstance(result, Placed), f"refused by {result.rule}"
        return hold_id

    def refused(self, amount: str | Decimal = "0", tokens: int = 0, **how: Any) -> Refused:
        _, result = self.ask(amount, tokens, **how)
        assert isinstance(result, Refused), "it was admitted"
        return result

    def own_budget(self, **limits: Any) -> UUID:
        """The budget of the account's one own key, without limits or with these."""
        budget_id = uuid5(NAMESPACE_OID, str(self.id))
        if limits or not Budget.objects.filter(pk=budget_id).exists():
            budget_set(budget_id, self.id, **{"usd_per_day": None, "usd_per_month": None, **limits})
        return budget_id

    def settle(
        self, hold_id: UUID, amount: str | Decimal, tokens: int = 0, **how: Any
    ) -> Ended | None:
        how = {"at": AT, **on_key(hold_id, usd(amount)), **how}
        return ledger.settle(hold_id, self.id, usd=usd(amount), tokens=tokens, **how)

    def release(
        self, hold_id: UUID, amount: str | Decimal = "0", tokens: int = 0, **how: Any
    ) -> Ended | None:
        how = {"at": AT, **on_key(hold_id, usd(amount)), **how}
        return ledger.release(hold_id, self.id, usd=usd(amount), tokens=tokens, **how)

    def expire(self, hold_id: UUID, **how: Any) -> Ended | None:
        how = {"at": AT + HOUR, **on_key(hold_id, ZERO), **how}
        return ledger.expire(hold_id, self.id, **how)

    def spend(self, amount: str | Decimal, tokens: int = 0, **how: Any) -> UUID:
        """A hold that is settled at exactly its amount."""
        hold_id = self.place(amount, tokens, **how)
        assert self.settle(hold_id, amount, tokens, at=how.get("at", AT)) is not None
        return hold_id

    def used(self, window: str) -> dict[str, Decimal]:
        """The meter's counters of one window."""
        meter = Meter.objects.get(account_id=self.id)
        return {name: getattr(meter, f"{window}_{name}") for name in COUNTERS}

    @property
    def stopped(self) -> bool:
        return Meter.objects.get(account_id=self.id).stopped_at is not None


def on_key(hold_id: UUID, amount: Decimal) -> dict[str, Any]:
    """How the ledger is told of the end of a hold on own keys: all spent on the first."""
    claim = Claim.objects.filter(hold_id=hold_id, position=0).first()
    if claim is None:
        return {}
    return {"own_key": True, "spent_by": {str(claim.budget_id): amount}}


def make_purse(tier: str | Tier = "TEST", name: str = "alice") -> Purse:
    account, _ = account_get_or_create(name, tier if isinstance(tier, str) else tier.code)
    return Purse(account.pk)


def drifts() -> list[str]:
    return [str(drift) for drift in find_drift()]


def everything() -> dict[str, list[str]]:
    """Every row that has to do with money, to compare before and after."""
    rows = {}
    with connection.cursor() as cursor:
        for table in TABLES:
            cursor.execute(f"SELECT to_jsonb(t)::text FROM {table} t ORDER BY 1")
            rows[table] = [text for (text,) in cursor.fetchall()]
    return rows


# --- Threads ---------------------------------------------------------------------------------


def in_threads(
    count: int,
    work: Callable[[int], T],
    *,
    prepare: Callable[[], None] = lambda: None,
) -> list[T]:
    """``work(0..count-1)``, all let go at the same moment; their results, or the first error.

    Before, each has its connection and has called ``prepare``.
    """
    barrier = threading.Barrier(count)
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            connection.ensure_connection()
            prepare()
            barrier.wait(30)
            results[index] = work(index)
        except BaseException as error:
            errors.append(error)
            barrier.abort()
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return results


class Waiting(threading.Thread):
    """A call in a thread of its own that will have to wait for a lock of the test's."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._pid: int | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                (self._pid,) = cursor.fetchone()
            self._result = self._call()
        except BaseException as error:
            self._error = error
        finally:
            connections.close_all()

    def until_it_waits(self) -> Waiting:
        """Come back when PostgreSQL says that it waits for a lock."""
        for _ in range(2000):
            with connection.cursor() as cursor:
                # Not pg_stat_activity, which shows a transaction the same picture each time.
                cursor.execute(
                    "SELECT 1 FROM pg_locks WHERE pid = %s AND NOT granted", [self._pid or 0]
                )
                if cursor.fetchone():
                    return self
            assert self.is_alive(), "it did not have to wait"
            threading.Event().wait(0.005)
        raise AssertionError("it never came to the lock")

    def result(self) -> Any:
        self.join(30)
        assert not self.is_alive(), "it still waits"
        if self._error is not None:
            raise self._error
        return self._result


# --- The database's clock, in the test's hands -----------------------------------------------


class TickingClock:
    """A clock for the ledger that goes on by ``step`` each time that it is read.

    The ledger's own statements are run as they are, without ``at``: ``clock_timestamp()`` and
    ``now()`` are found in a schema that comes before ``pg_catalog``. So the clock is still the
    database's and is still read when the lock is held, but midnight comes after so many readings,
    on a slow machine as on a fast one. A sequence underneath makes every reading a later one.
    """

    def __init__(self, begin: datetime, step: timedelta) -> None:
        self.begin, self.step = begin, step

    def __enter__(self) -> TickingClock:
        moment = f"'{self.begin.isoformat()}'::timestamptz + interval '{self.step}'"
        with connection.cursor() as cursor:
            cursor.execute(
                f"""
                DROP SCHEMA IF EXISTS ticking CASCADE;
                CREATE SCHEMA ticking;
                CREATE SEQUENCE ticking.tick;
                CREATE FUNCTION ticking.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
                    AS $$ SELECT {moment} * nextval('ticking.tick') $$;
                CREATE FUNCTION ticking.now() RETURNS timestamptz LANGUAGE sql STABLE
                    AS $$ SELECT {moment} * (SELECT last_value FROM ticking.tick) $$;
                """
            )
        return self

    def use(self) -> None:
        """Have this thread's connection go by it."""
        with connection.cursor() as cursor:
            cursor.execute("SET search_path = ticking, public, pg_catalog")

    def advance(self, time: timedelta) -> None:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT setval('ticking.tick', (SELECT last_value FROM ticking.tick) + %s)",
                [time // self.step],
            )

    def __exit__(self, *_: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute("RESET search_path; DROP SCHEMA ticking CASCADE")


# --- The witness -----------------------------------------------------------------------------

WITNESS = """
CREATE TABLE witness (
    seq bigserial PRIMARY KEY, at timestamptz NOT NULL, hold_id uuid NOT NULL,
    account_id bigint NOT NULL, state text NOT NULL, own_key boolean NOT NULL,
    admitted_at timestamptz NOT NULL, held_usd numeric NOT NULL, held_tokens bigint NOT NULL,
    charged_usd numeric NOT NULL, charged_tokens bigint NOT NULL, counters numeric[] NOT NULL
);
CREATE FUNCTION witness() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO witness (at, hold_id, account_id, state, own_key, admitted_at, held_usd,
        held_tokens, charged_usd, charged_tokens, counters)
    VALUES (clock_timestamp(), NEW.id, NEW.account_id, NEW.state, NEW.own_key, NEW.admitted_at,
        NEW.held_usd, NEW.held_tokens, NEW.charged_usd, NEW.charged_tokens,
        COALESCE(NEW.ended_counters, NEW.counters));
    RETURN NULL;
END $$;
CREATE TRIGGER witness AFTER INSERT OR UPDATE ON billing_hold
    FOR EACH ROW EXECUTE FUNCTION witness();
"""
NO_WITNESS = """
DROP TRIGGER IF EXISTS witness ON billing_hold;
DROP FUNCTION IF EXISTS witness();
DROP TABLE IF EXISTS witness;
"""


@contextmanager
def witnessed() -> Iterator[None]:
    """Have a trigger note every change of a hold, in the order in which the ledger made it."""
    with connection.cursor() as cursor:
        cursor.execute(NO_WITNESS + WITNESS)
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute(NO_WITNESS)


@dataclass(frozen=True)
class Seen:
    """A refusal as its caller saw it. ``asked`` by measure: usd, tokens, requests."""

    at: datetime
    rule: str
    asked: dict[str, Decimal]
    limits: LimitStates

    @classmethod
    def of(cls, refused: Refused, amount: Decimal, tokens: int) -> Seen:
        asked = {"usd": amount, "tokens": Decimal(tokens), "requests": Decimal(1)}
        return cls(refused.at, refused.rule, asked, refused.limits)

    @property
    def justified(self) -> bool:
        """Whether the figures that came with it say that it did not fit.

        Not ``free``, which is never below zero: after an overrun not even nothing fits.
        """
        state = self.limits[self.rule]
        assert state.limit is not None
        return state.spent + state.held + self.asked[state.kind.measure] > state.limit


@dataclass
class History:
    """What really happened, added up from the witness's rows."""

    admissions: int = 0
    ends: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    overspends: list[str] = field(default_factory=list)
    wrong_figures: list[str] = field(default_factory=list)
    false_refusals: list[str] = field(default_factory=list)
    windows: dict[str, set[datetime]] = field(default_factory=lambda: defaultdict(set))

    @classmethod
    def replay(cls, account_id: int, tier: Tier, refusals: Sequence[Seen] = ()) -> History:
        """Go through every change in order, and put each refusal where its time belongs."""
        history = cls()
        used: dict[tuple[str, datetime], dict[str, Decimal]] = defaultdict(
            lambda: defaultdict(Decimal)
        )
        last: dict[UUID, dict[str, Decimal]] = {}
        pending = sorted(refusals, key=lambda seen: seen.at, reverse=True)

        def amount(limit: Limit, at: datetime) -> tuple[Decimal, Decimal]:
            if limit.window == "request":
                return ZERO, ZERO
            cell = used[limit.window, window_start(limit.window, at)]
            held = ZERO if limit.measure == "requests" else cell[f"{limit.measure}_held"]
            return cell[limit.measure], held

        def judge(seen: Seen) -> None:
            limit = next(limit for limit in LIMITS if limit.name == seen.rule)
            spent, held = amount(limit, seen.at)
            asked, allowed = seen.asked[limit.measure], getattr(tier, limit.name)
            if spent + held + asked <= allowed:
                history.false_refusals.append(
                    f"{seen.at}: {seen.rule} with {spent} + {held} + {asked} of {allowed}"
                )
            state = seen.limits[seen.rule]
            if (state.spent, state.held) != (spent, held):
                history.wrong_figures.append(f"{seen.at}: {state} told, {spent}, {held} true")

        for row in _witness_rows(account_id):
            while pending and pending[-1].at < row["at"]:
                judge(pending.pop())
            hold_id, at = row["hold_id"], row["admitted_at"]
            system = not row["own_key"]
            opened = row["state"] == "open"
            now = {
                "usd": row["charged_usd"] * system,
                "usd_held": row["held_usd"] * (opened and system),
                "tokens": Decimal(row["charged_tokens"]),
                "tokens_held": Decimal(row["held_tokens"] * opened),
                "requests": Decimal(1),
            }
            before = last.get(hold_id, {})
            last[hold_id] = now
            for window in WINDOWS:
                start = window_start(window, at)
                history.windows[window].add(start)
                for name, value in now.items():
                    used[window, start][name] += value - before.get(name, ZERO)
            if not opened:
                history.ends[row["state"]] += 1
                continue
            history.admissions += 1
            states = LimitStates.from_counters(row["counters"], at)
            for limit in LIMITS:
                allowed = getattr(tier, limit.name)
                spent, held = amount(limit, at)
                if limit.window == "request":
                    spent = {"usd": row["held_usd"], "tokens": Decimal(row["held_tokens"])}[
                        limit.measure
                    ]
                elif (states[limit.name].spent, states[limit.name].held) != (spent, held):
                    history.wrong_figures.append(f"{at}: {states[limit.name]}, {spent}, {held}")
                free_of_it = row["own_key"] and limit.measure == "usd"
                if allowed is not None and spent + held > allowed and not free_of_it:
                    history.overspends.append(f"{at}: {limit.name} {spent} + {held} of {allowed}")
        while pending:
            judge(pending.pop())
        return history


def _witness_rows(account_id: int) -> list[dict[str, Any]]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM witness WHERE account_id = %s ORDER BY seq", [account_id])
        names = [column.name for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def open_holds(account_id: int) -> list[UUID]:
    return list(
        Hold.objects.filter(account_id=account_id, state=Hold.State.OPEN).values_list(
            "pk", flat=True
        )
    )


__all__ = ["AT", "DAY", "HOUR", "LIMITS", "MINUTE", "QUANTUM", "WINDOWS", "ZERO"]
