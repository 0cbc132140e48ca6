"""The command line: python -m rankclip_jax.convert SRC DST --to hf|openai|orbax."""

import argparse

import jax

from rankclip_jax.common import commands, ownership, storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.weights import export, pretrained


def main() -> None:
    """Exit codes: common/commands.py."""
    parser = argparse.ArgumentParser(
        prog=commands.prog("rankclip_jax.convert"),
        description="Exports a model for another library: weights, config, tokenizer, preprocessing, model card.",
    )
    parser.add_argument("src", help="a workdir, a Hugging Face or open_clip folder, an OpenAI or RankCLIP .pt, ...")
    parser.add_argument("dst", help="the folder to write")
    parser.add_argument(
        "--to",
        choices=export.LAYOUTS,
        default="hf",
        help="hf (default): for transformers; openai: a state dict for open_clip and OpenAI's code; orbax: for JAX",
    )
    parser.add_argument("--tokenizer", help="a tokenizer.json or hub id, if SRC has none")
    parser.add_argument(
        "--activation",
        choices=["quick_gelu", "gelu"],
        default="quick_gelu",
        help="of weights without a config: quick_gelu (OpenAI, RankCLIP; default) or gelu",
    )
    parser.add_argument(
        "--ema", action="store_true", help="the averaged weights of a run with config.optim.ema, instead of its last"
    )
    flags = parser.parse_args()
    commands.usual_numbers()
    # Nothing is computed, so an accelerator need not be free. (JAX makes its options as it starts, unseen by mypy.)
    if not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")
    with commands.exit_codes():
        dst = storage.local(flags.dst, "DST")
        model = pretrained.read(flags.src, flags.tokenizer, flags.activation, flags.ema)
        try:
            export.write(model, dst, flags.to)
        except OSError as error:
            raise InputError(f"cannot write {flags.dst}: {error.strerror or error}") from None
    ours = {name.partition("/")[0] for name in ownership.listed(dst)["convert"]}  # others' files may be beside them
    print(f"wrote {flags.dst}: {', '.join(sorted(name for name in ours if (dst / name).exists()))}")
    if flags.to != "orbax" and export.ours_alone(model.config, flags.to):
        print("open_clip has no such ResNet (three stages, or the small stem); only rankclip_jax.load reads the folder")
    if model.tokenizer is None:
        print(f"no tokenizer files written: {flags.src} has no tokenizer; give one with --tokenizer")


if __name__ == "__main__":
    main()
