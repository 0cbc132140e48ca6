"""The pipeline's TensorFlow comes without Keras, which is there for whoever asks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SCRIPT = """
import sys
import input_pipeline.pipeline
import tensorflow as tf

assert "keras" not in sys.modules and "tf_keras" not in sys.modules
assert not [name for name, found in sys.modules.items() if "keras" in name and found is None]
assert tf.keras.optimizers.Adam(0.5).learning_rate == 0.5
import clu.metric_writers, keras.src.optimizers
"""


@pytest.mark.slow
def test_keras_is_imported_when_it_is_asked_for_and_not_before():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_module_imports_tensorflow():
    tensorflow = re.compile(r"^\s*(import|from) tensorflow\b", re.MULTILINE)
    found = [path.name for path in (REPO / "input_pipeline").rglob("*.py") if tensorflow.search(path.read_text())]
    assert found == ["tensorflow_import.py"]
