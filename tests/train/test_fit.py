"""`fit` from end to end on a tiny model."""

from __future__ import annotations

import json

import pytest
import tiny_run
import torch

import weft
from weft.core import WeftError
from weft.train import load_recipe, mean_loss
from weft.train.evaluate import exact_match
from weft.train.single import RunData


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bytes_of(out) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("progress", ["lines", "off"])
def test_what_went_another_way_is_told_once(tmp_path, capsys, caplog, progress):
    model = tiny_run.model()
    model.model.norm.register_forward_hook(lambda module, inputs, y: y + torch.randn_like(y))  # no two passes agree
    events = []
    recipe = tiny_run.recipe(tmp_path, train__steps=1, train__progress=progress)
    weft.fit(model, recipe, tokenizer=tiny_run.tokenizer(), on_event=events.append)
    words = "the fast step does not agree"
    shown, logged = capsys.readouterr().err.count(words), caplog.text.count(words)
    assert (shown, logged) == ((1, 0) if progress == "lines" else (0, 1))
    assert sum(words in e["text"] for e in events if e["event"] == "note") == 1


def test_the_best_adapter_answers_as_it_is_saved(tmp_path):
    """DoRA keeps its factors in evaluation: those of the last step must not answer for the best one."""
    model = tiny_run.model()
    settings = dict(train__lr=0.02, train__steps=300, train__patience=2, train__eval_every=2, eval__max_new_tokens=8)
    recipe = tiny_run.recipe(tmp_path, method="DoRA", method__rank=4, eval__exact_match=True, **settings)
    result = weft.fit(model, recipe, tokenizer=tiny_run.tokenizer())
    assert result.best_step < result.steps and len({answer for *_, answer in result.answers}) > 1
    data, other = RunData(model, recipe, tiny_run.tokenizer()), weft.load(tiny_run.model(), tmp_path / "out")
    e = recipe.eval
    again = exact_match(other, tiny_run.tokenizer(), data.held, e.max_new_tokens, e.batch, lambda: None, recipe.data)
    assert again.answers == result.answers


def test_learns_saves_and_reports(tmp_path):
    model = tiny_run.model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    events = []
    recipe = tiny_run.recipe(
        tmp_path, train__steps=150, train__lr=3e-2, eval__exact_match=True, eval__max_new_tokens=8, train__tensorboard="on"
    )
    result = weft.fit(model, recipe, tokenizer=tiny_run.tokenizer(), on_event=events.append)
    out = tmp_path / "out"
    first = next(line for line in result.history if "eval_loss" in line)
    assert first["step"] == 0 and result.eval_loss < 0.7 * first["eval_loss"] and result.train_loss < 0.7 * first["train_loss"]
    assert result.steps == 150 and 0 <= result.exact_match <= 1 and len(result.answers) == 12
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoints", "metrics.jsonl", "recipe.yaml", "run.json",
        "tensorboard",
    ]  # fmt: skip
    assert load_recipe(out / "recipe.yaml") == recipe
    info = json.loads((out / "run.json").read_text())
    assert info["status"] == "finished" and info["eval_loss"] == result.eval_loss and info["torch"] == torch.__version__
    assert [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] == result.history
    kinds = [e["event"] for e in events]
    assert kinds[0] == "start" and kinds[-1] == "end" and kinds.count("step") == 150
    # the base is untouched, the adapter is on the model, and what was saved is what was trained
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in before.items()) and not model.training
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in before)
    ids = torch.arange(10)[None]
    other = weft.load(tiny_run.model(), out)
    assert torch.equal(model(ids).logits, other(ids).logits)
    with weft.using(model, None):
        assert torch.equal(model(ids).logits, tiny_run.model()(ids).logits)


def test_same_seed_same_bytes_other_seed_others(tmp_path):
    outs = {}
    for key, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny_run.run(tmp_path, seed=seed, output=str(tmp_path / key))
        outs[key] = bytes_of(tmp_path / key)
    assert outs["a"] == outs["b"] != outs["c"]


def test_several_runs_on_one_base(tmp_path):
    model, tokenizer = tiny_run.model(), tiny_run.tokenizer()
    for name in ("one", "two"):
        weft.fit(model, tiny_run.recipe(tmp_path, name=name, output=str(tmp_path / name)), tokenizer=tokenizer)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")  # the first one does not reach into the second
    # an adapter that is there already is trained on
    again = tiny_run.recipe(tmp_path, name="one", output=str(tmp_path / "more"))
    weft.fit(model, again, tokenizer=tokenizer)
    assert bytes_of(tmp_path / "more") != bytes_of(tmp_path / "one")


def test_accumulation_equals_one_big_batch(tmp_path):
    """Micro-batches of unequal length: the gradient is the mean over all tokens, not the mean of the micro-batches' means."""
    from weft.data import Batches, load_rows, prepare
    from weft.step import loss_sum
    from weft.train.flat import Flat

    config = tiny_run.recipe(tmp_path).data
    examples = list(prepare(load_rows(config.train), tiny_run.tokenizer(), config).examples)
    grads = []
    for tokens in (48, 100_000):
        model = weft.adapt(tiny_run.model(), weft.LoRA(rank=4))
        with torch.no_grad():
            for n, p in sorted(weft.adapters.trainable(model, "default").items()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))) * 0.1)
        flat = Flat(weft.adapters.trainable(model, "default"), lambda _: 1.0)
        batches = list(Batches(examples, tokens, False, 0).epoch(0))
        total = sum(b.n_targets for b in batches)
        for b in batches:
            (loss_sum(model, b) / total).backward()
        grads.append((len(batches), flat.grad.clone()))
    assert grads[0][0] > 5 and grads[1][0] == 1
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-6)


def test_accumulated_run_follows_the_big_batch(tmp_path):
    """The whole loop: with everything in one step, the batch's cutting makes no difference beyond rounding."""
    common = {"train__steps": 3, "method__dropout": 0.0, "eval__start": False, "train__eval_every": 0, "data__packing": False}
    big = tiny_run.run(tmp_path, train__tokens=100_000, output=str(tmp_path / "big"), **common)
    from weft.data import Batches, load_rows, prepare

    config = tiny_run.recipe(tmp_path).data
    n = len(Batches(list(prepare(load_rows(config.train), tiny_run.tokenizer(), config).examples), 64, False, 0))
    small = tiny_run.run(tmp_path, train__tokens=64, train__accumulate=n, output=str(tmp_path / "small"), **common)
    losses = [[line["loss"] for line in r.history if "loss" in line] for r in (big, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] > losses[0][-1]


def test_a_document_is_cut_where_the_model_has_no_more_places(tmp_path):
    """And a given length is the user's own business."""
    book = tmp_path / "book.txt"
    book.write_text("".join(map(chr, range(97, 123))) * 90)
    given = {"data__train": str(book), "data__eval": str(book), "train__tokens": 4096, "train__steps": 1}
    for more, longest in (({}, 256), ({"data__max_length": 300}, 300), ({"data__max_length": 100}, 100)):
        data = RunData(tiny_run.model(), tiny_run.recipe(tmp_path, **given, **more), tiny_run.tokenizer())
        lengths = [len(e) for e in data.batches.examples]
        assert max(lengths) == longest and sum(lengths) == 2341 and ("256" in str(data.warning)) == (longest == 300)
    wide = tiny_run.model()
    wide.config.max_position_embeddings = 10**6
    assert max(len(e) for e in RunData(wide, tiny_run.recipe(tmp_path, **given), tiny_run.tokenizer()).batches.examples) == 2048


def test_early_stop_takes_the_best(tmp_path):
    """At an absurd learning rate the loss soon rises: the run stops, and the adapter is that of the best evaluation."""
    wild = {"train__lr": 0.3, "train__schedule": "constant", "train__spike": 0}
    result = tiny_run.run(tmp_path, train__steps=300, train__eval_every=5, train__patience=2, **wild)
    losses = {line["step"]: line["eval_loss"] for line in result.history if "eval_loss" in line and line["step"]}
    assert result.stopped == "patience" and result.steps < 300
    assert losses[result.best_step] == min(losses.values()) == result.eval_loss
    from weft.data import Batches, load_rows, prepare

    config = tiny_run.recipe(tmp_path).data
    held = Batches(list(prepare(load_rows(config.eval), tiny_run.tokenizer(), config).examples), 64, False, 0).epoch(0)
    assert mean_loss(weft.load(tiny_run.model(), result.adapter), held) == pytest.approx(result.eval_loss, rel=1e-4)


def test_keeps_the_newest_checkpoints(tmp_path):
    tiny_run.run(tmp_path, train__save_every=4, train__keep=3)
    names = sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000012", "step-00000016"]
    weft.load(tiny_run.model(), tmp_path / "out" / "checkpoints" / names[0])  # a checkpoint is an adapter that can be used


def test_full_fine_tuning(tmp_path):
    result = tiny_run.run(tmp_path, method="Full", train__lr=3e-3, train__steps=40)
    first = next(line for line in result.history if "eval_loss" in line)
    assert result.eval_loss < first["eval_loss"] and result.parameters == sum(p.numel() for p in tiny_run.model().parameters())


def test_output_folder_is_guarded(tmp_path):
    tiny_run.run(tmp_path)
    kept = bytes_of(tmp_path / "out")
    with pytest.raises(WeftError, match=r"holds a finished run.*--overwrite"):
        tiny_run.run(tmp_path)
    info = json.loads((tmp_path / "out" / "run.json").read_text())
    (tmp_path / "out" / "run.json").write_text(json.dumps(info | {"status": "unfinished"}))
    with pytest.raises(WeftError, match=r"another recipe:\s+train.lr: 0.005 there, 0.001 here"):
        tiny_run.run(tmp_path, train__lr=1e-3)
    with pytest.raises(WeftError, match="resuming was ruled out"):
        weft.fit(tiny_run.model(), tiny_run.recipe(tmp_path), tokenizer=tiny_run.tokenizer(), resume="never")
    with (tmp_path / "rows0.jsonl").open("a") as f:
        f.write('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "X"}]}\n')
    from weft.train.output import Output

    output = Output(tiny_run.recipe(tmp_path))
    with pytest.raises(WeftError, match="the data changed since"):
        output.begin({"data": "other"})
    output.close()
    assert bytes_of(tmp_path / "out") == kept
    weft.fit(tiny_run.model(), tiny_run.recipe(tmp_path, seed=5), tokenizer=tiny_run.tokenizer(), overwrite=True)
    assert bytes_of(tmp_path / "out") != kept


def test_killed_just_before_the_end_is_marked(tmp_path):
    """The adapter is in place, but run.json does not say so yet: the run goes on from its last checkpoint to the same bytes."""
    whole = tiny_run.run(tmp_path, train__save_every=8)
    kept, file = bytes_of(tmp_path / "out"), tmp_path / "out" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "unfinished"}))
    with (tmp_path / "out" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 99, "torn')
    again = tiny_run.run(tmp_path, train__save_every=8)
    assert bytes_of(tmp_path / "out") == kept and again.eval_loss == whole.eval_loss
    assert [line["step"] for line in again.history] == [line["step"] for line in whole.history]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(WeftError, match="holds files of something else"):
        tiny_run.run(tmp_path)
    weft.fit(tiny_run.model(), tiny_run.recipe(tmp_path), tokenizer=tiny_run.tokenizer(), overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_one_process_at_a_time(tmp_path):
    from weft.train.output import Output

    first, second = Output(tiny_run.recipe(tmp_path)), Output(tiny_run.recipe(tmp_path))
    first.begin({})
    with pytest.raises(WeftError, match="another process is training"):
        second.begin({})
    first.close()


def test_patience_and_exact_match_need_held_out_rows(tmp_path):
    for setting in ({"train__patience": 2}, {"eval__exact_match": True}):
        with pytest.raises(WeftError, match=r"needs held-out rows: give data\.eval"):
            tiny_run.run(tmp_path, data__eval=None, **setting)


def test_eval_split(tmp_path):
    result = tiny_run.run(tmp_path, data__eval=None, data__eval_split=0.25)
    assert result.eval_loss is not None
    assert json.loads((tmp_path / "out" / "run.json").read_text())["data"].startswith("30+10 examples")
