"""The Colab notebook: it runs from top to bottom at a small size, and its stored outputs are those of a whole run."""

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from benchmarks.quick_compile import XLA_FLAGS
from rankclip_jax import config as configs
from rankclip_jax.common import jax_install

REPO = Path(__file__).parents[2]
NOTEBOOK = REPO / "notebooks/rankclip_colab.ipynb"
# Two epochs of eight steps, of towers that compile quickly, evaluated once.
SMALL = """
WORKDIR = {workdir!r}
SETTINGS = [
    "epochs=2",
    "log_every=1",
    "batch_size=32",
    "data.train=256",
    "data.val=32",
    "model.name=ViT-tiny",
    "model.image_size=16",
    "model.vision={{'patch_size': 8, 'layers': 1, 'width': 32, 'heads': 2}}",
    "model.text={{'layers': 1, 'width': 32, 'heads': 2}}",
    "optim.warmup_steps=2",
    "eval.every_epochs=2",
    "eval.zero_shot={{'held_out': {{'format': 'shapes', 'path': 'held_out:32'}}}}",
    "eval.retrieval={{'scenes': {{'format': 'shapes', 'path': 32}}}}",
    "eval.geometry={{'scenes': {{'format': 'shapes', 'path': 32}}}}",
    "checkpoint.every_steps=4",
]
MY_STEPS = 2
"""
HAS_TRANSFORMERS = all(map(importlib.util.find_spec, ("torch", "transformers")))


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def texts(output) -> str:
    """What an output says in words: text, HTML and errors, no pictures."""
    data = {kind: text for kind, text in output.get("data", {}).items() if kind.startswith("text/")}
    return "".join([output.get("text", ""), *data.values(), *output.get("traceback", [])])


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", XLA_FLAGS)  # one device, as in Colab
    # Its processes share programs, as they do in Colab, also those that compile in less than a second.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    notebook = read()
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(SMALL.format(workdir=str(tmp_path))))
    own = next(cell for cell in notebook.cells if cell.source.startswith("MINE = ["))
    own.source, towers = re.subn(r"'layers': \d", "'layers': 1", own.source)  # the same towers, of one layer each
    assert towers == 2
    kernel = dict(timeout=300, kernel_name="python3", resources={"metadata": {"path": str(REPO)}})
    NotebookClient(notebook, **kernel).execute()  # raises on a cell that fails
    said = "\n".join(texts(output) for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "saved step" in said and "resuming from step" in said
    assert "with and without the stop: differ by 0.0 at most" in said
    assert "the same embeddings, to the last bit" in said
    assert ("image_embeds differ by" if HAS_TRANSFORMERS else "not compared with transformers") in said
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("there", "driver", "pip"),
    [
        ("0.12.0.1 gpu", 550, ""),
        ("0.7.2 gpu", 550, "pip install 'jax[cuda12]>=0.10.2'"),
        ("0.12.0.1 cpu", 580, "pip install 'jax[cuda13]>=0.10.2'"),
        ("", None, "pip install 'jax>=0.10.2'"),
    ],
)
def test_what_its_install_cell_does_on_a_machine_without_the_project(there, driver, pip, monkeypatch):
    cell = next(cell for cell in read().cells if "!git clone" in cell.source)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(jax_install, "extra", lambda file: {None: "", 550: "cuda12", 580: "cuda13"}[driver])
    monkeypatch.setattr(jax_install, "requirements", lambda: ["jax>=0.10.2"])
    monkeypatch.setattr(jax_install, "plugins", lambda: {})  # whatever the environment that tests has
    monkeypatch.setattr(jax_install.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=there))
    ran, names = [], {"REPO": "https://example.org/it"}
    names["get_ipython"] = lambda: SimpleNamespace(system=lambda line: ran.append(line.format_map(names)))
    exec(TransformerManager().transform_cell(cell.source), names)
    clone = "git clone -q --depth 1 https://example.org/it rankclip"
    assert ran == [clone, *([f"{pip} -q"] if pip else []), "pip install -q -e rankclip"]
    names["REPO"] = ""
    with pytest.raises(AssertionError, match="give REPO"):
        exec(TransformerManager().transform_cell(cell.source), names)


def test_it_trains_in_float32():
    """A T4, which Colab lends, has no bfloat16."""
    code = [cell.source for cell in read().cells if cell.cell_type == "code"]
    for used in ("configs/shapes.py", "configs/cifar10.py"):
        assert any(used in source for source in code) and configs.load(str(REPO / used)).model.dtype == "float32"
    assert not any("bfloat16" in source for source in code)


def test_its_stored_outputs_are_complete():
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run in one go, from the top"
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    for cell in cells:
        # A figure or a table is the last line of its cell.
        if re.match(r"(figures|Show|print)\b", cell.source.splitlines()[-1]):
            assert cell.outputs, cell.source
    drawn = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(drawn) == sum(len(re.findall(r"^(?:figures\.|Show\(|view = display)", c.source, re.M)) for c in cells)


def test_it_is_small_and_names_no_machine():
    assert NOTEBOOK.stat().st_size < 1_500_000
    for cell in read().cells:
        for output in cell.get("outputs", ()):
            assert not re.search(r"/(work|tmp|root|home|content)\b", texts(output)), texts(output)[:500]
