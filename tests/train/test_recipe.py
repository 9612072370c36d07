"""Recipes: YAML, dicts and flags in, YAML out, and every mistake in one error."""

from __future__ import annotations

import dataclasses

import pytest

from weft.cli.settings import documented
from weft.core import METHODS, WeftError
from weft.data import DataConfig
from weft.methods import Full, LoRA
from weft.train import EvalConfig, Recipe, TrainConfig, dump_recipe, load_recipe, settings, to_dict

DATA = {"data": {"train": "rows.jsonl"}}


def problems(source, overrides=()) -> list[str]:
    with pytest.raises(WeftError) as caught:
        load_recipe(source, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_defaults():
    recipe = load_recipe(DATA)
    assert recipe.method == LoRA() and recipe.train.lr is None and recipe.train.schedule == "cosine"


CLASS_PATH = {"class_path": "weft.methods.LoRA", "init_args": {"rank": 4}}


@pytest.mark.parametrize("method", ["LoRA", "lora", {"name": "LoRA", "rank": 4}, {"rank": 4}, CLASS_PATH])
def test_method_forms(method):
    recipe = load_recipe(DATA | {"method": method})
    assert recipe.method == LoRA(rank=16 if isinstance(method, str) else 4)


def test_yaml_reads_naturally(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: embedded\nmethod: {name: LoRA, rank: 8, targets: [q_proj, v_proj]}\ndata: {train: [a.jsonl, b.jsonl]}\n"
                    "train:\n  lr: 1e-3\n  betas: [0.9, 0.95]\n  progress: off\n  epochs: 2\n")  # fmt: skip
    recipe = load_recipe(file)
    assert recipe.method == LoRA(rank=8, targets=("q_proj", "v_proj"))
    assert recipe.train.lr == 1e-3 and recipe.train.betas == (0.9, 0.95) and recipe.train.progress == "off" and recipe.train.epochs == 2.0
    assert recipe.data.train == ["a.jsonl", "b.jsonl"]


NEEDED = {"ALoRA": {"invocation_tokens": (5, 6)}}  # hyper-parameters without which a method cannot be


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=3, alpha=7.5, rank_pattern={"q_proj": 2}, targets=("q_proj",)), *(m(**NEEDED.get(n, {})) for n, m in METHODS.items())],
)
def test_round_trip(method, tmp_path):
    recipe = load_recipe(DATA, {"train.lr": 1e-20, "train.steps": 7, "eval.rows": None, "train.patience": 2, "output": "out: it's # odd"})
    recipe = dataclasses.replace(recipe, method=method)
    text = dump_recipe(recipe)
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert dump_recipe(load_recipe(tmp_path / "r.yaml")) == text
    assert load_recipe(to_dict(recipe)) == recipe


def test_a_method_says_what_it_cannot_do_without():
    assert "ids of one token or more" in problems(DATA | {"method": "ALoRA"})[0]


def test_flags_go_on_top():
    given = DATA | {"method": "LoRA", "train": {"lr": 1.0}}
    flags = ["--method.rank", "4", "--train.lr=1e-3", "--data.eval", "held.jsonl", "--data.max-length", "null", "--seed", "-3"]
    recipe = load_recipe(given, flags)
    assert recipe.method == LoRA(rank=4) and recipe.train.lr == 1e-3 and recipe.data.eval == "held.jsonl" and recipe.seed == -3
    assert given["train"] == {"lr": 1.0} and given["method"] == "LoRA"  # the mapping itself is left alone
    assert load_recipe(given, {"method": "Full"}).method == Full()


def test_what_peft_has_as_a_setting_and_weft_as_a_method():
    wrong = problems(DATA | {"method": {"use_dora": True, "lora_dropout": 0.1}})
    assert wrong == ["method.use_dora: unknown; that is a method of its own, method.name: DoRA",
                     "method.lora_dropout: unknown; did you mean method.dropout?"]  # fmt: skip


def test_unknown_keys_all_at_once_with_the_nearest():
    wrong = problems({"data": {"train": "a", "evla": "b"}, "train": {"learning_rate": 1, "epoch": 2, "rank": 1}, "metod": "LoRA",
                      "method": {"r": 3, "alhpa": 1}, "lr": 1})  # fmt: skip
    assert wrong == [
        "data.evla: unknown; did you mean data.eval?",
        "train.learning_rate: unknown; did you mean train.lr?",
        "train.epoch: unknown; did you mean train.epochs?",
        "train.rank: unknown; did you mean method.rank?",
        "metod: unknown; did you mean method?",
        "method.r: unknown; did you mean method.rank?",
        "method.alhpa: unknown; did you mean method.alpha?",
        "lr: unknown; did you mean train.lr?",
    ]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.lr", "fast", "train.lr: expected a number or null, got 'fast'"),
        ("train.steps", 1.5, "train.steps: expected a whole number or null, got 1.5"),
        ("train.steps", True, "train.steps: expected a whole number or null, got True"),
        ("train.schedule", "cosin", "train.schedule: expected cosine or linear or constant, got 'cosin'"),
        ("train.betas", [0.9], "train.betas: expected a list of 2: a number, a number, got [0.9]"),
        ("train", 3, "train: expected settings (lr, "),
        ("data.train", 3, "data.train: expected text or a list of texts, got 3"),
        ("method", "LoRa2", "method.name: unknown method 'LoRa2'; did you mean LoRA?"),
        ("method", 3, "method: expected a method, as in `method: LoRA`"),
        ("method.rank", "big", "method.rank: expected a whole number, got 'big'"),
        ("method.rank", 0, "a rank of 0"),
        ("data.eval_split", 2.0, "data.eval_split"),
        ("train.lr", -1.0, "train.lr: -1.0 must be above 0"),
        ("train.device", "gpu", "train.device: 'gpu' is not \"auto\""),
        ("train.device", "cuda:77", "train.device: 'cuda:77': torch finds"),
        ("train.tokens", 0, "train.tokens: 0 must be at least 1"),
        ("base", "nf5", "base: base='nf5' is not one of"),
    ],
)
def test_wrong_values(key, value, said):
    (wrong,) = problems(DATA, {key: value})
    assert said in wrong


def test_several_problems_in_one_error():
    assert len(problems(DATA, {"train.lr": "x", "train.steps": "y", "eval.rows": "z", "method.rank": -1})) == 4
    assert len(problems(DATA, {"train.lr": 0.0, "train.steps": 0, "eval.batch": 0})) == 3


def test_missing_data_is_said():
    assert problems({}) == ["data.train: must be given (text or a list of texts)"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [1", "not valid YAML"),
        (b"- 1\n", "a recipe is a mapping"),
        (b"seed: 1\nseed: 2\n", "'seed' stands here twice"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_broken_files(tmp_path, content, said):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(WeftError, match=said) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "r.yaml" in str(caught.value)


def test_missing_file():
    with pytest.raises(WeftError, match=r"nowhere\.yaml: the recipe cannot be read"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize(("argv", "said"), [(["--train.lr"], "--train.lr: needs a value"), (["lr", "3"], "lr: expected a flag"),
                                            (["--train.lr.x", "3"], "train.lr.x")])  # fmt: skip
def test_broken_flags(argv, said):
    assert any(said in line for line in problems(DATA | {"train": {"lr": 1.0}}, argv))


def test_every_setting_says_what_it_means():
    """The help of `weft train` and the reference page are made from the docstrings; the keys of the tree are those of the YAML."""
    tree = to_dict(load_recipe(DATA))
    for key, _, _ in settings():
        at = tree
        for part in key.split("."):
            assert part in at, key
            at = at[part]
    for cls in (Recipe, TrainConfig, EvalConfig, DataConfig, *METHODS.values()):
        said = documented(cls)
        assert all(said.get(f.name) for f in dataclasses.fields(cls)), cls
    assert documented(DataConfig)["packing"] == "lay rows end to end, so that there is no padding. Rows never see each other."
    assert documented(TrainConfig)["accumulate"].startswith("Micro-batches per optimiser step. Their losses")  # two lines in the source
