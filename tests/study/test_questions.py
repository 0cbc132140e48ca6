"""Conditions, contrasts and their corrected p; the world whose truth is known."""

import json

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from input_pipeline import graded, shapes
from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.study import measure, questions, report
from rankclip_jax.study.arms import Arm, arms_of, config_of
from rankclip_jax.study.data import Pairs, read_pairs, spoiled, truth_of
from rankclip_jax.study.runs import Study

TWO = {"objectives": {"clip": {"objective": "clip"}, "rankclip": {"objective": "rankclip"}}}
CONDITIONS = {"clean": {"study": {"mismatched": 0.0}}, "noisy": {"study": {"mismatched": 0.4}, "objectives": ["clip"]}}


def config(**study):
    return configs.complete({"data": {"format": "shapes", "train": 8, "val": 4}, "study": TWO | study})


def run(condition, objective, seed, value):
    final = {"zero_shot/seen": value}
    curve = [final | {"step": 1}]
    return Arm(condition, objective)._asdict() | dict(seed=seed, lr=1e-3, seconds=1.0, final=final, curve=curve)


def test_a_condition_changes_what_it_names_and_trains_what_it_lists():
    made = config(conditions=CONDITIONS, mismatched=0.2)
    arms = arms_of(made)
    assert [str(arm) for arm in arms] == ["clean/clip", "clean/rankclip", "noisy/clip"]
    assert [config_of(made, arm).study.mismatched for arm in arms] == [0.0, 0.0, 0.4]
    assert config_of(made, arms[1]).loss.objective == "rankclip" and config_of(made, arms[1]).data.train == 8
    assert [str(arm) for arm in arms_of(config())] == ["clip", "rankclip"]


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"conditions": {"a": {"objectives": ["klip"]}}}, "conditions.a.objectives: unknown objective 'klip'"),
        ({"conditions": {"a": {"model": {"image_size": 64}}}}, "conditions.a changes the network"),
        ({"conditions": {"a": {"data": {"mean": (0.5, 0.5, 0.5)}}}}, "conditions.a changes the network"),
        ({"conditions": {"a": {"epochs": 1}}}, "would train without in_modal, cross_modal, whose ramp begins"),
        ({"conditions": {"a": {"steps": 5}}}, "config.steps=5 is not for a study, which trains for config.epochs"),
        ({"conditions": {"a": {"init_from": "x"}}}, "config.init_from='x' is not for a study, which trains from"),
        ({"conditions": {"a": {"data": {"two_views": True}}}}, "config.data.two_views=True is not for a study"),
        ({"conditions": {"a": {"data": {"resize": "host"}}}}, "config.data.resize='host' is not for a study"),
        ({"conditions": {"a": {"data": {"shuffle": "blocks"}}}}, "config.data.shuffle='blocks' is not for a study"),
        ({"conditions": {"a": {"sharding": "fsdp"}}}, "config.sharding='fsdp' is not for a study, which trains on one"),
        ({"conditions": {"a": {"eval": {"every_epochs": None}}}}, "config.eval.every_epochs=None. Expected a number"),
        ({"conditions": {"a": {"eval": {"diagnostics": True}}}}, "config.eval.diagnostics=True is not for a study"),
        (
            {"conditions": {"a": {"eval": {"retrieval": {"x": {"format": "shapes", "path": 8}}}}}},
            "config.eval.retrieval={.*} is not for a study, which evaluates data.val and eval.zero_shot",
        ),
        ({"conditions": {"a": {"checkpoint": {"best": "val/clip"}}}}, "config.checkpoint.best='val/clip' is not for"),
        ({"conditions": {"a": {"profile": (1, 2)}}}, r"config.profile=\(1, 2\) is not for a study"),
        ({"conditions": {"a": {"data": {"val": 9}}}}, "conditions.a changes config.data.val, which is one"),
        ({"conditions": {"a": {"data": {"squash": "bicubic"}}}}, "conditions.a changes config.data.squash, which"),
        ({"conditions": {"a": {"tokenizer": {"vocab_size": 300}}}}, "conditions.a changes config.tokenizer, which"),
        ({"conditions": {"a": {"optim": {"rate": 1}}}}, "optim.rate"),
        ({"conditions": {"a": {"study": {"seeds": 2}}}}, "conditions.a changes config.study.seeds, which is one for"),
        ({"conditions": {"a": {"study": {"probe_l2": 2.0}}}}, "conditions.a changes config.study.probe_l2, which is"),
        (
            {"lrs": (1e-3, 1e-2), "conditions": {"a": {"optim": {"lr": 1.0}}}},
            "conditions.a changes config.optim.lr, which is chosen from config.study.lrs",
        ),
        ({"conditions": {"a": 3}}, "conditions.a=3. Expected changed groups of the configuration"),
        ({"objectives": {"clip": 3}}, "objectives.clip=3. Expected changed keys of config.loss"),
    ],
)
def test_wrong_conditions_say_what_is_wrong(study, message):
    made = config(**study)
    with pytest.raises(InputError, match=message):
        [config_of(made, arm) for arm in arms_of(made)]


def test_a_formula_is_signed_arms():
    arms = [Arm("a", "clip"), Arm("a", "rank"), Arm("", "clip")]
    assert questions.terms("a/rank - a/clip", arms) == [(1, arms[1]), (-1, arms[0])]
    assert questions.terms(" -clip + a/clip ", arms) == [(-1, arms[2]), (1, arms[0])]
    for wrong, why in (("a/rank a/clip", "Expected a"), ("a/rank -", "Expected a"), ("b/clip", "no arm 'b/clip'"),
                       (" ", "Expected a"), (3, "no arm '3'")):  # fmt: skip
        with pytest.raises(InputError, match=why):
            questions.terms(wrong, arms)


def test_a_contrast_is_taken_seed_by_seed():
    rng = np.random.default_rng(0)
    luck, gain = rng.normal(0, 9, 5), rng.normal(1, 0.1, 5)
    runs = [run("a", "clip", s, luck[s]) for s in range(5)]
    runs += [run("a", "rankclip", s, luck[s] + gain[s]) for s in range(4)]
    asked = {"q": {"metric": "zero_shot/seen", "contrasts": {"d": "a/rankclip - a/clip"}}}
    made = config(questions=asked, conditions={"a": {}})
    (found,) = questions.answers(made.study.questions, arms_of(made), runs)
    assert found.estimate.n == 4 and found.estimate.mean == pytest.approx(gain[:4].mean())
    assert found.p == pytest.approx(scipy.stats.ttest_rel(luck[:4] + gain[:4], luck[:4]).pvalue) == found.holm


def test_the_seed_that_chooses_rates_is_none_of_the_reported(tmp_path):
    with pytest.raises(InputError, match="search_seed=4 is a seed of the study. Expected >= 5$"):
        Study(config(lrs=(1e-3, 1e-2), search_seed=4, more_seeds={"clip": 5}), tmp_path)


@pytest.mark.parametrize("asked", [3, {"metric": "m"}, {"contrasts": {}}, {"metric": "m", "contrasts": "clip"}])
def test_what_is_no_question_is_said_before_anything_is_trained(asked, tmp_path):
    with pytest.raises(InputError, match=r'^config\.study\.questions\.q is not a question\. Expected {"metric": '):
        Study(config(questions={"q": asked}), tmp_path)


def test_a_metric_that_was_not_measured_is_named():
    made = config(questions={"q": {"metric": "zero_shot/sen", "contrasts": {"d": "rankclip - clip"}}})
    with pytest.raises(InputError, match=r"questions\.q\.metric='zero_shot/sen' is not measured; the nearest"):
        questions.answers(made.study.questions, arms_of(made), [run("", name, 0, 0.5) for name in ("clip", "rankclip")])


def test_holm_by_hand():
    # Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2 = 0.06, 0.04 x 1 -> not below 0.06.
    assert questions.holm([0.04, 0.01, None, 0.03, 0.02]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06])
    assert questions.holm([0.9, 0.8]) == [1.0, 1.0] and questions.holm([]) == []


def test_the_report_answers_first(tmp_path):
    runs = [run(c, o, s, 0.1 * s + (o == "rankclip")) for c in ("a", "b") for o in TWO["objectives"] for s in range(3)]
    asked = {"q": {"metric": "zero_shot/seen", "contrasts": {"gain, a": "a/rankclip - a/clip"}}}
    made = config(questions=asked, conditions={"a": {}, "b": {}})
    text = report.write(tmp_path, made, runs)
    assert "| q | gain, a | zero_shot/seen | **+100.0 ± 0.0** | 3 | 0 | 0 |" in text
    assert text.index("| q |") < text.index("## a") < text.index("## b")
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["answers"][0]["estimate"]["mean"] == pytest.approx(1) and set(saved["results"]) == {"a", "b"}
    with Image.open(tmp_path / "answers.png") as picture:
        assert picture.width == 700 and np.ptp(np.asarray(picture.convert("L"))) > 200


def _pairs(count):
    canvas = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    return Pairs(canvas, np.full((count, 2), 4, np.int32), [str(i) for i in range(count)])


def test_mismatched_pairs_exchange_captions_and_duplicates_nearly_repeat():
    clean = _pairs(200)
    noisy = spoiled(clean, 0.2, 0.1)
    moved = [i for i in range(200) if noisy.captions[i] != str(i) and (noisy.canvas[i] == clean.canvas[i]).all()]
    repeated = [i for i in range(200) if noisy.captions[i] != str(i) and i not in moved]
    assert len(moved) == 40 and sorted(noisy.captions[i] for i in moved) == sorted(str(i) for i in moved)
    assert len(repeated) == 20
    for i in repeated:
        difference = noisy.canvas[i].astype(int) - int(noisy.captions[i])
        assert abs(difference).max() <= 8 and np.ptp(difference) > 0
        other = int(noisy.captions[i])  # which is still there
        assert noisy.captions[other] == str(other) and np.array_equal(noisy.canvas[other], clean.canvas[other])
    assert len(set(noisy.captions)) == 200 - 20
    assert len(set(spoiled(clean, 0.9, 0.1).captions)) == len(set(spoiled(clean, 0.0, 0.9).captions)) + 160 == 180
    same = spoiled(clean, 0.0, 0.0)
    assert same.captions == clean.captions and np.array_equal(same.canvas, clean.canvas)
    with pytest.raises(InputError, match="more than all pairs"):
        spoiled(clean, 0.6, 0.5)
    with pytest.raises(InputError, match="or duplicates are all"):
        spoiled(clean, 0.0, 1.0)


def test_the_truth_counts_shared_attributes():
    named = [shapes.scene("val", i)[0] for i in range(12)]
    shared = [[sum(getattr(a, n) == getattr(b, n) for n in graded.ATTRIBUTES) for b in named] for a in named]
    stated = configs.complete({"data": {"format": "shapes", "train": 8, "val": "stated:12"}})
    assert np.allclose(truth_of(stated.data, 12) * 6, shared)
    assert truth_of(config().data, 12) is None


def test_captions_say_more_or_less_and_never_a_wrong_thing():
    told = read_pairs(config().data, "graded:300", side=8, canvas=8, split="train").captions
    of = {word: name for name, words in graded.SYNONYMS.items() for word in words}
    said = []
    for i, caption in enumerate(told):
        seen, _ = shapes.scene("train", i)
        words = [of[word] for word in caption.split() if word in of]
        assert set(words) <= {seen.colour, seen.shape, seen.size}, caption
        said.append(len(set(words)))
    assert [said.count(n) > 60 for n in (1, 2, 3)] == [True] * 3
    stated = graded.statement("val", 3)
    seen, _ = shapes.scene("val", 3)
    assert all(word in stated for word in (seen.colour, seen.shape, seen.size, seen.background, seen.row))


def test_graded_measures_against_scipy_and_by_hand():
    rng = np.random.default_rng(1)
    z, truth = rng.normal(size=(7, 5)), rng.integers(0, 7, (7, 7)) / 6
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    model = measure.Embedded(images=lambda x: z, texts=lambda x: z[::-1], scale=1.0)
    found = measure.graded(model, None, ["a"] * 7, truth)
    scores, text = z @ z.T, z @ z[::-1].T
    others = [[j for j in range(7) if j != i] for i in range(7)]
    mean = np.mean([scipy.stats.spearmanr(scores[i, o], truth[i, o])[0] for i, o in enumerate(others)])
    assert found["truth/image_image"] == pytest.approx(mean)
    values = []
    for i, o in enumerate(others):
        gains = 2 ** (6 * truth[i, o]) - 1
        order = np.argsort(-text[i, o])
        dcg = lambda g: sum(x / np.log2(k + 2) for k, x in enumerate(g[:10]))  # noqa: E731
        values.append(dcg(gains[order]) / dcg(sorted(gains, reverse=True)))
    assert found["retrieval/ndcg10_image_to_text"] == pytest.approx(np.mean(values))
