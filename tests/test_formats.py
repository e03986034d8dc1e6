"""Every data format from files to a trained model: losses by hand, whole runs, and what does not fit."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.config import build
from jaxlm.data.config import FORMATS, batch_columns
from jaxlm.data.loader import EvalBatches, Loader, make_dataset
from jaxlm.data.tokenizer import ByteTokenizer
from jaxlm.errors import UserError
from jaxlm.evaluate import evaluate, make_eval_step
from jaxlm.model import transformer
from jaxlm.model.config import TransformerConfig
from jaxlm.objectives.formats import check_model, make_objective
from jaxlm.sharding import MeshConfig, make_layout, make_mesh, use
from jaxlm.train import run
from jaxlm.train.checks import check_tokens
from jaxlm.train.feed import place_batch
from jaxlm.train.metrics import read_rows
from jaxlm.train.programs import Model, programs_on
from jaxlm.train.trained import evaluate as evaluate_run
from jaxlm.tree import named_leaves

VOCAB = 320
PAIRS = dict(packing="pad", text_key="text", target_key="answer")
DATA: dict[str, dict] = {
    "lm": {},
    "prefix_lm": {},
    "mlm": {},
    "nsp": dict(packing="pad"),
    "sop": dict(packing="pad"),
    "span_corruption": dict(input_len=32, decoder_start="pad"),
    "denoise": dict(input_len=24, noise=dict(rate=0.3, permute=True)),
    "seq2seq": dict(PAIRS, input_len=32),
    "classification": dict(PAIRS, target_key="kind", classes=("short", "long")),
    "tags": dict(PAIRS, target_key="tags", classes=("A", "B", "C")),
}
MODEL = dict(vocab_size=VOCAB, num_layers=2, model_dim=16, mlp_dim=24, attention=dict(num_heads=2))
BOTH_WAYS = dict(causal=False)
WITH_ENCODER = dict(encoder=dict(num_layers=1))
READ_OUT = dict(causal=False, token_types=2, readout=dict(classes=2, dense="tanh"))
MODELS: dict[str, dict] = {
    "lm": {},
    "prefix_lm": BOTH_WAYS,
    "mlm": BOTH_WAYS,
    "nsp": READ_OUT,
    "sop": READ_OUT,
    "span_corruption": WITH_ENCODER,
    "denoise": WITH_ENCODER,
    "seq2seq": WITH_ENCODER,
    "classification": dict(readout=dict(classes=2, of="last")),
    "tags": dict(causal=False, readout=dict(classes=3, of="each", dense="tanh")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    rng = np.random.default_rng(0)
    stock = ["the", "cat", "sat.", "on", "a", "mat", "and", "saw!", "dogs", "run"]
    lines = []
    for n in rng.integers(3, 30, 40):
        text = " ".join(rng.choice(stock, n))
        kind = "long" if n > 14 else "short"
        tags = " ".join("ABC"[len(word) % 3] for word in text.split())
        lines.append(json.dumps({"text": text, "answer": text[::-1][:20], "kind": kind, "tags": tags}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines[:32]))
    (folder / "eval.jsonl").write_text("".join(lines[32:]))
    return folder


def config(name: str, folder: Path, **groups):
    paths = dict(train=f"{folder}/train.jsonl", eval=f"{folder}/eval.jsonl", cache_dir=str(folder / "cache"))
    tree = {
        "model": MODEL | MODELS[name],
        "data": dict(paths, format=name, seq_len=24, batch_size=8, **DATA[name]),
        "optim": {"lr": 3e-3},
        "loss": {"chunk": 8, "z_loss": 1e-4},
        "train": {"num_steps": 4, "log_every": 1, "save_every": 2, "sample_prompts": []},
        "mesh": {"data": 1},
    }
    for group, changes in groups.items():
        tree[group] = {**tree[group], **changes}
    return build(tree)


def first_batch(cfg) -> tuple[Loader, dict]:
    loader = Loader(make_dataset(cfg.data, ByteTokenizer(), vocab_size=VOCAB), cfg.data)
    return loader, loader(0)


def some_params(cfg: TransformerConfig):
    rng = np.random.default_rng(0)
    like = transformer.abstract_params(cfg)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), like)


def by_hand(
    logits: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> tuple[float, float, float, float]:
    """Sums of w nll, of w z, of w [hit] and of w, in float64."""
    logits = np.asarray(logits, np.float64)
    lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    values = (lse - picked, lse**2, picked >= logits.max(-1), np.ones_like(lse))
    return tuple(float((weights * x).sum()) for x in values)


@pytest.mark.parametrize("name", FORMATS)
def test_the_objective_is_what_the_format_says(folder: Path, name: str):
    """Against logits written out; the eval step agrees, and knows bytes of plain text alone."""
    cfg = config(name, folder)
    model, params = Model(cfg.model), some_params(cfg.model)
    _, batch = first_batch(cfg)
    assert {n: x.shape[1:] for n, x in batch.items()} == {
        n: (c,) if c else () for n, c in batch_columns(cfg.data).items()
    }
    objective = make_objective(name, model, cfg.loss, ByteTokenizer().token_bytes)
    loss, weight, metrics = jax.jit(objective)(params, batch, None)

    hidden, _ = model.apply(params, batch, None)
    nll = z = count = 0.0
    if "targets" in batch:
        logits = model.unembed(params, hidden)
        if name == "tags":
            logits = model.classify(params, batch, hidden, None)
        nll, z, _, count = by_hand(logits, batch["targets"], batch["weights"])
    expected, divisor = nll + 1e-4 * z, count
    if "labels" in batch:
        classes = model.classify(params, batch, hidden, None)
        own = by_hand(classes, batch["labels"], batch["label_weights"])
        if "targets" in batch:
            share = batch["label_weights"] * batch["weights"].sum(1)
            extra = by_hand(classes, batch["labels"], share)
            expected += extra[0] + 1e-4 * extra[1]
            names = ("label_nll", "label_accuracy")
        else:
            expected, divisor, names = own[0] + 1e-4 * own[1], own[3], ("nll", "accuracy")
        for metric, x in zip(names, (own[0], own[2]), strict=True):
            assert metrics[metric] == pytest.approx((x, own[3]), rel=1e-4, abs=1e-4)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(weight) == pytest.approx(divisor)
    assert divisor > 0
    assert ("bpb" in metrics) == (name == "lm")

    step = make_eval_step(model, cfg.loss, ByteTokenizer().token_bytes, name)
    result = evaluate(step, params, [batch, batch])
    assert result.nll == pytest.approx(float(metrics["nll"][0] / metrics["nll"][1]), rel=1e-5)
    assert result.accuracy == pytest.approx(float(metrics["accuracy"][0] / metrics["accuracy"][1]), rel=1e-5)
    assert ("eval/bpb" in result.metrics()) == (name == "lm")
    assert ("eval/label_nll" in result.metrics()) == (name in ("nsp", "sop"))
    assert ("eval/exact" in result.metrics()) == (name == "seq2seq")
    if name == "seq2seq":
        right = (np.asarray(logits).argmax(-1) == batch["targets"]) | (batch["weights"] == 0)
        assert result.exact == right.all(1).mean()
    if name in ("nsp", "sop"):
        assert result.label_nll == pytest.approx(own[0] / own[3], rel=1e-4)
        assert result.label_accuracy == pytest.approx(own[2] / own[3])


def test_a_prefix_is_seen_both_ways_and_the_rest_backwards_only(folder: Path):
    cfg = config("prefix_lm", folder)
    params, model = some_params(cfg.model), Model(cfg.model)
    _, batch = first_batch(cfg)
    # Each column has an embedding of its own; whoever changes when that is pushed has seen it.
    ids = np.arange(8 * 24).reshape(8, 24)
    rows = {**batch, "tokens": ids}

    @jax.jit
    def hidden(table):
        return model.apply({**params, "embed": {**params["embed"], "table": table}}, rows, None)[0]

    table = params["embed"]["table"]
    before = hidden(table)
    sees_BTS = np.zeros((8, 24, 24), bool)
    for s in range(24):
        pushed = table.copy()
        pushed[ids[:, s]] += 0.5
        sees_BTS[:, :, s] = np.asarray(hidden(pushed) != before).any(-1)
    t = np.arange(24)
    same = (batch["segments"][:, :, None] == batch["segments"][:, None]) & (batch["segments"] > 0)[:, None]
    expected = ((t[:, None] >= t) | (batch["prefix"][:, None] > 0)) & same
    real = batch["segments"] > 0
    np.testing.assert_array_equal(sees_BTS[real], expected[real])
    assert (sees_BTS[real] != (np.broadcast_to(t[:, None] >= t, same.shape) & same)[real]).any()
    # No target that counts is among the columns that its own column sees.
    predicted = batch["weights"][:, :-1] * (batch["segments"][:, 1:] == batch["segments"][:, :-1])
    assert not (predicted * sees_BTS[:, t[:-1], t[1:]]).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nsp", "denoise", "classification", "tags"])
def test_microbatches_and_meshes_do_not_show(folder: Path, name: str):
    """Labels that a row lacks and masks of any number: all of it sums."""
    cfg = config(name, folder, loss={"z_loss": 0.0})
    loader, _ = first_batch(cfg)

    def trained(mesh: MeshConfig, microbatches: int, devices: list) -> tuple:
        layout = make_layout(mesh, make_mesh(mesh, devices))
        options = dict(microbatches=microbatches, token_bytes=None, data_format=name)
        device = programs_on(layout, cfg.model, cfg.loss, cfg.optim, {}, **options)
        with use(layout):
            state, _ = device.new_state(0)
            losses = []
            for n in range(2):
                numbers = {"lr": np.float32(0.01), "weight_decay": np.float32(0.1), "b2": np.float32(0.95)}
                state, metrics = device.step(state, None, (place_batch(layout, loader(n)), numbers))
                losses.append({k: float(a / b) for k, (a, b) in metrics.items()})
        return losses, dict(named_leaves(jax.device_get(state.params)))

    want, params = trained(MeshConfig(data=1), 1, jax.devices()[:1])
    # A device's part of a microbatch is one row.
    got, others = trained(MeshConfig(data=2, fsdp=2, tensor=2), 2, jax.devices())
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=1e-5)
    for leaf, x in others.items():
        np.testing.assert_allclose(x, params[leaf], rtol=2e-3, atol=2e-4, err_msg=leaf)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sop", "span_corruption", "classification", "prefix_lm"])
def test_a_run_goes_on_where_it_stopped_and_is_scored_by_its_own_measure(folder, tmp_path, name: str):
    cfg = config(name, folder, train={"eval_every": 2})
    whole = run.train(cfg, tmp_path / "whole", bar=False)
    assert whole.status == "finished"
    scored = {k for k in whole.metrics if k.startswith("eval/")}
    assert {"eval/nll", "eval/accuracy"} <= scored
    assert ("eval/label_accuracy" in scored) == (name == "sop")
    assert not any("bpb" in k or "bytes" in k for k in whole.metrics)
    assert "nats per prediction" in whole.text()
    stopped = run.train(cfg, tmp_path / "parts", bar=False, stop=lambda done: "enough" if done == 2 else "")
    assert (stopped.status, stopped.steps) == ("stopped", 2)
    assert run.train(cfg, tmp_path / "parts", bar=False).status == "finished"
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(("seconds", "perf/"))} for row in read_rows(path)]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "parts" / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]
    again = evaluate_run(tmp_path / "whole")
    assert again.nll == pytest.approx(whole.metrics["eval/nll"], rel=1e-6)
    assert again.bytes == 0
    other = build({**json.loads((tmp_path / "whole" / "config.json").read_text())["config"]})
    assert other == cfg


@pytest.mark.slow
def test_a_run_says_how_many_pairs_it_cuts(folder, tmp_path, capsys):
    cfg = config("classification", folder, train={"num_steps": 1})
    texts = {
        name: [json.loads(line) for line in (folder / name).open()] for name in ("train.jsonl", "eval.jsonl")
    }
    room = cfg.data.seq_len - 2  # between BOS and EOS
    expected = {
        f"{folder}/{name}": {"cut": sum(len(row["text"]) > room for row in rows), "pairs": len(rows)}
        for name, rows in texts.items()
    }
    assert 0 < expected[f"{folder}/train.jsonl"]["cut"] < 32
    run.train(cfg, tmp_path / "run", bar=False)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["cut"] == expected
    n = expected[f"{folder}/train.jsonl"]["cut"]
    said = capsys.readouterr().err
    assert f"{folder}/train.jsonl: {n} of 32 rows hold only the beginning of their text" in said
    whole = config("classification", folder, train={"num_steps": 1}, data={"seq_len": 200})
    assert run.train(whole, tmp_path / "whole", bar=False).cut == {}
    assert "beginning of their text" not in capsys.readouterr().err


def test_programs_of_two_formats_are_two(folder: Path):
    """A batch of one format is not scored by another's measure."""
    cfg = config("mlm", folder)
    _, batch = first_batch(cfg)
    model, params = Model(cfg.model), some_params(cfg.model)
    steps = [make_eval_step(model, cfg.loss, ByteTokenizer().token_bytes, name) for name in ("lm", "mlm")]
    as_text, as_masked = (evaluate(step, params, [batch]) for step in steps)
    assert as_text.bytes > 0  # what it must never report of masked tokens
    assert as_masked.bytes == 0
    assert as_masked.nll == as_text.nll


def test_eval_batches_know_no_tokens_beforehand(folder: Path):
    cfg = config("mlm", folder)
    data = make_dataset(cfg.data, ByteTokenizer(), split="eval", vocab_size=VOCAB)
    batches = EvalBatches(data, 8)
    step = make_eval_step(Model(cfg.model), cfg.loss, None, "mlm")
    sizes = dict(num_tokens=batches.num_tokens, num_bytes=batches.num_bytes)
    result = evaluate(step, some_params(cfg.model), batches, **sizes)
    assert 0 < result.tokens < 0.3 * data.sources[0].store.num_tokens


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        (
            "mlm",
            dict(causal=True),
            "data.format='mlm' with model.causal=True: a hidden token is told from both",
        ),
        ("lm", dict(causal=False), "'lm' with model.causal=False: every column would see the token"),
        ("prefix_lm", dict(causal=True), "a prefix is seen from all of it.*set model.causal=False"),
        ("seq2seq", dict(encoder={}), "'seq2seq' gives inputs to an encoder.*set model.encoder.num_layers"),
        (
            "lm",
            dict(encoder=dict(num_layers=1)),
            "no inputs for an encoder; formats that do: span_corruption",
        ),
        ("nsp", dict(readout={}), "model.readout.classes=0, but data.format='nsp' has rows of 2 classes"),
        ("classification", dict(readout=dict(classes=3, of="last")), "classes=3, but .*rows of 2 classes"),
        (
            "classification",
            dict(readout=dict(classes=2)),
            "of='first' of a causal model reads a token that has",
        ),
        ("classification", dict(readout=dict(classes=2, of="each")), "has one label a row; use 'first'"),
        ("tags", dict(readout=dict(classes=3)), "of='first' says one thing of a row, but .* use 'each'"),
        ("tags", dict(readout=dict(classes=2, of="each")), "classes=2, but .* has rows of 3 classes"),
        ("sop", dict(token_types=1), "model.token_types=1, but"),
        (
            "denoise",
            dict(position=dict(kind="learned", max_length=20)),
            "data.input_len=24 is longer than model.position.max_length=20",
        ),
    ],
)
def test_models_that_cannot_learn_from_a_format(folder: Path, name: str, model: dict, message: str):
    cfg = build(
        {"model": {**MODEL, **MODELS[name], **model}, "data": dict(format=name, seq_len=24, **DATA[name])}
    )
    with pytest.raises(UserError, match=message):
        check_model(cfg.model, cfg.data)


EXPERTS = dict(mlp_pattern=("moe",), moe=dict(num_experts=4, top_k=2))


@pytest.mark.parametrize("name", ["mlm", "sop", "classification"])
def test_auxiliary_losses_of_all_tokens_do_not_join_a_loss_of_few(folder: Path, name: str):
    """They would weigh (tokens of a row) / (tokens that the loss counts) times what the config says."""
    rest = dict(format=name, seq_len=24, **DATA[name])
    cfg = build({"model": {**MODEL, **MODELS[name], **EXPERTS}, "data": rest})
    with pytest.raises(UserError, match=r"moe.load_balance=0.01, but the loss of data.format="):
        check_model(cfg.model, cfg.data)
    moe = {**EXPERTS["moe"], "load_balance": 0.0, "router_z": 0.0, "bias_balancing": True}
    free = build({"model": {**MODEL, **MODELS[name], **EXPERTS, "moe": moe}, "data": rest})
    check_model(free.model, free.data)


def test_meshes_that_a_model_cannot_use_are_refused_with_the_config(folder: Path):
    piped = config("denoise", folder, mesh={"pipe": 2}, data={"batch_size": 8})
    with pytest.raises(UserError, match=r"mesh.pipe=2: a model with an encoder is not split into stages"):
        run.plan(piped)
    kernel = {"attention": {"num_heads": 2, "backend": "splash_interpret"}}
    split = config("seq2seq", folder, mesh={"sequence": 2}, model=kernel)
    with pytest.raises(UserError, match=r"sees whole rows of inputs, which mesh.sequence=2 splits"):
        run.plan(split)
    apart = {"position": {"kind": "none"}, "disentangled": {"span": 8}}
    for context in ("gather", "ulysses"):
        model = {**apart, "attention": {"num_heads": 2, "context": context}}
        staged = config("mlm", folder, mesh={"pipe": 2, "sequence": 2}, model=model)
        with pytest.raises(
            UserError, match=r"mesh.pipe=2 with columns .* mesh.sequence does not go with model"
        ):
            run.plan(staged)
    ring = config("prefix_lm", folder, model={"attention": {"num_heads": 2, "context": "ring"}})
    with pytest.raises(UserError, match=r"context='ring' has no allowed"):
        run.plan(ring)


def test_rounds_divide_a_devices_tokens(folder: Path):
    moe = {**EXPERTS, "moe": {**EXPERTS["moe"], "rounds": 5}}
    odd = config("lm", folder, model=moe)
    tokens = odd.data.batch_size * odd.data.seq_len
    assert tokens % 5 != 0
    with pytest.raises(UserError, match=f"moe.rounds=5 does not divide the {tokens} tokens.*does: [46]"):
        run.plan(odd)


def test_a_token_that_begins_and_ends_cannot_begin_targets(folder: Path, tmp_path: Path):
    cfg = config("denoise", folder, data={"with_bos": True})
    with pytest.raises(UserError, match=r"data.with_bos=True, but the tokenizer 'byte' has one token, 0"):
        check_tokens(cfg, ByteTokenizer())


def test_runs_that_are_refused_before_any_text_is_read(folder: Path):
    causal = config("mlm", folder, model={"causal": True})
    with pytest.raises(UserError, match=r"data.format='mlm' with model.causal=True"):
        run.plan(causal)
    prompts = config("mlm", folder, train={"sample_prompts": [""]})
    with pytest.raises(UserError, match=r"set train.sample_prompts="):
        run.plan(prompts)
    assert run.plan(config("denoise", folder)).tokens_per_step == 8 * 24
