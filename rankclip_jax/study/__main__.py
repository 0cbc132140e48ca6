"""The command line: python -m rankclip_jax.study --config configs/study_shapes.py [--workdir DIR]."""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.study import report
from rankclip_jax.study.runs import Study


def main() -> None:
    """Exit codes: 0 done, 1 wrong input (one line on stderr), 2 wrong flags."""
    parser = argparse.ArgumentParser(
        prog="python -m rankclip_jax.study",
        description="Trains every objective of config.study over its seeds, and writes results.md, results.json and "
        "plots. The same command resumes a study that stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a file of configs/, with its argument after a colon")
    parser.add_argument("--workdir", help="folder of the study; default: runs/ and the config's name")
    flags, rest = parser.parse_known_args()
    for flag in rest:
        if not flag.startswith("--config."):
            parser.error(f"unknown flag {flag}")
    workdir = Path(flags.workdir or Path("runs") / Path(flags.config.partition(":")[0]).stem)
    try:
        settings = configs.load(flags.config, [flag.removeprefix("--config.") for flag in rest])
        print(report.write(workdir, settings, Study(settings, workdir).run()))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
