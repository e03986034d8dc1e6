"""A recurrent model goes through the same doors as a transformer: train, resume, evaluate, sample, plan."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.config import build, check_name, default_config, diff, load_config, load_experiment
from jaxlm.errors import UserError
from jaxlm.model.models import check_row
from jaxlm.model.recurrence import LSTMConfig
from jaxlm.sharding import MeshConfig, make_layout
from jaxlm.sweep.plan import SweepConfig, make_plan
from jaxlm.train.run import plan, train
from jaxlm.train.trained import evaluate, load_trained, sample

TEXT = os.path.join(os.path.dirname(os.__file__), "json", "*.py")


def config(**changes):
    """A ConfigDict whose group `model` is an LSTM's."""
    out = default_config()
    out.model = default_config(LSTMConfig)
    out.model.model_dim, out.model.dropout = 32, 0.1
    out.data.tokenizer, out.data.train, out.data.eval, out.data.eval_tokens = "byte", TEXT, TEXT, 4096
    out.data.seq_len, out.data.batch_size = 32, 16
    out.optim.lr = 1e-2
    out.train.num_steps, out.train.sample_prompts = 6, ("def ",)
    out.sample.max_new_tokens = 8
    out.mesh.data, out.mesh.fsdp = 2, 2
    for name, value in changes.items():
        out.update_from_flattened_dict({name.replace("__", "."): value})
    return out


def test_a_group_of_another_kind_takes_the_place_of_a_transformers():
    cfg = build(config())
    assert isinstance(cfg.model, LSTMConfig)
    assert cfg.model.model_dim == 32
    assert "model.kind: (absent) -> 'lstm'" in diff(build(default_config()), cfg)
    for name, message in (
        ("model.num_heads", "unknown key model.num_heads"),
        ("model.tie_embedings", "did you mean 'tie_embeddings'"),
    ):
        wrong = config().to_dict()
        wrong["model"][name.split(".")[1]] = 1
        with pytest.raises(UserError, match=message):
            build(wrong)
    with pytest.raises(UserError, match=r"config model\.kind='gru' is not one of 'lstm'"):
        build({"model": {"kind": "gru"}})
    check_name("model.forget_bias")
    check_name("model.attention.num_heads")
    with pytest.raises(UserError, match=r"did you mean 'model\.forget_bias'"):
        check_name("model.forget_bas")


def test_what_knows_transformers_only_says_so(tmp_path):
    sweep = build({"run": config().to_dict()}, SweepConfig)
    with pytest.raises(UserError, match=r"jaxlm plan knows transformers only, and model\.kind is 'lstm'"):
        make_plan(sweep, tmp_path)
    for axis in ("tensor", "sequence", "expert", "pipe"):
        layout = make_layout(MeshConfig(data=1, **{axis: 2}))
        with pytest.raises(UserError, match=f"mesh.{axis}=2: an LSTM's columns"):
            check_row(LSTMConfig(), 32, 0, layout)


def test_a_plan_counts_it():
    result = plan(build(config()), num_devices=4)
    assert result.counts.n_total == result.counts.rooms["embed"] + result.counts.rooms["head"] + 2 * (
        8 * 32 * 32 + 4 * 32
    )
    specs = {row.name: row.spec for row in result.leaves}
    assert specs["blocks/lstm/w_state"] == jax.P(None, None, "fsdp", None)
    assert result.memory.total > 0


@pytest.mark.slow
def test_train_resume_evaluate_and_sample(tmp_path):
    """On a mesh of 2 x 2 and, resumed, on one device: the losses are those of one device throughout."""
    one = {"mesh__data": 1, "mesh__fsdp": 1}
    cfg, alone = build(config()), build(config(**one))
    straight = train(alone, tmp_path / "one", bar=False)
    stopped = train(cfg, tmp_path / "run", bar=False, stop=lambda done: "enough" if done == 3 else "")
    assert (stopped.status, stopped.steps, stopped.mesh["fsdp"]) == ("stopped", 3, 2)
    result = train(alone, tmp_path / "run", bar=False)
    assert (result.status, result.steps) == ("finished", 6)
    assert result.metrics["eval/nll"] == pytest.approx(straight.metrics["eval/nll"], abs=2e-5)
    assert result.metrics["eval/nll"] < 5.0 < np.log(256)
    assert load_config(tmp_path / "run" / "config.json") == cfg
    again = evaluate(tmp_path / "run")
    assert again.nll == pytest.approx(result.metrics["eval/nll"], abs=2e-5)
    trained = load_trained(tmp_path / "run", mesh=MeshConfig(data=1))
    assert trained.step == 6
    texts = sample(tmp_path / "run", ["def ", "import"], temperature=0.0, max_new_tokens=6)
    assert [len(text.tokens) for text in texts] == [6, 6]
    assert texts[0].tokens == sample(tmp_path / "run", ["def "], temperature=0.0, max_new_tokens=6)[0].tokens


@pytest.mark.slow
def test_an_encoder_decoder_goes_through_the_same_doors(tmp_path):
    """Dates and what they are in ISO 8601: trained, scored and asked like a transformer with an encoder."""
    out = load_experiment(str(Path(__file__).parents[2] / "experiments" / "objectives" / "dates.py:smoke"))
    out.model = default_config(LSTMConfig)
    out.model.num_layers, out.model.model_dim, out.model.encoder.num_layers = 1, 32, 1
    out.mesh.data = 1
    cfg = build(out)
    result = train(cfg, tmp_path / "run", bar=False)
    assert (result.status, result.steps) == ("finished", cfg.train.num_steps)
    assert result.counts["rooms"]["additive"] == 2 * 32 * 32 + 32 + 4 * 32 * 32 + 2 * 32 * 32
    assert evaluate(tmp_path / "run").nll == pytest.approx(result.metrics["eval/nll"], abs=2e-5)
    (text,) = sample(tmp_path / "run", ["1 May 1950"], temperature=0.0, max_new_tokens=5)
    assert 0 < len(text.tokens) <= 5
    plain = config().to_dict()
    plain["model"]["encoder"] = {"num_layers": 1}
    with pytest.raises(UserError, match="has no inputs for an encoder"):
        train(build(plain), tmp_path / "plain", bar=False)
    plain["data"] |= {"format": "mlm"}
    with pytest.raises(UserError, match=r"model\.causal=True"):
        train(build(plain | {"model": {"kind": "lstm"}}), tmp_path / "masked", bar=False)
