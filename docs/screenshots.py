"""Screenshots of the Dagster UI for the documentation, from a real server and a real browser.

usage: python -m docs.screenshots RECIPE OUT_DIR
Shows the state under DAGSTER_HOME: run the recipe first. Needs Chromium; CHROMIUM names it if it is not on the PATH.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from docs.changes import PROJECT, Copy, new_and_changed_rows

QUIET = ("--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update")


def find_chromium() -> str | None:
    """Return the browser that CHROMIUM names, else the first one on the PATH."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


DAGSTER_DEV = (sys.executable, "-m", "dagster", "dev", "-h", "127.0.0.1")


@contextmanager
def webserver(project: Path, home: Path, *, command: Sequence[str] = DAGSTER_DEV) -> Iterator[str]:
    """Run Dagster's web server and daemon on a project, on a free loopback port; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, "FINETUNE_PROJECT": str(project), "DAGSTER_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(address, server)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@contextmanager
def page(width: int = 1600, height: int = 1000) -> Iterator[Page]:
    """Yield an empty page of a headless browser."""
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=[*QUIET, *sandbox])
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()


def _wait_for(address: str, server: subprocess.Popen[bytes], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/server_info", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"no answer from {address} within {seconds:.0f} s")


def main(recipe: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    project = Path(__file__).resolve().parent.parent
    home = Path(os.environ.get("DAGSTER_HOME") or project / "dagster_home")
    with webserver(project, home) as address, page() as browser:
        browser.goto(f"{address}/locations/finetune_assets/asset-groups/{recipe}/lineage")
        browser.get_by_text("ollama_model").first.wait_for(timeout=120_000)
        browser.wait_for_timeout(5000)  # the page shows the graph first, and the states of the assets later
        browser.screenshot(path=out / "lineage.png")
        for asset in ("lora_adapter", "eval_metrics", "ollama_model"):
            browser.goto(f"{address}/assets/{recipe}/{asset}?view=overview")
            browser.get_by_text("fingerprint").first.wait_for(timeout=120_000)
            browser.wait_for_timeout(2000)
            browser.screenshot(path=out / f"{asset}.png")
        browser.goto(f"{address}/assets/{recipe}/lora_adapter?view=overview")
        browser.get_by_text("[Show Markdown]").first.click(timeout=60_000)
        browser.wait_for_timeout(2000)
        browser.screenshot(path=out / "loss_curve.png")


def stale(recipe: str, out: Path) -> None:
    """Take pictures of the lineage after edits of the recipe and a data file, which the running server has to find."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder), recipe)
        shutil.copyfile(PROJECT / "dagster_home" / "dagster.yaml", copy.home / "dagster.yaml")
        with webserver(copy.root, copy.home) as address, page(2000, 900) as browser:
            browser.goto(f"{address}/locations/finetune_assets/asset-groups/{recipe}/lineage")
            browser.get_by_text("Materialized").first.wait_for(timeout=180_000)  # the sensor's first tick
            copy.set("train", learning_rate=5e-4)
            new_and_changed_rows(copy)
            browser.get_by_text("Unsynced").first.wait_for(timeout=180_000)  # its next tick
            browser.wait_for_timeout(5000)
            browser.screenshot(path=out / "stale.png")
            browser.goto(f"{address}/assets/{recipe}/lora_adapter_config?view=overview")
            browser.wait_for_timeout(8000)
            browser.screenshot(path=out / "config_node.png")


if __name__ == "__main__":
    stale(sys.argv[1], Path(sys.argv[2]))
    main(sys.argv[1], Path(sys.argv[2]))
