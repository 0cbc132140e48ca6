"""TensorFlow, imported without Keras: no pipeline needs it, and it is two fifths of the import's time."""

import sys

_KERAS = ("keras.src.optimizers", "tf_keras.src.optimizers")  # what TensorFlow imports at its end, if it can
# None: there is no such module, and TensorFlow continues. It imports Keras when somebody asks for tf.keras.
_hidden = [name for name in _KERAS if "tensorflow" not in sys.modules and name not in sys.modules]
for name in _hidden:
    sys.modules[name] = None  # type: ignore[assignment]
try:
    import tensorflow as tf  # noqa: F401 -- what this module is for
finally:
    for name in _hidden:
        del sys.modules[name]
