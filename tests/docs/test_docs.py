"""What the README and docs show works: commands are run, Python is executed, files, links and keys exist.

Commands run in the process, in a folder that has what they name (docs_world.py). Training commands of the pages in RUN
are run with small sizes appended; those of other pages, which have tests of their own, as far as opening their data.
"""

import contextlib
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from packaging.requirements import Requirement

from rankclip_jax import cli, doctor
from rankclip_jax.config import keys as config_keys
from tests.support.docs_world import REPO, STAND_INS, make_world
from tests.support.one_device import on_one_device

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.exists()]
ROOTS = "configs|rankclip_jax|input_pipeline|benchmarks|docs|tests|notebooks"
OURS = r"(?:rankclip_jax|input_pipeline|benchmarks)[\w.]*"
RANKCLIP = "|".join(cli.COMMANDS)
RUN = ("tutorials.md",)  # parts of it, see test_commands
SLOW = ("interop.md",)  # converts, mixes and embeds, which have quick tests of their own
# Trained like others of its page, but for what does not touch the loss: CLIP's, whose step compiles a fifth faster.
UNRANKED = re.compile(r"runs/(adapted|tenth|start|last|lora|lit|recipe[1-9]\d*)")
# No evaluation: runs/tuned has one on the same pairs, runs/full and runs/lora on the same classes.
UNEVALUATED = {"runs/adapted": "retrieval", "runs/tenth": "retrieval"}
UNEVALUATED |= {"runs/last": "zero_shot", "runs/lit": "zero_shot"}
FEW_SCENES = "--config.eval.zero_shot.shapes.path=seen:32"  # of configs/finetune.py, which has 896
# Not ours to test: what installs, fetches, and speaks to a cluster.
MADE = (["python", "docs/config_page.py"], ["python", "docs/study_page.py"])  # with tests of their own
FOREIGN = ("pip", "python3", "git", "cd", "hf", "ruff", "pre-commit", "sbatch", "export", "#SBATCH", "kubectl", ".")


def name(page: Path) -> str:
    return str(page.relative_to(REPO))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Every command of the page's bash blocks and of its inline code, as words; `a && b` is two."""
    text = page.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    ours = rf"python -m {OURS}|rankclip ({RANKCLIP}) |--config\.[\w.]+="
    lines = [code for code in inline if re.match(ours, code) and "..." not in code]
    for block in blocks(page, "bash"):
        lines += re.sub(r"\\\n|,\n", lambda m: " " if m[0][0] == "\\" else ", ", block).splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["gcloud"]:  # what it does on the hosts
            words = next((shlex.split(w.partition("=")[2]) for w in words if w.startswith("--command=")), [])
        while "&&" in words:
            found.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        found.append(words)
    return [list(words) for words in dict.fromkeys(map(tuple, found)) if words]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_links_and_keys_exist(page):
    text = page.read_text()
    for name in re.findall(rf"\b((?:{ROOTS})/[\w./-]+\.(?:py|md|png|txt|ipynb))", text):
        assert (REPO / name).exists(), name
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"
    for key in set(re.findall(r"\bconfig\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", text)):
        parts, value = key.split("."), config_keys.default_config()
        if parts[0] in ("json", "md", "py", "key"):
            continue  # config.json and so on; --config.key=value stands for any
        while parts and isinstance(value, ConfigDict) and len(value):  # in an empty group names are the user's own
            part = parts.pop(0)
            assert part in value, f"config.{key}"
            value = value[part]


def test_the_index_lists_every_page():
    index = (REPO / "docs" / "README.md").read_text()
    for page in (REPO / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("docs")
    make_world(root)
    for name in "mine", "tuned":
        (root / "runs" / name).symlink_to(root / "own_model")
    return root


def stand_in(word: str) -> str:
    for shown, here in STAND_INS.items():
        word = re.sub(rf"\b{re.escape(shown)}(?<!\w(?=\w))", here, word)  # whole words only
    return word


def call(module: str, words: list[str], monkeypatch) -> None:
    """main() of the module as `python -m` would, exit code 0."""
    monkeypatch.setattr(sys, "argv", [module, *words])
    main = importlib.import_module(module + (".__main__" if module.endswith(("train", "report", "study")) else "")).main
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, f"python -m {module} {shlex.join(words)}: {stop.code}"


def check_training(words: list[str], monkeypatch) -> None:
    """Flags, configuration, and that the data open, or a model to evaluate with its tokenizer."""
    from input_pipeline import sources
    from rankclip_jax.train import __main__ as train
    from rankclip_jax.weights import pretrained

    seen = []
    monkeypatch.setattr(train.plan, "plan", seen.append)
    monkeypatch.setattr(train.loop, "train", lambda config, workdir: seen.append(config))
    monkeypatch.setattr(train.evaluate, "evaluate", lambda config, workdir, out: seen.append(config))
    call("rankclip_jax.train", words, monkeypatch)
    (config,) = seen
    if Path(config.eval.model or "").suffix == ".pt":
        assert pretrained.read(config.eval.model, config.tokenizer.path).tokenizer
    if not any(word.startswith("--mode") for word in words) and config.data.format != "tfds":
        for path, split in (config.data.train, "train"), (config.data.val, "val"):
            assert path is None or sources.open_source(config.data, path, image_side=32, split=split).size


def check_study(words: list[str], monkeypatch) -> None:
    """Flags and configuration of a study; its runs have their tests."""
    from rankclip_jax.study import __main__ as study

    class Seen:
        def __init__(self, config, workdir):
            assert config.study.baseline in config.study.objectives

        def run(self):
            return []

    with monkeypatch.context() as patch:
        patch.setattr(study, "Study", Seen)
        patch.setattr(study, "_share", lambda processes: None)
        patch.setattr(study.report, "write", lambda *arguments: "")
        call("rankclip_jax.study", words, patch)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name(page), marks=pytest.mark.slow if page.name in SLOW else ())
        for page in PAGES
        if page.name not in RUN
    ],
)
def test_commands(page, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    Path("photos.npz").unlink(missing_ok=True)  # of another page
    for words in commands(page):
        run(words, monkeypatch)


def run(words: list[str], monkeypatch, training=check_training) -> None:
    words = [stand_in(word) for word in words if word not in ("[DIR", "...]")]  # [DIR ...]: or several
    if words[0] == "srun":  # what it starts
        words = words[1:]
    if words[0].startswith("--config."):  # a piece of a training command
        words = ["python", "-m", "rankclip_jax.train", "--config", "configs/shapes.py", *words]
        if any(word.startswith("--config.data.") for word in words):  # of data that are not here
            words.append("--mode=plan")
    if words[0] == "rankclip" and words[1] in cli.COMMANDS:  # what it stands for
        module, flags, first, _ = cli.COMMANDS[words[1]]
        words = [*flags, *([first] if first and words[2:] and words[2][0] != "-" else []), *words[2:]]
        words = ["python", "-m", module.removesuffix(".__main__"), *words]
    if words[:2] == ["python", "-m"] and re.fullmatch(OURS, words[2]):
        module, words = words[2], words[3:]
        if not words and module != "rankclip_jax.doctor":
            assert importlib.util.find_spec(module), module  # named, not run
        elif words == ["--help"]:
            call(module, words, monkeypatch)
        elif module == "rankclip_jax.train":
            with monkeypatch.context() as patch:
                patch.setattr("rankclip_jax.parallel.processes.start", lambda *flags: None)  # for fresh processes
                training(words, patch)
        elif module.startswith("benchmarks"):
            source = Path(importlib.util.find_spec(module).origin).read_text()
            assert all(flag.partition("=")[0] in source for flag in words if flag.startswith("--")), (module, words)
        elif module == "rankclip_jax.study":
            check_study(words, monkeypatch)
        elif module == "input_pipeline.download":
            check_download(words, monkeypatch)
        elif module == "rankclip_jax.doctor":
            with monkeypatch.context() as patch:  # the step has its test
                patch.setattr(doctor, "devices", lambda: [])
                patch.setattr(doctor, "pipeline", lambda: [])
                call(module, words, patch)
        else:
            call(module, words, monkeypatch)
    elif Path(words[0]).name == "pip":
        check_pip(words)
    else:
        known = words[:3] == ["python", "-m", "pytest"] or words[:2] in MADE
        assert known or words[0] in FOREIGN, f"who tests {shlex.join(words)}?"


def check_pip(words: list[str]) -> None:
    arguments = iter(words[2:])
    for word in arguments:
        if word == "-r":
            assert (REPO / next(arguments)).exists(), words
        elif word == "-e":
            folder, _, extra = next(arguments).partition("[")
            about = tomllib.loads((REPO / folder / "pyproject.toml").read_text())["project"]
            assert not extra or extra.removesuffix("]") in about["optional-dependencies"], words
        elif not word.startswith("-"):
            Requirement(word)


def check_download(words: list[str], monkeypatch) -> None:
    """Up to the work itself, which tests/test_download.py does against a server."""
    from collections import Counter

    from input_pipeline import download

    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(download, "download", lambda urls, folder, options: seen.append(urls) or (Counter(fetched=1), 1))
        with contextlib.suppress(AssertionError):
            call("input_pipeline.download", words, patch)
    assert Path(seen[0]).exists()


def short_training(words: list[str], monkeypatch) -> None:
    """On the documented data, for an epoch of two steps on one device; a new model has one layer instead of several."""
    few = ["--config.steps=2", "--config.optim.warmup_steps=1", "--config.batch_size=8"]
    if words[0] == "shapes":
        few += ["--config.data.train=16", "--config.data.val=16"]
        few += [f"--config.eval.zero_shot.{name}.path={name}:32" for name in ("seen", "held_out")]
        few += [f"--config.eval.{kind}.scenes.path=16" for kind in ("retrieval", "geometry")]
    if words[0] in ("mine.csv", "shapes") and not any("init_from" in word for word in words):
        few += ["--config.model.vision={'layers':1}", "--config.model.text={'layers':1}"]
    kind = next((UNEVALUATED[word] for word in words if word in UNEVALUATED), None)
    if kind:
        few += [f"--config.eval.{kind}={{}}"]
    if any("finetune.py" in word for word in words) and kind != "zero_shot":
        few += [FEW_SCENES]
    if any(map(UNRANKED.fullmatch, words)) and not any("objective" in word for word in words):
        few += ["--config.loss.objective=clip"]
    on_one_device(monkeypatch)
    call("rankclip_jax.train", [*words, *few], monkeypatch)


@pytest.mark.slow
def test_the_tutorials(tmp_path, monkeypatch, capsys, compiled_once):
    """In order: what one command leaves is the next one's input. Own data is trained for real, and what follows it."""
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("vit-b-32").symlink_to("own_model")
    page = REPO / "docs" / "tutorials.md"
    for words in commands(page):
        if words[0] == "rankclip" and words[1] in ("train", "resume", "eval"):
            run(words, monkeypatch, short_training)
            continue
        if "runs/cc3m" in words and "rankclip_jax.train" not in words:  # its own training is not run
            instead = {"runs/cc3m": "runs/mine", "runs/cc3m-clip": "runs/tuned", "exported": "again"}
            words = [instead.get(word, word) for word in words]
        run([*words, *([FEW_SCENES] if "--alphas" in words else [])], monkeypatch)
    files = ["report.html", "photos.npz", "matches.png", "exported/config.json", "look/contact_sheet.png"]
    for made in (*files, "runs/mixed/mix.png", "runs/mixed/model.safetensors"):
        assert Path(made).exists(), made
    pytest.importorskip("transformers")
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {})
    assert "tensor([[" in capsys.readouterr().out


@pytest.mark.slow
def test_the_recipes_of_finetuning(world, monkeypatch):
    """Each trains: the line of the page with what the table adds to it."""
    monkeypatch.chdir(world)
    Path("vit-b-32").symlink_to("own_model")
    text = (REPO / "docs" / "finetuning.md").read_text()
    recipes = re.findall(r"^\| [^|]+ \| `(--config[^`]+)` \|$", text, re.MULTILINE)
    line = shlex.split(blocks(REPO / "docs" / "finetuning.md", "bash")[0])
    assert len(recipes) >= 6
    recipes += ["--config.optim.name=lion --config.loss.objective=siglip"]
    recipes += ["--config.optim.name=adafactor --config.model.vision.patch_dropout=0.5"]
    recipes += ["--config.optim.name=muon"]
    for number, added in enumerate(recipes):
        words = [f"runs/recipe{number}" if word == "runs/tuned" else word for word in line]
        run([*words, *shlex.split(added)], monkeypatch, short_training)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in RUN and blocks(page, "python")], ids=name)
def test_python_blocks(page, world, monkeypatch):
    monkeypatch.chdir(world)
    z_img, z_txt = np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)
    z_img, z_txt = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z_img, z_txt))
    names = dict(image_embeds=z_img, text_embeds=z_txt, logit_scale=20.0)
    for block in blocks(page, "python"):
        exec(compile("\n".join(stand_in(line) for line in block.splitlines()), page.name, "exec"), names)
    for name in "loss", "p", "z_img":
        assert np.isfinite(names.get(name, 0.0)).all()
