"""The verb `preflight`: what a run will need and cost on hardware that is not here."""

from collections.abc import Sequence
from typing import Any

from absl import flags

from jaxlm.errors import UserError
from jaxlm.verbs import FAILED, Verb, need, no_positional, run_config


def _preflight_flags(values: flags.FlagValues) -> None:
    def text(name: str, default: str | None, about: str) -> None:
        flags.DEFINE_string(name, default, about, flag_values=values)

    text(
        "topology",
        None,
        "chips of a slice, such as v5p:8x8x8 (v4, tpu7x alike) or v6e:16x16 (v5e alike); GPUs of a host, "
        "h100:8 (h200 alike); cpu:8 for emulated devices",
    )
    flags.DEFINE_integer("slices", 1, "slices of that topology", lower_bound=1, flag_values=values)
    flags.DEFINE_float("price", 0.0, "of an hour of one chip; 0 = no prices", flag_values=values)
    flags.DEFINE_integer("top", 8, "collectives to list", lower_bound=0, flag_values=values)
    text(
        "cache", None, "folder that keeps what was compiled; empty = keep nothing; default: the user's cache"
    )
    flags.DEFINE_boolean("json", False, "print JSON alone", flag_values=values)
    flags.DEFINE_boolean(
        "search",
        False,
        "find the best mesh, remat, microbatches and attention tiles first",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "max_compiles",
        4,
        "layouts that a search compiles; then the best of them with up to two other tiles",
        lower_bound=1,
        flag_values=values,
    )
    text("out", "", "file for the overrides of the best layout that a search finds, JSON")


def _preflight(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    from jaxlm.config import build
    from jaxlm.preflight.command import preflight_command

    no_positional("preflight", positional)
    need(values, "preflight", "topology")
    if values["max_compiles"].present and not values.search:
        raise UserError(
            f"--max_compiles={values.max_compiles} is how many layouts a search compiles: add --search"
        )
    options = {n: values[n].value for n in ("slices", "price", "top", "cache", "max_compiles", "out")}
    options |= {"as_json": values.json, "search_layouts": values.search}
    fits = preflight_command(build(config), values.topology, **options)
    return 0 if fits else FAILED


VERBS: dict[str, Verb] = {
    "preflight": Verb(
        "Compile the training step for hardware that is not here: memory, traffic, time, cost.",
        "--config=FILE[:ARG] --topology=NAME:AxBxC [--slices=N] [--search] [--price=X] [--json]",
        "jaxlm preflight --config=experiments/llama_8b.py --topology=v5p:4x4x4",
        _preflight_flags,
        _preflight,
        config=run_config,
    ),
}
