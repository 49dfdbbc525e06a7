"""The files that are replayed: scores of models per query, their prices, arrival times."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Columns of a scores file that are not a model.
ABOUT = ("task", "query_id", "split", "prompt_tokens_est")
PRICES = ("input_price_per_m", "output_price_per_m")
MAX_TOKENS = 100_000_000


class BadFile(Exception):
    """A file is not what it should be; the message says where and what was expected."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """Recorded answers: ``scores[query, model]`` 0–1, ``task[query]`` an index of ``tasks``.

    ``prices``: USD per million tokens (input, output), by model. ``unpriced``: models that the
    scores have and the prices have not. An unknown price is never free, so they take no part.
    """

    tasks: tuple[str, ...]
    models: tuple[str, ...]
    prices: tuple[tuple[Decimal, Decimal], ...]
    task: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    scores: NDArray[np.float64]
    unpriced: tuple[str, ...] = ()

    def costs(self, completion_tokens: int) -> NDArray[np.float64]:
        """USD of each query at each model."""
        rates = np.array(self.prices, dtype=np.float64) / 1e6
        return self.prompt_tokens[:, None] * rates[:, 0] + completion_tokens * rates[:, 1]


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file, and the number of its last line."""

    path: Path
    line: int
    values: dict[str, str]

    def bad(self, what: str) -> BadFile:
        return BadFile(f"{self.path}, line {self.line}: {what}")

    def name(self, column: str) -> str:
        """Raises BadFile where it is empty."""
        text = self.values[column].strip()
        if not text:
            raise self.bad(f"{column} is empty.")
        return text

    def amount(self, column: str, at_most: float) -> float:
        """A number from 0 to ``at_most``. Raises BadFile."""
        text = self.values[column]
        try:
            value = float(text)
        except ValueError:
            raise self.bad(f"“{text}” in {column} is not a number.") from None
        if not 0 <= value <= at_most:
            raise self.bad(f"{column} is {text} and should be from 0 to {at_most:,.0f}.")
        return value

    def price(self, column: str) -> Decimal | None:
        """USD per million tokens; None where it is empty, and so not known. Raises BadFile."""
        text = self.values[column].strip()
        if not text:
            return None
        try:
            value = Decimal(text)
        except InvalidOperation:
            raise self.bad(f"“{text}” in {column} is not a number.") from None
        if not (value.is_finite() and 0 <= value <= 1_000_000):
            raise self.bad(f"{column} is {text} and should be from 0 to 1,000,000.")
        return value


def read(scores: Path, prices: Path) -> Recorded:
    """Raises BadFile where a file is missing, has no rows or a value that makes no sense."""
    rates = read_prices(prices)
    header, rows = table(scores, ("task", "prompt_tokens_est"))
    names = [name for name in header if name not in ABOUT]
    models = tuple(name for name in names if name in rates)
    unpriced = tuple(name for name in names if name not in rates)
    if len(models) < 2:
        why = f" There is no price for {', '.join(unpriced)} in {prices}." if unpriced else ""
        raise BadFile(f"{scores}: two models at least are needed, one column each.{why}")
    tasks: dict[str, int] = {}
    task, tokens, values = [], [], []
    for row in rows:
        task.append(tasks.setdefault(row.name("task"), len(tasks)))
        tokens.append(int(row.amount("prompt_tokens_est", MAX_TOKENS)))
        values.append([row.amount(name, 1) for name in models])
    return Recorded(
        tuple(tasks),
        models,
        tuple(rates[name] for name in models),
        np.array(task),
        np.array(tokens),
        np.array(values, dtype=np.float64),
        unpriced,
    )


def read_prices(path: Path) -> dict[str, tuple[Decimal, Decimal]]:
    """USD per million input and output tokens, by model; of those that are known.

    Raises BadFile.
    """
    found: dict[str, tuple[Decimal, Decimal]] = {}
    seen: set[str] = set()
    for row in table(path, ("model", *PRICES))[1]:
        name = row.name("model")
        if name in seen:
            raise row.bad(f"{name} is there a second time.")
        seen.add(name)
        prompt, completion = (row.price(column) for column in PRICES)
        if prompt is not None and completion is not None:
            found[name] = (prompt, completion)
    return found


def read_arrivals(path: Path) -> NDArray[np.float64]:
    """Seconds since the first arrival, from a column TIMESTAMP. Raises BadFile."""
    times = []
    for row in table(path, ("TIMESTAMP",))[1]:
        text = row.values["TIMESTAMP"]
        try:
            # Some traces have seven decimal places, which Python 3.11 reads as six.
            times.append(datetime.fromisoformat(text).timestamp())
        except (ValueError, OverflowError, OSError):
            raise row.bad(f"“{text}” is not a date and time.") from None
    times.sort()
    if len(times) < 2 or times[-1] == times[0]:
        raise BadFile(f"{path}: two arrivals at least are needed, at different times.")
    return np.array(times) - times[0]


def table(path: Path, needed: Sequence[str]) -> tuple[list[str], list[Row]]:
    """The header and the rows of a CSV file. Raises BadFile."""
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            check_header(path, header, needed)
            for values in reader:
                row = Row(path, reader.line_num, dict(zip(header, values, strict=False)))
                # An empty line is none; one of too few or too many values is cut off or shifted.
                if values and len(values) != len(header):
                    raise row.bad(f"{len(values)} values, where the header names {len(header)}.")
                if values:
                    rows.append(row)
    except csv.Error as error:
        raise BadFile(f"{path}, line {reader.line_num}: {error}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"{path} can't be read: {error}.") from None
    if not rows:
        raise BadFile(f"{path} has no rows.")
    return header, rows


def check_header(path: Path, header: Sequence[str], needed: Sequence[str]) -> None:
    if not header:
        raise BadFile(f"{path} has no rows.")
    for column in needed:
        if column not in header:
            raise BadFile(f"{path}: there is no column “{column}”.")
    twice = [name or "an empty one" for name, times in Counter(header).items() if times > 1]
    if twice or "" in header:
        which = f"{', '.join(twice)} more than once" if twice else "a column without a name"
        raise BadFile(f"{path}: the header has {which}.")
