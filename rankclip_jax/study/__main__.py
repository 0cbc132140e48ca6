"""The command line: python -m rankclip_jax.study --config configs/study_shapes.py [--workdir DIR]."""

import argparse
from pathlib import Path

from rankclip_jax import config as configs
from rankclip_jax.common import commands, storage
from rankclip_jax.study import report
from rankclip_jax.study.runs import Study
from rankclip_jax.train import resolve


def main() -> None:
    """Exit codes: common/commands.py."""
    parser = argparse.ArgumentParser(
        prog=commands.prog("rankclip_jax.study"),
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
    default = Path("runs") / Path(flags.config.partition(":")[0]).stem
    commands.quiet_tensorflow()
    with commands.exit_codes("stopped; the same command resumes"):
        workdir = storage.local(flags.workdir or str(default), "--workdir")
        settings = configs.load(flags.config, [flag.removeprefix("--config.") for flag in rest])
        resolve.require(settings, "a study")
        print(report.write(workdir, settings, Study(settings, workdir).run()))


if __name__ == "__main__":
    main()
