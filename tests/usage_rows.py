"""Many rows of usage at once, for what must not take longer with more of them."""

from __future__ import annotations

from django.db import connection

from billing.models import Account
from tests.conftest import Shelf


def bulk(account: Account, shelf: Shelf, count: int) -> None:
    """``count`` settled requests of the last days with their logs and rollups, by SQL."""
    models = [shelf.large.pk, shelf.medium.pk, shelf.small.pk, shelf.tiny.pk]
    with connection.cursor() as cursor:
        cursor.execute(
            """
            WITH held AS (
                INSERT INTO billing_hold (id, account_id, state, own_key, held_usd, held_tokens,
                    admitted_at, expires_at, ended_at, charged_usd, charged_tokens, overrun,
                    unreported, context, counters)
                SELECT gen_random_uuid(), %(account)s, 'settled', false, 0.01, 1000,
                    now() - (n %% 8000) * interval '1 minute', now(), now(), 0.01, 1000,
                    false, false, '{}', '{}'
                FROM generate_series(1, %(count)s) n
                RETURNING id, admitted_at
            )
            INSERT INTO usage_logs (user_id, provider_id, model_id, prompt_tokens,
                completion_tokens, cost, latency, task_type_id, metadata, request_id, created_at)
            SELECT %(name)s, m.provider_id, m.id, 700, 300, 0.01, 500, %(task)s, '{}', h.id, now()
            FROM (SELECT *, (row_number() OVER () %% 4) + 1 AS n FROM held) h
            JOIN models m ON m.id = (%(models)s::uuid[])[h.n]
            """,
            {
                "account": account.pk,
                "name": account.external_id,
                "count": count,
                "models": models,
                "task": shelf.chat.pk,
            },
        )
        cursor.execute("DELETE FROM swapper_usagehour WHERE account_id = %s", [account.pk])
        cursor.execute(
            """
            INSERT INTO swapper_usagehour (account_id, hour, model_id, task_type_id, own_key,
                calls, successes, prompt_tokens, completion_tokens, cost, latency_ms)
            SELECT h.account_id, date_trunc('hour', h.admitted_at, 'UTC'), u.model_id,
                u.task_type_id, u.own_key, count(*), count(*), sum(u.prompt_tokens),
                sum(u.completion_tokens), sum(u.cost), sum(u.latency)
            FROM usage_logs u JOIN billing_hold h ON h.id = u.request_id
            WHERE h.account_id = %s GROUP BY 1, 2, 3, 4, 5
            """,
            [account.pk],
        )
