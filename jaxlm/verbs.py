"""What the verbs of the console command do: their flags, and the one call that each makes.

JAX and the rooms are imported inside the verb that needs them: help and a misspelt flag answer at once.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from jaxlm.errors import UserError, check, nearest

FAILED, STOPPED = 1, 75  # exit codes; 75 is EX_TEMPFAIL of sysexits: run the same command again


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb: what it says about itself, its flags, and what it does."""

    summary: str  # one line, in the list of verbs
    usage: str  # after `jaxlm VERB`
    example: str  # a command that works
    define: Callable[[flags.FlagValues], None]  # its flags
    run: Callable[
        [flags.FlagValues, Sequence[str], Any], int
    ]  # flags, positional arguments, config -> exit code
    config: Callable[[], type] | None = None  # the dataclass that --config and its overrides describe


def about(flag: flags.Flag) -> str:
    """The help of a flag, without what absl adds to that of repeated ones."""
    return flag.help.split(";\n")[0]


def no_positional(verb: str, positional: Sequence[str]) -> None:
    """Refuse a word that is no flag."""
    if positional:
        raise UserError(f"jaxlm {verb} takes flags only, got {positional[0]!r}")


def need(values: flags.FlagValues, verb: str, *names: str) -> None:
    """Refuse a command without these flags."""
    for name in names:
        if not values[name].value:
            raise UserError(f"jaxlm {verb} needs --{name}: {about(values[name])}")


def _string(values: flags.FlagValues, name: str, default: str | None, text: str) -> None:
    flags.DEFINE_string(name, default, text, flag_values=values)


def _integer(values: flags.FlagValues, name: str, default: int | None, text: str, low: int = 0) -> None:
    flags.DEFINE_integer(name, default, text, lower_bound=low, flag_values=values)


def _train_flags(values: flags.FlagValues) -> None:
    _string(values, "workdir", None, "run directory; a run that is there goes on if the config is the same")
    flags.DEFINE_boolean(
        "bar", None, "draw a progress bar, else print lines; default: on a terminal", flag_values=values
    )
    _string(
        values,
        "coordinator",
        "",
        "HOST:PORT of process 0 of several that train together; 'auto' = as JAX finds out (TPU VM, GKE); "
        "SLURM and Open MPI 4 need no flag, Open MPI 5 and other MPIs this one",
    )
    _integer(values, "num_processes", None, "with --coordinator: processes in all; default: as MPI says", 1)
    _integer(values, "process_id", None, "with --coordinator: number of this one, from 0")


def _train(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    from jaxlm import distributed
    from jaxlm.config import build
    from jaxlm.preflight.planner import resolve_here
    from jaxlm.train.loop import NonFiniteError
    from jaxlm.train.run import train

    no_positional("train", positional)
    need(values, "train", "workdir")
    cfg = build(config)
    distributed.start(values.coordinator, values.num_processes, values.process_id)
    try:
        with distributed.leaving_at_once(NonFiniteError):
            result = train(resolve_here(cfg), values.workdir, bar=values.bar)
    except NonFiniteError as error:
        print(f"jaxlm: {error}", file=sys.stderr)
        return FAILED
    if distributed.is_chief():
        print(result.text())
    return 0 if result.status == "finished" else STOPPED


def _checkpoint_flags(values: flags.FlagValues) -> None:
    _integer(values, "step", None, "which checkpoint; default the newest")
    flags.DEFINE_boolean(
        "ema", False, "use the averaged parameters of a run with optim.ema", flag_values=values
    )
    _string(values, "mesh", "", "mesh to load the model on, such as fsdp=4,tensor=2; default: the run's own")


def _checkpoint(values: flags.FlagValues) -> dict[str, Any]:
    """Which parameters, and on which mesh, as the flags of `_checkpoint_flags` say."""
    return {"step": values.step, "ema": values.ema, "mesh": mesh_of(values.mesh)}


def mesh_of(text: str) -> Any:
    """The `MeshConfig` of a flag such as 'fsdp=4,tensor=2'; None of an empty one."""
    from jaxlm.config import build
    from jaxlm.sharding import MeshConfig

    if not text:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    whole = re.compile(r"-?\d+")
    return build({k.strip(): int(v) if whole.fullmatch(v) else v for k, _, v in pairs}, MeshConfig, "--mesh")


def _sample_flags(values: flags.FlagValues) -> None:
    _string(values, "workdir", None, "run directory")
    flags.DEFINE_multi_string("prompt", [""], "text to continue; may be repeated", flag_values=values)
    _integer(values, "num", 1, "texts for each prompt", 1)
    _integer(
        values,
        "max_new_tokens",
        None,
        "tokens of a text at most; this and the next: default as in the run",
        1,
    )
    flags.DEFINE_float("temperature", None, "0 = greedy", flag_values=values)
    _integer(values, "top_k", None, "keep the k likeliest tokens; 0 = off")
    flags.DEFINE_float(
        "top_p", None, "keep the likeliest tokens of this probability together; 1 = off", flag_values=values
    )
    flags.DEFINE_float(
        "min_p",
        None,
        "keep tokens at least this share of the likeliest one's probability",
        flag_values=values,
    )
    flags.DEFINE_float("repetition_penalty", None, "of tokens that occurred; 1 = off", flag_values=values)
    flags.DEFINE_multi_string(
        "stop", None, "end a text before this string; may be repeated", flag_values=values
    )
    _integer(values, "seed", None, "texts are a function of it")
    _checkpoint_flags(values)


def _sample(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    from jaxlm.train.trained import sample

    no_positional("sample", positional)
    need(values, "sample", "workdir")
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    chosen = {name: values[name].value for name in names if values[name].value is not None}
    prompts = [prompt for prompt in values.prompt for _ in range(values.num)]
    results = sample(values.workdir, prompts, **_checkpoint(values), **chosen)
    for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        if len(results) > 1:
            gap = "\n" if i else ""
            print(f"{gap}--- {i + 1} of {len(results)}, {len(result.tokens)} tokens, {result.finish}")
        print(prompt + result.text)
    return 0


def _evaluate_flags(values: flags.FlagValues) -> None:
    _string(values, "workdir", None, "run directory")
    _string(values, "data", "", "glob of texts to evaluate on; default the run's data.eval")
    _integer(values, "batch_size", 0, "rows at a time, does not change the result; 0 = as in the run")
    flags.DEFINE_boolean(
        "per_position", False, "also the loss by position in the document", flag_values=values
    )
    _checkpoint_flags(values)


def _evaluate(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    from jaxlm.train.trained import load_trained, score

    no_positional("evaluate", positional)
    need(values, "evaluate", "workdir")
    names = ("data", "batch_size", "per_position")
    options = {name: values[name].value for name in names}
    trained = load_trained(values.workdir, **_checkpoint(values))
    result = score(trained, **options)
    report = {"step": trained.step, **result.metrics("")}
    if result.nll_by_position is not None:
        report["nll_by_position"] = result.nll_by_position.tolist()
    print(json.dumps(_finite(report), indent=2))
    return 0


def _finite(tree: Any) -> Any:
    """The same with None for NaN, which JSON does not have."""
    if isinstance(tree, dict):
        return {name: _finite(x) for name, x in tree.items()}
    if isinstance(tree, list):
        return [_finite(x) for x in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _config_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean(
        "sharding", False, "print every leaf's axes, spec and bytes per device", flag_values=values
    )
    _integer(values, "devices", None, "number of devices to plan for; default those of this machine", 1)
    flags.DEFINE_boolean("json", False, "print the resolved config alone, as JSON", flag_values=values)
    _string(values, "preset", "", "mesh, remat and backend for hardware such as 'TPU v5 x 64'")


def _config(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    from rich.console import Console
    from rich.table import Table

    from jaxlm.config import build, canonical_json, config_hash, flatten
    from jaxlm.mesh_rules import preset
    from jaxlm.preflight.planner import resolve_here
    from jaxlm.scaling.count_tables import tables
    from jaxlm.train.run import plan

    no_positional("config", positional)
    devices = values.devices
    if values.preset:
        check(devices is None, f"--devices={devices}: --preset says how many devices there are; drop one")
        check(not config.mesh.auto, "--preset and --config.mesh=auto both choose a mesh; drop one")
        rule, devices = preset(values.preset)
        config.update_from_flattened_dict(rule.overrides(devices))
        for name, value in rule.overrides(devices).items() if not values.json else ():
            print(f"--config.{name}={value!r}")
    cfg = resolve_here(build(config), devices)
    if values.json:
        print(canonical_json(cfg, indent=2))
        return 0
    result = plan(cfg, num_devices=devices)
    group = ""
    for name, value in flatten(cfg).items():
        if name.rpartition(".")[0] != group:
            group = name.rpartition(".")[0]
            print()
        print(f"{name} = {value!r}")
    print(f"\nhash {config_hash(cfg)}\n")
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables(result.counts, result.memory):
        console.print(table)
    split = [f"{name}={n}" for name, n in result.mesh_shape.items() if n > 1]
    sizes = " x ".join(split) or "one device"
    console.print(
        f"mesh {sizes}; {result.tokens_per_step:,} tokens a step; {result.tokens:,} in the run of "
        f"{cfg.train.num_steps:,} steps: {result.counts.flops_train * result.tokens:.3g} FLOPs",
        highlight=False,
    )
    if values.sharding:
        leaves = Table(title=f"parameters on {sizes}", title_justify="left")
        for column in ("leaf", "shape", "dtype", "axes", "stored", "used"):
            leaves.add_column(column, no_wrap=column == "leaf")
        leaves.add_column("bytes per device", justify="right")
        for row in result.leaves:
            axes = " ".join(str(axis or "-") for axis in row.axes)
            shape = " x ".join(map(str, row.shape))
            stored, used = (
                ", ".join("-" if part is None else str(part) for part in spec) or "replicated"
                for spec in (row.spec, row.compute)
            )
            leaves.add_row(row.name, shape, row.dtype, axes, stored, used, f"{row.bytes_per_device:,}")
        console.print(leaves)
    return 0


def _tokenizer_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string("input", [], "train: glob of texts; may be repeated", flag_values=values)
    _string(values, "out", None, "train: the .model file to write")
    _integer(values, "vocab_size", 8192, "train: pieces, 256 bytes and 3 special ones included", 1)
    _string(values, "model_type", "bpe", "train: bpe | unigram | word | char")
    _string(values, "tokenizer", None, "inspect: 'byte', *.model, *.json or a folder with one")
    _string(values, "text", None, "inspect: measure on this text")


def _tokenizer(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    from jaxlm.data.sources import iter_all
    from jaxlm.data.tokenizer import load_tokenizer, tokenizer_report, train_sentencepiece

    if len(positional) != 1 or positional[0] not in ("train", "inspect"):
        got = " ".join(positional) or "nothing"
        hint = nearest(got, ("train", "inspect"))
        raise UserError(f"jaxlm tokenizer needs one of 'train' and 'inspect', got {got}{hint}")
    if positional[0] == "train":
        need(values, "tokenizer train", "input", "out")
        texts = (document.text for document in iter_all(values.input))
        tokenizer = train_sentencepiece(texts, values.out, values.vocab_size, values.model_type)
    else:
        need(values, "tokenizer inspect", "tokenizer")
        tokenizer = load_tokenizer(values.tokenizer)
    report = tokenizer_report(tokenizer, *([] if values.text is None else [values.text]))
    print(json.dumps(report, indent=2, ensure_ascii=False))
    return 0


def _prepare_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(
        "input",
        [],
        "glob of text, jsonl(.gz, .zst), parquet or ArrayRecord; may be repeated",
        flag_values=values,
    )
    _string(values, "out", None, "folder of the shards; run again to go on after an interruption")
    _string(values, "tokenizer", None, "'byte', *.model, *.json or a folder with one")
    _string(values, "text_key", "text", "JSON field or column of the text; of pairs two, such as en,de")
    _integer(values, "shard_tokens", 1 << 24, "tokens of a shard, about", 1)
    _integer(values, "workers", 0, "processes; 0 = one per core")
    _integer(values, "shard_index", 0, "which part of the work this machine does, from 0 ...")
    _integer(values, "shard_count", 1, "... of how many", 1)


def _prepare(values: flags.FlagValues, positional: Sequence[str], config: Any) -> int:
    from jaxlm.data.prepare import prepare

    no_positional("prepare", positional)
    need(values, "prepare", "input", "out", "tokenizer")

    def progress(done: int, units: int, tokens: int, size: int) -> None:
        print(f"{done}/{units} shards  {tokens:,} tokens  {size:,} bytes", file=sys.stderr, flush=True)

    names = ("text_key", "shard_tokens", "workers", "shard_index", "shard_count")
    options = {name: values[name].value for name in names}
    result = prepare(values.input, values.out, values.tokenizer, progress=progress, **options)
    state = "complete" if result.complete else "not complete: other parts are missing"
    print(
        f"{result.out_dir}: {result.units} shards, {result.documents:,} documents, {result.tokens:,} tokens "
        f"({result.bytes / max(result.tokens, 1):.2f} bytes each), {state}"
    )
    return 0


def run_config() -> type:
    from jaxlm.config import RunConfig

    return RunConfig


VERBS: dict[str, Verb] = {
    "train": Verb(
        "Train a model, or go on with a run that was stopped.",
        "--config=FILE[:ARG] --workdir=DIR [--config.FIELD=VALUE ...]",
        "jaxlm train --config=experiments/quickstart.py:smoke --workdir=runs/smoke --config.optim.lr=1e-3",
        _train_flags,
        _train,
        config=run_config,
    ),
    "sample": Verb(
        "Continue texts with a trained model.",
        "--workdir=DIR [--prompt=TEXT ...]",
        "jaxlm sample --workdir=runs/quickstart --prompt='To be, or' --num=3 --temperature=0.8",
        _sample_flags,
        _sample,
    ),
    "evaluate": Verb(
        "Measure a trained model on held-out text: nats per token, perplexity, bits per byte.",
        "--workdir=DIR [--data=GLOB]",
        "jaxlm evaluate --workdir=runs/quickstart --data='books/*.txt'",
        _evaluate_flags,
        _evaluate,
    ),
    "config": Verb(
        "Show a resolved config, its parameters, FLOPs and memory; without --config, the defaults.",
        "[--config=FILE[:ARG]] [--sharding] [--devices=N | --preset='KIND x N']",
        "jaxlm config --config=experiments/llama_8b.py --sharding --devices=64",
        _config_flags,
        _config,
        config=run_config,
    ),
    "tokenizer": Verb(
        "Train a SentencePiece tokenizer, or look at any tokenizer.",
        "train --input=GLOB --out=FILE | inspect --tokenizer=FILE",
        "jaxlm tokenizer train --input='texts/*.txt' --out=tokenizer.model --vocab_size=8192\n"
        "jaxlm tokenizer inspect --tokenizer=tokenizer.model",
        _tokenizer_flags,
        _tokenizer,
    ),
    "prepare": Verb(
        "Turn text into token shards, on all cores.",
        "--input=GLOB --out=DIR --tokenizer=FILE",
        "jaxlm prepare --input='web/*.jsonl.zst' --out=web/shards --tokenizer=tokenizer.model",
        _prepare_flags,
        _prepare,
    ),
}
