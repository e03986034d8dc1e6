"""Errors that a user can mend: one clear message, no traceback at the command line."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Bad input: the message names the value, the place and, where there is one, the nearest valid choice.

    The command line prints the message alone and exits with code 2.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `choices`, whatever their case, or an empty string.

    >>> nearest("num_layrs", ["num_layers", "model_dim"])
    "; did you mean 'num_layers'?"
    >>> nearest("zzz", ["num_layers"])
    ''
    >>> nearest("V5P", ["v4", "v5p"])
    "; did you mean 'v5p'?"
    """
    lower = {str(c).lower(): str(c) for c in choices}
    found = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.6)
    return f"; did you mean {lower[found[0]]!r}?" if found else ""


def check_choice(value: Any, choices: Iterable[Any], where: str) -> None:
    """Raise `UserError` unless `value` is one of `choices`; `where` names the field."""
    choices = list(choices)
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise UserError(f"{where}={value!r} is not one of {listed}{nearest(str(value), map(str, choices))}")


def check(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
