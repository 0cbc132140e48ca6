"""`rankclip` in few words: what they stand for, the package that has the experiments, and --help."""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks.quick_compile import XLA_FLAGS
from rankclip_jax import cli
from rankclip_jax import config as configs
from rankclip_jax.common import storage
from rankclip_jax.common.trees import flatten
from rankclip_jax.config import experiments
from rankclip_jax.config import keys as config_keys
from rankclip_jax.train import __main__ as train
from rankclip_jax.train import arguments, evaluate, loop, plan

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "photos", "shards", "classes/cat", "runs/mine/checkpoints", "data/shapes", "wds/test":
        (tmp_path / name).mkdir(parents=True)
    for name in "photos/a.jpg", "shards/0.tar", "photos.tar.gz", "wds/test/nshards.txt", "ViT-B-32.pt":
        (tmp_path / name).touch()
    return tmp_path


@pytest.fixture
def started(folder, monkeypatch):
    """Runs `rankclip ...`; returns (what was started, its configuration, workdir and what else it was given)."""
    seen = []
    monkeypatch.setattr(loop, "train", lambda *given: seen.append(("train", *given)))
    monkeypatch.setattr(evaluate, "evaluate", lambda *given: seen.append(("eval", *given)))
    monkeypatch.setattr(plan, "plan", lambda *given: seen.append(("plan", *given)))
    monkeypatch.setattr(train.processes, "start", lambda *_: None)
    monkeypatch.setattr(train.commands, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(train.compilation_cache, "enable", lambda platform: None)

    def run(words):
        monkeypatch.setattr("sys.argv", ["rankclip", *(word.replace("␣", " ") for word in words.split())])
        cli.main()
        return seen.pop()

    return run


def test_an_experiment_by_its_name(started):
    mode, config, workdir = started("train shapes --config.steps=3")
    assert (mode, config.data.format, config.steps, workdir) == ("train", "shapes", 3, Path("runs/shapes"))
    for same in ("train configs/shapes.py --config.steps=3", "train --config configs/shapes.py --config.steps=3"):
        assert started(same) == (mode, config, workdir)
    assert started("train shapes:objective=clip --workdir x")[1:] == (configs.load("shapes:objective=clip"), Path("x"))
    assert started("plan cc3m:model=RN50")[:2] == ("plan", configs.load("cc3m:model=RN50"))


@pytest.mark.parametrize("what, kind, name", [
    ("mine.csv", "csv", "mine"),
    ("mine.tsv", "csv", "mine"),
    ("data/mine.jsonl", "csv", "mine"),
    ("mine.csv.gz", "csv", "mine"),
    ("photos/", "folder", "photos"),
    ("./data/shapes", "folder", "shapes"),
    ("shards", "webdataset", "shards"),
    ("shards/*.tar", "webdataset", "shards"),
    ("shards/{00000..00031}.tar", "webdataset", "shards"),
    ("shards/0.tar", "webdataset", "0"),
    ("gs://bucket/cc/0.parquet", "parquet", "0"),
])  # fmt: skip
def test_data_of_ones_own(started, what, kind, name):
    mode, config, workdir = started(f"train {what}")
    assert (mode, config.data.train, config.data.format, workdir) == ("train", what, kind, Path("runs") / name)
    assert (config.batch_size, config.model.name, config.eval.retrieval.to_dict()) == (None, None, {})
    by_keys = configs.load("own", [f"data.train={what!r}"])  # python -m rankclip_jax.train --config configs/own.py ...
    assert by_keys == config


def test_files_to_validate_and_evaluate_on(started):
    config = started("train mine.csv --val held.csv --labels held.csv:group classes")[1]
    assert config.data.val == "held.csv" and list(config.eval.retrieval) == ["held"]
    assert config.eval.retrieval.held.path == "held.csv"
    sets = config.eval.zero_shot
    assert (sets.held.path, sets.held.label_key, sets.held.format) == ("held.csv", "group", "csv")
    assert (sets.classes.path, sets.classes.format) == ("classes", "folder")
    config = started("train shards --val held.csv --retrieval other.csv wds")[1]
    assert config.data.val.val.to_dict().items() >= {"path": "held.csv", "format": "csv"}.items()
    formats = {name: one.format for name, one in config.eval.retrieval.items()}
    assert formats == {"other": "csv", "wds": "clip_benchmark"}
    config = started("eval a.pt --labels held.csv:group held.csv:kind other.csv:kind")[1]
    keys = {name: (one.path, one.label_key) for name, one in config.eval.zero_shot.items()}
    held = {f"held-{column}": ("held.csv", column) for column in ("group", "kind")}
    assert keys == held | {"other": ("other.csv", "kind")}
    again = "eval a.pt --labels held.csv:group --retrieval held.csv --labels held.csv:kind other.csv:kind"
    again = started(f"{again} --retrieval wds")[1].eval
    assert again.zero_shot == config.eval.zero_shot and list(again.retrieval) == ["held", "wds"]
    config = started("train shapes --val shards --config.data.val=3")[1]
    assert config.data.val == 3 and not len(configs.load("own").eval.retrieval)


def test_a_format_that_is_given_is_not_guessed(started):
    config = started("train captions.txt --val held.txt --config.data.format=csv")[1]
    assert (config.data.train, config.data.val, config.data.format) == ("captions.txt", "held.txt", "csv")
    config = started("train shards.d --val held.csv --config.data.format=webdataset")[1]
    assert config.data.val.val.to_dict().items() >= {"path": "held.csv", "format": "csv"}.items()


def test_a_set_in_the_table_of_the_data_has_its_columns_and_its_folder(started):
    words = "train mine.csv --val held.csv --labels held.csv:group other.csv:group mine.csv:meta:kind"
    config = started(
        f"{words} --config.data.image_key=filepath --config.data.caption_key=title --config.data.image_folder=../pics "
        "--config.data.delimiter=; --config.data.encoding=cp1252 --config.eval.retrieval.held.caption_key=other"
    )[1]
    given = dict(image_key="filepath", image_folder="../pics", delimiter=";", encoding="cp1252")
    sets = config.eval.zero_shot
    assert config.eval.retrieval.held.to_dict().items() >= (given | {"caption_key": "other"}).items()
    assert sets.held.to_dict().items() >= given.items() and sets.other.image_key is None
    assert sets.mine.to_dict().items() >= (given | {"path": "mine.csv", "label_key": "meta:kind"}).items()


def test_a_key_with_spaces_is_a_key_wherever_it_stands(started):
    mode, config, workdir = started("train --config.mesh={'data':1,␣'fsdp':␣-1} shapes --config.optim.lr=0.5")
    assert (mode, config.mesh.to_dict(), config.optim.lr) == ("train", {"data": 1, "fsdp": -1}, 0.5)
    assert workdir == Path("runs/shapes")


def test_a_run_is_resumed_and_evaluated_by_its_folder(started, folder):
    stored = configs.to_json(configs.load("shapes"))
    (folder / "runs/mine/config.json").write_text(stored)
    mode, config, workdir = started("resume runs/mine")
    assert (mode, configs.to_json(config), workdir) == ("train", stored, Path("runs/mine"))
    assert started("train runs/mine") == (mode, config, workdir)  # and its pictures are no data
    assert started("plan runs/mine")[:2] == ("plan", config)
    assert started("train runs/mine --workdir x")[1].data.train == "runs/mine"
    mode, config, workdir, out = started("eval runs/mine")
    assert (mode, configs.to_json(config), workdir, out) == ("eval", stored, Path("runs/mine"), None)
    config = started("eval runs/mine --retrieval held.csv --labels held.csv:group")[1]
    assert {kind: list(config.eval[kind]) for kind in configs.fields.EVAL_SETS} == {
        "zero_shot": ["held"], "retrieval": ["held"], "linear_probe": [], "geometry": []
    }  # fmt: skip


def test_weights_from_elsewhere_are_evaluated(started):
    mode, config, workdir, out = started("eval ViT-B-32.pt --imagenet val --tokenizer t.json --out r.json")
    assert (config.eval.model, config.eval.suite, config.eval.data_dir) == ("ViT-B-32.pt", ("imagenet",), "val")
    assert (mode, workdir, out, config.tokenizer.path) == ("eval", None, Path("r.json"), "t.json")
    _, config, workdir, _ = started("eval runs/mine --workdir results")
    assert (config.eval.model, workdir) == ("runs/mine", Path("results"))


def test_the_home_folder_is_known_where_no_shell_writes_it_out(started, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = tmp_path / "home"
    assert started("train mine.csv --workdir=~/run")[2] == home / "run"
    assert started("eval a.pt --workdir=~/run --out=~/r.json")[2:] == (home / "run", home / "r.json")
    assert storage.local("~/x", "DST") == home / "x"
    with storage.output("~/shards", "embed") as out:
        assert out == home / "shards"


@pytest.mark.parametrize("words, message", [
    ("train photos.tar.gz", r"^error: photos\.tar\.gz is compressed, .*; decompress it first$"),
    ("train shpaes", r"^error: shpaes is neither an experiment nor data\. Expected one of cc3m, .*\(shapes\?\); or"),
    ("train nothing.py", "no file nothing.py; the experiments are cc3m, "),
    ("train shapes --config cc3m", "shapes and --config cc3m are two experiments; give one"),
    ("train mine.csv --retrieval photos", "--retrieval photos: expected a table of images and captions"),
    ("train mine.csv --labels held.csv", "--labels held.csv: expected TABLE:COLUMN, for example heldout.csv:label"),
    ("plan nothing.csv", "no such file: nothing.csv"),
    ("train mine.csv --labels a/x.csv:k b/x.csv:k", "--labels: a/x.csv and b/x.csv would both be the set x-k; rename"),
    ("eval a.pt --retrieval a/x.csv b/x.csv", "--retrieval: a/x.csv and b/x.csv would both be the set x; rename one"),
    ("train mine.csv --config.lr=1", r"config\.lr does not exist; the nearest key is config\.optim\.lr"),
    ("train mine.csv --config.optm.lr=1", r"config\.optm does not exist; the nearest key is config\.optim"),
    ("train mine.csv --config.optim.lr.x=1", r"config\.optim\.lr={'x': 1}\. Expected a number above 0 or None"),
    ("train shapes --config.epochs.x=1", r"config\.epochs\.x does not exist: config\.epochs=10 is not a group of keys"),
    ("resume runs/other", "runs/other holds no run"),
    ("eval a.pt --out gs://bucket/r.json", "--out must be a local path; copy it to gs://bucket/r.json when"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(started, words, message):
    with pytest.raises(SystemExit, match=message) as stop:
        started(words)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("words", ["train", "resume", "plan", "fly", "train shapes --fast"])
def test_wrong_words_and_flags_end_with_2(started, words, capsys):
    with pytest.raises(SystemExit) as stop:
        started(words)
    assert stop.value.code == 2 and capsys.readouterr().err


def test_help_lists_the_usual_keys_with_their_defaults(started, capsys):
    with pytest.raises(SystemExit) as stop:
        started("train --help")
    said = capsys.readouterr().out
    assert not stop.value.code and said.startswith("usage: rankclip train ")
    defaults = flatten(config_keys.default_config().to_dict())
    assert len(set(config_keys.USUAL)) == len(config_keys.USUAL)
    for key in config_keys.USUAL:
        assert re.search(rf"^  --config\.{re.escape(f'{key}={defaults[key]}')} +\S", said, re.MULTILINE), key
    groups = [key.rpartition(".")[0] for key in config_keys.USUAL]
    assert [group for group in re.findall(r"^([\w ]+)$", said, re.MULTILINE) if group in groups] == [
        group for group in dict.fromkeys(groups) if group
    ]  # each once


def test_version_and_words(capsys, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.3")
    monkeypatch.setattr("sys.argv", ["rankclip", "--version"])
    cli.main()
    assert capsys.readouterr().out == "rankclip_jax 1.2.3\n"

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    cli.main()
    assert capsys.readouterr().out == "rankclip_jax (a checkout that is not installed)\n"
    monkeypatch.setattr("sys.argv", ["rankclip"])
    cli.main()
    listed = capsys.readouterr().out
    assert all(f"  {word} " in listed for word in cli.COMMANDS)


def test_a_word_that_is_no_command_is_refused_with_the_nearest(capsys, monkeypatch):
    for word, near in ("evall", " Did you mean eval?"), ("zzz", ""):
        monkeypatch.setattr("sys.argv", ["rankclip", word])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        every = ", ".join(cli.COMMANDS)
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"error: no command '{word}'. Expected one of {every}.{near}\n"


def test_ctrl_c_while_a_command_is_imported_is_one_line(capsys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["rankclip", "train", "shapes"])
    monkeypatch.setattr("importlib.import_module", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_every_package_is_in_the_wheel():
    folders = {path.parent for room in ("rankclip_jax", "input_pipeline") for path in (REPO / room).rglob("*.py")}
    found = {".".join(folder.relative_to(REPO).parts) for folder in folders}
    assert found | {"rankclip_jax.configs"} == set(PROJECT["tool"]["setuptools"]["packages"])
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"rankclip_jax.configs": "configs"}


@pytest.mark.slow
def test_the_wheel_trains_in_an_empty_folder(tmp_path):
    source, target, empty = (tmp_path / name for name in ("source", "target", "empty"))
    source.mkdir()
    empty.mkdir()
    files = ["pyproject.toml", "requirements.txt", "README.md", "LICENSE"]
    for name in ("rankclip_jax", "input_pipeline", "configs", *files):
        (source / name).symlink_to(REPO / name)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, cwd=empty)
    script = target / "bin" / "rankclip"
    small = ["--config.steps=2", "--config.batch_size=8", "--config.data.train=64", "--config.data.val=None"]
    small += ["--config.optim.warmup_steps=1", "--config.model.image_size=16", "--config.eval.zero_shot={}"]
    small += ["--config.model.name=ViT-tiny", "--config.loss.objective=clip", "--config.model.text={'layers':1}"]
    small += ["--config.model.vision={'layers':1,'width':32,'heads':2,'patch_size':8}"]
    small += ["--config.eval.retrieval={}", "--config.eval.geometry={}"]
    env = os.environ | {"PYTHONPATH": str(target), "XLA_FLAGS": XLA_FLAGS}
    done = subprocess.run(
        [sys.executable, str(script), "train", "shapes", *small], cwd=empty, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout and (empty / "runs/shapes/config.json").is_file()
    assert sorted(path.name for path in (target / "rankclip_jax" / "configs").glob("*.py")) == [
        f"{name}.py" for name in experiments.names()
    ]


def test_names_of_data():
    parser = argparse.ArgumentParser()
    arguments.add_to(parser)
    for what, name in (("/a/b/mine.csv", "mine"), ("../x", "x"), ("*.tar", "own"), (".hidden", ".hidden")):
        assert arguments.name_of(what) == name
