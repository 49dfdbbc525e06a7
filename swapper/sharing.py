"""What was learned, as a file that installations give each other.

A file has the figures of the one installation that wrote it, of system keys alone: never those
that it was given by others, so that nothing counts twice however files go round. It names no
account and holds no key, text or time of a request: averages by task type, provider type and model
name. What others found is only where untried models begin from (learning/state.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import msgspec
from django.db.models.functions import Now
from msgspec import Meta

from billing.money import plain
from mswap_site.errors import Invalid
from swapper import everywhere
from swapper.everywhere import Name
from swapper.learned import changing, next_version
from swapper.learning.cells import MEMORY
from swapper.messages import Milliseconds, decode
from swapper.messages import Name as Text
from swapper.models import Installation, SharedPerformance

FORMAT: Final = "modelswapper-performance"
VERSION: Final = 1
MAX_BYTES = 100_000_000
MAX_CELLS = 200_000
MAX_USD = 1_000_000

Share = Annotated[float, Meta(ge=0, le=1)]


class Shared(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A cell: ``quality`` is the mean of ``weight`` remembered observations, of all ``calls``."""

    task_type: Text
    provider_type: Text
    model_name: Text
    quality: Share
    weight: Annotated[float, Meta(ge=0, le=1e9)]
    success_rate: Share
    avg_latency_ms: Milliseconds
    avg_cost_usd: Decimal
    calls: Annotated[int, Meta(ge=1, le=1_000_000_000)]

    def __post_init__(self) -> None:
        if not (self.avg_cost_usd.is_finite() and 0 <= self.avg_cost_usd <= MAX_USD):
            raise ValueError(f"avg_cost_usd is an amount from 0 to {MAX_USD:,}.")

    @property
    def name(self) -> Name:
        return self.task_type, self.provider_type, self.model_name


class File(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """One installation's figures as of ``exported_at``."""

    format: Literal["modelswapper-performance"]
    version: Literal[1]
    installation: UUID
    exported_at: Annotated[datetime, Meta(tz=True)]
    cells: Annotated[tuple[Shared, ...], Meta(max_length=MAX_CELLS)]


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did: cells that count now, and that counted before, of one installation."""

    installation: UUID
    cells: int
    replaced: int


_decoder = msgspec.json.Decoder(File)


def write(path: Path) -> int:
    """Write what was learned here to ``path``; return how many cells. Raises OSError."""
    ours, _ = Installation.objects.get_or_create(ours=True)
    cells = [
        Shared(
            task_type=task,
            provider_type=provider_type,
            model_name=name,
            quality=round(good / weight, 6) if weight else 0.0,
            weight=round(weight, 3),
            success_rate=round(float(success_rate), 6),
            avg_latency_ms=int(latency),
            avg_cost_usd=Decimal(plain(round(cost, 10))),
            calls=calls,
        )
        for task, provider_type, name, success_rate, latency, cost, calls, good, weight
        in everywhere.learned_here()
    ]  # fmt: skip
    file = File(
        format=FORMAT,
        version=VERSION,
        installation=ours.pk,
        exported_at=datetime.now(UTC).replace(microsecond=0),
        cells=tuple(cells),
    )
    # Whoever reads it meanwhile sees the old file or the new one.
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n")
    draft.replace(path)
    return len(cells)


def read(path: Path) -> File:
    """Raises OSError, and Invalid with what is wrong and where."""
    if path.stat().st_size > MAX_BYTES:
        raise Invalid(f"It is larger than {MAX_BYTES:,} bytes.")
    data = path.read_bytes()
    check_format(data)
    file: File = decode(_decoder, data)
    seen: set[Name] = set()
    for index, cell in enumerate(file.cells):
        if cell.name in seen:
            raise Invalid(
                f"{' / '.join(cell.name)} is in it more than once.", field=f"cells[{index}]"
            )
        seen.add(cell.name)
    return file


def check_format(data: bytes) -> None:
    """Say of a file of another kind or version that it is one, and not which field is wrong."""
    try:
        head: Any = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid(f"It is not JSON: {error}.") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise Invalid(f"It is not a file of the format “{FORMAT}”.")
    if head.get("version") != VERSION:
        raise Invalid(
            f"It has version {head.get('version')!r} of the format; this program reads {VERSION}."
        )


def take_in(file: File) -> Imported:
    """Let ``file`` count instead of what its installation shared before.

    Raises Invalid where the file is our own: what was learned here counts already.
    """
    with changing():
        installation, _ = Installation.objects.get_or_create(pk=file.installation)
        if installation.ours:
            raise Invalid("It was written by this installation, whose figures count already.")
        installation.exported_at, installation.imported_at = file.exported_at, Now()
        installation.save()
        before = _forget_cells(installation)
        SharedPerformance.objects.bulk_create(
            [shared_row(installation, cell) for cell in file.cells], batch_size=2000
        )
        _add_up(before.union(cell.name for cell in file.cells))
    return Imported(file.installation, len(file.cells), len(before))


def forget(installation_id: UUID) -> int:
    """Let what an installation shared no longer count; return how many cells that was.

    Raises Invalid where nothing was imported from it.
    """
    with changing():
        installation = Installation.objects.filter(pk=installation_id, ours=False).first()
        if installation is None:
            raise Invalid(f"Nothing was imported from installation {installation_id}.")
        names = _forget_cells(installation)
        installation.delete()
        _add_up(names)
    return len(names)


def shared_row(installation: Installation, cell: Shared) -> SharedPerformance:
    # However much they saw, it is remembered here as our own would be.
    weight = min(cell.weight, MEMORY)
    return SharedPerformance(
        installation=installation,
        task_type=cell.task_type,
        provider_type=cell.provider_type,
        model_name=cell.model_name,
        good=cell.quality * weight,
        weight=weight,
        success_rate=Decimal(str(cell.success_rate)),
        avg_latency=cell.avg_latency_ms,
        avg_cost=round(cell.avg_cost_usd, 12),
        sample_size=cell.calls,
    )


def _forget_cells(installation: Installation) -> set[Name]:
    cells = SharedPerformance.objects.filter(installation=installation)
    names = set(cells.values_list("task_type", "provider_type", "model_name"))
    cells.delete()
    return names


def _add_up(names: set[Name]) -> None:
    if names:
        everywhere.add_up(sorted(names), next_version())
