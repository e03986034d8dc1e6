"""`jaxlm hf import` and `export`: run directories, refusals, sharded files, meshes."""

import dataclasses
import gc
import json
import shutil
import weakref

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="checkpoints need the extra `pip install 'jaxlm[hf]'`")
from safetensors.numpy import load_file, save_file

import jaxlm.hf
from jaxlm.cli import main
from jaxlm.errors import UserError
from jaxlm.hf.families import FAMILIES
from jaxlm.hf.files import INDEX, write_folder
from jaxlm.hf.pretrained import Pretrained, save
from jaxlm.hf.seq2seq import Seq2Seq
from jaxlm.hf.transfer import tensors_of
from jaxlm.model import transformer
from jaxlm.model.attention import AttentionConfig
from jaxlm.model.config import EncoderConfig, ReadoutConfig, TransformerConfig
from jaxlm.model.positions import PositionConfig
from jaxlm.sharding import MeshConfig, make_layout
from jaxlm.train.imported import Imported
from jaxlm.tree import named_leaves

CFG = TransformerConfig(
    vocab_size=256,
    num_layers=3,
    model_dim=32,
    mlp_dim=48,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    param_dtype="bfloat16",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bf16 llama in two shards."""
    path = tmp_path_factory.mktemp("llama")
    params = transformer.init(CFG, jax.random.key(0))
    save(Pretrained(CFG, params, FAMILIES["llama"], {}), path / "whole")
    whole = Pretrained(CFG, params, FAMILIES["llama"], {})
    tensors = {n: (shape, make) for n, shape, make in tensors_of(CFG, whole.family, params, dtype="bfloat16")}
    config = json.loads((path / "whole" / "config.json").read_text())
    write_folder(path / "cut", config, tensors, itemsize=2, shard_bytes=40_000)
    return path


def test_shards_and_meshes_give_the_same_parameters(folder):
    assert len(list((folder / "cut").glob("*.safetensors"))) > 1
    assert (folder / "cut" / INDEX).is_file()
    whole = jaxlm.hf.load(folder / "whole")
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    split = jaxlm.hf.load(folder / "cut", layout=layout)
    assert whole.cfg.param_dtype == "bfloat16"
    for (name, a), (_, b) in zip(named_leaves(whole.params), named_leaves(split.params), strict=True):
        if "wq" in name:
            assert b.sharding.shard_shape(b.shape) != b.shape
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    ids = np.arange(10).reshape(2, 5)
    np.testing.assert_allclose(whole.logits(ids), split.logits(ids), atol=1e-4)


def broken(folder, tmp_path, change):
    tensors = load_file(folder / "whole" / "model.safetensors")
    change(tensors)
    (tmp_path / "config.json").write_text((folder / "whole" / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_what_is_missing_surplus_and_misshapen_is_listed(folder, tmp_path):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.extra.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.norm.weight"] = np.zeros((31,), np.float32)

    with pytest.raises(UserError) as error:
        jaxlm.hf.load(broken(folder, tmp_path, change))
    text = str(error.value)
    assert "1 missing:\n  model.layers.1.mlp.up_proj.weight" in text
    assert "1 surplus:\n  model.layers.7.extra.weight" in text
    assert "model.norm.weight has shape [31], the config asks for [32]" in text


@pytest.mark.slow
def test_a_masked_model_may_come_with_what_it_was_trained_with(tmp_path):
    """As the first BERT's files do: a pooler, next sentences, and norms of gamma and beta."""
    encoder = dict(causal=False, norm="layernorm", norm_position="post", embed_norm=True, activation="gelu")
    head = dict(head_transform=True, head_bias=True, tie_embeddings=True, token_types=2, mlp_bias=True)
    attention = AttentionConfig(num_heads=2, qkv_bias=True, out_bias=True)
    position = PositionConfig(kind="learned", max_length=16)
    cfg = TransformerConfig(
        vocab_size=40, num_layers=1, model_dim=16, attention=attention, position=position, **encoder, **head
    )
    params = transformer.init(cfg, jax.random.key(0))
    save(Pretrained(cfg, params, FAMILIES["bert"], {}), tmp_path / "new")
    old = {}
    for name, x in load_file(tmp_path / "new" / "model.safetensors").items():
        old[
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        ] = x
    assert any("gamma" in name for name in old)
    old["bert.pooler.dense.weight"] = old["cls.seq_relationship.weight"] = np.zeros((16, 16), np.float32)
    (tmp_path / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = np.arange(10).reshape(2, 5)
    first, second = jaxlm.hf.load(tmp_path / "new"), jaxlm.hf.load(tmp_path)
    np.testing.assert_array_equal(first.logits(ids), second.logits(ids))
    assert first.left == ()
    assert second.left == ("bert.pooler.dense.weight", "cls.seq_relationship.weight")
    made = Imported("bert", tmp_path, 1, True, second.left)
    assert "left in the file" in made.text()
    assert "cls.seq_relationship.weight" in made.text()


def test_only_a_class_of_pairs_speaks_of_pairs(tmp_path):
    """A classifier of rows has as many logits, but they mean something else."""
    encoder = dict(causal=False, norm="layernorm", norm_position="post", embed_norm=True, activation="gelu")
    parts = dict(token_types=2, mlp_bias=True, tie_embeddings=True)
    cfg = TransformerConfig(
        vocab_size=40,
        num_layers=1,
        model_dim=16,
        attention=AttentionConfig(num_heads=2, qkv_bias=True, out_bias=True),
        position=PositionConfig(kind="learned", max_length=16),
        readout=ReadoutConfig(classes=2, dense="tanh"),
        **encoder,
        **parts,
    )
    params = transformer.init(cfg, jax.random.key(0))
    ids = np.arange(10).reshape(2, 5)
    for name in ("BertForNextSentencePrediction", "BertForSequenceClassification"):
        family = dataclasses.replace(FAMILIES["bert"], architecture=name)
        save(Pretrained(cfg, params, family, {}), tmp_path / name)
    pairs, rows = (jaxlm.hf.load(path) for path in sorted(tmp_path.iterdir()))
    np.testing.assert_array_equal(pairs.next_sentence_logits(ids), rows.class_logits(ids))
    with pytest.raises(UserError, match="BertForSequenceClassification says nothing about pairs"):
        rows.next_sentence_logits(ids)


@pytest.mark.slow
def test_generation_config_says_how_to_generate(folder, tmp_path):
    shutil.copytree(folder / "whole", tmp_path / "in")
    prompt = np.asarray([[5, 6, 7]])
    plain = jaxlm.hf.load(tmp_path / "in")
    free = plain.generate(prompt, max_new_tokens=12)
    penalised = plain.generate(prompt, max_new_tokens=12, repetition_penalty=0.1)  # it repeats itself
    assert free.tolist() != penalised.tolist()
    first, second = free[0, 3:5].tolist()
    assert first != second

    def said(**says):
        (tmp_path / "in" / "generation_config.json").write_text(json.dumps(says))
        return jaxlm.hf.load(tmp_path / "in")

    np.testing.assert_array_equal(said(repetition_penalty=0.1).generate(prompt, max_new_tokens=12), penalised)
    ended = said(eos_token_id=[second]).generate(prompt, max_new_tokens=12)
    assert ended.tolist() == [[5, 6, 7, first, second]]
    model = said(suppress_tokens=[first], bad_words_ids=[[second]])
    assert not {first, second} & set(model.generate(prompt, max_new_tokens=12)[0, 3:].tolist())
    save(model, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept == {"suppress_tokens": [first], "bad_words_ids": [[second]]}


def test_a_model_and_its_programs_go_together(folder):
    """What a call compiles belongs to the model, not to its class: nothing holds the arrays after it."""
    model = jaxlm.hf.load(folder / "whole")
    model.generate(np.asarray([[5, 6]]), max_new_tokens=1)
    arrays = [weakref.ref(leaf) for leaf in jax.tree.leaves(model.params)]
    del model
    gc.collect()
    assert all(ref() is None for ref in arrays)


def test_files_of_the_bare_model_go_without_the_prefix(folder, tmp_path):
    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    bare = jaxlm.hf.load(broken(folder, tmp_path, change))
    whole = jaxlm.hf.load(folder / "whole")
    ids = np.arange(5)[None]
    np.testing.assert_array_equal(bare.logits(ids), whole.logits(ids))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"hidden_act": "sigmoid"}, "hidden_act='sigmoid' is not one of"),
        ({"rope_scaling": {"rope_type": "magic"}}, "'magic' is not one of"),
        ({"num_attention_heads": 5}, "must divide num_heads=5"),
    ],
)
def test_configs_that_cannot_be_are_refused(folder, tmp_path, fields, message):
    config = json.loads((folder / "whole" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    (tmp_path / "model.safetensors").write_bytes((folder / "whole" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=message):
        jaxlm.hf.load(tmp_path)


def test_a_model_that_no_family_has_is_refused_by_field(tmp_path):
    cfg = dataclasses.replace(CFG, logit_softcap=20.0)
    params = transformer.init(cfg, jax.random.key(0))
    with pytest.raises(UserError, match=r"logit_softcap: 20.0 here, 0.0 there"):
        save(Pretrained(cfg, params, FAMILIES["llama"], {}), tmp_path / "out")


@pytest.mark.slow
def test_a_model_with_an_encoder_is_imported_sampled_and_exported(tmp_path, capsys):
    cfg = dataclasses.replace(
        CFG,
        num_layers=2,
        activation="geglu",
        tie_embeddings=True,
        attention=AttentionConfig(num_heads=4, head_dim=12, scale=1.0),
        position=PositionConfig(kind="t5"),
        encoder=EncoderConfig(num_layers=3),
    )
    model = Seq2Seq(cfg, transformer.init(cfg, jax.random.key(0)), FAMILIES["t5"], {})
    first, run, last = tmp_path / "first", tmp_path / "run", tmp_path / "last"
    save(model, first)
    assert main(["hf", "import", f"--model={first}", f"--workdir={run}"]) == 0
    assert main(["sample", f"--workdir={run}", "--prompt=To be", "--max_new_tokens=4"]) == 0
    assert main(["hf", "export", f"--workdir={run}", f"--out={last}"]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (first, last))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name])
    assert isinstance(jaxlm.hf.load(last), Seq2Seq)


@pytest.mark.slow
def test_verbs_work_on_an_imported_run_and_training_goes_on_from_it(folder, tmp_path, capsys):
    run, tuned, text = tmp_path / "run", tmp_path / "tuned", tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 40)
    assert main(["hf", "import", f"--model={folder / 'cut'}", f"--workdir={run}"]) == 0
    assert "no tokenizer file came with it" in capsys.readouterr().out
    assert main(["sample", f"--workdir={run}", "--prompt=To be", "--max_new_tokens=4"]) == 0
    assert main(["evaluate", f"--workdir={run}", f"--data={text}", "--batch_size=8"]) == 0
    before = json.loads(capsys.readouterr().out.split("\n{", 1)[1].join(["{", ""]))["nll"]
    flags = {
        "train.warm_start": run,
        "train.num_steps": 8,
        "data.train": text,
        "data.eval": text,
        "data.batch_size": 8,
        "data.seq_len": 32,
        "optim.lr": 3e-3,
        "optim.warmup": 0.0,
        "train.sample_prompts": (),
        "train.plot_every": 0,
    }
    overrides = [f"--config.{name}={value}" for name, value in flags.items()]
    assert main(["config", f"--config={run}", *overrides]) == 0
    assert main(["train", f"--config={run}", f"--workdir={tuned}", *overrides]) == 0
    after = json.loads((tuned / "result.json").read_text())["eval/nll"]
    assert after < before - 0.1
    for source, out in ((run, tmp_path / "same"), (tuned, tmp_path / "new")):
        assert main(["hf", "export", f"--workdir={source}", f"--out={out}"]) == 0
    original = load_file(folder / "whole" / "model.safetensors")
    same, new = (load_file(tmp_path / name / "model.safetensors") for name in ("same", "new"))
    assert original.keys() == same.keys() == new.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(tensor, same[name])
    assert any((original[name] != new[name]).any() for name in original)
    assert main(["hf", "import", f"--model={folder / 'cut'}", f"--workdir={run}"]) == 2
    assert main(["hf", "export", f"--workdir={run}", f"--out={tmp_path / 'same'}"]) == 2
    assert main(["hf", "imprt"]) == 2
