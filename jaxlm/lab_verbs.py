"""The verbs of the scaling lab: plan, sweep, collect, fit, predict, anneal, report, selftest, coordcheck.

`fit`, `predict`, `anneal`, `report` and `selftest` import numpy and scipy, and no JAX.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from jaxlm.errors import UserError, nearest
from jaxlm.verbs import FAILED, Verb, need, no_positional, run_config


def _text(values: flags.FlagValues, name: str, default: str | None, text: str) -> None:
    flags.DEFINE_string(name, default, text, flag_values=values)


def _whole(values: flags.FlagValues, name: str, default: int | None, text: str, low: int = 0) -> None:
    flags.DEFINE_integer(name, default, text, lower_bound=low, flag_values=values)


def _real(values: flags.FlagValues, name: str, default: float, text: str, low: float | None = None) -> None:
    flags.DEFINE_float(name, default, text, lower_bound=low, flag_values=values)


def _switch(values: flags.FlagValues, name: str, default: bool, text: str) -> None:
    flags.DEFINE_boolean(name, default, text, flag_values=values)


def _need_extra(verb: str) -> None:
    """scipy belongs to an extra."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise UserError(f"jaxlm {verb} needs scipy: pip install 'jaxlm[fit]'") from None


# ---------------------------------------------------------------------------------------------------- plan


def _plan_flags(values: flags.FlagValues) -> None:
    _text(values, "workdir", None, "sweep directory; the plan is kept in its plan.json")
    _text(values, "name", "grid", "of the plan; a sweep directory holds several")
    _switch(values, "dry_run", False, "print the same and write nothing into the sweep directory")
    _text(values, "chip", "", "estimate time on this chip, such as v5p; default: this machine, measured")
    _whole(values, "num_chips", 1, "chips that train one run", 1)
    _real(
        values, "mfu", 0.0, "share of the chip's peak that a run reaches; 0 = the chip table's assumption", 0
    )
    _real(values, "gflops", 0.0, "sustained GFLOP/s of a run, in place of a measurement; 0 = measure", 0)
    _real(values, "price", 0.0, "of an hour of one chip (or of this machine); 0 = do not price", 0)
    _switch(
        values, "preflight", False, "compile every shape for --chip that is not in the cache of preflights"
    )


def _plan(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    from jaxlm.sweep.preview import plan_command

    no_positional("plan", positional)
    need(values, "plan", "workdir")
    names = ("name", "dry_run", "chip", "num_chips", "mfu", "gflops", "price", "preflight")
    return plan_command(config, values.workdir, **{name: values[name].value for name in names})


def _sweep_config() -> type:
    from jaxlm.sweep.plan import SweepConfig

    return SweepConfig


# --------------------------------------------------------------------------------------------------- sweep


def _sweep_flags(values: flags.FlagValues) -> None:
    _text(values, "workdir", None, "sweep directory with a plan: a folder that workers share, or a URL")
    _whole(values, "workers", 1, "processes on this machine; more may join from anywhere", 1)
    _whole(values, "index", None, "train this run alone, by its place in the plan (a SLURM array element)")
    _whole(values, "vectorize", 0, "train up to so many runs that differ in numbers alone as one program")
    _text(values, "name", None, "of the plan; default: all plans of the directory")
    _switch(values, "retry_failed", True, "train runs again that failed")
    _real(values, "stale_after", 90.0, "seconds without a heartbeat after which a claim is taken over", 1)
    _text(values, "scratch", None, "local folder for run directories when the workdir is a URL")
    _switch(values, "watch", False, "only show how the sweep stands")


def _sweep(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    from jaxlm.sweep.command import sweep_command

    no_positional("sweep", positional)
    need(values, "sweep", "workdir")
    names = ("workers", "index", "vectorize", "name", "retry_failed", "stale_after", "scratch")
    options = {name: values[name].value for name in names}
    return sweep_command(values.workdir, show=values.watch, **options)


# ------------------------------------------------------------------------------------------------- collect


def _workdir_flag(values: flags.FlagValues) -> None:
    _text(values, "workdir", None, "sweep directory")


def _collect(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    from jaxlm.sweep.collect import collect_command

    no_positional("collect", positional)
    need(values, "collect", "workdir")
    return collect_command(values.workdir)


# ----------------------------------------------------------------------------------------------------- fit


def _fit_flags(values: flags.FlagValues) -> None:
    _text(values, "table", None, "CSV or Parquet of runs: a sweep's table.csv, or anybody's")
    _text(values, "columns", "", "ROLE=COLUMN, such as N=params,C=train_flop,loss=loss_nats; ours are known")
    _text(values, "out", None, "folder of fit.json and the pictures")
    _text(values, "law", "chinchilla", "name in jaxlm.scaling.laws.LAWS")
    _text(values, "method", "surface", "surface | varpro | envelope | parabola | akima | robust | all")
    _text(values, "objective", "huber", "huber | lad | mse | log_mse, of the surface methods")
    _real(values, "delta", 1e-3, "of huber, in log loss", 0)
    _text(values, "where", "", "rows to use, such as 'C<1e21 and N>1e7'")
    _whole(values, "drop_highest", 0, "leave out so many rows of highest loss")
    _text(values, "group", "", "column; one fit for each of its values")
    _text(values, "block", "", "column whose values are resampled whole (a trunk), or N for the sizes")
    _switch(values, "evaluations", False, "of loss_to_accuracy: rows are evaluations of the runs in --block")
    flags.DEFINE_multi_string("fix", [], "parameter that keeps a value, E=1.69", flag_values=values)
    flags.DEFINE_multi_string("tie", [], "parameters that are equal, alpha=beta", flag_values=values)
    flags.DEFINE_multi_string("bound", [], "range of a parameter, alpha=0.1:1", flag_values=values)
    _whole(values, "starts", 16, "of the law's grid of starts, drawn at random; 0 = all, of chinchilla 4500")
    _whole(values, "draws", 400, "of the bootstrap")
    _whole(values, "seed", 0, "of starts and draws")
    _real(values, "level", 0.95, "of the intervals")
    _switch(values, "profile", True, "profile every parameter")
    _switch(values, "plots", True, "draw")


def _fit(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    no_positional("fit", positional)
    need(values, "fit", "table", "out")
    _need_extra("fit")
    from jaxlm.scaling.fit_table import fit_command

    names = (
        "law",
        "method",
        "objective",
        "delta",
        "drop_highest",
        "where",
        "group",
        "block",
        "evaluations",
        "starts",
        "draws",
    )
    names += ("seed", "level", "fix", "tie", "bound", "profile", "plots")
    fit_command(values.table, values.columns, out=values.out, **{name: values[name].value for name in names})
    return 0


# -------------------------------------------------------------------------------------- predict and report


def _predict_flags(values: flags.FlagValues) -> None:
    _text(values, "fit", None, "fit.json that `jaxlm fit` wrote")
    flags.DEFINE_multi_string(
        "budget", [], "training FLOPs to predict for; several with commas, or repeated", flag_values=values
    )
    _whole(values, "next", 0, "recommend so many runs that would narrow N* at the budget most")
    _real(values, "level", 0.95, "of the intervals")
    flags.DEFINE_multi_string(
        "at",
        [],
        "inputs of the law: N=1e9,D=2e10 for its value there; with --budget further ones, such as U=1e9",
        flag_values=values,
    )
    _text(values, "then", "", "fit.json of loss_to_accuracy or loss_to_error: predict the metric as well")
    _text(values, "measured", "", "with --then: table of held-out runs, for the errors of both steps")
    _text(values, "columns", "", "of that table, such as N=params,D=tokens,loss=nll,accuracy=acc")
    _switch(values, "json", False, "print JSON")


def _predict(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    no_positional("predict", positional)
    need(values, "predict", "fit")
    _need_extra("predict")
    from jaxlm.scaling.answers import predict_command
    from jaxlm.scaling.fit_table import parse_numbers, parse_pairs

    options = dict(next_count=values.next, level=values.level, as_json=values.json, then=values.then)
    options |= dict(measured=values.measured, columns=values.columns)
    budgets = parse_numbers(values.budget, "--budget", "1e22") if values.budget else ()
    predict_command(values.fit, budgets, at=parse_pairs(values.at, "--at"), **options)
    return 0


def _report(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    no_positional("report", positional)
    need(values, "report", "workdir")
    _need_extra("report")
    from jaxlm.scaling.report import report_command

    return report_command(values.workdir)


# ---------------------------------------------------------------------------------- selftest and coordcheck


def _no_flags(values: flags.FlagValues) -> None:
    pass


def _selftest(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    if list(positional) != ["scaling"]:
        got = " ".join(positional) or "nothing"
        raise UserError(f"jaxlm selftest needs 'scaling', got {got}{nearest(got, ['scaling'])}")
    _need_extra("selftest")
    from jaxlm.scaling.selftest import selftest_command

    return selftest_command()


def _anneal_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(
        "run", [], "run directory whose whole curve is fitted; may be repeated", flag_values=values
    )
    flags.DEFINE_multi_string(
        "predict", [], "run directory that is predicted, and compared", flag_values=values
    )
    _text(values, "out", None, "folder of annealing.json and the picture")
    _text(values, "column", "train/nll", "of metrics.jsonl")
    _whole(values, "skip", 0, "updates at the start that are left out, the warm-up at least")
    _whole(values, "reach", 0, "smooth over so many rows; 0 = a choice by the length of the curve")
    _whole(values, "draws", 200, "of the bootstrap")
    _whole(values, "seed", 0, "of the draws")
    _real(values, "level", 0.95, "of the intervals")


def _anneal(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    no_positional("anneal", positional)
    need(values, "anneal", "run", "out")
    _need_extra("anneal")
    from jaxlm.scaling.annealing import annealing_command

    names = ("predict", "column", "skip", "reach", "draws", "seed", "level")
    annealing_command(values.run, values.out, **{name: values[name].value for name in names})
    return 0


def _sizes(values: flags.FlagValues, name: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in values[name].value.split(",") if part)
    except ValueError:
        raise UserError(f"--{name}={values[name].value} must be whole numbers, such as 64,128,256") from None
    if any(size < 1 for size in sizes):
        raise UserError(f"--{name}={values[name].value} must be positive")
    return sizes


def _coordcheck_flags(values: flags.FlagValues) -> None:
    _text(values, "widths", "64,128,256,512,1024", "model dims to compare; empty = none")
    _text(values, "depths", "", "numbers of layers to compare, such as 2,4,8,16; empty = none")
    _whole(values, "steps", 5, "updates after which activations are measured", 1)
    _whole(values, "seeds", 2, "initialisations that are averaged", 1)
    _text(values, "out", "coordcheck.png", "the picture")


def _coordcheck(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    from jaxlm.config import build
    from jaxlm.train.coordcheck import coordcheck_command

    no_positional("coordcheck", positional)
    cfg = build(config)
    sizes = {name: _sizes(values, name) for name in ("widths", "depths")}
    options = dict(steps=values.steps, seeds=values.seeds, out=values.out)
    return 0 if coordcheck_command(cfg.model, cfg.optim, **sizes, **options) else FAILED


VERBS: dict[str, Verb] = {
    "plan": Verb(
        "Show every run of a sweep with its size, FLOPs, time and price before any of them runs.",
        "--config=FILE[:ARG] --workdir=DIR [--name=NAME] [--dry_run]",
        "jaxlm plan --config=experiments/scaling/smoke.py --workdir=runs/scaling --dry_run",
        _plan_flags,
        _plan,
        config=_sweep_config,
    ),
    "sweep": Verb(
        "Train the runs of a plan that are not finished; any number of these commands share the work.",
        "--workdir=DIR [--workers=K] [--vectorize=K] [--index=I]",
        "jaxlm sweep --workdir=runs/scaling --workers=2",
        _sweep_flags,
        _sweep,
    ),
    "collect": Verb(
        "Gather a sweep's runs in one flat table, CSV and Parquet.",
        "--workdir=DIR",
        "jaxlm collect --workdir=runs/scaling",
        _workdir_flag,
        _collect,
    ),
    "fit": Verb(
        "Fit a scaling law to a table of runs, with its uncertainty; numpy and scipy alone.",
        "--table=FILE --out=DIR [--columns=ROLE=COLUMN,...] [--law=LAW] [--method=METHOD]",
        "jaxlm fit --table=runs.csv --columns=N=params,C=flop,loss=loss_nats --drop_highest=5 --out=fits",
        _fit_flags,
        _fit,
    ),
    "predict": Verb(
        "Say what a fit predicts at a budget, or at inputs of its law, each number with its interval.",
        "--fit=FILE --budget=FLOPS[,FLOPS...] [--next=K] | --fit=FILE --at=INPUT=NUMBER[,...] [--then=FILE]",
        "jaxlm predict --fit=runs/scaling/fits/surface/fit.json --budget=1e13 --next=3",
        _predict_flags,
        _predict,
    ),
    "anneal": Verb(
        "Fit the annealing law to whole loss curves, and predict the curves of other schedules.",
        "--run=DIR [--run=DIR ...] --out=DIR [--predict=DIR ...]",
        "jaxlm anneal --run=runs/constant --run=runs/wsd --predict=runs/cosine --out=fits/annealing",
        _anneal_flags,
        _anneal,
    ),
    "report": Verb(
        "Write a sweep's report: one HTML file, and Markdown with pictures.",
        "--workdir=DIR",
        "jaxlm report --workdir=runs/scaling",
        _workdir_flag,
        _report,
    ),
    "selftest": Verb(
        "Recover published laws from made-up tables and print what was got and wanted.",
        "scaling",
        "jaxlm selftest scaling",
        _no_flags,
        _selftest,
    ),
    "coordcheck": Verb(
        "Check that activations keep their size as width or depth grows (muP, CompleteP).",
        "--config=FILE[:ARG] [--widths=64,128,256] [--depths=2,4,8]",
        "jaxlm coordcheck --config=experiments/quickstart.py:smoke --config.model.parametrization=mup",
        _coordcheck_flags,
        _coordcheck,
        config=run_config,
    ),
}
