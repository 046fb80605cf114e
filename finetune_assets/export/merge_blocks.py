"""The work of a streamed merge: tensors that stay are copied by the kernel, the others computed a few rows at a time.

A block of rows is read, converted, multiplied, added and written while it is in a core's cache, by one thread for each
core. How rows are cut into blocks changes no bit: an element of B A is the same sum whatever is computed beside it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_assets.errors import StepFailed
from finetune_assets.export.shards import BYTES_OF, FLOATS, Checkpoint, Spec, head

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 18  # weights: 1 MiB in float32, so that a block and its change fit a core's cache
PORTION = 1 << 23  # weights that a thread takes at a time
FEWEST = 16  # rows of a block: products of a row or two may be summed in another order
NO_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}  # of a kernel that cannot


@dataclass(frozen=True)
class Update:
    """What happens to one base weight W of shape (out, in): W + scale * B A, then DoRA's magnitude where there is one.

    `a`, `b` and `magnitude` are names of adapter tensors of shapes (r, in), (out, r) and (out,).
    """

    a: str
    b: str
    magnitude: str | None
    scale: float


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the merged model comes from: a stored tensor, changed or as it is."""

    checkpoint: Checkpoint
    name: str
    update: Update | None


Shard = Sequence[tuple[Spec, Origin]]


def write_shards(shards: Mapping[Path, Shard], lora: Checkpoint, device: str, done: Callable[[], None]) -> None:
    """Write each file with its tensors, which are in file order.

    Args:
        device: torch's name of where to compute.
        done: is called after each tensor.

    Raises:
        StepFailed: a weight is not finite once merged, or does not fit its type.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        # As many files at a time as there are threads: two that write to one file wait for each other.
        for first in range(0, len(shards), threads):
            _write(dict(list(shards.items())[first : first + threads]), lora, device, done, threads)
    finally:
        torch.set_num_threads(threads)


def _write(shards: Mapping[Path, Shard], lora: Checkpoint, device: str, done: Callable[[], None], threads: int) -> None:
    import torch

    with contextlib.ExitStack() as files:
        # one thread of torch's to each of ours
        pool = files.enter_context(ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)))
        files.callback(pool.shutdown, cancel_futures=True)
        sources: dict[Path, int] = {}
        queues: list[list[tuple[_Tensor, tuple[int, int]]]] = []
        for path, origins in shards.items():
            start, places = head([spec for spec, _ in origins])
            out = files.enter_context(path.open("wb"))
            out.write(start)
            out.flush()
            queue: list[tuple[_Tensor, tuple[int, int]]] = []
            for (spec, origin), place in zip(origins, places, strict=True):
                file, begin = origin.checkpoint.place(origin.name)
                if file not in sources:
                    sources[file] = files.enter_context(file.open("rb")).fileno()
                tensor = _Tensor(spec, origin, lora, device, (sources[file], begin), (out.fileno(), place))
                queue += [(tensor, portion) for portion in tensor.portions()]
            queues.append(queue)
        jobs: dict[Future[None], str] = {}
        for tensor, portion in (job for turn in itertools.zip_longest(*queues) for job in turn if job is not None):
            jobs[pool.submit(tensor.write, *portion)] = tensor.spec.name
        left = Counter(jobs.values())
        for job in as_completed(jobs):
            job.result()
            left[jobs[job]] -= 1
            if not left[jobs[job]]:
                done()


@dataclass(frozen=True)
class _Tensor:
    """One tensor on its way: (descriptor, place of the first byte) it is read from, and that it is written to."""

    spec: Spec
    origin: Origin
    lora: Checkpoint
    device: str
    read: tuple[int, int]
    written: tuple[int, int]

    @property
    def width(self) -> int:
        """Weights of a row; what is not multiplied is cut wherever it suits."""
        return self.spec.shape[1] if self.origin.update is not None else 1

    def portions(self) -> list[tuple[int, int]]:
        """Ranges of rows, one for each job."""
        return self._parts(0, math.prod(self.spec.shape) // self.width, PORTION)

    def write(self, first: int, last: int) -> None:
        """Compute and write the rows from `first` up to `last`."""
        if first == last:
            return
        stored = self.origin.checkpoint.spec(self.origin.name).dtype
        size, size_made = BYTES_OF[stored] * self.width, BYTES_OF[self.spec.dtype] * self.width
        (source, begin), (target, place) = self.read, self.written
        if self.origin.update is None and stored == self.spec.dtype and self.origin.checkpoint is not self.lora:
            _copy(source, begin + first * size, target, place + first * size_made, (last - first) * size)
            return
        import torch

        dtypes = {stored: getattr(torch, name) for name, stored in FLOATS.items()}
        blocks = self._parts(first, last, BLOCK)
        rows = max(high - low for low, high in blocks)
        # for all blocks: fresh memory would cost more than the arithmetic
        raw = torch.empty(rows, self.width, dtype=dtypes[stored])
        made = torch.empty(rows, self.width, dtype=dtypes[self.spec.dtype])
        weight = torch.empty(rows, self.width, device=self.device)
        change = _Change(self.origin.update, self.lora, self.device, rows) if self.origin.update is not None else None
        for low, high in blocks:
            part = slice(high - low)
            _fill(source, _bytes(raw[part]), begin + low * size)
            weight[part] = raw[part]
            if change is not None:
                change.apply(weight[part], low, high)
            self._check(weight[part], made.dtype)
            made[part] = weight[part]
            _pour(target, _bytes(made[part]), place + low * size_made)

    def _parts(self, first: int, last: int, weights: int) -> list[tuple[int, int]]:
        """The rows in parts of nearly the same length, of about so many weights."""
        count = (last - first) // max(FEWEST, weights // self.width) or 1
        edges = [first + (last - first) * number // count for number in range(count + 1)]
        return list(itertools.pairwise(edges))

    def _check(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        import torch

        # rounding keeps order: where least and largest are finite, all are; NaN is both
        if bool(torch.stack(torch.aminmax(weight)).to(dtype).isfinite().all()):
            return
        if self.spec.dtype == "F16":
            raise StepFailed(
                f"{self.spec.name} does not fit float16 once merged", "set export.export_dtype to bfloat16 or float32"
            )
        raise StepFailed(
            f"{self.spec.name} is not finite once merged: the adapter holds NaN or infinite values", "train it again"
        )


class _Change:
    """An update, ready to be applied to at most `rows` rows at a time. The arithmetic and its order are PEFT's."""

    def __init__(self, update: Update, lora: Checkpoint, device: str, rows: int):
        import torch

        def fetch(name: str) -> torch.Tensor:
            return lora.tensor(name).float().to(device)

        self.a, self.b, self.scale = fetch(update.a), fetch(update.b), update.scale
        self.magnitude = fetch(update.magnitude) if update.magnitude is not None else None
        self.delta = torch.empty(rows, self.a.shape[1], device=device)

    def apply(self, weight: torch.Tensor, first: int, last: int) -> None:
        """Change the rows `weight` (float32, those from `first` up to `last`) in place. Shape (last - first, in)."""
        import torch

        weight += torch.mm(self.b[first:last], self.a, out=self.delta[: last - first]).mul_(self.scale)
        if self.magnitude is not None:
            # DoRA (arXiv 2402.09353, eq. 5): the direction of W + BA, the length from the magnitude.
            factor = self.magnitude[first:last] / torch.linalg.norm(weight, dim=1)
            weight *= factor.view(-1, 1)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor, whose rows follow each other."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data


def _fill(source: int, view: memoryview, at: int) -> None:
    while len(view):
        if not (got := os.preadv(source, [view], at)):
            raise StepFailed("a file of weights ends before its tensors do", "fetch or make it again")
        view, at = view[got:], at + got


def _pour(target: int, view: memoryview, at: int) -> None:
    while len(view):
        done = os.pwrite(target, view, at)
        view, at = view[done:], at + done


def _copy(source: int, begin: int, target: int, place: int, size: int) -> None:
    """Bytes from file to file; the kernel does it where it can (Linux, most file systems)."""
    while size and hasattr(os, "copy_file_range"):
        try:
            done = os.copy_file_range(source, target, size, begin, place)
        except OSError as error:
            if error.errno in NO_COPY:
                break
            raise
        if not done:
            break
        begin, place, size = begin + done, place + done, size - done
    buffer = bytearray(min(size, 1 << 20))
    while size:
        view = memoryview(buffer)[: min(size, len(buffer))]
        _fill(source, view, begin)
        _pour(target, view, place)
        begin, place, size = begin + len(view), place + len(view), size - len(view)
