"""The command `rankclip`: every command of the project by one word. `python -m rankclip_jax.cli` does the same.

Each word is a module's own command line with its own --help, and ends with its exit code.
"""

import difflib
import sys

from rankclip_jax.common import commands, jax_install

# Word -> module, flags that stand for the word, what a first argument without a dash is given to, and what it does.
COMMANDS = {
    "train": ("rankclip_jax.train.__main__", [], None, "train: shapes, or mine.csv; resumes what was stopped"),
    "resume": ("rankclip_jax.train.__main__", [], "--workdir", "resume the run in a workdir"),
    "eval": ("rankclip_jax.train.__main__", ["--mode=eval"], None, "evaluate a workdir, an export or a .pt"),
    "plan": ("rankclip_jax.train.__main__", ["--mode=plan"], None, "what a run will need, before any launch"),
    "embed": ("rankclip_jax.embed", [], None, "embed a collection of pictures"),
    "search": ("rankclip_jax.embed", [], None, "search in a collection: MODEL DATA QUERY ..."),
    "export": ("rankclip_jax.convert", [], None, "write a model for Hugging Face, open_clip or JAX"),
    "mix": ("rankclip_jax.train.mix", [], None, "a model between two: A B --alpha 0.5 --out DIR"),
    "report": ("rankclip_jax.report.__main__", [], None, "one HTML page about one run or several"),
    "study": ("rankclip_jax.study.__main__", [], "--config", "compare objectives over seeds"),
    "doctor": ("rankclip_jax.doctor", [], None, "check this machine"),
    "prepare": ("input_pipeline.prepare", [], None, "any data set to shards, or what is in it (--inspect)"),
    "download": ("input_pipeline.download", [], None, "a list of image URLs to shards"),
}


def main() -> None:
    """Exit codes: those of the command; 2 for an unknown word."""
    words = sys.argv[1:]
    asked = {"--version": _version, "-h": _usage, "--help": _usage}
    if not words or words[0] in asked:
        with commands.exit_codes():
            print(asked[words[0]]() if words else _usage())
        return
    word, *rest = words
    if word not in COMMANDS:
        near = "".join(f" Did you mean {name}?" for name in difflib.get_close_matches(word, COMMANDS, 1))
        print(f"error: no command {word!r}. Expected one of {', '.join(COMMANDS)}.{near}", file=sys.stderr)
        sys.exit(2)
    module, flags, first, _ = COMMANDS[word]
    if first and rest and not rest[0].startswith("-"):
        rest = [first, *rest]
    sys.argv = [f"rankclip {word}", *flags, *rest]
    commands.quiet_tensorflow()  # before a module imports it
    with commands.exit_codes():  # Ctrl-C in the seconds that imports take
        (command,) = commands.imported(module)
    command.main()


def _version() -> str:
    return f"rankclip_jax {jax_install.version('rankclip_jax') or '(a checkout that is not installed)'}"


def _usage() -> str:
    lines = [f"  {word:10}{said}" for word, (*_, said) in COMMANDS.items()]
    return "\n".join(["usage: rankclip COMMAND ...   (rankclip COMMAND --help; rankclip --version)\n", *lines])


if __name__ == "__main__":
    main()
