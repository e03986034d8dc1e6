"""The console command `jaxlm VERB [flags]`: parse flags, load and override the config, run the verb."""

import ast
import difflib
import errno
import glob
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxlm import hf_verbs, lab_verbs, preflight_verbs, verbs
from jaxlm.errors import UserError, nearest
from jaxlm.verbs import Verb, about

VERBS: dict[str, Verb] = {
    **verbs.VERBS,
    **hf_verbs.VERBS,
    **lab_verbs.VERBS,
    **preflight_verbs.VERBS,
}

# Failures of the file system that a user can mend; any other OSError is a bug and shows its traceback.
_FILE_SYSTEM = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EISDIR,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit code.

    0 done; 1 the training failed (loss not finite); 2 bad input; 75 stopped by a signal, the same command
    goes on.
    """
    if argv is None:
        argv = sys.argv[1:]
        _restart_with_huge_pages(argv)
    argv = list(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    try:
        for arg in argv:
            if any("\ud800" <= c <= "\udfff" for c in arg):
                raise UserError(f"argument {arg!r} is not UTF-8")
        return _dispatch(argv)
    except KeyboardInterrupt:
        print("jaxlm: interrupted", file=sys.stderr)
        return 130
    except (UserError, OSError) as e:
        if isinstance(e, OSError) and e.errno not in _FILE_SYSTEM:
            raise
        if debug:
            traceback.print_exc()
        print(f"jaxlm: {e}", file=sys.stderr)
        return 2


_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MALLOC = "glibc.malloc.hugetlb=1"


def _restart_with_huge_pages(argv: Sequence[str]) -> None:
    """On a CPU, start this process again with transparent huge pages for malloc.

    glibc reads the setting before `main`, so it cannot be set from inside. Training buffers are allocated and
    freed every step: with 4 KiB pages one step of a 14 M parameter model takes 440,000 page faults, with huge
    pages 2,000, and is up to 20 % faster (where the kernel's policy is `madvise`). Keeping freed memory
    (`mmap_max=0`) would spare the rest of them, but resident memory grew to 7 GB where 2 are in use.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables:  # by the user, or by this function: it restarts once
        return
    computes = argv[:1] in (["train"], ["evaluate"], ["sample"], ["sweep"]) and not {"--help", "-h"} & set(
        argv
    )
    accelerator = [glob.glob(f"/dev/{name}") for name in ("nvidia[0-9]*", "accel*", "vfio/[0-9]*")]
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(accelerator)
    if not (sys.platform == "linux" and computes and on_cpu):
        return
    if not _HUGE_PAGES.exists() or "[never]" in _HUGE_PAGES.read_text():
        return
    setting = f"{tunables}:{MALLOC}".removeprefix(":")
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": setting})


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        import jaxlm

        print(jaxlm.__version__)
        return 0
    name, rest = argv[0], argv[1:]
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"there is no verb {name!r}{hint} (verbs: {', '.join(VERBS)})")
    verb = VERBS[name]
    values = flags.FlagValues()
    verb.define(values)
    if {"--help", "-h"} & set(rest):
        print(_verb_help(name, verb, values))
        return 0
    _check_flag_names(name, verb, values, rest)
    config = None
    if verb.config:
        spec, rest = _take_config_flag(rest)
        config = _define_config(values, spec, rest, verb.config())
    positional = _parse(values, rest)
    return verb.run(values, positional, config)


_FLAG = re.compile(r"^--?([A-Za-z_][^=]*)")
_OVERRIDE = re.compile(r"^--?(?:no)?config\.([^=]*)")


def _check_flag_names(name: str, verb: Verb, values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Refuse a flag that the verb does not have, before anything heavy is imported."""
    known = [*values, "config"] if verb.config else list(values)
    for arg in argv:
        if arg == "--":
            return
        if _OVERRIDE.match(arg):
            if not verb.config:
                raise UserError(f"jaxlm {name} takes no config, so {arg} has no effect")
            continue
        match = _FLAG.match(arg)
        if match and match[1] not in known:
            positive = match[1].removeprefix("no")
            if positive in known and values[positive].boolean:
                continue
            raise UserError(f"jaxlm {name} has no flag --{match[1]}{nearest(match[1], known)}")


def _take_config_flag(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--config=SPEC` or `--config SPEC`, and the other arguments."""
    spec, rest, args = None, [], iter(argv)
    for arg in args:
        if arg in ("--config", "-config"):
            spec = next(args, None)
            if spec is None:
                raise UserError("--config needs a value: path/to/experiment.py or path/to/experiment.py:arg")
        elif arg.startswith(("--config=", "-config=")):
            spec = arg.split("=", 1)[1]
        else:
            rest.append(arg)
    return spec, rest


def _define_config(values: flags.FlagValues, spec: str | None, argv: list[str], cls: type) -> Any:
    """Load the experiment and define one flag per override; parsing puts their values in the ConfigDict."""
    from ml_collections import config_flags

    from jaxlm.config import check_name, default_config, load_experiment

    config = default_config(cls) if spec is None else load_experiment(spec)
    for i, arg in enumerate(argv):
        match = _OVERRIDE.match(arg)
        if match:
            check_name(match[1], cls)
            argv[i] = _tuple_literal(config, match[1], arg)
            mesh = match[1] in ("mesh", "run.mesh")
            if mesh and arg.endswith("=auto"):
                argv[i] = f"--config.{match[1]}.auto=True"
            if mesh and argv[i + 1 : i + 2] == ["auto"] and "=" not in arg:
                argv[i : i + 2] = [f"--config.{match[1]}.auto=True"]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["jaxlm", *argv])
    return config


def _tuple_literal(config: Any, name: str, arg: str) -> str:
    """`--config.x=a,b` for a tuple as `--config.x=('a', 'b')`; ml_collections would make it `('a,b',)`."""
    flag, equals, text = arg.partition("=")
    value = _value_at(config, name)
    if not equals or not isinstance(value, tuple):
        return arg
    try:
        ast.literal_eval(text)
        return arg
    except (SyntaxError, ValueError):
        return f"{flag}={tuple(part.strip() for part in text.strip('()[]').split(',') if part.strip())!r}"


def _value_at(config: Any, name: str) -> Any:
    """The value at a dotted name of a ConfigDict."""
    for i, part in enumerate(parts := name.split(".")):
        if part not in config:  # a field of another kind than this group is of
            place = ".".join(parts[:i])
            raise UserError(
                f"config: this experiment's {place} has no field {part!r}, another kind of it has"
                f"{nearest(part, list(config))}"
            )
        config = config[part]
    return config


def _parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parse the flags; returns the positional arguments."""
    try:
        return values(["jaxlm", *argv])[1:]
    except flags.Error as e:
        raise UserError(re.sub(r"^flag ", "", str(e).split("\n")[0])) from None


def _overview() -> str:
    """What `jaxlm` alone prints."""
    width = max(map(len, VERBS))
    lines = ["jaxlm: language models in JAX.", "", "usage: jaxlm VERB [flags]", ""]
    lines += [f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()]
    lines += ["", "`jaxlm VERB --help` shows the flags of a verb; `--debug` shows the traceback of an error."]
    return "\n".join(lines)


def _verb_help(name: str, verb: Verb, values: flags.FlagValues) -> str:
    """What `jaxlm VERB --help` prints: purpose, flags with their defaults, an example."""
    lines = [f"usage: jaxlm {name} {verb.usage}", "", *textwrap.wrap(verb.summary, 100), ""]
    rows = [("--config=FILE[:ARG]", "experiment, a Python file with get_config(arg)")] if verb.config else []
    if verb.config:
        rows.append(("--config.FIELD=VALUE", "override one field; `jaxlm config` lists all of them"))
    for flag_name in values:
        flag = values[flag_name]
        shown = "" if flag.default in (None, "", [], [""]) or flag.boolean else f" (default {flag.default})"
        kind = {"int": "=N", "float": "=X", "bool": ""}.get(flag.flag_type(), "=TEXT")
        rows.append((f"--[no]{flag_name}" if flag.boolean else f"--{flag_name}{kind}", about(flag) + shown))
    width = max(len(left) for left, _ in rows)
    for left, text in rows:
        first, *more = textwrap.wrap(text, 100 - width) or [""]
        lines += [f"  {left:{width}}  {first}", *(f"  {'':{width}}  {line}" for line in more)]
    return "\n".join([*lines, "", "example:", *(f"  {line}" for line in verb.example.splitlines())])
