"""The command line: python -m rankclip_jax.study --config configs/study_shapes.py [--workdir DIR]."""

import argparse
import subprocess
import sys
from pathlib import Path

from rankclip_jax import config as configs
from rankclip_jax.common import commands, storage
from rankclip_jax.common.errors import InputError
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
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # of config.study.processes, who start each other
    flags, rest = parser.parse_known_args()
    for flag in rest:
        if not flag.startswith("--config."):
            parser.error(f"unknown flag {flag}")
    default = Path("runs") / Path(flags.config.partition(":")[0]).stem
    commands.usual_numbers()
    commands.keep_freed_memory()
    commands.quiet_tensorflow()
    with commands.exit_codes("stopped; the same command resumes"):
        workdir = storage.local(flags.workdir or str(default), "--workdir")
        settings = configs.load(flags.config, [flag.removeprefix("--config.") for flag in rest])
        resolve.require(settings, "a study")
        study = Study(settings, workdir)
        if flags.part is not None:
            study.run(flags.part, settings.study.processes)
            return
        if settings.study.processes > 1:
            _share(settings.study.processes)
        print(report.write(workdir, settings, study.run()))


def _share(processes: int) -> None:
    """The same command for each part of the arms; their lines go where ours go."""
    command = [sys.executable, "-m", "rankclip_jax.study", *sys.argv[1:]]
    started = [subprocess.Popen([*command, "--part", str(part)]) for part in range(processes)]
    try:
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()
    if any(codes):
        failed = sum(map(bool, codes))
        raise InputError(f"{failed} of {processes} processes failed, as said above. The same command resumes")


if __name__ == "__main__":
    main()
