"""The command line, `finetune`: reads arguments, calls lineage and assets, prints. Entry point: `main`."""

from finetune_assets.cli.commands import main

__all__ = ["main"]
