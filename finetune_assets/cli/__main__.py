"""Entry point of `python -m finetune_assets.cli`."""

from finetune_assets.cli.commands import main

if __name__ == "__main__":
    main()
