"""The command line: python -m rankclip_jax.report DIR [DIR ...] --out report.html."""

import argparse
import dataclasses

from rankclip_jax.common import commands, storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import make_folder, write_whole
from rankclip_jax.figures.words import printable
from rankclip_jax.report import page, runs


def main() -> None:
    """Exit codes: common/commands.py."""
    parser = argparse.ArgumentParser(
        prog=commands.prog("rankclip_jax.report"),
        description="Draws training curves, evaluations and configurations of one run or several as one HTML page.",
    )
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="workdir of a run; --mode=eval there draws more")
    parser.add_argument("--out", help="the page to write (default: report.html)")
    flags = parser.parse_args()
    with commands.exit_codes():
        out = storage.local(flags.out or "report.html", "--out")
        if not flags.out and out.is_file() and page.MADE not in out.read_text(encoding="utf-8", errors="replace"):
            raise InputError(f"{out} is there already, and this command did not write it; give --out FILE")
        if out.is_dir():
            raise InputError(f"--out {out} is a folder; give the name of a file, for example {out / 'report.html'}")
        if out.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"--out {out}: the page's name must end in .html")
        folders = [storage.fetched(one) if storage.is_remote(one) else one for one in flags.workdirs]
        found = [runs.read_run(folder) for folder in folders]
        names = runs.apart([workdir.rstrip("/") for workdir in flags.workdirs])
        found = [dataclasses.replace(run, name=name) for run, name in zip(found, names, strict=True)]
        text = page.render(found)
        make_folder(out.parent)
        write_whole(out, text)
        for workdir, run in zip(flags.workdirs, found, strict=True):
            for file, why in run.unreadable.items():
                more = f" (and {len(why) - 1:,} more)" if len(why) > 1 else ""
                print(f"left out: {printable(workdir)}/{file}: {why[0]}{more}")
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, opens in any browser without a network")


if __name__ == "__main__":
    main()
