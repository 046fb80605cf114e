"""What a server's copy of a GGUF file could be, other than llama-quantize's: of another form, or of another content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from finetune_assets.export.gguf.form import write_in_form
from finetune_assets.models.formats.gguf import UINT32, Head, read_head


def backwards(source: Path, target: Path) -> None:
    """A copy in another form than llama-quantize's: tensors from the last to the first, other metadata first."""
    head = read_head(source)
    turned = replace(head, raw=dict(reversed(head.raw.items()))).laid_out(head.tensors[::-1])
    _write(source, head, turned, target)


def _write(source: Path, head: Head, made: Head, target: Path) -> None:
    data, places = source.read_bytes(), {tensor.name: head.data_start + tensor.offset for tensor in head.tensors}
    with target.open("wb") as out:
        out.write(made.encode())
        start = out.tell()
        for tensor in made.tensors:
            out.seek(start + tensor.offset)
            out.write(data[places[tensor.name] :][: tensor.nbytes])
        out.truncate(start + made.data_size)


def one_weight_changed(source: Path, target: Path) -> None:
    """The last byte of one tensor in the middle of the file."""
    backwards(source, target)
    head = read_head(target)
    tensor = next(tensor for tensor in head.tensors if tensor.name == "blk.1.ffn_up.weight")
    with target.open("r+b") as file:
        file.seek(head.data_start + tensor.offset + tensor.nbytes - 1)
        last = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([last ^ 1]))


def other_metadata(source: Path, target: Path) -> None:
    head = read_head(source)
    write_in_form(source, head.with_value("llama.context_length", UINT32, 511), target)


def another_type(source: Path, target: Path) -> None:
    """A tensor table that says something else: one matrix turned on its side."""
    head = read_head(source)
    turned = [
        replace(tensor, shape=tensor.shape[::-1]) if tensor.name == "output.weight" else tensor
        for tensor in head.tensors
    ]
    _write(source, head, head.laid_out(turned), target)
