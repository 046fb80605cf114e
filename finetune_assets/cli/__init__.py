"""The command line, `finetune`: reads arguments, calls lineage and assets, prints. Front door: `main`."""

from finetune_assets.cli.commands import main

__all__ = ["main"]
