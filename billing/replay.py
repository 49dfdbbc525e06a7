"""What would other limits have refused? The ledger's rules over what it really admitted.

``Day`` is the rule: one account's UTC day under one set of limits, hold by hold, in plain integers.
Every window lies within one day, so that days are independent of each other. ``preview`` feeds it
with the last days of a tier's accounts, and where these are more than a page can wait for, with a
sample of whole days.

As in the ledger a hold counts in the windows it was admitted in: with what it held until it ended,
then with what it was charged. (Silence is charged as held, so a late report is the end.) What is
refused takes nothing. tests/test_tier_preview.py shows that ledger and replay agree.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from heapq import heappop, heappush
from itertools import groupby
from typing import Any, NamedTuple

from django.db import connection, transaction

from billing.limits import LENGTHS, LIMITS, WINDOWS, window_start
from billing.models import Account, Tier
from billing.money import QUANTUM

DAYS = 30
# As many holds as are replayed while somebody waits for the page: two to three seconds.
MOST = 100_000
BATCH = 2000
WORST = 10
APPROVAL = "approval_required"

MICROSECOND = timedelta(microseconds=1)
WINDOW_LENGTHS = [LENGTHS[window] // MICROSECOND for window in WINDOWS]
HOUR, DAY = WINDOWS.index("hour"), WINDOWS.index("day")
USD, TOKENS, REQUESTS = range(3)
MEASURES = {"usd": USD, "tokens": TOKENS, "requests": REQUESTS}
# What fits into a bigint of quanta; a stand-in for anything above.
MOST_USD = 900_000_000


class Admitted(NamedTuple):
    """A hold that the ledger admitted. Times in µs since 1970, USD in quanta of 10^-10."""

    account_id: int
    at: int
    ended_at: int | None
    own_key: bool
    usd: int
    charged_usd: int
    tokens: int
    charged_tokens: int


class Corrected(NamedTuple):
    """A correction: counts in the hour and the day of ``hour`` from ``made_at`` on."""

    made_at: int
    hour: int
    usd: int


class Rule(NamedTuple):
    name: str
    window: int | None
    measure: int
    limit: int


def quanta(usd: Decimal) -> int:
    return int(usd / QUANTUM)


@dataclass(frozen=True, slots=True)
class Rules:
    """A tier's limits as the replay compares them, in the order in which the ledger does."""

    limits: tuple[Rule, ...]
    approval: int | None

    @classmethod
    def of(cls, tier: Tier) -> Rules:
        rules = []
        for kind in LIMITS:
            limit = getattr(tier, kind.name)
            if limit is not None:
                window = None if kind.window == "request" else WINDOWS.index(kind.window)
                number = quanta(limit) if kind.measure == "usd" else int(limit)
                rules.append(Rule(kind.name, window, MEASURES[kind.measure], number))
        threshold = tier.approval_threshold_usd
        if threshold is None and tier.usd_per_request is not None:
            threshold = tier.usd_per_request / 2
        return cls(tuple(rules), None if threshold is None else quanta(threshold))


class Day:
    """One account's UTC day under ``rules``."""

    def __init__(self, rules: Rules, corrections: Iterable[Corrected] = ()) -> None:
        self.rules = rules
        self.current = [-1] * len(WINDOWS)
        self.used = [[0, 0, 0] for _ in WINDOWS]
        # What will change a window's use: (when, of which moment, USD, tokens, a correction).
        self.changes: list[tuple[int, int, int, int, bool]] = []
        for made_at, hour, usd in corrections:
            heappush(self.changes, (made_at, hour, usd, 0, True))

    def ask(self, hold: Admitted, corrections: Iterable[Corrected] = ()) -> str | None:
        """Admit a hold (None), or say which limit refuses it. In the order of admission.

        ``corrections``: those that are about this very hold.
        """
        at = hold.at
        for window, length in enumerate(WINDOW_LENGTHS):
            if at // length != self.current[window]:
                self.current[window] = at // length
                self.used[window] = [0, 0, 0]
        while self.changes and self.changes[0][0] <= at:
            self._change(*heappop(self.changes)[1:])

        usd = 0 if hold.own_key else hold.usd
        asked = (usd, hold.tokens, 1)
        for name, of, measure, limit in self.rules.limits:
            if hold.own_key and measure == USD:
                continue
            before = 0 if of is None else self.used[of][measure]
            if before + asked[measure] > limit:
                return name
        for used in self.used:
            used[USD] += usd
            used[TOKENS] += hold.tokens
            used[REQUESTS] += 1
        if hold.ended_at is not None:
            moved = 0 if hold.own_key else hold.charged_usd - usd
            tokens = hold.charged_tokens - hold.tokens
            heappush(self.changes, (hold.ended_at, at, moved, tokens, False))
        for made_at, hour, corrected in corrections:
            heappush(self.changes, (made_at, hour, corrected, 0, True))
        return None

    def asks_for_approval(self, hold: Admitted) -> bool:
        threshold = self.rules.approval
        return not hold.own_key and threshold is not None and hold.usd > threshold

    def _change(self, of: int, usd: int, tokens: int, correction: bool) -> None:
        for window, used in enumerate(self.used):
            if correction and window not in (HOUR, DAY):
                continue
            if of // WINDOW_LENGTHS[window] == self.current[window]:
                # A refund of an hour may be of more than the replay has admitted in it.
                used[USD] = max(0, used[USD] + usd) if correction else used[USD] + usd
                used[TOKENS] += tokens


# --- A tier's last days ----------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """What one set of limits would have done: refusals by limit and by account."""

    by_limit: Counter[str] = field(default_factory=Counter)
    by_account: dict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    approvals: int = 0

    @property
    def refused(self) -> int:
        return self.by_limit.total()

    def ask(self, day: Day, hold: Admitted, corrections: Iterable[Corrected]) -> None:
        rule = day.ask(hold, corrections)
        if rule is not None:
            self.by_limit[rule] += 1
            self.by_account[hold.account_id][rule] += 1
        elif day.asks_for_approval(hold):
            self.approvals += 1


@dataclass(frozen=True, slots=True)
class Affected:
    """An account that the proposed limits would have refused something."""

    account_id: int
    name: str
    requests: int
    refused: int
    refused_now: int
    by_limit: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Preview:
    """``requests`` of ``all_requests`` were replayed, of ``accounts`` accounts; the tier has
    ``all_accounts``. A sample if these differ."""

    since: datetime
    all_accounts: int
    active_accounts: int
    all_requests: int
    accounts: int
    requests: int
    proposed: Outcome
    current: Outcome
    worst: tuple[Affected, ...]

    @property
    def is_sample(self) -> bool:
        return self.requests < self.all_requests

    @property
    def proposed_share(self) -> str:
        return self._share(self.proposed)

    @property
    def current_share(self) -> str:
        return self._share(self.current)

    def _share(self, outcome: Outcome) -> str:
        """Per cent of the requests; what is not nothing does not round to nothing."""
        percent = 100 * outcome.refused / (self.requests or 1)
        return "under 0.1 %" if 0 < percent < 0.1 else f"{percent:.1f} %"

    @property
    def limits(self) -> list[tuple[str, int, int]]:
        """(limit, refused by the proposed, by the current ones), what refuses most first."""
        found = self.proposed.by_limit | self.current.by_limit
        order = sorted(found, key=lambda name: (-self.proposed.by_limit[name], -found[name], name))
        return [(name, self.proposed.by_limit[name], self.current.by_limit[name]) for name in order]


# Requests by account and UTC day: those that ended, from the rollup, and the few open ones. Of
# these days a sample in an order that a hash decides, as many as fit: the same each time.
CHOOSE = """
WITH days AS MATERIALIZED (
    SELECT account_id, day, sum(requests)::bigint AS requests
    FROM (
        SELECT h.account_id, date_trunc('day', h.hour, 'UTC') AS day, h.requests
        FROM billing_accounthour h JOIN billing_account a ON a.id = h.account_id
        WHERE a.tier_id = %(tier)s AND h.hour >= %(since)s
        UNION ALL
        SELECT h.account_id, date_trunc('day', h.admitted_at, 'UTC'), 1
        FROM billing_hold h JOIN billing_account a ON a.id = h.account_id
        WHERE h.state = 'open' AND a.tier_id = %(tier)s AND h.admitted_at >= %(since)s
    ) x GROUP BY account_id, day
), chosen AS (
    SELECT account_id, day, sum(requests) OVER (
        ORDER BY md5(account_id::text || day::text), account_id, day
    ) AS together
    FROM days WHERE requests BETWEEN 1 AND %(most)s
)
SELECT (SELECT COALESCE(sum(requests), 0)::bigint FROM days),
    (SELECT count(DISTINCT account_id) FROM days),
    COALESCE(array_agg(account_id), '{}'), COALESCE(array_agg(day), '{}')
FROM chosen WHERE together <= %(most)s
"""

MICROSECONDS = "(extract(epoch FROM {}) * 1000000)::bigint"
QUANTA = f"(LEAST({{}}, {MOST_USD}) * {1 / QUANTUM:f})::bigint"
READ = f"""
SELECT h.account_id, {MICROSECONDS.format("h.admitted_at")}, {MICROSECONDS.format("h.ended_at")},
    h.own_key, {QUANTA.format("h.held_usd")}, {QUANTA.format("h.charged_usd")},
    h.held_tokens, h.charged_tokens
FROM unnest(%(accounts)s::bigint[], %(days)s::timestamptz[]) d(account_id, day)
CROSS JOIN LATERAL (
    SELECT * FROM billing_hold
    WHERE account_id = d.account_id AND admitted_at >= d.day
        AND admitted_at < d.day + interval '1 day'
    OFFSET 0
) h
ORDER BY h.account_id, h.admitted_at, h.id
"""
READ_CORRECTIONS = f"""
SELECT c.account_id, {MICROSECONDS.format("h.admitted_at")}, {MICROSECONDS.format("c.made_at")},
    {MICROSECONDS.format("c.hour")}, {QUANTA.format("c.usd")}
FROM billing_correction c LEFT JOIN billing_hold h ON h.id = c.hold_id
WHERE c.account_id = ANY(%(accounts)s) AND c.hour >= %(since)s
"""


def preview(current: Tier, proposed: Tier, at: datetime, *, most: int = MOST) -> Preview:
    """Replay what the accounts of ``current`` asked for in the last DAYS UTC days, today among
    them, under its limits and under those of ``proposed`` (not saved). Reads only.

    At most ``most`` holds: beyond that a sample of the accounts' days.
    """
    since = window_start("day", at) - timedelta(days=DAYS - 1)
    outcomes = Outcome(), Outcome()
    rules = Rules.of(proposed), Rules.of(current)
    requests: Counter[int] = Counter()
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute(CHOOSE, {"tier": current.pk, "since": since, "most": most})
            all_requests, active, accounts, days = cursor.fetchone()
            params: dict[str, Any] = {"accounts": accounts, "days": days, "since": since}
            cursor.execute(READ_CORRECTIONS, params)
            of_holds, of_days = _by_place(cursor.fetchall())
        for (account_id, day), holds in groupby(_admitted(params), key=_account_and_day):
            replays = [Day(rule, of_days.get((account_id, day), ())) for rule in rules]
            for hold in holds:
                requests[account_id] += 1
                corrections = of_holds.get((account_id, hold.at), ())
                for outcome, replay in zip(outcomes, replays, strict=True):
                    outcome.ask(replay, hold, corrections)
    return Preview(
        since,
        Account.objects.filter(tier=current.pk).count(),
        active,
        max(all_requests, requests.total()),
        len(requests),
        requests.total(),
        *outcomes,
        _worst(*outcomes, requests),
    )


def _account_and_day(hold: Admitted) -> tuple[int, int]:
    return hold.account_id, hold.at // WINDOW_LENGTHS[DAY]


def _admitted(params: dict[str, Any]) -> Iterator[Admitted]:
    """Read by a cursor on the server, so that only a batch is ever in memory here."""
    with connection.chunked_cursor() as cursor:
        cursor.execute(READ, params)
        while rows := cursor.fetchmany(BATCH):
            yield from map(Admitted._make, rows)


def _by_place(
    rows: Iterable[tuple[int, int | None, int, int, int]],
) -> tuple[dict[tuple[int, int], list[Corrected]], dict[tuple[int, int], list[Corrected]]]:
    """Corrections of holds, by account and admission; those of hours, by account and day."""
    of_holds, of_days = defaultdict(list), defaultdict(list)
    for account_id, admitted_at, *correction in rows:
        corrected = Corrected(*correction)
        if admitted_at is None:
            of_days[account_id, corrected.hour // WINDOW_LENGTHS[DAY]].append(corrected)
        else:
            of_holds[account_id, admitted_at].append(corrected)
    return of_holds, of_days


def _worst(proposed: Outcome, current: Outcome, requests: Counter[int]) -> tuple[Affected, ...]:
    refused = {key: found.total() for key, found in proposed.by_account.items()}
    worst = sorted(refused, key=lambda key: (-refused[key], key))[:WORST]
    names = dict(Account.objects.filter(pk__in=worst).values_list("pk", "external_id"))
    return tuple(
        Affected(
            key,
            names[key],
            requests[key],
            refused[key],
            current.by_account[key].total() if key in current.by_account else 0,
            tuple(proposed.by_account[key].most_common()),
        )
        for key in worst
    )
