"""The files that are replayed: scores of models per query, their prices, arrival times."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Columns of a scores file that are not a model.
ABOUT = ("task", "query_id", "split", "prompt_tokens_est")
PRICES = ("input_price_per_m", "output_price_per_m")


class BadFile(Exception):
    """A file is not what it should be; the message says where and what was expected."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """Recorded answers: ``scores[query, model]`` 0–1, ``task[query]`` an index of ``tasks``.

    ``prices``: USD per million tokens (input, output), by model.
    """

    tasks: tuple[str, ...]
    models: tuple[str, ...]
    prices: tuple[tuple[Decimal, Decimal], ...]
    task: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    scores: NDArray[np.float64]

    def costs(self, completion_tokens: int) -> NDArray[np.float64]:
        """USD of each query at each model."""
        rates = np.array(self.prices, dtype=np.float64) / 1e6
        return self.prompt_tokens[:, None] * rates[:, 0] + completion_tokens * rates[:, 1]


def read(scores: Path, prices: Path) -> Recorded:
    """Raises BadFile where a file is missing, has no rows or a value that makes no sense."""
    rates = read_prices(prices)
    header, rows = table(scores)
    for column in ("task", "prompt_tokens_est"):
        if column not in header:
            raise BadFile(f"{scores}: there is no column “{column}”.")
    models = tuple(name for name in header if name not in ABOUT)
    if len(models) < 2:
        raise BadFile(f"{scores}: two models at least are needed, one column each.")
    unpriced = [name for name in models if name not in rates]
    if unpriced:
        raise BadFile(f"{prices}: no price for {', '.join(unpriced)}.")
    tasks: dict[str, int] = {}
    task, tokens, values = [], [], []
    for number, row in enumerate(rows, start=2):
        where = f"{scores}, line {number}"
        task.append(tasks.setdefault(row["task"], len(tasks)))
        tokens.append(int(amount(row["prompt_tokens_est"], where, "prompt_tokens_est")))
        values.append([amount(row[name], where, name, at_most=1) for name in models])
    return Recorded(
        tuple(tasks),
        models,
        tuple(rates[name] for name in models),
        np.array(task),
        np.array(tokens),
        np.array(values, dtype=np.float64),
    )


def read_prices(path: Path) -> dict[str, tuple[Decimal, Decimal]]:
    """USD per million input and output tokens, by model. Raises BadFile."""
    header, rows = table(path)
    for column in ("model", *PRICES):
        if column not in header:
            raise BadFile(f"{path}: there is no column “{column}”.")
    found = {}
    for number, row in enumerate(rows, start=2):
        try:
            prompt, completion = (Decimal(row[column]) for column in PRICES)
        except (InvalidOperation, TypeError):
            raise BadFile(f"{path}, line {number}: a price is not a number.") from None
        if not (prompt.is_finite() and completion.is_finite() and min(prompt, completion) >= 0):
            raise BadFile(f"{path}, line {number}: a price is a finite number, not negative.")
        found[row["model"]] = (prompt, completion)
    return found


def read_arrivals(path: Path) -> NDArray[np.float64]:
    """Seconds since the first arrival, from a column TIMESTAMP. Raises BadFile."""
    header, rows = table(path)
    if "TIMESTAMP" not in header:
        raise BadFile(f"{path}: there is no column “TIMESTAMP”.")
    try:
        # Some traces have seven decimal places, which Python 3.11 reads as six.
        times = np.array([datetime.fromisoformat(row["TIMESTAMP"]).timestamp() for row in rows])
    except (ValueError, TypeError):
        raise BadFile(f"{path}: a TIMESTAMP is not a date and time.") from None
    times.sort()
    if len(times) < 2 or times[-1] == times[0]:
        raise BadFile(f"{path}: two arrivals at least are needed, at different times.")
    return times - times[0]


def table(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadFile(f"{path} can't be read: {error}.") from None
    if not rows:
        raise BadFile(f"{path} has no rows.")
    return list(reader.fieldnames or ()), rows


def amount(text: str | None, where: str, column: str, at_most: float = float("inf")) -> float:
    try:
        value = float(text or "")
    except ValueError:
        raise BadFile(f"{where}: “{text or ''}” in {column} is not a number.") from None
    if not 0 <= value <= at_most or value == float("inf"):
        wanted = "not negative" if at_most == float("inf") else f"from 0 to {at_most:g}"
        raise BadFile(f"{where}: {column} is {text} and should be {wanted}.")
    return value
