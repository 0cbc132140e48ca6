"""The command line: rankclip train shapes, rankclip train mine.csv, rankclip eval runs/mine.

Or python -m rankclip_jax.train --config configs/shapes.py --workdir DIR [--mode=eval].
"""

import argparse
import sys
from pathlib import Path

import jax

from rankclip_jax.common import commands, storage
from rankclip_jax.common.devices import devices_of
from rankclip_jax.parallel import compilation_cache, preemption, processes
from rankclip_jax.parallel.mesh import make_mesh
from rankclip_jax.train import arguments, evaluate, loop, plan
from rankclip_jax.train import workdir as workdirs
from rankclip_jax.weights import late_callbacks


def main() -> None:
    """Exit codes: common/commands.py."""
    parser = argparse.ArgumentParser(
        prog=commands.prog("rankclip_jax.train"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains, or evaluates what was trained. The same command resumes a run that stopped.",
        epilog=arguments.usual_keys(),
        allow_abbrev=False,
    )
    arguments.add_to(parser)
    cluster = parser.add_argument_group("many processes, where no cluster is detected (docs/reliability.md)")
    cluster.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    cluster.add_argument("--num_processes", type=int)
    cluster.add_argument("--process_id", type=int, help="from 0")
    # Keys apart: argparse takes one whose value has a space for WHAT.
    keys = [word for word in sys.argv[1:] if word.startswith("--config.")]
    flags = parser.parse_args([word for word in sys.argv[1:] if not word.startswith("--config.")])
    if flags.mode != "eval":  # which can do with config.eval.model alone
        if not (flags.what or flags.config or flags.workdir):
            parser.error("give an experiment (shapes), data of your own (mine.csv), or the --workdir of a run")
    commands.usual_numbers()
    commands.keep_freed_memory()
    commands.quiet_tensorflow()
    late_callbacks.quiet_tasks()
    with commands.exit_codes("stopped; the same command resumes from the last checkpoint"):
        given = arguments.read(flags, [key.removeprefix("--config.") for key in keys])
        try:
            with storage.workdir(given.workdir) as workdir:
                _run(flags, given, workdir)
        except preemption.Preempted as stop:
            print(stop)
            sys.exit(preemption.EXIT_CODE)
        except Exception as error:  # after a workdir in a bucket has got what was written
            if jax.distributed.is_initialized():
                processes.stop(error)
            raise


def _run(flags: argparse.Namespace, given: arguments.Given, workdir: Path | None) -> None:
    try:
        if flags.mode == "eval":
            settings = evaluate.settings(given.config, workdir, given.overrides)
        else:
            settings = workdirs.settings(given.config, workdir, given.overrides)
        if flags.mode == "plan":
            plan.plan(workdirs.with_known(settings, workdir) if workdir else settings)
            return
        commands.imported("input_pipeline.pipeline")  # TensorFlow, which will be needed
        processes.start(flags.coordinator, flags.num_processes, flags.process_id)
        if flags.mode == "train":
            assert workdir is not None  # main asked for one, or for what names it
            compilation_cache.enable(devices_of(make_mesh(settings.mesh)).platform)
            loop.train(settings, workdir)
        else:
            evaluate.evaluate(settings, workdir, flags.out and storage.local(flags.out, "--out"))
    except preemption.Preempted:
        raise
    except Exception as error:
        if said := commands.refused(error):
            raise said from None
        raise


if __name__ == "__main__":
    main()
