"""Tiny sweeps, made by hand: bytes of a small language, models of a few thousand parameters, twenty steps."""

import dataclasses
import types

import numpy as np
import pytest

from jaxlm.config import build, config_hash
from jaxlm.scaling.counting import count
from jaxlm.sweep.plan import Cell, Plan, SweepConfig
from jaxlm.sweep.plan_file import save_plan


def config(texts, **groups):
    """One run: D 8, one layer, 128 tokens a step."""
    tree = {
        "model": {"num_layers": 1, "model_dim": 8, "mlp_dim": 16, "attention": {"num_heads": 1}},
        "data": {
            "train": f"{texts}/train.txt",
            "eval": f"{texts}/eval.txt",
            "seq_len": 16,
            "batch_size": 8,
        },
        "optim": {"lr": 3e-3, "schedule": "linear", "final": 0.0, "warmup": 2.0, "warmup_unit": "steps"},
        "train": {"num_steps": 20, "log_every": 5, "save_every": 5, "sample_prompts": []},
        "mesh": {"data": 1},
    }
    for name, changes in groups.items():
        tree[name] = {**tree.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return build(tree)


def cell(cfg, role="grid", **fields):
    """The cell of a run."""
    counts = count(cfg.model, cfg.data.seq_len)
    tokens = cfg.train.num_steps * cfg.data.batch_size * cfg.data.seq_len
    values = dict(budget=0.0, flops=counts.flops_train * tokens, tokens=tokens, steps=cfg.train.num_steps)
    values |= dict(counts=counts.to_dict(), branch_step=cfg.train.branch_step, parent=cfg.train.branch_from)
    return Cell(config_hash(cfg)[:12], "grid", role, cfg, **{**values, **fields})


def branches(texts, steps=(10, 20), **groups):
    """A WSD trunk and its cooldowns that end after `steps` updates."""
    optim = {"schedule": "wsd", "cooldown": 0.2, **groups.pop("optim", {})}
    leave = [round(0.8 * n) for n in steps]
    trunk = cell(
        config(
            texts,
            optim={**optim_of(texts), **optim, "schedule": "constant"},
            train={"num_steps": max(leave), "save_steps": leave, **train_of(texts)},
        ),
        "trunk",
    )
    made = []
    for n, step in zip(steps, leave, strict=True):
        part = {**train_of(texts), "num_steps": n, "branch_from": trunk.id, "branch_step": step}
        made.append(cell(config(texts, optim={**optim_of(texts), **optim}, train=part), "branch"))
    return [trunk, *made]


def optim_of(texts):
    return dataclasses.asdict(config(texts).optim)


def train_of(texts):
    return {"log_every": 5, "save_every": 5, "sample_prompts": []}


def make(folder, cells, name="grid"):
    """A sweep directory with a plan of these cells."""
    save_plan(folder, Plan(name, SweepConfig(), "0" * 64, tuple(cells)))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The functions above, and two files of text."""
    texts = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for name, n in {"train": 4000, "eval": 150}.items():
        (texts / f"{name}.txt").write_text(" ".join(rng.choice(["the", "cat", "sat", "mat", "on"], n)))
    return types.SimpleNamespace(texts=texts, config=config, cell=cell, branches=branches, make=make)
