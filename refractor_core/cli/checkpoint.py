"""``refractor checkpoint``: list, verify, and exchange with Hugging Face."""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list|verify|export-hf|import-hf")
    listing = verbs.add_parser("list", help="checkpoints of a run")
    listing.add_argument("run_dir")
    verify = verbs.add_parser("verify", help="read every byte; exit 1 and name what is damaged")
    verify.add_argument("path", help="a checkpoint, or a run directory for all of its checkpoints")
    export = verbs.add_parser("export-hf", help="write a Hugging Face directory")
    export.add_argument("path", help="a checkpoint or run directory")
    export.add_argument("target", help="new directory")
    export.add_argument("--family", choices=["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"], help="default: the one that fits")
    export.add_argument("--weights", choices=["live", "ema"], default="live")
    bring = verbs.add_parser("import-hf", help="turn a Hugging Face directory into a checkpoint that a run can begin from")
    bring.add_argument("path", help="a Hugging Face directory")
    bring.add_argument("target", help="new directory; the checkpoint becomes target/step-00000000")


def run(args: argparse.Namespace) -> int:
    """Does what the verb says; exit code 1 if a checkpoint is damaged."""
    return {"list": _list, "verify": _verify, "export-hf": _export, "import-hf": _import}[args.verb](args)


def _found(path: str) -> list:
    from pathlib import Path

    from refractor_core.checkpoint import Checkpoint

    place = Path(path)
    if (place / "manifest.json").is_file() or place.name.startswith("step-"):
        return [Checkpoint(place)]
    found = Checkpoint.listed(place / "checkpoints" if (place / "checkpoints").is_dir() else place)
    if not found:
        raise ValueError(f"{path}: holds no checkpoint; expected a directory step-00000100, or a run directory with checkpoints/")
    return found


def _list(args: argparse.Namespace) -> int:
    from refractor_core.checkpoint import DamagedCheckpoint

    for checkpoint in _found(args.run_dir):
        try:
            print(f"{checkpoint.path}  step {checkpoint.step}  {checkpoint.state['tokens']:,} tokens  {checkpoint.summary()}")
        except DamagedCheckpoint as error:
            print(f"{checkpoint.path}  damaged: {error}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    damaged = False
    for checkpoint in _found(args.path):
        damages = checkpoint.verify()
        damaged |= bool(damages)
        print("\n".join(f"damaged: {damage}" for damage in damages) or f"sound: {checkpoint.path}  {checkpoint.summary()}")
    return 1 if damaged else 0


def _export(args: argparse.Namespace) -> int:
    from pathlib import Path

    from refractor_core.checkpoint.model import find_checkpoint, load_model
    from refractor_core.model.hub import export_hub
    from refractor_core.train.state import DTYPES

    checkpoint = find_checkpoint(Path(args.path))
    stored = checkpoint.names("model.")  # imported: in the format that they came in
    dtype = checkpoint.dtype(stored[0]) if stored else DTYPES[checkpoint.state.get("precision", "fp32")]
    model = load_model(checkpoint.path, dtype, weights=args.weights)
    export_hub(model, Path(args.target), family=args.family)
    print(f"wrote {args.target}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from pathlib import Path

    from refractor_core.checkpoint.model import import_checkpoint

    print(f"wrote {import_checkpoint(Path(args.path), Path(args.target))}")
    return 0
