"""The report: one page that fetches nothing, shows what the files say, and survives what is wrong in them."""

import base64
import html.parser
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rankclip_jax import figures
from rankclip_jax.common.errors import InputError
from rankclip_jax.evaluation import results_file
from rankclip_jax.report import __main__ as report_main
from rankclip_jax.report import page, results, runs

EVIL = '</script><img src=x onerror="alert(1)">'


def jpeg():
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "JPEG")
    return base64.b64encode(out.getvalue()).decode()


def write_run(folder, *, seed=0, evil="a caption", steps=30):
    rng = np.random.default_rng(seed)
    (folder / "eval").mkdir(parents=True)
    rows = [{"step": s, "loss": 5 / s, "clip": 4 / s, "learning_rate": 1e-3, "seconds": s} for s in range(1, steps + 1)]
    rows[0]["start"] = {"date": "2026-11-26 10:33 UTC", "device": "8 x TPU v4", "parameters": 151_277_313, "steps": 60}
    rows += [{"step": steps, "val/clip": 1.5, "val/spearman_in_modal": 0.25, "zero_shot/toys/top1": 0.5 + seed / 10}]
    rows[-1]["counts"] = {"zero_shot/toys": {"n": 1234, "classes": 40}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"seed": seed, "loss": {"objective": "rankclip"}, "model": {"name": "RN-tiny"}}
    (folder / "config.json").write_text(json.dumps(config))
    results = {
        "step": steps,
        "zero_shot": {"toys": {"top1": 0.5 + seed / 10, "top3": 0.9, "mean_per_class": 0.4, "n": 1234, "classes": 40}},
        "robustness": {"odd toys": {"reference": 0.5, "shifted": 0.25, "drop": 0.25, "effective": 0.0123}},
        "retrieval": {"pairs": {"image_to_text_r1": 0.125, "text_to_image_r1": 0.375, "images": 8, "texts": 16}},
        "linear_probe": {"toys": {"top1": 0.75, "mean_per_class": 0.7, "l2": 0.316, "n": 1234}},
        "geometry": {"pairs": {"modality_gap": 0.8768, "n": 8}},
        "missing": {"zero_shot/gone": f"no such file: {evil}"},
    }
    (folder / "eval.json").write_text(json.dumps(results))
    np.savez(folder / "eval" / "zero_shot_toys.npz", classes=["ball", evil], confusion=np.array([[7, 3], [0, 10]]))
    shown = {"picture": jpeg(), "label": evil, "predicted": "ball"}
    (folder / "eval" / "examples_toys.json").write_text(json.dumps({"right": [shown], "wrong": [shown]}))
    (folder / "data.json").write_text(json.dumps({"train": {"samples": 12_800, "fingerprint": "0f"}, "val": None}))
    answers = [{"caption": evil, "right": True}, {"caption": "another", "right": False}]
    pictures = [{"picture": jpeg(), "right": False}, {"picture": jpeg(), "right": True}]
    gallery = {
        "image_to_text": [{"picture": jpeg(), "answers": answers}],
        "text_to_image": [{"caption": evil, "answers": pictures}],
    }
    (folder / "eval" / "retrieval_pairs.json").write_text(json.dumps(gallery))
    points = {"image": rng.normal(size=(8, 2)), "text": rng.normal(size=(8, 2)), "explained": np.array([0.5, 0.2])}
    histogram = {"edges": np.linspace(-1, 1, 61), "positive": np.eye(60, dtype=int)[50], "negative": np.arange(60)}
    np.savez(folder / "eval" / "geometry_pairs.npz", captions=[evil] * 8, **points, **histogram)
    bad = {"row": 3, "where": f"data.csv row 3: {evil}", "reason": "cut off"}
    (folder / "bad_samples.jsonl").write_text(json.dumps(bad) + "\n" + json.dumps(bad) + '\n{"row": 4, "whe')
    return folder


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text, of a page that must be well nested."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


def rendered(*folders):
    text = page.render([runs.read_run(folder) for folder in folders])
    return text, Page(text)


def test_every_section_shows_what_the_files_say(tmp_path):
    _, found = rendered(write_run(tmp_path / "first"))
    for words in (
        "Run: first", "Training", "CLIP term", "nats", "Zero-shot classification", "50.00 %", "1,234", "Robustness",
        "1.23 %", "Retrieval", "12.50 %", "37.50 %", "Linear probe", "0.316", "Rank agreement over time",
        "Rank agreement, image-image with text-text, validation", "0.877", "principal axis 2: 20% of variance",
        "30.00 %", "cut off", "zero_shot/gone", '"seed": 0', "151,277,313", "12,800 pairs", "8 x TPU v4", "00:00:30",
        "2026-11-26 10:33 UTC", "30 of 60", "taken for ball", "chance", "2.50 %", "7.50 %", "47.2 to 52.8",
    ):  # fmt: skip
        assert words in found.text, words
    bad_row = re.search(r"cut off(\d+)data.csv row 3", found.text)
    assert bad_row[1] == "2"  # the torn third line is left out


def test_drawings_are_of_the_evaluation_that_is_shown(tmp_path):
    folder = write_run(tmp_path / "first")
    results_file.add(folder / "eval.json", "run", 60, {"zero_shot": {"cars": {"top1": 1.0, "n": 20, "classes": 2}}})
    found = runs.read_run(folder)
    assert (found.results["step"], found.confusion, found.examples, found.retrieval, found.geometry) == (60, *[{}] * 4)


def test_nothing_is_fetched_and_what_files_say_is_never_code(tmp_path):
    text, found = rendered(write_run(tmp_path / "run", evil=EVIL))
    for tag, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not {"script", "iframe", "object", "link"} & {tag for tag, _ in found.tags}
    assert text.count("url(") == text.count("url(#") and "@import" not in text and "http" not in text
    # Twice in the gallery, in the list of confusions, the bad samples, what is missing, two examples, and at the
    # projection's points.
    assert found.text.count(EVIL) >= 7 + 2 * 8


def test_runs_side_by_side_with_the_better_one_in_bold_and_their_differences(tmp_path):
    text, _ = rendered(write_run(tmp_path / "a", seed=0), write_run(tmp_path / "b", seed=1))
    assert "<b>60.00 %</b>" in text and "<b>50.00 %</b>" not in text.split("Zero-shot classification</h2>")[1]
    differs = text.split("differs</th>")[1].split("</table>")[0]
    assert re.findall(r"<code>(.*?)</code>", differs) == ["seed", "0", "1"]
    clip = text.split("CLIP term</figcaption>")[1].split("</svg>")[0]
    strokes = re.findall(r'style="([^"]*stroke: (#\w+)[^"]*)"', clip)
    lines = dict.fromkeys((colour, "dasharray" in style) for style, colour in strokes)
    expected = [(figures.colour(run), dashed) for dashed in (False, True) for run in (0, 1)]
    assert [line for line in lines if line in expected] == expected


def test_one_page_is_one_text_with_ids_of_their_own_also_where_runs_are_alike(tmp_path):
    folders = [write_run(tmp_path / place / "run") for place in ("a", "b")]
    text, found = rendered(*folders)
    assert rendered(*folders)[0] == text
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) > 50 and len(set(ids)) == len(ids)
    referred = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', text))
    assert referred == set(ids)


def test_a_run_that_was_never_evaluated_and_one_with_numbers_that_are_not_finite(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3.0}\n')
    _, found = rendered(tmp_path / "run")
    assert "Loss" in found.text and "Zero-shot" not in found.text and "nan" not in found.text.lower()


def test_the_bold_of_a_better_run_needs_intervals_apart():
    close, apart = ({"zero_shot": {"toys": {"top1": share, "n": 100, "classes": 4}}} for share in (0.55, 0.75))
    worse = {"zero_shot": {"toys": {"top1": 0.5, "n": 100, "classes": 4}}}
    for better, bold in ((close, False), (apart, True)):
        shown = results.results([run_of(better), run_of(worse)], "zero_shot")
        assert ("<b>" in shown) == bold


def test_intervals_are_wilsons():
    p, n, z = 0.75, 96, 1.959963984540054
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert results.interval(p, n) == pytest.approx((middle - half, middle + half), rel=1e-12)
    assert results.interval(1.0, 128)[1] == results.interval(0.0, 128)[0] + 1 == 1


def test_chance_is_what_a_random_order_reaches():
    assert results.chance("top5", {"classes": 40}) == 5 / 40 and results.chance("top10", {"classes": 4}) == 1
    assert results.chance("mean_per_class", {"classes": 40}) == 1 / 40 and results.chance("top1", {}) is None
    row = {"images": 20, "texts": 100}  # five captions an image
    assert results.chance("text_to_image_r5", row) == 5 / 20
    expected = 1 - math.comb(95, 10) / math.comb(100, 10)
    assert results.chance("image_to_text_r10", row) == pytest.approx(expected, rel=1e-12)


def test_without_an_evaluation_the_results_are_those_of_training(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "eval.json").unlink()
    found = runs.read_run(run).results
    assert found["zero_shot"] == {"toys": {"top1": 0.5, "n": 1234, "classes": 40}} and found["step"] == 30
    assert "step 30, during training" in rendered(run)[1].text
    with (run / "metrics.jsonl").open("a") as out:
        out.write(json.dumps({"step": 40, "retrieval/pairs/image_to_text_r1": 0.5}) + "\n")
    assert "step 40, zero shot at step 30, during training" in rendered(run)[1].text


def run_of(found):
    return runs.Run("run", [], {}, None, {"step": 1, "model": "run", **found}, {}, {}, {}, {}, {}, {})


FILES = ("config.json", "data.json", "metrics.jsonl", "eval.json", "bad_samples.jsonl", "eval/zero_shot_toys.npz")
FILES += ("eval/examples_toys.json", "eval/geometry_pairs.npz", "eval/retrieval_pairs.json")
DEEP = "[" * 100_000
DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "list": lambda data: b"[1, 2]\n",
    "number": lambda data: b"3\n",
    "null": lambda data: b"null\n",
    "noise": lambda data: np.random.default_rng(0).bytes(300),
    "deep": lambda data: DEEP.encode(),
    "nested": lambda data: (b'{"a": ' * 100 + b"1" + b"}" * 100),
    "lists for objects": lambda data: b'{"zero_shot": [1], "retrieval": {"x": 3}, "missing": null, "step": "x"}\n',
    "slashes": lambda data: json.dumps(
        {"step": 7, "retrieval/coco/2017/image_to_text_r1": 0.5, "zero_shot": {"coco/2017": {"top1": 0.5, "n": 4}}}
    ).encode() + b"\n",
    "out of range": lambda data: json.dumps(
        {"step": 10**400, "loss": 1e308, "zero_shot": {"a": {"top1": 7, "n": 0}}, "run": {"9" * 5000: {}}}
    ).encode() + b"\n",
    **{f"values {turn}": lambda data, turn=turn: other_values(data, turn) for turn in range(4)},
}  # fmt: skip


def other_values(data, turn):
    """Each value of an object, and of the objects in it, of another type."""
    others = [None, {"q": 1}, "text", [1], True, -1e300, 10**30]

    def changed(value, depth, place):
        if isinstance(value, dict) and depth < 2 + turn:
            return {key: changed(inner, depth + 1, place + i) for i, (key, inner) in enumerate(value.items())}
        if isinstance(value, list) and value and depth < 2 + turn:
            return [changed(inner, depth + 1, place + i) for i, inner in enumerate(value)]
        return others[(place + turn) % len(others)]

    try:
        found = json.loads(data.splitlines()[0])
    except ValueError:
        return b"{}"
    return json.dumps(changed(found, 0, 0)).encode() + b"\n"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_never_stops_the_report(tmp_path, whole_run, file):
    for name, damaged in DAMAGES.items():
        run = tmp_path / name.replace(" ", "_")
        (run / "eval").mkdir(parents=True)  # with little else in it: drawing takes its time
        (run / "metrics.jsonl").write_text('{"step": 1}\n')
        (run / "eval.json").write_text('{"step": 1, "zero_shot": {"toys": {"top1": 0.5}}}')
        (run / file).write_bytes(damaged((whole_run / file).read_bytes()))
        found = runs.read_run(run)
        assert found.unreadable.keys() <= {file}
        Page(page.render([found]))
        if name in ("list", "number", "null", "noise", "deep", "half") and not (
            file.endswith(".jsonl") and name in ("noise", "deep", "half")  # there the last line may be cut off
        ):
            assert found.unreadable[file], name


def test_counts_of_any_whole_numbers_are_the_same_counts(tmp_path):
    run = tmp_path / "run"  # with little else in it: drawing takes its time
    (run / "eval").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "eval.json").write_text('{"step": 1, "zero_shot": {"toys": {"top1": 0.5}}}')
    pages = []
    for dtype in (np.int64, np.uint8, np.int8, np.uint64):
        counts = np.array([[3, 100], [0, 5]], dtype)
        np.savez(run / "eval" / "zero_shot_toys.npz", classes=["ball", "cube"], confusion=counts)
        pages.append(page.render([runs.read_run(run)]))
    assert "ballcube10097.09 %" in Page(pages[0]).text and pages == pages[:1] * 4


@pytest.mark.parametrize("file", FILES)
def test_what_is_no_file_is_named_and_not_opened(tmp_path, whole_run, file):
    for name, make in (("folder", Path.mkdir), ("pipe", os.mkfifo)):
        run = shutil.copytree(whole_run, tmp_path / name)
        (run / file).unlink()
        make(run / file)
        assert runs.read_run(run).unreadable == {file: ["is not a file"]}


def test_what_would_take_the_machine_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1} | {f"key {i}": 1.0 for i in range(5_000)}) + "\n")
    found = {"step": 1, "zero_shot": {"toys": {"top1": 0.5, "n": 10**30, "\ud800\n": "\x1b[2J"}}}
    (run / "eval.json").write_text(json.dumps(found))
    out = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(out, "PNG")
    shown = {"picture": base64.b64encode(out.getvalue()).decode(), "label": "a", "predicted": "b"}
    (run / "eval" / "examples_toys.json").write_text(json.dumps({"right": [shown], "wrong": []}))
    np.savez_compressed(run / "eval" / "zero_shot_toys.npz", classes=["a"], confusion=np.zeros((6_000, 6_000), int))
    read = runs.read_run(run)
    assert read.results["zero_shot"] == {"toys": {"top1": 0.5}}
    said = {file: " ".join(why) for file, why in read.unreadable.items()}
    assert "more than 1,000 different numbers" in said["metrics.jsonl"]
    assert "n is 10" in said["eval.json"] and said["eval.json"].isprintable()
    assert said["eval/examples_toys.json"] == "right 1: a picture of 9000 x 9000 pixels"
    assert said["eval/zero_shot_toys.npz"] == "unpacks to more than 256 MB"


def test_damaged_files_are_named_on_the_page_and_the_rest_is_drawn(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "eval.json").write_text("{")
    (run / "eval" / "geometry_pairs.npz").write_bytes(b"PK\3\4 torn")
    np.savez(run / "eval" / "zero_shot_toys.npz", classes=np.array([object()]), confusion=np.eye(1, dtype=int))
    path = run / "eval" / "retrieval_pairs.json"
    path.write_text(path.read_text().replace(jpeg(), "QUJD", 1))
    _, found = rendered(run)
    for words in (
        "eval.jsonis not JSON", "eval/geometry_pairs.npzcannot be read", "eval/zero_shot_toys.npzcannot be read",
        "eval/retrieval_pairs.jsonimage_to_text 1: begins with b'ABC'; not an image", "CLIP term", "taken for ball",
    ):  # fmt: skip
        assert words in found.text, words


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda path: None, "no folder {path}; give the workdir of a run"),
        (lambda path: path.write_text("x"), "{path} is not a folder; give the workdir of a run"),
        (lambda path: path.mkdir(), "{path} is empty; give the workdir of a run"),
        (lambda path: (path / "x").mkdir(parents=True), "{path} holds neither metrics.jsonl nor eval.json; give the"),
        (lambda path: write_run(path / "a"), "{path} holds workdirs of runs but is not one itself; give them: {path}/"),
        (lambda path: (path / "eval.json").mkdir(parents=True), "nothing of a run can be read in {path}: eval.json "),
    ],
)  # fmt: skip
def test_what_is_no_workdir_is_one_line(tmp_path, prepare, message):
    prepare(tmp_path / "run")
    with pytest.raises(InputError) as raised:
        runs.read_run(tmp_path / "run")
    assert str(raised.value).startswith(message.format(path=tmp_path / "run")) and "\n" not in str(raised.value)


def test_long_runs_make_a_small_page(tmp_path):
    rng = np.random.default_rng(0)
    keys = [f"number_{i}" for i in range(17)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [{"step": 100 * s} | dict(zip(keys, rng.normal(size=17), strict=True)) for s in range(5_000)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, found = rendered(tmp_path / "a", tmp_path / "b")
    assert [tag for tag, _ in found.tags].count("figure") == 17 and len(text) < 1_000_000


def test_halves_of_a_character_do_not_stop_the_page(tmp_path):
    run = write_run(tmp_path / "run", evil="half of one: ?")
    for path in (run / "eval.json", run / "eval" / "retrieval_pairs.json", run / "bad_samples.jsonl"):
        path.write_text(path.read_text().replace("one: ?", "one: \\ud800"))
    assert page.render([runs.read_run(run)]).encode().count(b"half of one:") >= 5 + 2 * 8


def test_runs_of_one_name_are_named_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.apart(["a/one", "b/two", "gs://c/three"]) == ["one", "two", "three"]
    assert runs.apart(["a/run", "b/run", "two"]) == ["a/run", "b/run", f"{tmp_path.name}/two"]
    assert runs.apart(["gs://a/x/run", "gs://b/x/run"]) == ["a/x/run", "b/x/run"]
    assert runs.apart(["run", "./run"])[0].endswith(f"{tmp_path.name}/run")  # the same twice


@pytest.mark.slow
def test_the_command_line_writes_the_page_and_says_one_line_about_wrong_input(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    command = [sys.executable, "-m", "rankclip_jax.report"]
    repo = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, run, "--out", tmp_path / "new" / "r.html"], cwd=repo, capture_output=True, text=True
    )
    assert done.returncode == 0 and "opens in any browser" in done.stdout, done.stderr
    assert (tmp_path / "new" / "r.html").read_text().startswith("<!doctype html>")
    for words, said in (
        ([tmp_path / "gone"], "no folder .*gone; give the workdir of a run"),
        ([run, "--out", run / "metrics.jsonl"], ".* the page's name must end in .html"),
    ):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, words)])
        with pytest.raises(SystemExit, match=rf"^error: {said}$") as stopped:  # a text: to stderr, exit code 1
            report_main.main()
        assert "\n" not in stopped.value.code
