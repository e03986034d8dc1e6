"""`jaxlm preflight --search`: try layouts by the analytic model, compile the best few, rank those.

Tried are meshes x remat x microbatches, all else as in the config: none of them changes what is computed.
The estimate prunes what does not divide or fit and orders the rest; of the compiled ones those that fit are
ranked by their time with nearly full overlap, see `Candidate.score`. Of the best the kernel's tiles are then
tried, where attention has any: half and twice the config's.
"""

import dataclasses
import itertools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from jaxlm.config import RunConfig
from jaxlm.errors import UserError, check
from jaxlm.model.backends import BACKENDS
from jaxlm.model.splash import LANES, tile_size
from jaxlm.preflight.compiled import Facts
from jaxlm.preflight.planner import (
    Estimate,
    describe_mesh,
    estimate,
    mesh_overrides,
    meshes,
    ranked,
    why_none,
)
from jaxlm.preflight.report import GiB, Report, make_report, sums
from jaxlm.preflight.topology import Topology
from jaxlm.sharding import MESH_AXES

# Share of the time by which other tiles than the config's must win: the score knows the hidden scores that
# a tile computes and its memory, not how fast a kernel runs with it.
CLEARLY = 0.01
REMATS = ("none", "minimal", "full")
MICROBATCHES = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One layout: what was estimated, and what the compiler said if it was asked."""

    cfg: RunConfig
    estimate: Estimate
    report: Report | None = None
    retiled: bool = False  # another's layout with other tiles

    @property
    def score(self) -> float:
        """Seconds to rank by: of what the compiler says, the bound and a fifth of what might not overlap."""
        if self.report is None or self.report.time is None:
            return self.estimate.seconds
        time = self.report.time
        return time.bound + 0.2 * (time.serial - time.bound)

    @property
    def overrides(self) -> dict[str, Any]:
        """Config fields that make the layout."""
        attention, tiled = self.cfg.model.attention, BACKENDS[self.cfg.model.attention.backend].tiled
        return {
            **mesh_overrides(self.cfg.mesh),
            "model.remat": self.cfg.model.remat,
            "train.microbatches": self.cfg.train.microbatches,
            **(
                {f"model.attention.{n}": getattr(attention, n) for n in ("tile_q", "tile_k")} if tiled else {}
            ),
        }


def variants(cfg: RunConfig, topology: Topology) -> Iterator[RunConfig]:
    """All layouts that are tried; those with fewer microbatches and less remat first."""
    for microbatches in MICROBATCHES:
        train = dataclasses.replace(cfg.train, microbatches=microbatches)
        for remat in REMATS:
            model = dataclasses.replace(cfg.model, remat=remat)
            for mesh in meshes(cfg, topology.num_devices, topology.slices):
                yield dataclasses.replace(cfg, model=model, train=train, mesh=mesh)


def tiles(cfg: RunConfig) -> tuple[int, int]:
    """Queries and keys of a tile of the attention kernel; (0, 0) = the backend has none to choose."""
    attention, length = cfg.model.attention, cfg.data.seq_len
    if not BACKENDS[attention.backend].tiled:
        return 0, 0
    return tile_size(length, attention.tile_q, "tile_q"), tile_size(length, attention.tile_k, "tile_k")


def retiled(cfg: RunConfig, num_devices: int) -> Iterator[RunConfig]:
    """The layout with half and with twice the tiles, where they divide the columns of a device."""
    own, length = tiles(cfg), cfg.data.seq_len
    parts = cfg.mesh.shape(num_devices)[MESH_AXES.index("sequence")]
    if parts > 1 and cfg.model.attention.context == "ring":
        return  # the ring computes attention itself
    columns = length // parts
    for pair in ([n // 2 for n in own], [n * 2 for n in own]):
        if all(n and n % LANES == 0 and length % n == columns % n == 0 for n in pair):
            attention = dataclasses.replace(cfg.model.attention, tile_q=pair[0], tile_k=pair[1])
            yield dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention=attention))


def search(
    cfg: RunConfig,
    topology: Topology,
    compile_one: Callable[[RunConfig], Facts],
    *,
    max_compiles: int,
    price: float = 0.0,
) -> tuple[list[Candidate], list[Candidate]]:
    """`(compiled, only estimated)` layouts, each best first; of the compiled ones those that fit come first.

    Compiles in the order of the estimates until `max_compiles` of them are done, then the best of them with
    other tiles. Layouts that a kernel or the compiler refuses are passed over.

    Raises:
        UserError: nothing divides and fits by the estimate, all that does is refused, or the hardware has no
            numbers.
    """
    check(topology.chip is not None, f"--search needs a chip's numbers, --topology={topology} has none")
    where = (topology.chip, topology.num_devices, topology.slices)
    found = ranked(variants(cfg, topology), *where)
    if not found:
        raise UserError(f"no layout on {topology} will do: {why_none(variants(cfg, topology), *where)}")
    estimated = [Candidate(*item) for item in found]

    refused: list[UserError] = []

    def judged(each: Candidate) -> Iterator[Candidate]:
        try:
            facts = compile_one(each.cfg)
        except UserError as error:
            refused.append(error)
            return
        yield dataclasses.replace(each, report=make_report(each.cfg, topology, facts, price))

    left = iter(estimated)
    compiled = list(itertools.islice((done for each in left for done in judged(each)), max_compiles))
    if not compiled:
        raise UserError(
            f"none of {len(estimated)} layouts on {topology} can be compiled; the best: {refused[0]}"
        )
    compiled.sort(key=_order)
    for cfg in retiled(compiled[0].cfg, topology.num_devices):
        compiled += judged(Candidate(cfg, estimate(cfg, *where), retiled=True))
    return sorted(compiled, key=_order), list(left)


def _order(each: Candidate) -> tuple[bool, float]:
    return not each.report.fits, each.score * (1 + CLEARLY * each.retiled)


def ranking_table(compiled: Sequence[Candidate], estimated: Sequence[Candidate], rows: int = 10) -> Table:
    """The ranking: compiled layouts, then the best of those that were only estimated."""
    table = Table(
        title="layouts, best first; numbers of the compiler, in brackets estimates", title_justify="left"
    )
    for name in ("mesh", "remat", "microbatches", "tiles"):
        table.add_column(name)
    for name in ("GiB", "GB sent", "seconds", "MFU at most", ""):
        table.add_column(name, justify="right")
    for each in [*compiled, *estimated[: max(0, rows - len(compiled))]]:
        head = (describe_mesh(each.cfg.mesh), each.cfg.model.remat, str(each.cfg.train.microbatches))
        head += (" x ".join(str(n) for n in tiles(each.cfg) if n),)
        guess = each.estimate
        memory, sent = f"({guess.memory.total / GiB:.2f})", f"({sum(guess.traffic.values()) / 1e9:.1f})"
        seconds, mfu, verdict = f"({each.score:.4g})", "", ""
        if (report := each.report) is not None:
            shortage = report.facts.shortage
            verdict = "fits" if shortage is None else "does not fit"
            if report.facts.memory is not None:
                memory = f"{report.facts.memory.allocated / GiB:.2f} {memory}"
            if report.time is not None:
                total = sums(report.facts.collectives).get("all", {"ici": 0.0, "dcn": 0.0})
                sent = f"{(total['ici'] + total['dcn']) / 1e9:.1f} {sent}"
                seconds = f"{each.score:.4g} ({guess.seconds:.4g})"
                mfu = f"{report.time.mfu:.1%}"
        table.add_row(*head, memory, sent, seconds, mfu, verdict)
    return table


def flags(overrides: Mapping[str, Any]) -> str:
    """The overrides as flags of the command line, for a shell.

    >>> print(flags({"mesh.fsdp": 64, "mesh.rules": (("embed", "data fsdp"),)}))
    --config.mesh.fsdp=64 '--config.mesh.rules=(("embed", "data fsdp"),)'
    """

    def text(value: Any) -> str:
        return repr(value).replace("'", '"') if isinstance(value, tuple) else str(value)

    return " ".join(shlex.quote(f"--config.{name}={text(value)}") for name, value in overrides.items())
