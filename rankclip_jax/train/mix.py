"""The command line: rankclip mix A B --alpha 0.5 --out DIR, a model between two; --alphas: how good each one is.

Or python -m rankclip_jax.cli mix A B ...
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from rankclip_jax import evaluation, figures
from rankclip_jax.common import commands, storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import whole, write_whole
from rankclip_jax.common.ownership import Owned
from rankclip_jax.models import ResNetConfig
from rankclip_jax.train import arguments, evaluate
from rankclip_jax.weights import export, mixing, pretrained
from rankclip_jax.weights.pretrained import Pretrained

_NAMES = ("mix.json", "mix.png")
_COLUMNS = {"zero_shot": ("top1",), "linear_probe": ("top1",), "retrieval": ("image_to_text_r1", "text_to_image_r1")}


def main() -> None:
    """Exit codes: common/commands.py."""
    parser = argparse.ArgumentParser(
        prog=commands.prog("rankclip_jax.cli mix"),
        description="Writes (1 - ALPHA) A + ALPHA B, weight by weight, of two models of one architecture: of one model "
        "and what was fine-tuned from it, such a mixture often keeps what both can do (WiSE-FT).",
        allow_abbrev=False,
    )
    parser.add_argument("a", metavar="A", help="a workdir, an export, a .pt ...: ALPHA 0")
    parser.add_argument("b", metavar="B", help="the same: ALPHA 1")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--alpha", type=_share, help="default: 0.5, or with --alphas: write no model")
    parser.add_argument(
        "--alphas",
        type=_shares,
        metavar="0,0.25,...",
        help="evaluate these mixtures on the sets that the flags below name: mix.json, mix.png and a table",
    )
    parser.add_argument("--to", choices=export.LAYOUTS, help="as of rankclip export; default: hf, of a ResNet openai")
    parser.add_argument("--tokenizer", help="a tokenizer.json or hub id, for weights that have none")
    parser.add_argument(
        "--activation", choices=["quick_gelu", "gelu"], default="quick_gelu", help="of weights without a config"
    )
    parser.add_argument("--config", help="name or file of an experiment, whose evaluation sets are taken")
    arguments.add_sets(parser)
    keys = [word for word in sys.argv[1:] if word.startswith("--config.")]  # argparse would take a space for a word
    flags = parser.parse_args([word for word in sys.argv[1:] if not word.startswith("--config.")])
    if not flags.alphas and not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")  # nothing is computed, so an accelerator need not be free
    commands.usual_numbers()
    commands.keep_freed_memory()
    with commands.exit_codes():
        out = storage.local(flags.out, "--out")
        if out.resolve() in (Path(flags.a).resolve(), Path(flags.b).resolve()):
            raise InputError(f"--out {flags.out} is one of the two models; give another folder")
        given = [*arguments.sets(flags, alone=True), *(key.removeprefix("--config.") for key in keys)]
        if (given or flags.config) and not flags.alphas:
            raise InputError("nothing is evaluated without --alphas; give it, or leave out --config and the sets")
        a, b = (pretrained.read(path, flags.tokenizer, flags.activation) for path in (flags.a, flags.b))
        try:
            if flags.alphas:
                config = evaluate.settings(flags.config, None, given)
                print(curve(config, a, b, flags.alphas, out))
            if flags.alpha is not None or not flags.alphas:
                alpha = 0.5 if flags.alpha is None else flags.alpha
                model = mixing.between(a, b, alpha)
                resnet = isinstance(model.config.vision, ResNetConfig)
                export.write(model, out, flags.to or ("openai" if resnet else "hf"))
                print(f"wrote {flags.out}: {1 - alpha:g} {flags.a} + {alpha:g} {flags.b}")
        except OSError as error:
            raise InputError(f"cannot write {flags.out}: {error.strerror or error}") from None


def curve(config: ConfigDict, a: Pretrained, b: Pretrained, alphas: Sequence[float], folder: Path) -> str:
    """Evaluates the mixtures on config.eval's sets; writes mix.json and mix.png; returns the table.

    Raises:
      InputError: no set is named, or none could be evaluated; the two do not mix; or files of others are in the way.
    """
    session = evaluate.session_of(config, mixing.between(a, b, alphas[0]))
    sets = evaluation.open_sets(config.eval, session.side)
    if not any(sets.opened.values()):
        hint = "name sets to evaluate on: --labels TABLE:COLUMN, --retrieval TABLE, --imagenet FOLDER or --config NAME"
        raise InputError("; ".join(sets.missing.values()) or f"--alphas: {hint}")
    owned = Owned(folder, "mix")
    owned.claim(_NAMES)
    rows, table, missing = [], {}, dict(sets.missing)
    for alpha in alphas:
        print(f"alpha {alpha:g}", flush=True)
        state = evaluate.state_of(session, mixing.between(a, b, alpha))
        results = evaluation.evaluate(config.eval, session.encoder(state), sets)
        missing |= results["missing"]
        if not any(results[kind] for kind in evaluation.KINDS):
            raise InputError("; ".join(missing.values()))
        rows.append({"alpha": alpha} | evaluation.flat(results))
        table[f"{alpha:g}"] = {
            f"{name} {evaluation.short(key)}": row[key]
            for kind, columns in _COLUMNS.items()
            for name, row in results[kind].items()
            for key in columns
        }
    found = {"a": a.path.name, "b": b.path.name, "rows": rows, "missing": missing}
    write_whole(folder / _NAMES[0], json.dumps(found, indent=2) + "\n")
    with whole(folder / _NAMES[1]) as part:
        figures.over_alpha(rows, a.path.name, b.path.name).savefig(part, format="png")
    said = [f"missing: {name}: {reason}" for name, reason in missing.items()]
    return "\n".join([evaluation.table(table, "alpha"), *said, f"drawn: {folder / _NAMES[1]}"])


def _share(text: str) -> float:
    try:
        if 0 <= (value := float(text)) <= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 1")


def _shares(text: str) -> list[float]:
    return sorted({_share(part) for part in text.split(",")})
