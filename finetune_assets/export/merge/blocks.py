"""Writing of a streamed merge: the kernel copies unchanged tensors; the others are computed a few rows at a time.

One thread per core reads, converts, multiplies, adds and writes a block of rows while it is in the core's cache. The
size of blocks does not change a bit of the result: an element of B A is the same sum in any block.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from finetune_assets.export.merge.file_rows import Rows, create
from finetune_assets.models.formats.safetensors import BYTES_OF, FLOAT_NAMES, Checkpoint, Spec, head
from finetune_assets.reporting.errors import StepFailed

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 18  # weights: 1 MiB in float32; smaller blocks cost more calls, larger ones leave a core's cache
PORTION = 1 << 23  # weights of one job of a thread
FEWEST = 16  # rows of a block at least: products of one or two rows may be summed in another order


@dataclass(frozen=True)
class Update:
    """The update of one base weight W of shape (out, in): W + scale * B A, then DoRA's magnitude if there is one.

    `a`, `b` and `magnitude` are names of adapter tensors of shapes (r, in), (out, r) and (out,).
    """

    a: str
    b: str
    magnitude: str | None
    scale: float


@dataclass(frozen=True)
class Origin:
    """The source of a merged tensor: a stored tensor, and its update if it has one."""

    checkpoint: Checkpoint
    name: str
    update: Update | None


Shard = Sequence[tuple[Spec, Origin]]


def write_shards(shards: Mapping[Path, Shard], lora: Checkpoint, device: str, done: Callable[[], None]) -> None:
    """Write each file with its tensors, which are in file order.

    Args:
        device: torch's name of the device that computes.
        done: called after each tensor.

    Raises:
        StepFailed: a weight is not finite once merged, or does not fit its type.
    """
    import torch

    threads = torch.get_num_threads()
    # each of our threads computes with one thread of torch
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    queues: list[list[tuple[_Tensor, tuple[int, int]]]] = []
    for path, origins in shards.items():
        start, places = head([spec for spec, _ in origins])
        create(path, start, len(start) + sum(spec.nbytes for spec, _ in origins))
        for_file = zip(origins, places, strict=True)
        tensors = [_Tensor(spec, origin, lora, device, path, place) for (spec, origin), place in for_file]
        queues.append([(tensor, portion) for tensor in tensors for portion in tensor.portions()])
    # jobs alternate between files: of two threads that write to one file, one waits
    in_turn = [job for turn in itertools.zip_longest(*queues) for job in turn if job is not None]
    try:
        jobs = {pool.submit(tensor.write, *portion): tensor.spec.name for tensor, portion in in_turn}
        left = Counter(jobs.values())
        for job in as_completed(jobs):
            job.result()
            left[jobs[job]] -= 1
            if not left[jobs[job]]:
                done()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Tensor:
    """One tensor, the file it is written to, and the offset of its first byte there."""

    spec: Spec
    origin: Origin
    lora: Checkpoint
    device: str
    path: Path
    place: int

    @property
    def width(self) -> int:
        """Weights of a row; a tensor without an update has rows of one weight, so that it can be cut anywhere."""
        return max(1, self.spec.shape[1]) if self.origin.update is not None else 1

    def portions(self) -> list[tuple[int, int]]:
        """Return ranges of rows, one for each job."""
        return self._parts(0, math.prod(self.spec.shape) // self.width, PORTION)

    def write(self, first: int, last: int) -> None:
        """Compute and write the rows from `first` up to `last`."""
        stored = self.origin.checkpoint.spec(self.origin.name).dtype
        file, begin = self.origin.checkpoint.place(self.origin.name)
        with file.open("rb") as source, self.path.open("r+b") as target:
            read = Rows(source.fileno(), begin, self.width * BYTES_OF[stored])
            written = Rows(target.fileno(), self.place, self.width * BYTES_OF[self.spec.dtype])
            as_it_is = self.origin.update is None and stored == self.spec.dtype
            if as_it_is and self.origin.checkpoint is not self.lora:
                read.copy(first, last, written)
            elif first < last:
                self._compute(first, last, read, written, FLOAT_NAMES[stored])

    def _compute(self, first: int, last: int, read: Rows, written: Rows, stored: str) -> None:
        blocks = self._parts(first, last, BLOCK)
        sizes = {high - low for low, high in blocks}
        update, most = self.origin.update, max(sizes)
        change = _Change(update, self.lora, most, self.device) if update is not None else None
        memory = _Block.of(most, self.width, stored, FLOAT_NAMES[self.spec.dtype], self.device)
        views = {rows: memory.first(rows) for rows in sizes}
        for low, high in blocks:
            block = views[high - low]
            read.read(low, block.raw_bytes)
            block.weight.copy_(block.raw)
            if change is not None:
                change.apply(block.weight, low, high)
            block.made.copy_(block.weight)
            if not block.finite():
                self._fail()
            written.write(low, block.made_bytes)

    def _parts(self, first: int, last: int, weights: int) -> list[tuple[int, int]]:
        """Cut rows into parts of nearly equal length, of about `weights` weights each."""
        count = (last - first) // max(FEWEST, weights // self.width) or 1
        edges = [first + (last - first) * number // count for number in range(count + 1)]
        return list(itertools.pairwise(edges))

    def _fail(self) -> NoReturn:
        if self.spec.dtype == "F16":
            raise StepFailed(
                f"{self.spec.name} does not fit float16 once merged", "set export.export_dtype to bfloat16 or float32"
            )
        raise StepFailed(
            f"{self.spec.name} is not finite once merged: the adapter holds NaN or infinite values", "train it again"
        )


class _Block:
    """Memory for some rows: as stored, in float32, and as written.

    All blocks of a job share it, and views are created once: new memory would cost more than the arithmetic.
    """

    def __init__(self, raw: torch.Tensor, weight: torch.Tensor, made: torch.Tensor):
        import numpy as np
        import torch

        self.raw, self.weight, self.made = raw, weight, made
        self.raw_bytes, self.made_bytes = _bytes(raw), _bytes(made)
        kinds = [f"{kind}{made.element_size()}" for kind in "iu"]
        infinite = _bytes(torch.tensor([math.inf, -math.inf], dtype=made.dtype))
        self._bits = [np.frombuffer(self.made_bytes, kind) for kind in kinds]
        self._least = [int(np.frombuffer(infinite, kind)[sign]) for sign, kind in enumerate(kinds)]

    @classmethod
    def of(cls, rows: int, width: int, stored: str, made: str, device: str) -> _Block:
        import torch

        raw = torch.empty(rows, width, dtype=getattr(torch, stored))
        weight = raw.to(device, torch.float32)  # the same memory where there is nothing to convert
        return cls(raw, weight, weight.to("cpu", getattr(torch, made)))

    def first(self, rows: int) -> _Block:
        """Return a view of the first rows."""
        raw = self.raw[:rows]
        weight = raw if self.weight is self.raw else self.weight[:rows]
        return _Block(raw, weight, weight if self.made is self.weight else self.made[:rows])

    def finite(self) -> bool:
        """Return whether all values to be written are finite.

        Read as integers, infinity and NaN are the largest of their sign: signed integers show the positive ones,
        unsigned integers the negative ones.
        """
        return all(bits.max() < least for bits, least in zip(self._bits, self._least, strict=True))


class _Change:
    """An update that can be applied to at most `rows` rows at a time, by PEFT's arithmetic in PEFT's order."""

    def __init__(self, update: Update, lora: Checkpoint, rows: int, device: str):
        import torch

        def fetch(name: str) -> torch.Tensor:
            return lora.tensor(name).float().to(device)

        self.a, self.b, self.scale = fetch(update.a), fetch(update.b), update.scale
        self.magnitude = fetch(update.magnitude) if update.magnitude is not None else None
        rank, width = self.a.shape
        self.one_pass = _one_pass(rows, rank, width, self.scale, device)
        self.delta = torch.empty(0 if self.one_pass else rows, width, device=device)

    def apply(self, weight: torch.Tensor, first: int, last: int) -> None:
        """Change rows in place: float32, those from `first` up to `last`. Shape (last - first, in)."""
        import torch

        b = self.b[first:last]
        if self.one_pass:
            weight.addmm_(b, self.a, alpha=self.scale)
        else:
            weight += torch.mm(b, self.a, out=self.delta[: last - first]).mul_(self.scale)
        if self.magnitude is not None:
            # DoRA (arXiv 2402.09353, eq. 5): the direction of W + BA, the length from the magnitude.
            factor = self.magnitude[first:last] / torch.linalg.norm(weight, dim=1)
            weight *= factor.view(-1, 1)


@functools.cache
def _one_pass(rows: int, rank: int, width: int, scale: float, device: str) -> bool:
    """Try whether addmm returns the bits of PEFT's separate product, multiplication and sum.

    It does if nothing is rounded in between: the scale is a power of two, and the library does not sum the rank in
    parts.
    """
    import torch

    generator = torch.Generator(device).manual_seed(0)
    shapes = ((rows, width), (rows, rank), (rank, width))
    weight, b, a = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    return torch.equal(torch.addmm(weight, b, a, alpha=scale), weight + (b @ a) * scale)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data
