"""What the compiler says of a plan's shapes: facts of `jaxlm preflight`, in place of estimates."""

import sys
from collections.abc import Iterator, Mapping

from jaxlm.config import RunConfig
from jaxlm.preflight.compiled import cached_facts, default_cache, facts_of
from jaxlm.preflight.report import Report, make_report
from jaxlm.preflight.topology import Topology, has_compiler


def reports(
    probes: Mapping[str, RunConfig], topology: Topology | None, *, compile_missing: bool
) -> dict[str, Report]:
    """Reports by key, of the shapes that have been compiled for the topology, or of all.

    Args:
        probes: a run of every shape, its mesh chosen.
        topology: chips of one run; None = there is no compiler for them.
        compile_missing: compile what the cache lacks, minutes each; else only look there.

    Raises:
        UserError: with `compile_missing`, no compiler is installed or a run cannot be compiled.
    """
    if topology is None or not (compile_missing or has_compiler(topology)):
        return {}
    found, cache = {}, default_cache()
    for i, (key, cfg) in enumerate(probes.items(), 1):
        if compile_missing:
            what = f"compiling shape {i} of {len(probes)} for {topology}: this can take minutes"
            facts, _ = facts_of(
                cfg, topology, cache, lambda what=what: print(what, file=sys.stderr, flush=True)
            )
        else:
            facts = cached_facts(cfg, topology, cache)
        if facts is not None:
            found[key] = make_report(cfg, topology, facts)
    return found


def reserved(report: Report, otherwise: int) -> int:
    """Bytes of a device that the program takes, or would take if it fitted; `otherwise` if nobody says."""
    memory, shortage = report.facts.memory, report.facts.shortage
    return memory.allocated if memory is not None else int(shortage.needed) or otherwise


def sending(report: Report) -> float | None:
    """Seconds that a step's collectives take by the compiler's program; None if it cannot be read."""
    return None if report.time is None else report.time.ici + report.time.dcn


def notes(found: Mapping[str, Report], shapes: int) -> Iterator[str]:
    """What a plan of so many shapes says of where its numbers are from."""
    if found:
        topology = next(iter(found.values())).topology
        rest = f", those of the other {shapes - len(found)} are estimates" if len(found) < shapes else ""
        yield f"memory and traffic of {len(found)} shape(s) are the compiler's for {topology}{rest}"
