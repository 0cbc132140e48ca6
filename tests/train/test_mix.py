"""A model between two: its numbers, its folder, its curve, and what does not mix."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import rankclip_jax
from rankclip_jax import cli, figures
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.train import evaluate
from rankclip_jax.weights import export, mixing, pretrained
from tests.support.made_models import CAPTIONS, RESNET, VIT, make_workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("mix")
    make_workdir(root / "a", VIT)
    make_workdir(root / "b", VIT, scores=(0.5, 0.6))  # its second checkpoint has other parameters
    make_workdir(root / "resnet", RESNET)
    make_workdir(root / "resnet2", RESNET, scores=(0.5, 0.6))
    make_workdir(root / "wide", VIT | dict(text=dict(layers=1, width=64, heads=1)))
    return root


@pytest.fixture
def mix(folder, monkeypatch):
    """Runs `rankclip mix ...` in the folder."""
    monkeypatch.chdir(folder)

    def run(words):
        monkeypatch.setattr("sys.argv", ["rankclip", "mix", *words.split()])
        cli.main()

    return run


def leaves(path):
    return jax.tree.leaves(pretrained.read(path).variables)


@pytest.mark.parametrize("pair", [("a", "b"), ("resnet", "resnet2")])
def test_every_parameter_lies_between(folder, pair):
    a, b = (pretrained.read(folder / name) for name in pair)
    for alpha in (0.0, 0.25, 1.0):
        between = mixing.between(a, b, alpha)
        assert between.run is None and between.step is None and between.config == a.config
        same = zip(*(jax.tree.leaves(model.variables) for model in (a, b, between)), strict=True)
        for x, y, z in same:
            assert z.dtype == np.float32
            np.testing.assert_array_equal(z, np.float32((1 - alpha) * np.float64(x) + alpha * np.float64(y)))
            assert alpha or (z == x).all()
            assert alpha < 1 or (z == y).all()
    scale = [float(model.variables["params"]["logit_scale"]) for model in (a, between)]
    assert len(jax.tree.leaves(between.variables)) > 20 and scale == [2.5, 2.5]


def test_the_logit_scale_and_running_statistics_are_mixed(folder):
    a, b = (pretrained.read(folder / name) for name in ("resnet", "resnet2"))
    b.variables["params"]["logit_scale"] = np.float32(4.5)
    between = mixing.between(a, b, 0.25).variables
    assert between["params"]["logit_scale"] == np.float32(3.0)
    b.variables["params"]["logit_scale"] = np.float32(np.nan)  # a run that diverged
    assert mixing.between(a, b, 0.0).variables["params"]["logit_scale"] == a.variables["params"]["logit_scale"]
    first = [jax.tree.leaves(tree["batch_stats"])[0] for tree in (a.variables, b.variables, between)]
    np.testing.assert_allclose(first[2], 0.75 * first[0] + 0.25 * first[1], rtol=1e-6)
    assert np.abs(first[0] - first[1]).max() > 0.01


@pytest.mark.slow
def test_the_folder_is_a_model_as_export_writes_it(mix, folder, capsys):
    mix("a b --alpha 0.25 --out mixed")
    assert capsys.readouterr().out == "wrote mixed: 0.75 a + 0.25 b\n"
    for x, y, z in zip(leaves("a"), leaves("b"), leaves("mixed"), strict=True):
        np.testing.assert_allclose(z, 0.75 * x + 0.25 * y, atol=1e-6)
    model = rankclip_jax.load("mixed")
    assert model.encode_text(CAPTIONS[:2]).shape == (2, 128)
    card = (folder / "mixed" / "README.md").read_text()
    assert "# a and b" in card and "Every weight is 0.75 times that of `a` and 0.25 times that of `b`" in card
    mix("a b --out mixed")  # a half of each; what was there before is export's own
    mix("a b --out arrays --to orbax")
    np.testing.assert_array_equal(leaves("mixed")[0], leaves("arrays")[0])
    np.testing.assert_allclose(leaves("mixed")[0], (leaves("a")[0] + leaves("b")[0]) / 2, atol=1e-6)
    mix("resnet resnet2 --out residual")
    assert (folder / "residual" / "open_clip_config.json").exists()


def test_what_does_not_mix_is_one_line(mix, folder, capsys):
    for words, message in (
        ("a wide --out x", "a and wide are not of one architecture: text.layers is 2 and 1"),
        ("a resnet --out x", "a and resnet are not of one architecture: vision.image_size is 32 and 16, "),
        ("a nothing --out x", "nothing"),
        ("a b --out gs://bucket/x", "--out must be a local path"),
        ("a b --out ./b/", "--out ./b/ is one of the two models; give another folder"),
        ("a b --alphas 0,1 --out x", "name sets to evaluate on: --labels TABLE:COLUMN"),
        ("a b --labels l.csv:x --out x", "nothing is evaluated without --alphas; give it, or leave"),
        ("a b --config shapes --out x", "nothing is evaluated without --alphas; give it, or leave"),
        ("a b --config.nonsense=1 --out x", "nothing is evaluated without --alphas; give it, or leave"),
        ("a b --alphas 0,1 --labels none.csv --out x", "--labels none.csv: expected TABLE:COLUMN"),
    ):
        with pytest.raises(SystemExit) as stop:
            mix(words)
        assert str(stop.value).startswith("error: ") and message in str(stop.value), words
        assert "\n" not in str(stop.value)
    assert not (folder / "x").exists()
    for words in ("a b", "a b --alpha 1.5 --out x", "a b --alphas 0,nan --out x", "a b --alpha half --out x"):
        with pytest.raises(SystemExit) as stop:
            mix(words)
        assert stop.value.code == 2 and capsys.readouterr().err


def test_weights_without_a_config_are_evaluated_and_mixed_with_the_activation_that_is_given(mix, folder):
    model = pretrained.read(folder / "a")
    export.write(model, folder / "bare", "openai")
    weights, words = folder / "alone.safetensors", folder / "bare" / "tokenizer.json"
    (folder / "bare" / "open_clip_model.safetensors").rename(weights)  # its config stays behind
    given = [f"eval.model={str(weights)!r}", f"tokenizer.path={str(words)!r}", "model.activation='gelu'"]
    session, _ = evaluate._model(evaluate.settings(None, None, given))
    assert session.model.config.activation == "gelu"
    made = make_workdir(folder / "gelu_run", VIT | {"activation": "gelu"})  # whose activation is not the other's
    session, _ = evaluate._model(evaluate.settings(None, made, given[:2]))
    assert session.model.config.activation == "quick_gelu"
    mix(f"{weights} {weights} --activation gelu --tokenizer {words} --out gelu")
    assert pretrained.read(folder / "gelu").config.activation == "gelu"


def test_another_tokenizer_or_view_does_not_mix(folder):
    a, b = (pretrained.read(folder / name) for name in ("a", "b"))
    other = Tokenizer.train(["entirely different words", "nothing in common"] * 9, b.tokenizer.vocab_size)
    with pytest.raises(InputError, match="different tokenizers"):
        mixing.check(a, dataclasses.replace(b, tokenizer=other))
    assert mixing.between(dataclasses.replace(a, tokenizer=None), b, 0.5).tokenizer is b.tokenizer
    with pytest.raises(InputError, match=r"prepare images differently: .*mean=\(0\.1, "):
        mixing.check(a, dataclasses.replace(b, view=dataclasses.replace(b.view, mean=(0.1, 0.2, 0.3))))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_the_curve_has_the_accuracies_of_evaluation(mix, folder, capsys):
    sets = "--config shapes --config.eval.retrieval={} --config.eval.geometry={} --config.data.canvas=None "
    sets += "--config.eval.zero_shot={'seen':{'format':'shapes','path':'seen:64'},"
    sets += "'held':{'format':'shapes','path':'held_out:48'}} --config.batch_size=16"
    mix(f"a b --alphas 1,0,0.5 --alpha 0.5 --out curve {sets}")
    said = capsys.readouterr().out
    found = json.loads((folder / "curve" / "mix.json").read_text())
    assert (found["a"], found["b"], found["missing"]) == ("a", "b", {})
    assert [row["alpha"] for row in found["rows"]] == [0, 0.5, 1]
    assert (folder / "curve" / "mix.png").stat().st_size > 5000
    lines = [line.split() for line in said.splitlines()]
    assert ["alpha", "held", "top1", "seen", "top1"] in lines
    for row, name in zip(found["rows"], ("a", "curve", "b"), strict=True):  # as --mode=eval has it of each model
        cells = [f"{100 * row[f'zero_shot/{of}/top1']:.2f}" for of in ("held", "seen")]
        assert [f"{row['alpha']:g}", cells[0], "%", cells[1], "%"] in lines
        overrides = [word.removeprefix("--config.") for word in sets.split() if word.startswith("--config.")]
        settings = evaluate.settings("shapes", None, [*overrides, f"eval.model={name!r}"])
        zero_shot = evaluate.evaluate(settings, None)["zero_shot"]
        assert set(zero_shot) == {"held", "seen"} and len(row) > 5
        assert all(zero_shot[of][key] == row[f"zero_shot/{of}/{key}"] for of in zero_shot for key in ("top1", "top5"))
    before = (folder / "curve" / "mix.json").read_bytes()
    mix(f"a b --alphas 0,0.5,1 --out curve {sets}")  # its own files are replaced
    assert (folder / "curve" / "mix.json").read_bytes() == before


def test_a_panel_for_each_kind_and_a_line_for_each_set():
    rows = [
        {"alpha": alpha, "zero_shot/x/top1": top1, "zero_shot/y/top1": 1 - top1, "retrieval/r/image_to_text_r1": 0.5}
        for alpha, top1 in ((0, 0.25), (0.5, 0.5), (1, 0.75))
    ]
    accuracy, retrieval = figures.over_alpha(rows, "start", "tuned").axes
    assert accuracy.get_xlabel() == "alpha (0: start, 1: tuned)" and retrieval.get_title() == "Retrieval"
    drawn = {line.get_label(): line.get_xydata().tolist() for line in accuracy.lines}
    assert drawn == {"x": [[0, 25], [0.5, 50], [1, 75]], "y": [[0, 75], [0.5, 50], [1, 25]]}
