"""What is ours in folders of before there were markers, in runs that resume, and where checkpoints are cleared away."""

import json
import re
import shutil

import pytest

from rankclip_jax.common import files
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.ownership import MARKER, Owned
from rankclip_jax.inference import collection, store
from rankclip_jax.study import report as study_report
from rankclip_jax.train import __main__ as train
from rankclip_jax.weights import checkpoint, export, pretrained
from rankclip_jax.weights.saving import Checkpoints
from tests.commands.test_ownership import BESIDE, COMMANDS, training
from tests.support.foreign import contents, fill
from tests.weights.test_checkpoint import abstract, config, save, saved_steps, state_of


def test_prepared_folders_of_before_go_on(run, world, tmp_path):
    command = (*COMMANDS["prepare"](world, tmp_path / "out"), "--shard-size=3")
    assert run(*command) is None
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / MARKER).unlink()
    (tmp_path / "out/00001.tfrecord").write_bytes(b"damaged")
    (tmp_path / "out/00002.tfrecord.part").write_bytes(b"half of it")
    assert run(*command) is None
    assert contents(tmp_path / "out") == whole


def test_parts_of_before_go_on(run, world, tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "PART", 2)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            run(*COMMANDS["embed"](world, tmp_path))
    (tmp_path / "photos.npz.parts" / MARKER).unlink()
    (tmp_path / "photos.npz.parts/6.npz").rename(tmp_path / "photos.npz.parts/6.unfinished")
    assert run(*COMMANDS["embed"](world, tmp_path)) is None
    assert [path.name for path in tmp_path.iterdir()] == ["photos.npz"]
    assert store.read(tmp_path / "photos.npz").rows.tolist() == list(range(7))


def test_workdirs_and_studies_of_before_are_recognised(world, tmp_path):
    workdir = shutil.copytree(world / "run", tmp_path / "run")
    fill(workdir, ["eval/zero_shot_seen.npz", "eval/notes.txt", "eval.json", "train.log", "results.json"])
    Owned(workdir, "train").claim(["config.json", "metrics.jsonl", "checkpoints", "curves.png"])
    Owned(workdir, "eval").claim(["eval.json", "eval/zero_shot_seen.npz"])
    Owned(workdir, "launch").claim(["train.log"])
    for command, name in (("eval", "eval/notes.txt"), ("study", "results.json"), ("convert", "config.json")):
        with pytest.raises(InputError, match=f"{name} is there already, and {command} did not write it"):
            Owned(workdir, command).claim([name])
    fill(workdir, ["eval/geometry_x.npz"])  # a user's, since it has a marker
    with pytest.raises(InputError, match="did not write it"):
        Owned(workdir, "eval").claim(["eval/geometry_x.npz"])

    fill(tmp_path / "study", [name for name in study_report.FILES if name != "answers.png"])  # which is younger
    with pytest.raises(InputError, match="did not write it"):
        Owned(tmp_path / "study", "study").claim(study_report.FILES)
    (tmp_path / "study/runs").mkdir()
    made = {"objective": "clip", "lr": 0.1, "seed": 0, "config": {}}
    (tmp_path / "study/runs/clip-lr0.1-seed0.json").write_text(json.dumps(made))
    Owned(tmp_path / "study", "study").claim(study_report.FILES)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_training_works_and_resumes_beside_files_of_others_also_a_run_of_before(run, tmp_path, capsys):
    before = contents(fill(tmp_path / "run", BESIDE))
    assert run(train, *training(tmp_path / "run")) is None
    assert contents(tmp_path / "run").items() >= before.items()
    for name in (MARKER, "curves.png"):
        (tmp_path / "run" / name).unlink()
    there = tmp_path / "run/checkpoints"
    (there / "4").rename(there / "4.orbax-checkpoint-tmp")  # a save that was cut off
    mine = [*BESIDE, "checkpoints/notes.txt", "checkpoints/my.orbax-checkpoint-tmp/x"]
    before = contents(fill(tmp_path / "run", mine))
    assert run(train, *training(tmp_path / "run")) is None
    assert "resuming from step 2 of 4" in capsys.readouterr().out
    after = contents(tmp_path / "run")
    assert all(after[name] == before[name] for name in mine)
    assert "checkpoints/4.orbax-checkpoint-tmp" not in after and "checkpoints/4" in after and "curves.png" in after


def test_only_saves_of_ours_are_cleared_away(tmp_path):
    save(tmp_path, {1: state_of(1), 2: state_of(2)})
    there = tmp_path / "checkpoints"
    mine = ["notes.txt", "my.orbax-checkpoint-tmp/x", "7-old.orbax-checkpoint-tmp/x", "1/notes.txt", "best/model.pt"]
    before = {name: contents(fill(there, mine))[name] for name in mine}
    shutil.copytree(there / "2", there / "3.orbax-checkpoint-tmp")
    (there / "4.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path, config(keep=1), start=2)
    for step in (3, 4, 5):
        checkpoints.save(step, state_of(step), step)
    checkpoints.close()
    after = contents(there)
    assert saved_steps(tmp_path) == [1, 5]  # 1 holds a file of somebody else
    assert {name: after[name] for name in mine} == before
    assert not [name for name in after if re.match(r"\d+\.orbax", name)]


@pytest.mark.parametrize("name", ["6.orbax-checkpoint-tmp/x", "9/model.pt"])
def test_a_strangers_folder_in_the_way_of_a_save_is_refused(name, tmp_path):
    save(tmp_path, {1: state_of(1)})
    before = contents(fill(tmp_path / "checkpoints", [name]))
    with pytest.raises(InputError, match=f"{name.split('/')[0]} is not a checkpoint of this run, and in the way"):
        Checkpoints(tmp_path, config(), start=1)
    assert contents(tmp_path / "checkpoints") == before
    assert checkpoint.restore(tmp_path, config(), abstract(state_of(0))).step == 1


def test_exports_are_read_back_after_being_replaced(world, tmp_path):
    read = pretrained.read(world / "run")
    for layout in (*export.LAYOUTS, *export.LAYOUTS):
        export.write(read, tmp_path / layout, layout)
        assert pretrained.read(tmp_path / layout).config == read.config
    shutil.copytree(tmp_path / "orbax/variables", tmp_path / "orbax/variables.orbax-checkpoint-tmp")  # of a kill
    export.write(read, tmp_path / "orbax", "orbax")
    assert not (tmp_path / "orbax/variables.orbax-checkpoint-tmp").exists()


def test_what_a_kill_leaves_of_the_first_marker_is_no_strangers(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.whole(tmp_path / MARKER) as part:
        raise KeyboardInterrupt
    part.write_text("half")  # which a SIGKILL would leave
    Owned(tmp_path, "embed", alone="move it").claim(["a.npz"])
    (tmp_path / MARKER).unlink()
    (tmp_path / ".a.part").write_text("mine")
    with pytest.raises(InputError, match=r"holds files that embed did not write \(\.a\.part \.\.\.\); move it"):
        Owned(tmp_path, "embed", alone="move it")
