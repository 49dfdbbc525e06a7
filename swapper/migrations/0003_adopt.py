"""Give the rows of an adopted ChatChonk database what ModelSwapper knows them by.

Accounts (FREE) for every user that a row names, the user-managed provider attached to its account,
a first price row for each priced model, and the ledger rows and rollups of the usage so far, so
that limits and pages count it and every counter equals the sum of its rows. Set-based, because
usage_logs may be large; on an empty database nothing happens.
"""

from django.db import migrations

ACCOUNTS = """
INSERT INTO billing_account (external_id, tier_id)
SELECT DISTINCT user_id, 'FREE' FROM (
    SELECT user_id FROM usage_logs
    UNION ALL
    SELECT metadata ->> 'user_id' FROM providers WHERE metadata ->> 'user_managed' = 'true'
) named
WHERE user_id <> '' ON CONFLICT (external_id) DO NOTHING
"""

PROVIDERS = """
UPDATE providers p SET account_id = a.id FROM billing_account a
WHERE p.account_id IS NULL AND p.metadata ->> 'user_managed' = 'true'
    AND a.external_id = p.metadata ->> 'user_id'
"""

# A user's provider without a user would pass for one of ours: nobody may use it.
ORPHANS = """
UPDATE providers SET enabled = false
WHERE account_id IS NULL AND metadata ->> 'user_managed' = 'true'
"""

# 0/0 is "unknown", never "free": such a model gets no price and is not used.
PRICES = """
WITH priced AS (
    INSERT INTO swapper_price (model_id, schedule, prompt_per_1k, completion_per_1k, source,
        effective_from)
    SELECT id, jsonb_build_object('periods', jsonb_build_array(jsonb_build_object(
            'input', jsonb_build_object('base', trim_scale(cost_per_1k_prompt_tokens)::text),
            'output', jsonb_build_object('base', trim_scale(cost_per_1k_completion_tokens)::text)
        ))), cost_per_1k_prompt_tokens, cost_per_1k_completion_tokens, 'adopted', updated_at
    FROM models
    WHERE price_id IS NULL AND cost_per_1k_prompt_tokens >= 0
        AND cost_per_1k_completion_tokens >= 0
        AND (cost_per_1k_prompt_tokens > 0 OR cost_per_1k_completion_tokens > 0)
    RETURNING id, model_id
)
UPDATE models m SET price_id = priced.id FROM priced WHERE priced.model_id = m.id
"""

# One settled hold per call of an account: the ledger's rows for what was spent before.
HOLDS = """
INSERT INTO billing_hold (id, account_id, state, own_key, held_usd, held_tokens, admitted_at,
    expires_at, ended_at, charged_usd, charged_tokens, overrun, unreported, context, counters)
SELECT u.id, a.id, 'settled', p.account_id IS NOT NULL, GREATEST(round(u.cost, 10), 0),
    GREATEST(u.prompt_tokens + u.completion_tokens, 0), u.created_at, u.created_at, u.created_at,
    GREATEST(round(u.cost, 10), 0), GREATEST(u.prompt_tokens + u.completion_tokens, 0),
    false, false, '{}', '{}'
FROM usage_logs u
JOIN billing_account a ON a.external_id = u.user_id
JOIN providers p ON p.id = u.provider_id
WHERE u.request_id IS NULL
"""

LOGS = """
UPDATE usage_logs u SET request_id = u.id, own_key = p.account_id IS NOT NULL
FROM providers p, billing_hold h
WHERE p.id = u.provider_id AND h.id = u.id AND u.request_id IS NULL
"""

ACCOUNT_HOURS = """
INSERT INTO billing_accounthour (account_id, hour, system_usd, own_usd, requests, tokens,
    acknowledged_usd)
SELECT account_id, date_trunc('hour', admitted_at, 'UTC'),
    sum(CASE WHEN own_key THEN 0 ELSE charged_usd END),
    sum(CASE WHEN own_key THEN charged_usd ELSE 0 END), count(*), sum(charged_tokens),
    -- What was spent before there was a stop does not trip it now.
    sum(CASE WHEN own_key THEN 0 ELSE charged_usd END)
FROM billing_hold GROUP BY 1, 2
"""

SYSTEM_HOURS = """
INSERT INTO billing_systemhour (hour, shard, spent_usd, acknowledged_usd)
SELECT hour, account_id % 16, sum(system_usd), sum(system_usd)
FROM billing_accounthour GROUP BY 1, 2 HAVING sum(system_usd) <> 0
"""

USAGE_HOURS = """
INSERT INTO swapper_usagehour (account_id, hour, model_id, task_type_id, own_key, calls, successes,
    prompt_tokens, completion_tokens, cost, latency_ms)
SELECT h.account_id, date_trunc('hour', h.admitted_at, 'UTC'), u.model_id, u.task_type_id,
    u.own_key, count(*), count(*) FILTER (WHERE u.success), sum(u.prompt_tokens),
    sum(u.completion_tokens), sum(h.charged_usd), sum(u.latency)
FROM usage_logs u JOIN billing_hold h ON h.id = u.id
GROUP BY 1, 2, 3, 4, 5
"""


def _counters(source):
    return f"""
        COALESCE(sum(charge) FILTER (WHERE {source}), 0), 0,
        count(id) FILTER (WHERE {source}),
        COALESCE(sum(charged_tokens) FILTER (WHERE {source}), 0), 0"""


_MINUTE = "admitted_at >= date_trunc('minute', now(), 'UTC')"
_HOUR = "admitted_at >= date_trunc('hour', now(), 'UTC')"
_DAY = "admitted_at >= date_trunc('day', now(), 'UTC')"

METERS = f"""
INSERT INTO billing_meter (account_id, minute_start, hour_start, day_start,
    minute_usd_spent, minute_usd_held, minute_requests, minute_tokens, minute_tokens_held,
    hour_usd_spent, hour_usd_held, hour_requests, hour_tokens, hour_tokens_held,
    day_usd_spent, day_usd_held, day_requests, day_tokens, day_tokens_held,
    usd_per_day_warned, usd_per_hour_warned, tokens_per_day_warned,
    requests_per_day_warned, requests_per_hour_warned, requests_per_minute_warned)
SELECT account_id, date_trunc('minute', now(), 'UTC'), date_trunc('hour', now(), 'UTC'),
    date_trunc('day', now(), 'UTC'),
    {_counters(_MINUTE)}, {_counters(_HOUR)}, {_counters(_DAY)},
    0, 0, 0, 0, 0, 0
FROM (
    SELECT a.id AS account_id, h.id, h.admitted_at, h.charged_tokens,
        CASE WHEN h.own_key THEN 0 ELSE h.charged_usd END AS charge
    FROM billing_account a
    LEFT JOIN billing_hold h ON h.account_id = a.id AND h.{_DAY}
) rows
GROUP BY account_id
ON CONFLICT (account_id) DO NOTHING
"""


class Migration(migrations.Migration):
    dependencies = [("swapper", "0002_additions"), ("billing", "0002_tiers")]

    operations = [
        migrations.RunSQL(
            [
                ACCOUNTS,
                PROVIDERS,
                ORPHANS,
                PRICES,
                HOLDS,
                LOGS,
                ACCOUNT_HOURS,
                SYSTEM_HOURS,
                USAGE_HOURS,
                METERS,
            ],
            migrations.RunSQL.noop,
        )
    ]
