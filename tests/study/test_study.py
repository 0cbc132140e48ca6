import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.config.keys import BEFORE
from rankclip_jax.losses import clip_loss, gradient_cosine, rank_consistency, term_gradients
from rankclip_jax.parallel.mesh import make_mesh
from rankclip_jax.study import questions, report, results, statistics
from rankclip_jax.study.arms import arms_of, config_of
from rankclip_jax.study.batches import epoch_order, random_window
from rankclip_jax.study.runs import Study
from rankclip_jax.study.training import Job, Programs
from rankclip_jax.train.session import build_model
from tests.support.made_models import made_state

REPO = Path(__file__).parents[2]
SMOKE = [
    "batch_size=16",
    "epochs=2",
    "data.train=48",
    "data.val=24",
    "model.image_size=16",
    "model.vision={'patch_size': 8, 'width': 16, 'layers': 1, 'heads': 2}",
    "model.text={'width': 16, 'layers': 1, 'heads': 2}",
    "optim.warmup_steps=2",
    "eval.zero_shot={'seen': {'format': 'shapes', 'path': 'seen:112'}, 'held_out': {'format': 'shapes', 'path': "
    "'held_out:16'}}",
    "study.objectives={'clip': {'objective': 'clip'}, 'rankclip': {'objective': 'rankclip', 'schedule': 'constant', "
    "'lambda_cross': 0.5, 'terms': {'in_modal': {'weight': 0.5, 'schedule': 'ramp'}}}}",
    "study.more_seeds={'clip': 2}",
    "study.seeds=1",
    "study.select_share=0.5",
    "study.pairs=16",
    "study.probe_l2=1.0",  # found in fewer steps than with the usual one
]


def smoke(*more):
    return configs.load(str(REPO / "configs" / "study_shapes.py"), [*SMOKE, *more])


def test_estimates_are_student_t_intervals():
    values = [0.1, 0.4, 0.25, 0.35, 0.2]
    low, high = scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values))
    found = statistics.estimate(values)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    # By hand: t(0.975, 1) = 12.706, and s / sqrt(2) = 0.5 for values one apart.
    assert statistics.estimate([1.0, 2.0]) == (1.5, pytest.approx(12.7062 * 0.5, rel=1e-5), 2)
    assert statistics.estimate([3.0]) == (3.0, None, 1)


def test_differences_are_paired_by_seed():
    ours, theirs = {0: 0.5, 1: 0.9, 2: 0.1, 7: 99.0}, {2: 0.0, 1: 0.8, 0: 0.4, 3: -99.0}
    found = statistics.paired(ours, theirs)
    assert found.mean == pytest.approx(0.1) and found.n == 3
    assert found.half == pytest.approx(0, abs=1e-9)  # the seeds' own luck, far larger, cancels
    assert statistics.paired({0: 1.0}, {1: 1.0}) is None


def test_a_difference_is_bold_where_its_interval_excludes_zero():
    cell = lambda mean, half: report._cell("geometry/x", {"mean": mean, "half": half, "n": 3}, signed=True)  # noqa: E731
    assert cell(0.5, 0.4) == "**+0.500 ± 0.400**" and cell(-0.5, 0.4) == "**-0.500 ± 0.400**"
    assert cell(0.4, 0.5) == "+0.400 ± 0.500" and cell(0.5, None) == "+0.500"


def test_an_epoch_has_every_row_once_and_each_another_order():
    key = jax.random.key(3)
    first, second = (np.asarray(epoch_order(key, epoch, 50, 16)) for epoch in (0, 1))
    assert first.shape == (3, 16) and len(np.unique(first)) == 48 and not np.array_equal(first, second)
    assert sorted(np.ravel(epoch_order(key, 0, 48, 16))) == list(range(48))


def test_windows_are_whole_inside_and_of_the_area_asked_for():
    keys = jax.random.split(jax.random.key(0), 400)
    for size in ((30, 30), (20, 44), (6, 60)):
        draw = functools.partial(random_window, size_2=jnp.array(size), scale=(0.3, 0.6))
        windows = np.asarray(jax.vmap(draw)(keys))
        assert np.array_equal(windows, np.round(windows)) and windows.min() >= 0
        assert (windows[:, :2] + windows[:, 2:] <= np.array(size)).all()
        area, ratio = windows[:, 2:].prod(axis=1) / np.prod(size), windows[:, 3] / windows[:, 2]
        assert ratio.min() > 0.6 and ratio.max() < 1.6  # 3/4 to 4/3, rounded to whole pixels
        if size == (30, 30):
            assert 0.27 < area.min() < 0.35 and 0.55 < area.max() < 0.64
            assert len(np.unique(windows[:, :2], axis=0)) > 100
        if size == (6, 60):  # 4/3 of the height is all that fits: the central window
            assert (windows == [0, 26, 6, 8]).all()


@pytest.mark.slow
def test_term_gradients_are_those_of_the_terms():
    keys = jax.random.split(jax.random.key(0))
    z = tuple(x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (jax.random.normal(k, (12, 8)) for k in keys))
    found = {k: float(v) for k, v in jax.jit(term_gradients)(*z, 5.0).items()}

    @jax.jit
    def each(z):
        terms = [lambda z: clip_loss(*z, 5.0), *(lambda z, i=i: rank_consistency(*z, 5.0)[i] for i in (0, 1))]
        return [jax.grad(term)(z) for term in terms]

    clip, *both = each(z)
    clip, inner, cross = (np.concatenate([np.ravel(g) for g in grads]).astype(np.float64) for grads in (clip, *both))
    for a, b, name in ((clip, inner, "clip_in_modal"), (clip, cross, "clip_cross_modal")):
        expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert found[f"cosine_{name}"] == pytest.approx(expected, abs=1e-5)
    assert found["norm_clip"] == pytest.approx(np.linalg.norm(clip), rel=1e-5)
    # The sum of the two ranking terms, which gradient_cosine compares, follows from the parts.
    total = inner + cross
    expected = clip @ total / np.linalg.norm(clip) / np.linalg.norm(total)
    assert float(jax.jit(gradient_cosine)(*z, 5.0)) == pytest.approx(expected, abs=1e-5)


def test_a_term_may_follow_a_schedule():
    terms = {"cyclic_in_modal": {"weight": 0.25, "schedule": "ramp"}}
    assert configs.complete({"loss": {"terms": terms}}).loss.terms.cyclic_in_modal.weight == 0.25
    with pytest.raises(InputError, match=r"terms.clip=\{.*\}. Expected a number, or"):
        configs.complete({"loss": {"terms": {"clip": {"weight": 1.0, "schedule": "linear"}}}})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return Study(smoke(), tmp_path_factory.mktemp("study"))


def _train(study, config, *together):
    """`together`: the jobs of each call -> (state, metrics) of each job, a dict for each call."""
    programs = study._compiled(config, 48)
    data = study._arrays(config)
    every = []
    for jobs in together:
        every.append(found := {})
        note = lambda job, state, metrics, found=found: found.update({job: (state(), metrics)})  # noqa: E731
        programs.train(jobs, data, 2, note)
    return every


@pytest.mark.slow
def test_seeds_under_vmap_are_the_seeds_one_by_one(study, compiled_once):
    jobs = [Job(1e-3, 0), Job(1e-3, 1), Job(2e-3, 1)]
    together, *alone = _train(study, study._configs[study.arms[1]], jobs, *([job] for job in jobs))  # rankclip
    flat = {}
    for job, one in zip(jobs, alone, strict=True):
        (a, a_metrics), (b, b_metrics) = together[job], one[job]
        assert a_metrics["loss"] == pytest.approx(b_metrics["loss"], rel=1e-4)
        flat[job], other = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.params)]) for s in (a, b))
        # Sums are taken in another order, and Adam's first steps follow the sign of what may be rounding noise.
        assert np.quantile(abs(flat[job] - other), 0.99) < 2e-4
    assert all(np.median(abs(flat[a] - flat[b])) > 1e-4 for a, b in ((jobs[0], jobs[1]), (jobs[1], jobs[2])))


@pytest.mark.slow
def test_a_scheduled_term_ramps_in(study):
    """In the first of two epochs the ramp is 0, in the second 2: then the weight is that of a constant 2 x 0.5."""
    (found,) = _train(study, study._configs[study.arms[1]], [Job(1e-3, 0)])
    metrics = found[Job(1e-3, 0)][1]
    expected = metrics["clip"] + metrics["rank_in_modal"] + 0.5 * metrics["rank_cross_modal"]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_study_trains_with_whole_images(study):
    vision = study.config.model.vision.to_dict() | {"patch_dropout": 0.5}
    config = configs.complete(study.config.to_dict() | {"model": {"name": study.config.model.name, "vision": vision}})
    with pytest.raises(InputError, match=r"config\.model\.vision\.patch_dropout: expected 0"):
        Programs(build_model(config, study.tokenizer), config, 48)


@pytest.mark.slow
def test_a_study_resumes_where_it_stopped_and_reports(study, monkeypatch, capsys, compiled_once):
    class StoppedError(Exception):
        pass

    trained = []
    train = Study._train

    def until(self, programs, config, data, jobs, full):
        if len(trained) == 3:
            raise StoppedError
        trained.append((config.loss.objective, jobs, full))
        return train(self, programs, config, data, jobs, full)

    monkeypatch.setattr(Study, "_train", until)
    with pytest.raises(StoppedError):
        study.run()
    files = sorted(study.folder.rglob("*.json"))
    assert len(files) == 3  # of clip: two rates tried, one seed of two
    before = [f.read_text() for f in files]
    monkeypatch.setattr(Study, "_train", train)
    found = study.run()
    assert "7/7  runs rankclip seed 0" in capsys.readouterr().out
    assert [f.read_text() for f in files] == before  # what was done is not done again
    assert [(r["objective"], r["seed"]) for r in found] == [("clip", 0), ("clip", 1), ("rankclip", 0)]
    assert all(len(r["curve"]) == 2 and 0 <= r["final"]["zero_shot/held_out"] <= 1 for r in found)
    text = report.write(study.folder, study.config, found)
    assert (study.folder / "curves.png").stat().st_size > 5000 and (study.folder / "dynamics.png").exists()
    written = json.loads((study.folder / "results.json").read_text())["results"]
    clip, rank = ([r["final"]["geometry/modality_gap"] for r in found if r["objective"] == o] for o in written)
    assert written["clip"]["metrics"]["geometry/modality_gap"]["mean"] == pytest.approx(np.mean(clip))
    difference = written["rankclip"]["difference"]["geometry/modality_gap"]
    assert difference["n"] == 1 and difference["mean"] == pytest.approx(rank[0] - clip[0])
    assert "| clip | 2 |" in text and "| rankclip | 1 |" in text and "| rankclip - clip | " in text
    # The rate is the one whose search run did best.
    searched = [r for r in (json.loads(file.read_text()) for file in files) if r["seed"] == 1000]
    scores = {r["lr"]: r["curve"][-1]["zero_shot/seen"] for r in searched}
    assert found[0]["lr"] == max(scores, key=lambda lr: (scores[lr], -lr)) and len(scores) == 2
    # Another configuration is refused, not mixed in.
    with pytest.raises(InputError, match=r"another configuration \(optim\)"):
        Study(smoke("optim.b1=0.8"), study.folder).run()


def test_a_run_from_before_there_were_some_keys_is_read(tmp_path):
    wanted = results.identity(smoke())
    old = json.loads(json.dumps(wanted))
    for key in BEFORE:
        group, name = key.split(".")
        del old[group][name]
    kept = {"objective": "clip", "lr": 1.0, "seed": 0, "seconds": 1.0, "curve": [], "final": {}}
    results.write(tmp_path / "run.json", kept | {"config": old})
    assert results.read(tmp_path / "run.json", wanted) == kept | {"condition": ""}


def test_models_are_measured_with_the_pixels_that_they_were_trained_with(tmp_path):
    mean, std = np.array([0.9, 0.1, 0.5], np.float32), np.array([0.5, 0.2, 0.3], np.float32)
    made = Study(smoke(f"data.mean={tuple(mean.tolist())}", f"data.std={tuple(std.tolist())}"), tmp_path)
    model = made._model(made._configs[made.arms[0]])
    state = made_state(model, optax.identity(), make_mesh({"data": 1}, jax.devices()[:1]))
    side = model.config.vision.image_size
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3)).astype(np.uint8)
    encode = jax.jit(lambda params, x: model.apply({"params": params}, x, method="encode_image"))
    expected = encode(state.params, (images / np.float32(255) - mean) / std)
    assert np.allclose(made._embedder.of(state).images(images), expected, atol=1e-5)


def test_wrong_studies_say_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match=r"config\.study\.objectives is empty"):
        Study(configs.complete({"data": {"format": "shapes", "train": 10, "val": 5}}), tmp_path)
    with pytest.raises(InputError, match=r"more_seeds: unknown objective .klip.. Expected one of clip, rankclip"):
        Study(smoke("study.more_seeds={'klip': 3}"), tmp_path)
    with pytest.raises(InputError, match=r"baseline: unknown objective .klip.. Expected one of clip, rankclip"):
        Study(smoke("study.baseline=klip"), tmp_path)
    with pytest.raises(InputError, match="objectives.x=3. Expected changed keys of config.loss"):
        Study(smoke("study.objectives.x=3"), tmp_path)
    with pytest.raises(InputError, match="config.loss.decai does not exist"):
        Study(smoke("study.objectives.x.decai=log"), tmp_path)
    with pytest.raises(InputError, match="fewer than a batch"):
        Study(smoke("batch_size=64"), tmp_path)
    assert math.isclose(sum(configs.load(str(REPO / "configs/study_shapes.py")).study.lrs), 4e-3)


@pytest.mark.parametrize("name", ["study_shapes", "study_cifar10"])
def test_every_objective_of_the_configs_is_complete(name):
    config = configs.load(str(REPO / "configs" / f"{name}.py"))
    for fields in config.study.objectives.values():
        configs.complete({"loss": fields.to_dict()})
    assert config.study.baseline in config.study.objectives and config.study.more_seeds.rankclip == 5


@pytest.mark.parametrize("name, arms", [("study_ranking", 21), ("study_cifar10_noise", 10)])
def test_every_arm_of_the_planned_studies_trains_as_long(name, arms):
    config = configs.load(str(REPO / "configs" / f"{name}.py"))
    pairs = lambda made: made.study.limit or int(made.data.train.removeprefix("graded:"))  # noqa: E731
    made = [config_of(config, arm) for arm in arms_of(config)]
    assert [each.epochs * (pairs(each) // each.batch_size) for each in made] == [2048] * arms
    assert {each.eval.every_epochs / each.epochs for each in made} == {1.0} and {each.optim.lr for each in made} == {
        {"study_ranking": 5e-4, "study_cifar10_noise": 1e-3}[name]
    }
    questions.check(config.study.questions, arms_of(config))


@pytest.mark.slow
def test_a_cell_of_the_planned_study_at_small_size(tmp_path, compiled_once):
    small = ["batch_size=16", "epochs=2", "eval.every_epochs=2", "data.train=graded:32", "data.val=stated:12"]
    small += ["study.seeds=2", "study.pairs=12", "study.limit=32", "optim.warmup_steps=1", "tokenizer.vocab_size=300"]
    small += [f"eval.zero_shot.{name}.path={name}:64" for name in ("seen", "held_out")]
    small += ["study.probe_l2=1.0", "model.vision.layers=1", "model.embed_dim=32"]
    config = configs.load(str(REPO / "configs" / "study_ranking.py"), small)
    asked = {"noise": {"metric": "zero_shot/seen", "contrasts": {"20 %": "base/rankclip - base/clip"}}}
    study = config.study.to_dict() | {"conditions": {"base": {"objectives": ["clip", "rankclip"]}}, "questions": asked}
    config = configs.complete(config.to_dict() | {"study": study})
    runs = Study(config, tmp_path).run()
    report.write(tmp_path, config, runs)
    final = {(run["objective"], run["seed"]): run["final"] for run in runs}
    gains = [final["rankclip", seed]["zero_shot/seen"] - final["clip", seed]["zero_shot/seen"] for seed in (0, 1)]
    (answer,) = json.loads((tmp_path / "results.json").read_text())["answers"]
    assert answer["estimate"]["n"] == 2 and math.isclose(answer["estimate"]["mean"], np.mean(gains), abs_tol=1e-12)
    assert {"truth/image_image", "retrieval/ndcg10_image_to_text", "linear_probe/seen"} <= final["clip", 0].keys()
