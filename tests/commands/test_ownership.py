"""Nothing that is not ours is deleted, emptied or replaced: every command that writes, among files of others."""

import json
import re
import shutil
import sys

import pytest

from input_pipeline import download, prepare
from notebooks import launch
from rankclip_jax import convert, doctor, embed
from rankclip_jax.common import ownership
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.ownership import MARKER, Owned
from rankclip_jax.inference import collection, store
from rankclip_jax.report import __main__ as report_main
from rankclip_jax.study import __main__ as study_main
from rankclip_jax.study import report as study_report
from rankclip_jax.train import __main__ as train
from rankclip_jax.train import workdir as workdirs
from rankclip_jax.weights import export
from tests.commands.test_train import SMALL, TRANSFORMER
from tests.study.test_study import SMOKE
from tests.support.foreign import FOREIGN, contents, fill


def training(workdir, *flags):
    short = ("steps=4", "loss.objective=clip", "data.val=None", "eval.zero_shot={}", "eval.diagnostics=False")
    short = (*TRANSFORMER, *(f"--config.{flag}" for flag in (*short, "checkpoint.keep=2")))
    return (*SMALL, *short, f"--workdir={workdir}", *flags)


def studying(workdir):
    short = ("epochs=1", "study.lrs=()", "study.more_seeds={}", "study.objectives={'clip': {'objective': 'clip'}}")
    return ("--config=configs/study_shapes.py", f"--workdir={workdir}", *(f"--config.{x}" for x in (*SMOKE, *short)))


COMMANDS = {
    "train": lambda world, out: (train, *training(out)),
    "eval": lambda world, out: (train, *training(out, "--mode=eval", f"--config.eval.model={world / 'run'}")),
    "study": lambda world, out: (study_main, *studying(out)),
    "prepare": lambda world, out: (prepare, world / "data.csv", out),
    "inspect": lambda world, out: (prepare, world / "data.csv", out, "--inspect"),
    "download": lambda world, out: (download, world / "list.tsv", out),
    "download, its list in the folder": lambda world, out: (download, out / "urls.parquet", out),
    "hf": lambda world, out: (convert, world / "run", out, "--to", "hf"),
    "openai": lambda world, out: (convert, world / "run", out, "--to", "openai"),
    "orbax": lambda world, out: (convert, world / "run", out, "--to", "orbax"),
    "embed": lambda world, out: (embed, world / "run", world / "photos", "--out", out / "photos.npz"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_others_is_refused_in_one_line_and_stays_as_it_is(command, run, world, tmp_path):
    before = contents(fill(tmp_path / "out"))
    said = run(*COMMANDS[command](world, tmp_path / "out"))
    assert re.search("did not write|already exists|is not a manifest of prepare", said)
    assert re.search("move it away|give a new OUT_DIR|give another", said)
    assert contents(tmp_path / "out") == before


OWN = {
    "train": lambda config: [*workdirs._names(config), "config.json/x", "metrics.jsonl/x"],
    "eval": lambda config: ["eval.json", "eval/geometry_scenes.npz", "eval/retrieval_scenes.json"],
    "study": lambda config: study_report.FILES,
    "inspect": lambda config: ["contact_sheet.png", "bad_samples.jsonl"],
    "hf": lambda config: export._names("hf", True),
    "openai": lambda config: export._names("openai", True),
    "orbax": lambda config: [*export._names("orbax", True), "variables/x", "variables.orbax-checkpoint-tmp/x"],
    "prepare": lambda config: [
        *("x", "00003.tfrecord.part", "bad_samples.jsonl"),
        *("manifest.json", "manifest.json/x", "manifest.jsonl"),
    ],
    "download": lambda config: ["urls.parquet", "00000.tar", "00000_stats.json", "_tmp/0.feather", "_download/x"],
    "embed": lambda config: ["photos.npz", "photos.npz.bad_samples.jsonl", "photos.npz.parts/0.npz"],
}


@pytest.mark.parametrize("command", OWN)
def test_each_own_name_of_a_command_is_refused_where_it_is_taken(command, run, world, tmp_path):
    from rankclip_jax import config as configs

    for number, name in enumerate(OWN[command](configs.complete({}))):
        folder = fill(tmp_path / str(number), [name])
        before = contents(folder)
        said = run(*COMMANDS[command](world, folder))
        assert said and name.split("/")[0] in said, name
        assert contents(folder) == before, name


BESIDE = [name for name in FOREIGN if name.startswith(("mine", "0000", "urls", "x_", "notes", "_tmp", "_download"))]
BESIDE += ["my.orbax-checkpoint-tmp", "config.json.part", "metrics.part", "profile/trace", "runs/other.json"]


@pytest.mark.parametrize(
    "command, names",
    [
        pytest.param("eval", BESIDE, marks=pytest.mark.slow),
        pytest.param("study", BESIDE, marks=pytest.mark.slow),
        ("inspect", [*BESIDE, "manifest.json"]),
        ("hf", [*BESIDE, "metrics.jsonl", "variables/x"]),
        ("orbax", [*BESIDE, "metrics.jsonl", "model.safetensors"]),
        ("embed", [*BESIDE, "photos.npz.unfinished", "about.json", "bad_samples.jsonl"]),
    ],
)
def test_where_none_of_its_names_is_taken_a_command_works_and_leaves_the_rest(
    command, names, run, world, tmp_path, one_device, compiled_once
):
    before = contents(fill(tmp_path / "out", names))
    for _ in range(1 if command == "embed" else 2):  # its own files it replaces
        assert run(*COMMANDS[command](world, tmp_path / "out")) is None
    after = contents(tmp_path / "out")
    assert after.items() >= before.items()
    if command == "embed":
        assert after.keys() - before.keys() == {"photos.npz"}


def test_a_report_replaces_the_file_that_out_names_and_no_other(run, world, tmp_path, monkeypatch):
    before = contents(fill(tmp_path / "out"))
    (tmp_path / "out/link.html").symlink_to("README.md")
    assert run(report_main, world / "run", "--out", tmp_path / "out/report.html") is None
    assert run(report_main, world / "run", "--out", tmp_path / "out/link.html") is None
    after = contents(tmp_path / "out")
    assert after.pop("report.html") == after.pop("link.html") != before.pop("report.html")
    assert after == before
    # Without --out nobody has named report.html: only a page of ours is replaced.
    monkeypatch.chdir(tmp_path / "out")
    assert run(report_main, world / "run") is None
    (tmp_path / "out/report.html").write_text("of pytest-html")
    assert "give --out FILE" in run(report_main, world / "run")
    assert (tmp_path / "out/report.html").read_text() == "of pytest-html"


def test_doctor_and_launch_change_nothing(run, tmp_path, monkeypatch, capsys):
    before = contents(fill(tmp_path / "out"))
    for heavy in ("devices", "pipeline", "packages"):
        monkeypatch.setattr(doctor, heavy, lambda *_: [])
    run_doctor = ["doctor", "--workdir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", run_doctor)
    with pytest.raises(SystemExit):
        doctor.main()
    assert "can be written" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"train\.log is there already, and launch did not write it"):
        launch.Training("configs/shapes.py", tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_users_files_in_a_folder_of_ours_stay(run, world, tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "PART", 2)
    mine = ["notes.part", "mine.tfrecord", "99999.tfrecord", "00009.tfrecord.part", "x.tar"]
    assert run(*COMMANDS["prepare"](world, tmp_path / "out"), "--shard-size=3") is None
    before = contents(fill(tmp_path / "out", mine))
    (tmp_path / "out/00001.tfrecord").write_bytes(b"damaged")
    (tmp_path / "out/00002.tfrecord.part").write_bytes(b"half of it, of a run that was killed")
    assert run(*COMMANDS["prepare"](world, tmp_path / "out"), "--shard-size=3") is None
    assert contents(tmp_path / "out") == before

    assert run(*COMMANDS["orbax"](world, tmp_path / "export")) is None
    before = contents(fill(tmp_path / "export", ["variables/notes.txt"]))
    assert "variables/notes.txt would be removed" in run(*COMMANDS["orbax"](world, tmp_path / "export"))
    assert contents(tmp_path / "export") == before

    (tmp_path / "photos").mkdir()
    monkeypatch.setattr(store, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in run(*COMMANDS["embed"](world, tmp_path / "photos"))
    monkeypatch.undo()
    fill(tmp_path / "photos", ["photos.npz.parts/notes.txt"])
    assert run(*COMMANDS["embed"](world, tmp_path / "photos")) is None
    after = contents(tmp_path / "photos")
    assert after.keys() == {"photos.npz", "photos.npz.parts", "photos.npz.parts/notes.txt"}


@pytest.mark.parametrize("name", ["../victim", "../victim/file", "/etc/passwd", "a/../../victim/file", "a\\..\\b", "."])
def test_names_that_lead_elsewhere_are_refused_wherever_they_are_read(name, run, world, tmp_path):
    assert run(*COMMANDS["prepare"](world, tmp_path / "out"), "--shard-size=3") is None
    before = contents(fill(tmp_path / "victim", ["file"]))
    with pytest.raises(InputError, match="it would lead elsewhere"):
        ownership.inside(tmp_path / "out", name)
    path = tmp_path / "out/manifest.json"
    for marked in (True, False):
        manifest = json.loads(path.read_text())
        manifest["shards"][0] |= {"name": name, "sha256": "0" * 64}
        path.write_text(json.dumps(manifest))
        if not marked:
            (tmp_path / "out" / MARKER).unlink()
        assert "is not a manifest of prepare" in run(*COMMANDS["prepare"](world, tmp_path / "out"), "--shard-size=3")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / MARKER).write_text(json.dumps({"download": [name], "prepare": [name]}))
    for command in ("download", "prepare"):
        assert "is damaged" in run(*COMMANDS[command](world, tmp_path / "own"))
    assert contents(tmp_path / "victim") == before


@pytest.mark.parametrize("marker", ["", "[]", "{", "null", '{"prepare": 3}', '{"prepare": [3]}', "[" * 99999])
def test_a_marker_that_is_none_is_one_line(marker, run, world, tmp_path):
    (tmp_path / MARKER).write_text(marker)
    assert f"{MARKER} is damaged" in run(*COMMANDS["prepare"](world, tmp_path))
    (tmp_path / MARKER).unlink()
    (tmp_path / MARKER).symlink_to("elsewhere")
    assert f"{MARKER} is damaged" in run(*COMMANDS["prepare"](world, tmp_path))


@pytest.mark.parametrize("settings", [5, [[1]], "rows shard_size", None])
def test_a_manifest_of_somebody_else_makes_nothing_ours(tmp_path, settings):
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [], "settings": settings}))
    with pytest.raises(InputError, match="manifest.json is there already"):
        Owned(tmp_path, "prepare").check(["manifest.json"])


def linked(path, target):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def test_links_are_not_followed(run, world, tmp_path):
    assert run(*COMMANDS["prepare"](world, tmp_path / "made"), "--shard-size=3") is None
    fill(tmp_path / "victim", ["folder/file", "folder/0.feather"])
    shutil.copy(tmp_path / "made/manifest.json", tmp_path / "victim/file")
    before = contents(tmp_path / "victim")

    def refused(name, folder, *command):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "copy", symlinks=True)
        (tmp_path / "copy" / name).parent.mkdir(exist_ok=True)
        linked(tmp_path / "copy" / name, tmp_path / "victim" / ("folder" if "." not in name else "file"))
        assert "is a symbolic link" in run(*command), name
        assert contents(tmp_path / "victim") == before, name

    out = tmp_path / "copy"
    for name in ("00001.tfrecord", "00001.tfrecord.part", "bad_samples.jsonl", "manifest.json", "manifest.jsonl"):
        refused(name, tmp_path / "made", *COMMANDS["prepare"](world, out), "--shard-size=3")
    for name in ("metrics.jsonl", "bad_samples.jsonl", "curves.png", "checkpoints"):
        refused(name, world / "run", *COMMANDS["train"](world, out))
    for name in ("eval.json", "eval"):
        refused(name, world / "run", *COMMANDS["eval"](world, out))
    assert run(*COMMANDS["orbax"](world, tmp_path / "export")) is None
    for name in ("README.md", "variables"):
        refused(name, tmp_path / "export", *COMMANDS["orbax"](world, out))
    (tmp_path / "empty").mkdir()
    refused("photos.npz.parts", tmp_path / "empty", *COMMANDS["embed"](world, out))
    downloaded(world, tmp_path / "tars")
    for name in ("00001.tar", "00001_stats.json", "_tmp", "_download", "_download/img2dataset.log"):
        refused(name, tmp_path / "tars", *COMMANDS["download"](world, out), "--shard-size=3")


# Downloads: what img2dataset does is simulated here, and real in tests/input_pipeline/test_img2dataset.py.


def downloaded(world, out, finished=(0, 1, 2)):
    """Has the list downloaded, as img2dataset leaves it: the shards in `finished`, and of the next one a beginning."""

    def leaves(python, arguments, environment, out_dir, log, total):
        for shard in range(3):
            if shard <= max(finished) + 1 and not (out_dir / f"{shard:05d}_stats.json").exists():
                (out_dir / f"{shard:05d}.tar").write_text(f"tar {shard}")
                (out_dir / f"{shard:05d}.parquet").write_text(f"parquet {shard}")
            if shard in finished:
                stats = {"count": min(3, 7 - 3 * shard), "successes": 1, "status_dict": {"success": 1}}
                (out_dir / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
        (out_dir / "_tmp").mkdir(exist_ok=True)
        (out_dir / "_tmp/2.feather").write_text("rows")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "_run", leaves)
        patch.setattr(download, "find_python", lambda env: sys.executable)
        options = download._flags().parse_args([str(world / "list.tsv"), str(out), "--shard-size=3"])
        return download.download(options.urls, options.out_dir, options)


@pytest.mark.parametrize("marker", [True, False], ids=["marked", "of before"])
def test_a_download_resumes_next_to_files_of_others(marker, run, world, tmp_path):
    out = tmp_path / "out"
    downloaded(world, out, finished=(0,))
    assert not (out / "00001.tar").exists() and not (out / "_tmp").exists()  # the beginning of a shard
    (out / "00001.tar").write_text("half of it")  # as a kill leaves it
    (out / "_tmp").mkdir()
    (out / "_tmp/1.feather").write_text("rows")
    if not marker:
        (out / MARKER).unlink()
    mine = ["mine.tar", "99999.tar", "x.parquet", "notes.part", "_download/notes.txt"]
    before = contents(fill(out, mine))
    counts, total = downloaded(world, out)
    assert total == 7 and counts["images"] == 3 and not counts["shards not finished"]
    after = contents(out)
    assert {name: after[name] for name in (*mine, "00000.tar")} == {name: before[name] for name in (*mine, "00000.tar")}
    assert after["00001.tar"] == b"tar 1" and "_tmp" not in after and MARKER in after
    # What img2dataset would trip over, or remove.
    for name, says in (("x_stats.json", "in img2dataset's way"), ("_tmp/precious", "_tmp/precious would be removed")):
        before = contents(fill(out, [name]))
        with pytest.raises(InputError, match=says):
            downloaded(world, out)
        assert contents(out) == before
        (out / name).unlink()
