"""Runs a Python script in which no code of a model can run: `python guarded_script.py SCRIPT ARGUMENTS...`.

Started by path in a process of its own (see `converter`): the script finds its arguments, its folder on the module
path and the name `__main__` as if it had been started itself.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    script = Path(sys.argv[1])
    sys.path[0] = str(Path(__file__).parents[3])
    from finetune_assets.inputs.remote_code import gate

    sys.path[0] = str(script.parent)
    sys.argv = sys.argv[1:]
    with gate(trust=False):
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
