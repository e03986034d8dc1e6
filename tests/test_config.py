"""Configs: names, types and ranges are checked; JSON, hash and diff agree with equality."""

import dataclasses
import json
import textwrap

import pytest

from jaxlm.config import (
    EXECUTION,
    RunConfig,
    build,
    canonical_json,
    check_name,
    config_hash,
    default_config,
    diff,
    field_names,
    flatten,
    identity,
    load_config,
    load_experiment,
    to_dict,
)
from jaxlm.errors import UserError


def set_path(config, name, value):
    *groups, last = name.split(".")
    for group in groups:
        config = config[group]
    config[last] = value


def test_defaults_are_those_of_the_dataclasses():
    assert build(default_config()) == RunConfig() == build({})


def test_every_field_can_be_set_through_the_config_dict():
    """Each leaf is changed to another value of its type; the frozen config must show exactly that change."""
    base = flatten(RunConfig())
    assert set(base) <= set(field_names())
    for name, value in base.items():
        other = {
            bool: lambda v: not v,
            int: lambda v: v + 1,
            float: lambda v: v / 2 + 1e-3,
            str: lambda v: v + "x",
        }
        if type(value) not in other:
            continue
        config = default_config()
        set_path(config, name, other[type(value)](value))
        try:
            built = build(config)
        except UserError:
            continue  # the other value is out of range or breaks a rule between fields
        assert diff(RunConfig(), built) == [f"{name}: {value!r} -> {other[type(value)](value)!r}"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"num_layrs": 3}}, "unknown key model.num_layrs; did you mean 'num_layers'?"),
        ({"modle": {}}, "unknown key modle; did you mean 'model'?"),
        (
            {"model": {"attention": {"n_heads": 3}}},
            "unknown key model.attention.n_heads; did you mean 'num_heads'?",
        ),
        (
            {"num_layers": 3},
            "unknown key num_layers; did you mean 'model.num_layers' or 'model.encoder.num_layers'?",
        ),
        ({"train": {"lr": 1.0}}, "unknown key train.lr; did you mean 'optim.lr'?"),
        ({"model": {"num_layers": "3"}}, "model.num_layers: expected int, got '3' (str)"),
        ({"model": {"num_layers": 3.0}}, "model.num_layers: expected int, got 3.0 (float)"),
        ({"model": {"num_layers": True}}, "model.num_layers: expected int, got True (bool)"),
        ({"model": {"scan": 1}}, "model.scan: expected bool, got 1 (int)"),
        ({"model": {"dtype": None}}, "model.dtype: expected str, got None"),
        ({"optim": {"lr": "fast"}}, "optim.lr: expected float, got 'fast' (str)"),
        ({"optim": {"lr": float("nan")}}, "optim.lr=nan is not a finite number"),
        ({"model": 3}, "model: expected a group of fields, got 3"),
        ({"data": {"train": 3}}, "data.train: expected str"),
        ({"model": {"attention": {"pattern": "global"}}}, "pattern: expected tuple[str, ...], got 'global'"),
        ({"model": {"attention": {"pattern": ["global", 3]}}}, "pattern[1]: expected str, got 3"),
        (
            {"train": {"warm_start_rename": [["a"]]}},
            "warm_start_rename[0]: expected tuple[str, str], got ['a']",
        ),
        ({"model": {"position": {"kind": "ropee"}}}, "model.position.kind='ropee' is not one of"),
        ({"model": {"position": {"kind": "ropee"}}}, "did you mean 'rope'?"),
        (
            {"model": {"remat": "ful"}},
            "model.remat='ful' is not one of 'none', 'minimal', 'full', 'offload', 'offload_minimal'; "
            "did you mean 'full'?",
        ),
        (
            {"model": {"attention": {"num_heads": 4, "num_kv_heads": 3}}},
            "num_kv_heads=3 must divide num_heads=4",
        ),
        (
            {"model": {"model_dim": 130}},
            "model.model_dim=130 is not divisible by model.attention.num_heads=4",
        ),
        ({"model": {"moe": {"num_experts": 4, "top_k": 5}}}, "model.moe.top_k=5 must be between 1 and"),
        ({"optim": {"lr": -1.0}}, "optim.lr=-1.0 must"),
        ({"train": {"num_steps": 0}}, "train.num_steps=0 must be at least 1"),
        ({"train": {"save_every": -1}}, "train.save_every=-1 must be at least 0"),
        ({"mesh": {"data": 0}}, "mesh.data=0 must be a positive size"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "only one axis can be -1"),
        ({"data": {"packing": "concatt"}}, "data.packing='concatt' is not one of"),
        ({"sample": {"top_p": 2.0}}, "sample.top_p=2.0 must be"),
        ({"loss": {"label_smoothing": 1.0}}, "loss.label_smoothing=1.0 must lie in [0, 1)"),
    ],
)
def test_a_bad_config_is_refused_with_its_path_and_the_nearest_choice(tree, message):
    with pytest.raises(UserError) as error:
        build(tree)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_integers_stand_for_floats_and_lists_for_tuples():
    cfg = build({"optim": {"lr": 1}, "model": {"attention": {"pattern": ["local", "global"], "window": 8}}})
    assert cfg.optim.lr == 1.0
    assert isinstance(cfg.optim.lr, float)
    assert cfg.model.attention.pattern == ("local", "global")
    assert build({"data": {"train": [["a", 1.0]]}}).data.train == (("a", 1.0),)
    assert build({"data": {"train": "a=1,b=2"}}).data.train == "a=1,b=2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.num_layrs", "did you mean 'model.num_layers'?"),
        ("model.atention.window", "unknown key model.atention; did you mean 'model.attention'?"),
        ("window", "did you mean 'model.attention.window'?"),
        ("fsdp", "did you mean 'mesh.fsdp'?"),
        ("model.num_layers.x", "model.num_layers is of type int, it has no field 'x'"),
    ],
)
def test_a_misspelt_name_gets_the_nearest(name, message):
    with pytest.raises(UserError, match="config: ") as error:
        check_name(name)
    assert message in str(error.value)


def test_every_field_name_is_known():
    for name in field_names():
        check_name(name)


def test_json_gives_the_same_config_and_hash_back():
    config = default_config()
    config.model.attention.pattern = ("local", "global")
    config.model.attention.window = 16
    config.data.train = (("a/*.txt", 0.3), ("b", 1.0))
    config.train.sample_prompts = ("é", "")
    cfg = build(config)
    again = build(json.loads(canonical_json(cfg)))
    assert again == cfg
    assert config_hash(again) == config_hash(cfg) == config_hash(json.loads(canonical_json(cfg, indent=2)))
    assert to_dict(cfg)["model"]["attention"]["pattern"] == ("local", "global")


def test_the_hash_sees_what_is_computed_and_not_how():
    base = RunConfig()
    for name in EXECUTION:
        check_name(name)
    same = dataclasses.replace(
        base,
        mesh=dataclasses.replace(base.mesh, fsdp=2),
        train=dataclasses.replace(base.train, log_every=3, save_every=7),
        data=dataclasses.replace(base.data, prefetch=5),
    )
    assert config_hash(same) == config_hash(base)
    assert identity(same) == identity(base) != to_dict(base)
    hashes = {config_hash(base)}
    for name, value in [("seed", 1), ("optim.lr", 1e-3), ("model.num_layers", 5), ("train.num_steps", 7)]:
        config = default_config()
        set_path(config, name, value)
        hashes.add(config_hash(build(config)))
    assert len(hashes) == 5


def test_diff_names_each_changed_field():
    a = build({"optim": {"lr": 1e-3}, "model": {"mlp_pattern": ["dense"]}})
    b = build({"optim": {"lr": 2e-3}, "seed": 3})
    assert diff(a, b) == ["optim.lr: 0.001 -> 0.002", "seed: 0 -> 3"]
    assert diff(a, json.loads(canonical_json(a))) == []


def experiment(path, body):
    path.write_text("from jaxlm.config import default_config\n" + textwrap.dedent(body))
    return path


def test_an_experiment_is_loaded_with_its_argument(tmp_path):
    path = experiment(
        tmp_path / "mine.py",
        """
        def get_config(arg="3"):
            config = default_config()
            config.model.num_layers = int(arg)
            return config
        """,
    )
    assert load_experiment(str(path)).model.num_layers == 3
    assert load_experiment(f"{path}:7").model.num_layers == 7


def test_a_bad_experiment_is_refused(tmp_path):
    experiment(tmp_path / "mine.py", "x = 1\n")
    experiment(tmp_path / "dict.py", "def get_config():\n    return {}\n")
    with pytest.raises(UserError, match=r"there is no file .*mien.py; did you mean '.*mine.py'"):
        load_experiment(str(tmp_path / "mien.py"))
    with pytest.raises(UserError, match=r"mine.py has no function get_config"):
        load_experiment(str(tmp_path / "mine.py"))
    with pytest.raises(UserError, match="get_config returned a dict, expected a ConfigDict"):
        load_experiment(str(tmp_path / "dict.py"))
    with pytest.raises(UserError, match="takes no argument"):
        load_experiment(f"{tmp_path / 'dict.py'}:smoke")


def test_a_misspelt_assignment_in_an_experiment_fails_at_once(tmp_path):
    path = experiment(
        tmp_path / "typo.py",
        """
        def get_config():
            config = default_config()
            config.model.num_layrs = 3
            return config
        """,
    )
    with pytest.raises(UserError, match=r"unknown key model.num_layrs; did you mean 'num_layers'"):
        build(load_experiment(str(path)))


def test_a_value_of_the_wrong_type_in_an_experiment_is_refused(tmp_path):
    path = experiment(
        tmp_path / "typed.py",
        """
        def get_config():
            config = default_config()
            config.model.num_layers = "3"
            return config
        """,
    )
    with pytest.raises(UserError, match=r"typed.py: .*num_layers.*3 is of original type"):
        load_experiment(str(path))


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a run directory: it has no config.json"):
        load_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_config(tmp_path / "config.json")


def test_the_dtype_of_sums_over_devices_is_the_runs_own():
    plain, rounded = build({}), build({"mesh": {"reduce_dtype": "bfloat16"}})
    assert config_hash(plain) != config_hash(rounded)
    assert identity(rounded)["mesh"] == {"reduce_dtype": "bfloat16"}
    assert "mesh" not in identity(build({"mesh": {"data": 2}}))
    with pytest.raises(UserError, match=r"reduce_dtype='bfloat16' with model\.quant='int8'"):
        build({"mesh": {"reduce_dtype": "bfloat16"}, "model": {"quant": "int8"}})
