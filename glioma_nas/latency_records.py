"""Measured inference times: one record for each operator, the conditions they hold under, and the table of them.

A time means something only together with the device, the engine, its version, the precision and the number of threads
it was taken with. A table therefore carries one `Environment`, holds records of that environment only, and refuses to
be merged with, or extended by, another one.

Reference: METHOD eq. 4-9 prices operators from such a table; Cai et al., ProxylessNAS, ICLR 2019, section 3.3.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glioma_nas.costs import OperatorSpec
from glioma_nas.errors import BackendError, StorageError
from glioma_nas.files import read_json, write_json, write_text

FORMAT_VERSION = 1
BATCH_SIZE = 1

MUCH_DISTURBED = 0.5
"""Share of disturbed calls above which a time is not worth keeping."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LatencyRecord:
    """Times of one network or operator.

    Attributes:
        median_ms: Median time of one call, milliseconds.
        p95_ms: 95th percentile of the same calls, milliseconds.
        n: Number of timed calls.
        warmup_runs: Number of calls before them that were not timed.
        input_shapes: Shape of each input, batch first.
        median_low_ms: Lower end of the median's 95 % interval, milliseconds; none for fewer calls than have one.
        median_high_ms: Its upper end.
        clock_mhz: Clock of the device right after; none where the system does not show it.
        disturbed: Share of the calls in [0, 1] during which other processes held the processors; they were left out if
            enough others remained. None where the system does not tell.
        component: Hash of the code that was timed, see `glioma_nas.latency_building.component_hash`; empty: not known.
    """

    median_ms: float
    p95_ms: float
    n: int
    warmup_runs: int
    input_shapes: tuple[Shape, ...] = ()
    median_low_ms: float | None = None
    median_high_ms: float | None = None
    clock_mhz: float | None = None
    disturbed: float | None = None
    component: str = ""

    @property
    def much_disturbed(self) -> bool:
        """Tell whether most calls were disturbed, so that the time is not worth keeping."""
        return (self.disturbed or 0.0) > MUCH_DISTURBED

    @property
    def doubt(self) -> tuple[bool, float, float]:
        """Order records by how little they say, the best first.

        Whether most calls were disturbed, the width of the median's interval relative to it (infinite without one), and
        the share of disturbed calls, where unknown counts as all of them. More calls say nothing by themselves:
        they were made because the median would not stand still.
        """
        low, high = self.median_low_ms, self.median_high_ms
        width = math.inf if low is None or high is None else (high - low) / self.median_ms
        return self.much_disturbed, width, 1.0 if self.disturbed is None else self.disturbed

    def __post_init__(self) -> None:
        for name, value in (("median_ms", self.median_ms), ("p95_ms", self.p95_ms)):
            if not (math.isfinite(value) and value > 0):
                raise BackendError(f"{name} is {value!r}; a time is a positive number of milliseconds")
        if self.n < 1 or self.warmup_runs < 0:
            raise BackendError(
                f"a record of {self.n} timed and {self.warmup_runs} warm-up calls; at least 1 and 0 are needed"
            )


@dataclass(frozen=True)
class Environment:
    """The conditions of a measurement.

    Attributes:
        device: Processor or accelerator model, as the system names it.
        threads: Threads the engine may use inside one operator.
        backend: Registered name of the latency backend.
        backend_version: Version of the engine's library.
        precision: Number format of weights and activations, for example ``float32``.
        torch_version: PyTorch that exported or ran the network.
        platform: Operating system and machine type.
    """

    device: str
    threads: int
    backend: str
    backend_version: str
    precision: str
    torch_version: str
    platform: str

    def differences(self, other: Environment) -> dict[str, tuple[Any, Any]]:
        """Name the conditions that change a time and differ: field → (ours, theirs).

        The PyTorch version is left out: an engine runs what was exported. Where PyTorch is the engine, its version is
        ``backend_version``.
        """
        fields = ("device", "threads", "backend", "backend_version", "precision", "platform")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in fields}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def describe(self) -> str:
        """Render as one line for tables and reports."""
        engine = f"{self.backend} {self.backend_version}, {self.precision}, {self.threads} threads"
        return f"{self.device}, {engine}, {self.platform}"


class LatencyTable:
    """Times by operator, all taken in one environment at batch size 1.

    Args:
        environment: The conditions of every record.
        records: Times to start with.
    """

    def __init__(self, environment: Environment, records: Mapping[OperatorSpec, LatencyRecord] | None = None) -> None:
        self.environment = environment
        self._records: dict[OperatorSpec, LatencyRecord] = dict(records or {})
        self.source = "latency table"

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, spec: object) -> bool:
        return spec in self._records

    def __iter__(self) -> Iterator[OperatorSpec]:
        return iter(sorted(self._records))

    def record(self, spec: OperatorSpec) -> LatencyRecord:
        """Return everything measured for ``spec``.

        Raises:
            BackendError: It was never measured; no other entry stands in for it.
        """
        try:
            return self._records[spec]
        except KeyError:
            raise BackendError(
                f"{self.source}: no time for operator {spec.key()} among {len(self)} entries; "
                "build the table for this search space (glioma-nas latency build)"
            ) from None

    def lookup(self, spec: OperatorSpec) -> float:
        """Return the median time of ``spec`` in milliseconds; see `record` for the error."""
        return self.record(spec).median_ms

    def add(self, spec: OperatorSpec, record: LatencyRecord) -> None:
        """Enter a time, replacing an earlier one of the same operator."""
        self._records[spec] = record

    def updated(self, other: LatencyTable) -> LatencyTable:
        """Return a table with the entries of both; those of ``other`` replace ours.

        Ours stays where theirs is much disturbed, ours is not, and both are of the same code.

        Raises:
            BackendError: The environments differ.
        """
        self.require_same_environment(other.environment)
        better = {
            spec: theirs
            for spec, theirs in other._records.items()
            if (ours := self._records.get(spec)) is None
            or ours.much_disturbed
            or not theirs.much_disturbed
            or ours.component != theirs.component
        }
        return LatencyTable(self.environment, {**self._records, **better})

    def require_same_environment(self, environment: Environment) -> None:
        """Make sure that times of ``environment`` may stand beside those of this table.

        Raises:
            BackendError: The table was measured on another device, engine, version, precision or number of threads.
        """
        differences = self.environment.differences(environment)
        if differences:
            told = "; ".join(
                f"{name} '{ours}' in the table, '{theirs}' here" for name, (ours, theirs) in differences.items()
            )
            raise BackendError(
                f"{self.source}: table of another device or engine ({told}); measure a new table in another file"
            )

    def merge(self, other: LatencyTable) -> LatencyTable:
        """Return a table with the entries of both.

        Where both hold an operator, the record that leaves less doubt wins (`LatencyRecord.doubt`), ours where both
        leave as much; if the operator's code has changed between them, that of ``other``.

        Raises:
            BackendError: The environments differ.
        """
        self.require_same_environment(other.environment)
        merged = LatencyTable(self.environment, self._records)
        for spec in other:
            theirs = other.record(spec)
            ours = merged._records.get(spec)
            changed = ours is not None and "" not in (known := {ours.component, theirs.component}) and len(known) > 1
            if ours is None or changed or theirs.doubt < ours.doubt:
                merged.add(spec, theirs)
        return merged

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict for each entry, sorted by operator, for tables and CSV files."""
        rows = []
        for spec in self:
            record = dataclasses.asdict(self._records[spec])
            shapes = " ".join("x".join(map(str, shape)) for shape in record.pop("input_shapes"))
            rows.append({**dataclasses.asdict(spec), **record, "input_shapes": shapes})
        return rows

    def save(self, path: Path) -> None:
        """Write to a JSON file atomically."""
        records = [{"spec": dataclasses.asdict(spec), **dataclasses.asdict(self._records[spec])} for spec in self]
        write_json(
            path,
            {
                "format": FORMAT_VERSION,
                "environment": dataclasses.asdict(self.environment),
                "batch_size": BATCH_SIZE,
                "records": records,
            },
        )

    def save_csv(self, path: Path) -> None:
        """Write one row for each entry to a CSV file, with the environment in every row."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        rows, environment = self.rows(), dataclasses.asdict(self.environment)
        writer.writerow([*(rows[0] if rows else ["operator"]), *environment])
        writer.writerows([*row.values(), *environment.values()] for row in rows)
        write_text(path, text.getvalue())

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read a file written by `save`.

        Raises:
            StorageError: The file is missing, not JSON, not a latency table of this format and batch size 1, or holds
                an impossible time.
        """
        data = read_json(path)
        try:
            version = data["format"]
            if version != FORMAT_VERSION:
                raise StorageError(
                    f"{path}: latency table format {version!r} is not the supported {FORMAT_VERSION}; measure it again"
                )
            if data["batch_size"] != BATCH_SIZE:
                raise StorageError(
                    f"{path}: latency table of batch size {data['batch_size']!r}; networks are priced at {BATCH_SIZE}, "
                    "measure it again"
                )
            table = cls(Environment(**data["environment"]))
            for entry in data["records"]:
                fields = dict(entry)
                spec = OperatorSpec(**fields.pop("spec"))
                shapes = tuple(tuple(int(size) for size in shape) for shape in fields.pop("input_shapes"))
                table.add(spec, LatencyRecord(**fields, input_shapes=shapes))
        except BackendError as err:
            raise StorageError(f"{path}: {spec.key()}: {err}; delete it and measure the table again") from err
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise StorageError(f"{path}: not a latency table ({err!r}); delete it and measure the table again") from err
        table.source = str(path)
        return table
