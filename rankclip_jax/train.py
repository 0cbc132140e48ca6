"""The command line: python -m rankclip_jax.train --config configs/shapes.py --workdir DIR [--mode=eval]."""

import logging
import os
import sys

# TensorFlow only reads files here, so its greetings say nothing, oneDNN's among them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags
from ml_collections import config_flags

from rankclip_jax import loop
from rankclip_jax.config import complete
from rankclip_jax.errors import InputError

# Keys that a file does not set can be overridden too; `complete` then checks them all against the defaults.
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File of configs/, with an argument if it takes one.", lock_config=False, accept_new_attributes=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/ and the config's name.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "train (resumes by itself), or evaluate a workdir.")

PREEMPTED = 75  # exit code: saved and stopped by SIGTERM; start again to go on (EX_TEMPFAIL of sysexits.h)


def main(argv):
    """Exit codes: 0 done, 1 wrong input (one line on stderr), 75 preempted and saved."""
    del argv
    logging.getLogger("absl").setLevel(logging.WARNING)
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = _WORKDIR.value or os.path.join("runs", os.path.basename(name).split(".py")[0])
    try:
        config = complete(_CONFIG.value)
        loop.train(config, workdir) if _MODE.value == "train" else loop.evaluate(config, workdir)
    except InputError as error:
        sys.exit(f"error: {error}")
    except loop.Preempted as stop:
        print(stop)
        sys.exit(PREEMPTED)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
