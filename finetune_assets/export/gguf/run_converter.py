"""Main program of a child process: runs llama.cpp's converter so that it writes its file in the form of `form`.

usage: python run_converter.py STOP_TOKEN_IDS SCRIPT [ARGUMENT...]

The converter writes tensors in the order of the checkpoint, and a file of 16 GB would have to be written again to be
sorted. So its writer gets the sorted order, and the corrections of chat_metadata, before it writes the first byte.
STOP_TOKEN_IDS is a JSON list.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the script with its writer changed."""
    stops, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    sys.path.insert(1, str(Path(__file__).resolve().parents[3]))
    import gguf  # the one that the script uses

    writer: Any = gguf.GGUFWriter
    write_header = writer.write_header_to_file

    def arrange_and_write(self: Any, path: Path | None = None) -> None:
        arrange(self, json.loads(stops))
        write_header(self, path)

    writer.write_header_to_file = arrange_and_write
    runpy.run_path(script, run_name="__main__")


def arrange(writer: Any, stop_token_ids: list[int]) -> None:
    """Sort the metadata and tensors that a GGUFWriter holds for one file, and correct the metadata."""
    from finetune_assets.export.gguf.chat_metadata import corrected
    from finetune_assets.export.gguf.form import metadata_in_form, place
    from finetune_assets.models.formats.gguf import Head

    (values,), (tensors,) = writer.kv_data, writer.tensors
    raw = {
        key: (int(value.type), bytes(writer._pack_val(value.value, value.type, False, value.sub_type)))
        for key, value in values.items()
    }
    made = Head(3, metadata_in_form(corrected(Head(3, raw, (), 0), stop_token_ids).raw), (), 0)
    for key in [key for key in values if key not in made.raw]:
        del values[key]
    for key, (kind, data) in made.raw.items():
        value = values.pop(key, None)
        if raw.get(key) == (kind, data):
            values[key] = value
        else:
            writer.add_key_value(key, made.get(key), type(next(iter(values.values())).type)(kind))
    for name in sorted(tensors, key=place):
        tensors[name] = tensors.pop(name)


if __name__ == "__main__":
    main()
