"""Which model, and why. Pure: dataclasses in, a ranked choice with its reasons out.

    score = θ − λ·cost − μ·latency + preference

θ is the believed quality of a model for a task (``Knowledge``, from ``swapper.learning``), λ and μ
are the ``Weights`` of the request's priority. No ORM, clock, settings or randomness of its own:
what is drawn comes from a generator that is passed in. ``rank`` works on arrays (one row per usable
model), so that thousands of models take well under two milliseconds; floats serve the ranking
only, and every amount that is answered or held is computed exactly by ``pricing``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swapper import pricing
from swapper.ranking.choice import PARTS, Candidate, Choice, Ranking
from swapper.ranking.query import PRIOR_WEIGHT, Knowledge, Query
from swapper.ranking.reasons import explain, overestimated
from swapper.ranking.table import Floats, Mask, ModelCard, Table
from swapper.ranking.weights import (
    EXPLORING,
    PRESSURE_FROM,
    WEIGHTS,
    Preference,
    Priority,
    Weights,
)

# The parts live in ``swapper.ranking``; whoever selects or learns asks for them here.
__all__ = (
    "EXPLAINED", "EXPLORING", "NAMED", "PARTS", "PRESSURE_FROM", "PRIOR_WEIGHT", "REPROBE_SHARE",
    "WEIGHTS", "Candidate", "Choice", "Floats", "Knowledge", "Mask", "ModelCard", "Preference",
    "Priority", "Query", "Ranking", "Table", "Weights", "explain",
    "overestimated", "rank",
)  # fmt: skip

# Candidates kept for the explanation, and names of those that a rule excluded.
EXPLAINED = 8
NAMED = 5
# Samples are drawn as if prior and observations weighed this many times as much: plain sampling
# explores more than pays within the thousands of requests between changes. The prior less, since
# else a model that starts unluckily never gets a second chance.
PRIOR_SHARPNESS, SHARPNESS = 2.0, 6.0
# Only the best so many (by what is known) are drawn for. Of hundreds of untried models the
# cheapest come first; those that disappoint make room for the next.
EXPLORED = 16
# Share of the low-priority requests that look whether a model that fell from favour is back …
REPROBE_SHARE = 0.35
# … which are those that it would win, or miss by no more than this.
NEAR = 0.05
PREFERRED_BONUS = 0.25


def rank(
    table: Table,
    query: Query,
    knowledge: Knowledge | None = None,
    generator: np.random.Generator | None = None,
    reprobe_share: float = REPROBE_SHARE,
) -> Ranking:
    """Filter ``table`` by everything but what is free, and rank what is left.

    Each model is excluded by the first rule that it breaks; the rules are, in order: capability,
    context_length, provider_excluded, tier_price, max_cost, those of ``knowledge.barred``, and
    awaits_probe.

    ``knowledge``: what was learned of ``table``'s models for the query's task; None: nothing.
    ``generator`` draws for low and medium priority; without one, and for high and critical, what
    is believed counts as it is. ``reprobe_share`` 0 never looks whether a fallen model is back.
    """
    prompt_k, completion_k = query.prompt_tokens / 1000, query.completion_tokens / 1000
    costs = table.prompt_rate * prompt_k + table.completion_rate * completion_k
    for index, above in table.not_linear:
        if query.prompt_tokens > above:
            costs[index] = pricing.ceiling(
                table.cards[index].schedule,
                query.prompt_tokens,
                query.completion_tokens,
                at=query.at,
            )

    allowed = np.ones(len(table.cards), dtype=np.bool_)
    excluded: dict[str, int] = {}
    ruled_out: dict[str, NDArray[np.bool_]] = {}

    def keep(rule: str, mask: NDArray[np.bool_]) -> None:
        nonlocal allowed
        broken = allowed & ~mask
        gone = int(np.count_nonzero(broken))
        if gone:
            excluded[rule], ruled_out[rule] = gone, broken
            allowed = allowed & mask

    keep("capability", table.capable(query.needs))
    keep("context_length", table.context_length >= max(query.min_context_length, query.tokens))
    if query.excluded_providers:
        keep("provider_excluded", ~table.of_providers(query.excluded_providers))
    if query.max_price_per_1k is not None:
        keep("tier_price", table.dearest_rate <= float(query.max_price_per_1k))
    if query.max_cost is not None:
        keep("max_cost", costs <= float(query.max_cost) * (1 + 1e-9))

    known = knowledge or Knowledge.untried(table)
    for rule, mask in known.barred.items():
        keep(rule, ~mask)
    # Where nothing else is left, any request is better asked than refused for want of a low one.
    if query.priority != "low" and (allowed & ~known.probes).any():
        keep("awaits_probe", ~known.probes)

    weights = WEIGHTS[query.priority].leaning(query.preference).under_pressure(query.pressure)
    preference = table.priority_part
    if query.preferred_providers:
        preference = preference + PREFERRED_BONUS * table.of_providers(query.preferred_providers)
    rest = preference - weights.cost * costs - weights.latency / 1000 * known.latency_ms
    worth = weights.quality * known.answers
    scores = rest + worth * known.quality
    indices = np.flatnonzero(allowed)
    reprobed = None
    if query.priority == "low" and len(indices) and (known.probes.any() or known.fallen.any()):
        # As a request of medium priority would see it: for low priority alone, a dear model is
        # hardly ever worth its price, and would never be asked.
        usual = WEIGHTS["medium"].leaning(query.preference).under_pressure(query.pressure)
        chance = known.fallen * reprobe_share
        quality = np.where(known.fallen > 0, known.before, known.quality)
        seen = preference - usual.cost * costs - usual.latency / 1000 * known.latency_ms
        reprobed = to_ask(
            known.probes,
            chance if generator is not None and chance.any() else None,
            seen + usual.quality * quality,
            float((seen + usual.quality * known.answers * known.quality)[indices].max()),
            indices,
            generator,
        )
    theta, drawn = known.quality, None
    if generator is not None and query.priority in EXPLORING and len(indices):
        drawn = np.zeros(len(table.cards), dtype=np.bool_)
        drawn[shortlist(scores, indices)] = True
        theta = known.quality.copy()
        theta[drawn] = draw(known.quality[drawn], known.weight[drawn], generator)
        scores = rest + worth * theta
    # Best score first, the cheaper one at a tie; the table's order (by name) settles the rest.
    order = indices[np.lexsort((costs[indices], -scores[indices]))]
    if reprobed is not None:
        order = np.concatenate(([reprobed], order[order != reprobed]))
    ranking = Ranking(
        table, query, weights, order, scores, costs, preference, excluded, known, theta, drawn,
        reprobed,
    )  # fmt: skip
    if query.max_cost is not None and len(order):
        # The float margin above may have let one through that is dearer by a hair.
        exact = [i for i in order.tolist() if ranking.estimate(i) <= query.max_cost]
        if len(exact) < len(order):
            excluded["max_cost"] = excluded.get("max_cost", 0) + len(order) - len(exact)
            ranking.order = np.array(exact, dtype=np.intp)
            if reprobed not in exact:
                ranking.reprobed = None
    ranking.ruled_out = ruled_out
    return ranking


def shortlist(scores: Floats, indices: NDArray[np.intp]) -> NDArray[np.intp]:
    """The EXPLORED best of ``indices``."""
    if len(indices) <= EXPLORED:
        return indices
    return indices[np.argpartition(-scores[indices], EXPLORED)[:EXPLORED]]


def draw(quality: Floats, weight: Floats, generator: np.random.Generator) -> Floats:
    """A sample of each posterior, sharpened."""
    sure = PRIOR_SHARPNESS * PRIOR_WEIGHT + SHARPNESS * (weight - PRIOR_WEIGHT)
    return generator.beta(quality * sure, (1 - quality) * sure)


def to_ask(
    probes: Mask,
    chance: Floats | None,
    hoped: Floats,
    best: float,
    indices: NDArray[np.intp],
    generator: np.random.Generator | None,
) -> int | None:
    """A model of ``indices`` to look at again: one whose breaker takes a ``probe``, else one that
    fell, each with its ``chance``. Only one that would be ``best``, or nearly, if it is what is
    ``hoped``."""
    asked = probes[indices]
    if chance is not None and generator is not None and not asked.any():
        asked = chance[indices] > generator.random()
    if not asked.any():
        return None
    able = indices[asked & (hoped[indices] >= best - NEAR)]
    return int(able[hoped[able].argmax()]) if len(able) else None
