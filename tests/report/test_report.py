"""The report: one page that fetches nothing, shows what the files say, and survives what is wrong in them."""

import base64
import html.parser
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rankclip_jax import figures
from rankclip_jax.common.errors import InputError
from rankclip_jax.report import page, runs

EVIL = '</script><img src=x onerror="alert(1)">'


def jpeg():
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "JPEG")
    return base64.b64encode(out.getvalue()).decode()


def write_run(folder, *, seed=0, evil="a caption", steps=30):
    rng = np.random.default_rng(seed)
    (folder / "eval").mkdir(parents=True)
    rows = [{"step": s, "loss": 5 / s, "clip": 4 / s, "learning_rate": 1e-3} for s in range(1, steps + 1)]
    rows += [{"step": steps, "val/clip": 1.5, "val/spearman_in_modal": 0.25, "zero_shot/toys/top1": 0.5 + seed / 10}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"seed": seed, "loss": {"objective": "rankclip"}, "model": {"name": "RN-tiny"}}
    (folder / "config.json").write_text(json.dumps(config))
    results = {
        "step": steps,
        "zero_shot": {"toys": {"top1": 0.5 + seed / 10, "top3": 0.9, "mean_per_class": 0.4, "n": 1234}},
        "robustness": {"odd toys": {"reference": 0.5, "shifted": 0.25, "drop": 0.25, "effective": 0.0123}},
        "retrieval": {"pairs": {"image_to_text_r1": 0.125, "text_to_image_r1": 0.375, "images": 8, "texts": 16}},
        "linear_probe": {"toys": {"top1": 0.75, "mean_per_class": 0.7, "l2": 0.316, "n": 1234}},
        "geometry": {"pairs": {"modality_gap": 0.8768, "n": 8}},
        "missing": {"zero_shot/gone": f"no such file: {evil}"},
    }
    (folder / "eval.json").write_text(json.dumps(results))
    np.savez(folder / "eval" / "zero_shot_toys.npz", classes=["ball", evil], confusion=np.array([[7, 3], [0, 10]]))
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

    VOID = ("meta", "img")

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
        "Run: first", "Training", "CLIP term (nats)", "Zero-shot classification", "50.00 %", "1,234", "Robustness",
        "1.23 %", "Retrieval", "12.50 %", "37.50 %", "Linear probe", "0.316", "Rank agreement over time",
        "Spearman in modal", "0.877", "50 % and 20 % of variance", "30.00 %", "cut off", "zero_shot/gone", '"seed": 0',
    ):  # fmt: skip
        assert words in found.text, words
    bad_row = re.search(r"cut off(\d+)data.csv row 3", found.text)
    assert bad_row[1] == "2"  # the torn third line is left out


def test_nothing_is_fetched_and_what_files_say_is_never_code(tmp_path):
    text, found = rendered(write_run(tmp_path / "run", evil=EVIL))
    for tag, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not {"script", "iframe", "object", "link"} & {tag for tag, _ in found.tags}
    assert text.count("url(") == text.count("url(#") and "@import" not in text and "http" not in text
    # Twice in the gallery, in the list of confusions, the bad samples, what is missing, and at the projection's points.
    assert found.text.count(EVIL) >= 5 + 2 * 8


def test_runs_side_by_side_with_the_better_one_in_bold_and_their_differences(tmp_path):
    text, _ = rendered(write_run(tmp_path / "a", seed=0), write_run(tmp_path / "b", seed=1))
    assert "<b>60.00 %</b>" in text and "<b>50.00 %</b>" not in text.split("Zero-shot classification</h2>")[1]
    differs = text.split("differs</th>")[1].split("</table>")[0]
    assert re.findall(r"<code>(.*?)</code>", differs) == ["seed", "0", "1"]
    clip = text.split("CLIP term (nats)</figcaption>")[1].split("</svg>")[0]
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


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda run: (run / "eval.json").write_text("{"), "eval.json is not JSON"),
        (lambda run: (run / "eval" / "geometry_pairs.npz").write_bytes(b"PK\3\4 torn"), "geometry_pairs.npz cannot be"),
        (lambda run: [(run / name).unlink() for name in ("metrics.jsonl", "eval.json")], "neither metrics.jsonl nor"),
        (lambda run: run.rename(run.with_name("elsewhere")), "no folder .*run; give the workdir"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, break_it, message):
    run = write_run(tmp_path / "run")
    break_it(run)
    with pytest.raises(InputError, match=message):
        runs.read_run(run)


def test_objects_in_an_array_file_are_refused(tmp_path):
    run = write_run(tmp_path / "run")
    np.savez(run / "eval" / "zero_shot_toys.npz", classes=np.array([object()]), confusion=np.eye(1))
    with pytest.raises(InputError, match="zero_shot_toys.npz cannot be read"):
        runs.read_run(run)


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


def test_a_picture_that_is_none_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    path = run / "eval" / "retrieval_pairs.json"
    path.write_text(path.read_text().replace(jpeg(), "QUJD"))
    with pytest.raises(InputError, match=r"run: a picture in eval/retrieval_pairs.json cannot be read"):
        page.render([runs.read_run(run)])


@pytest.mark.slow
def test_the_command_line_writes_the_page_and_says_one_line_about_wrong_input(tmp_path):
    run = write_run(tmp_path / "run")
    command = [sys.executable, "-m", "rankclip_jax.report"]
    repo = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, run, "--out", tmp_path / "new" / "r.html"], cwd=repo, capture_output=True, text=True
    )
    assert done.returncode == 0 and "opens in any browser" in done.stdout, done.stderr
    assert (tmp_path / "new" / "r.html").read_text().startswith("<!doctype html>")
    done = subprocess.run([*command, tmp_path / "gone"], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no folder") and done.stderr.count("\n") == 1
