"""`unimoe train`: one stage of training from a recipe."""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a stage from a recipe",
        description="Trains what a YAML recipe says; see docs/training.md and the recipes there. On several processes: "
        "torchrun --nproc-per-node N -m unimoe train RECIPE.yaml",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last whole checkpoint in the recipe's output"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains. Raises ValueError, OSError or ImportError, with a message for the user, for whatever cannot be done."""
    try:
        import accelerate
    except ImportError:
        raise ImportError("training needs accelerate: pip install 'unimoe[train]'") from None
    if not args.recipe.is_file():
        raise ValueError(f"{args.recipe}: no such file; give a recipe")
    import unimoe  # noqa: F401  (registers the model)

    from ..training.recipe import Recipe
    from ..training.stages import run_recipe

    folder = run_recipe(Recipe.read(args.recipe), resume=args.resume)
    if accelerate.PartialState().is_main_process:
        print(f"done: {folder}")
    return 0
