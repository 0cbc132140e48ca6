"""What a configuration leaves open is settled at the first start: by the data, the devices, or where it starts from."""

import dataclasses
import json

import numpy as np
import pytest

from rankclip_jax import config as configs
from rankclip_jax import models
from rankclip_jax.common.devices import Devices
from rankclip_jax.common.errors import InputError
from rankclip_jax.train import loop, opening, resolve
from rankclip_jax.train import workdir as workdirs
from rankclip_jax.train.step import loss_spec
from rankclip_jax.weights import export, pretrained, view
from tests.support.made_models import RESNET, VIT, make_workdir

OWN = ["data.train=x.csv"]


def own(*changes):
    return configs.load("own", [*OWN, *changes])


def on(monkeypatch, platform, count=8):
    monkeypatch.setattr(resolve, "devices_of", lambda mesh: Devices(platform, platform, None, count))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("pairs", [9, 40, 100, 1_448, 30_000, 3_000_000])
def test_any_number_of_pairs_gives_a_run(monkeypatch, platform, pairs):
    on(monkeypatch, platform)
    given = own()
    settled = resolve.resolve(given, pairs)
    batch, steps_per_epoch = settled.batch_size, pairs // settled.batch_size
    steps = resolve.total_steps(settled, steps_per_epoch)
    assert batch % 8 == 0 and steps_per_epoch >= 1  # eight devices
    assert 2 * batch >= min(pairs, 16)
    assert settled.optim.warmup_steps <= steps / 10
    assert steps / settled.log_every <= 100 and (steps < 50 or steps / settled.log_every >= 25)
    assert 5 <= steps // steps_per_epoch // settled.eval.every_epochs <= 20 or settled.epochs < 10
    assert settled.loss.ramp_epochs == settled.epochs
    assert settled.loss.schedule == ("ramp" if settled.epochs > 1 else "constant")
    assert (given.batch_size, given.model.name) == (None, None)  # not changed in place
    fields = {key: configs.network(settled.model)[key] for key in ("image_size", "vision", "text")}
    assert isinstance(models.configure(settled.model.name, **fields).vision, models.VitConfig)  # which has exports


RAMPED = {"in_modal": {"weight": 1.0, "schedule": "ramp"}}


@pytest.mark.parametrize(
    "changes, said",
    [
        (["steps=3"], ["in_modal, cross_modal: weight 0 in all of this run", "--config.loss.schedule=constant"]),
        (["steps=3", "loss.objective=clip", f"loss.terms={RAMPED}"], ["in_modal: weight 0"]),
        (["steps=3", "loss.schedule=None"], ["loss.schedule=constant"]),
        (["steps=3", "loss.schedule=constant"], []),
        (["steps=3", "loss.objective=clip"], []),
        (["epochs=2"], []),
    ],
)
def test_a_run_of_one_epoch_says_that_its_ramp_never_begins(capsys, changes, said):
    resolve.resolve(configs.load("shapes", ["batch_size=16", "loss.schedule=ramp", *changes]), 64)
    printed = capsys.readouterr().out
    assert all(words in printed for words in said) and ("schedule=" in printed) == bool(said)


@pytest.mark.parametrize(
    "change, message",
    [
        ("layers=0", "layers 0. Expected whole numbers from 1 to 512"),
        ("foo=1", "unknown vision field 'foo'; did you mean 'pool'?"),
        ("patch_size=7", "image_size 64 is not a multiple of the vision tower's patch size 7"),
    ],
)
def test_a_field_that_does_not_fit_the_model_that_is_chosen(change, message):
    with pytest.raises(InputError, match=f"^config.model: {message}"):
        resolve.resolve(own(f"model.vision.{change}"), 48)


@pytest.mark.parametrize("change", ["steps=2147483648", "epochs=2147483648"])
def test_more_steps_than_can_be_counted(change):
    key, _, value = change.partition("=")
    with pytest.raises(InputError, match=rf"config.{key}={value} gives [\d,]+ steps. Expected at most 2,147,483,647"):
        resolve.resolve(own(change), 48)


def test_what_is_evaluated_needs_no_schedule():
    assert own().loss.schedule is None and loss_spec(own()).schedule == "ramp"


def test_the_numbers_of_the_issue(monkeypatch):
    monkeypatch.setattr(resolve, "batch_shards", lambda mesh: 1)
    settled = resolve.resolve(own(), 1_448)
    assert (settled.batch_size, settled.epochs) == (64, 35)  # 50,000 / 1,448
    assert (settled.model.name, settled.model.image_size) == ("ViT-tiny", 64)
    assert (settled.optim.warmup_steps, settled.log_every) == (77, 15)  # of 35 * 22 steps
    assert resolve.resolve(own(), 40).batch_size == 16
    assert resolve.resolve(own(), 5).batch_size == 5


def test_a_larger_model_on_an_accelerator_with_many_pairs(monkeypatch):
    names = {}
    for platform in ("cpu", "gpu"):
        on(monkeypatch, platform)
        for pairs in (1_000, 50_000):
            model = resolve.resolve(own(), pairs).model
            names[platform, pairs] = model.name, model.image_size
    assert names == {
        ("cpu", 1_000): ("ViT-tiny", 64),
        ("cpu", 50_000): ("ViT-tiny", 64),
        ("gpu", 1_000): ("ViT-tiny", 96),
        ("gpu", 50_000): ("ViT-S/16", None),
    }


def test_what_is_given_stays(capsys):
    changes = ["batch_size=24", "steps=7", "optim.lr=0.5", "optim.warmup_steps=1", "log_every=3", "model.image_size=32"]
    settled = resolve.resolve(own(*changes), 1_448)
    assert (settled.batch_size, settled.steps, settled.optim.lr, settled.log_every) == (24, 7, 0.5, 3)
    assert (settled.optim.warmup_steps, settled.model.image_size, settled.model.name) == (1, 32, "ViT-tiny")
    said = capsys.readouterr().out
    assert "model.name=ViT-tiny" in said and "batch_size" not in said and "optim.lr" not in said
    named = resolve.resolve(own("model.name=ViT-B/32"), 1_448).model
    assert (named.name, named.image_size, configs.network(named)["vision"]) == ("ViT-B/32", None, {})


def test_a_resumed_run_has_the_stored_values_whatever_the_data_are(tmp_path, capsys):
    first = resolve.resolve(own(), 1_448)
    stored = configs.completed(json.loads(configs.to_json(first)))
    capsys.readouterr()
    again = resolve.resolve(own(), 40, stored)
    assert again.to_dict() == stored.to_dict() and not capsys.readouterr().out
    workdirs.check_same_config(tmp_path, stored, own())
    for change in ("batch_size=8", "optim.lr=0.5", "model.vision={'layers':6}", "model.name=ViT-B/32"):
        with pytest.raises(InputError, match=f"another configuration .*config.{change.partition('=')[0]}"):
            workdirs.check_same_config(tmp_path, stored, own(change))


def test_plans_and_studies_say_what_they_need():
    with pytest.raises(InputError, match=r"^a study needs config\.batch_size, config\.epochs, .*warmup_steps, which"):
        resolve.require(own(), "a study")
    resolve.require(configs.load("cc3m"), "a plan")
    with pytest.raises(InputError, match=r"config\.model\.name=None\. Expected a preset, since .*\.format=shapes"):
        resolve.resolve(configs.load("shapes", ["model.name=None"]), 100)
    with pytest.raises(InputError, match=r"config\.data\.train=None\. Expected what to train on"):
        opening.open_data(configs.load("own"))


def test_a_best_checkpoint_by_what_is_not_evaluated_is_refused_at_the_start():
    def opened(*changes):
        small = ["data.train=128", "data.val=16", "eval.retrieval={}", "eval.geometry={}"]
        return opening.open_data(configs.load("shapes", [*small, *changes]))

    for best in ("zero_shot/seen/top1", "val/clip"):
        opened(f"checkpoint.best={best}")
    opened("checkpoint.best=val/clip/ema", "optim.ema=0.9")
    opened("checkpoint.best=val/modality_gap", "eval.diagnostics=True")
    opened("checkpoint.best=zero_shot/seen/ema/top1", "optim.ema=0.9")
    for best, why in (
        ("zero_shot/sen/top1", "it evaluates zero_shot/held_out/, zero_shot/seen/, val/"),
        ("zero_shot/seen/top_1", "it evaluates .*; the nearest is zero_shot/seen/top1"),
        ("val/siglip", "it evaluates .*; the nearest is val/clip"),
        ("val/modality_gap", "it evaluates "),
        ("loss", "it evaluates zero_shot/held_out/"),
        ("zero_shot/seen/ema/top1", "config.optim.ema=None"),
    ):
        with pytest.raises(InputError, match=rf"^config.checkpoint.best='{best}' is not a number that this .*: {why}"):
            opened(f"checkpoint.best={best}")


CHANGES = {
    "context_length": 20,
    "embed_dim": 96,
    "activation": "gelu",
    "text": dict(layers=2, width=128, heads=2, mlp_width=300),
}


@pytest.mark.parametrize("changes", [{}, CHANGES], ids=["as it is", "changed"])
@pytest.mark.parametrize("name", models.PRESETS)
def test_any_architecture_can_be_said_by_a_preset(name, changes):
    vision = models.PRESETS[name].vision
    side = {"image_size": 4 * (vision.stride if isinstance(vision, models.ResNetConfig) else vision.patch_size)}
    if models.PRESETS[name].siglip:  # whose image tower ends in embeddings of its own width
        changes = changes | {"embed_dim": None}
    theirs = models.configure(name, **(changes | side if changes else {}), vocab_size=300, eot_id=299)
    origin = pretrained.Pretrained("x", theirs, {}, view.View(1, 1), None)
    fields = configs.network(configs.complete({"model": resolve.of_source(origin)}).model)
    given = {key: fields[key] for key in configs.keys.ARCHITECTURE}
    assert models.configure(given.pop("name"), **given, vocab_size=300, eot_id=299) == theirs


@pytest.mark.parametrize("model", [VIT, RESNET], ids=["vit", "resnet"])
def test_the_model_is_the_one_it_starts_from(tmp_path, model, capsys):
    source = pretrained.read(make_workdir(tmp_path / "run", model))
    config = own(f"init_from={tmp_path / 'run'}", "data.train=x.csv")
    settled = resolve.resolve(config, 1_448, origin=source)
    words = dict(vocab_size=source.tokenizer.vocab_size, eot_id=source.tokenizer.eot_id)
    assert models.build(**configs.network(settled.model), **words).config == source.config
    assert (settled.optim.lr, settled.data.mean) == (1e-5, None)
    capsys.readouterr()
    larger = resolve.resolve(own("init_from=x", "model.image_size=64"), 1_448, origin=source)
    assert larger.model.image_size == 64
    for change, lr in (("lora=4", 2e-4), ("name=lion", 1e-6), ("name=muon", 1e-5)):
        found = resolve.resolve(own("init_from=x", f"optim.{change}"), 1_448, origin=source).optim.lr
        assert found == pytest.approx(lr)
    named = resolve.resolve(own("init_from=x", "model.name=ViT-S/16"), 1_448, origin=source)
    assert (named.model.name, configs.network(named.model)["vision"]) == ("ViT-S/16", {})


ONE_LAYER = dict(layers=1, width=64, heads=1)


@pytest.mark.slow
def test_the_view_comes_along_and_stays_in_what_is_exported(tmp_path, captioned, one_device):
    grey = dict(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    source = pretrained.read(make_workdir(tmp_path / "run", VIT | dict(vision=ONE_LAYER, text=ONE_LAYER)))
    source = dataclasses.replace(source, view=dataclasses.replace(source.view, **grey))
    export.write(source, tmp_path / "hf", "hf")
    changes = [f"data.train={captioned}", f"init_from={tmp_path / 'hf'}", "steps=1", "batch_size=8"]
    changes += ["loss.objective=clip", "eval.diagnostics=False", "data.resize=host"]  # sooner compiled
    loop.train(configs.load("own", changes), tmp_path / "tuned")
    stored = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert stored["data"]["mean"] == [0.5] * 3 and stored["data"]["std"] == [0.25] * 3
    assert stored["model"]["image_size"] == 32 and stored["data"]["format"] == "csv"
    tuned = pretrained.read(tmp_path / "tuned")
    assert tuned.view == source.view and tuned.tokenizer.vocabulary() == source.tokenizer.vocabulary()
    assert tuned.config == source.config
    kernel = ("params", "visual", "conv1", "kernel")
    before, after = (model.variables for model in (source, tuned))
    for key in kernel:
        before, after = before[key], after[key]
    assert 0 < np.abs(after - before).max() < 1e-4  # one step of 1e-5


def test_another_resize_of_the_start_is_said(capsys):
    config = configs.complete({})
    resolve.settle_view(config, view.View(resize=32, crop=32))
    assert capsys.readouterr().out == ""
    resolve.settle_view(config, view.View(resize=40, crop=32))
    assert "resized to the crop's side; the start resized to 40 and cropped 32" in capsys.readouterr().out


@pytest.mark.slow
def test_forty_pairs_train_resume_and_export(tmp_path, captioned, one_device):
    """As `rankclip train data.csv` does it, but for its length."""
    changes = [f"data.train={captioned}", "epochs=2", "model.vision={'layers': 1}", "model.text={'layers': 1}"]
    loop.train(configs.load("own", changes), tmp_path / "run")
    loop.train(configs.load("own", changes), tmp_path / "run")  # trained to its last step
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]  # of 16 pairs
    model = pretrained.read(tmp_path / "run")
    export.write(model, tmp_path / "hf", "hf")
    assert pretrained.read(tmp_path / "hf").config == model.config


SHORT, LONG = np.full(100, 12), np.full(100, 75)


def packing(config, lengths, captions=16, resumes=False):
    return resolve.packing(config, captions, 77, lambda: lengths, resumes).model


def test_captions_are_packed_where_a_tenth_is_saved_and_the_run_keeps_that(capsys):
    config = configs.load("shapes", [])
    short, long = packing(config, SHORT), packing(config, LONG)
    # Six of twelve tokens lie in a row, which never differ.
    assert (short.pack_text, short.pack_rows) == ("on", (3, 16)) and (long.pack_text, long.pack_rows) == ("off", None)
    assert capsys.readouterr().out.count("chosen: ") == 2
    forced, off = (packing(configs.load("shapes", [f"model.pack_text={how}"]), LONG) for how in ("on", "off"))
    assert (forced.pack_rows, off.pack_text, off.pack_rows) == ((16, 16), "off", None)
    for settled in (short, long, forced):
        stored = configs.completed(json.loads(json.dumps(config.to_dict() | {"model": settled.to_dict()})))
        resumed = configs.with_stored(config, stored)  # the file again, in which it is open
        assert not configs.differences(stored.to_dict(), resumed.to_dict())
        asked = lambda: pytest.fail("measured again")  # noqa: E731
        assert resolve.packing(resumed, 16, 77, asked, resumes=True).model == settled
        if settled.pack_text == "on":  # with more devices a share is smaller
            fewer = packing(resumed, SHORT, captions=4, resumes=True)
            assert (fewer.pack_text, fewer.pack_rows) == ("on", (1, 4))


def test_a_run_of_before_is_not_packed():
    fields = configs.load("shapes", []).to_dict()
    del fields["model"]["pack_text"], fields["model"]["pack_rows"]
    old = configs.completed(json.loads(json.dumps(fields)))
    resumed = configs.with_stored(configs.load("shapes", []), old)
    assert not configs.differences(old.to_dict(), resumed.to_dict()) and old.model.pack_text == "off"
    assert packing(resumed, SHORT, resumes=True).pack_text == "off"
    wanted = configs.with_stored(configs.load("shapes", ["model.pack_text=on"]), old)
    assert configs.differences(old.to_dict(), wanted.to_dict()) == ["config.model.pack_text: 'off' -> 'on'"]
