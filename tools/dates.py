"""Writes dates in the ways that people do, each with its ISO form: a transduction whose answer is exact.

    python tools/dates.py --out data/dates

`train.jsonl` and `heldout.jsonl` hold `date` and `iso`, 40,000 and 2,000 records. Days of 1900 to 2099; no
day of one file occurs in the other. The same call always writes the same files.
"""

import argparse
import datetime
import json
import pathlib
import random
import sys

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
FIRST = datetime.date(1900, 1, 1)
DAYS = (datetime.date(2100, 1, 1) - FIRST).days
RECORDS = {"train": 40_000, "heldout": 2_000}


def ordinal(day: int) -> str:
    """
    >>> [ordinal(n) for n in (1, 2, 3, 4, 11, 22)]
    ['1st', '2nd', '3rd', '4th', '11th', '22nd']
    """
    return f"{day}{'th' if 10 < day < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


def spellings(date: datetime.date) -> list[str]:
    """Every way in which a day is written here; none stands for two days."""
    d, month, y = date.day, MONTHS[date.month - 1], date.year
    return [
        f"{d} {month} {y}",
        f"{month} {d}, {y}",
        f"the {ordinal(d)} of {month} {y}",
        f"{month} {ordinal(d)} {y}",
        f"{d:02}-{month[:3].upper()}-{y}",
        f"{d}.{date.month}.{y}",
        f"{y}/{date.month}/{d}",
        f"{month[:3]} {d} '{y % 100:02}, {y // 100}00s",
    ]


def records() -> dict[str, list[dict[str, str]]]:
    """The records of both files."""
    draw = random.Random(0)
    days = draw.sample(range(DAYS), DAYS)
    parts = {"heldout": days[: DAYS // 10], "train": days[DAYS // 10 :]}
    out = {}
    for name, count in RECORDS.items():
        dates = [FIRST + datetime.timedelta(days=draw.choice(parts[name])) for _ in range(count)]
        out[name] = [{"date": draw.choice(spellings(date)), "iso": date.isoformat()} for date in dates]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=pathlib.Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in records().items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
