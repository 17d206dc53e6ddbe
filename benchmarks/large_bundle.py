"""A bundle whose weights are larger than 2 GB, which no ONNX file can hold itself: built, checked, served.

    python -m benchmarks.large_bundle [--gigabytes 2.2] [--keep FOLDER] [--half]

Writes an image tower with random weights in an external file, then, each in a process of its own, proves it
with `embedserve check`, and serves it: an image is put into a collection and found again. Needs about
twice the size as free memory.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import numpy as np
from PIL import Image

from benchmarks.machine import machine, resident_bytes
from benchmarks.server_process import server
from benchmarks.vit_bundle import Shape, write_vit_bundle

WIDTH = 1664
"""Of ViT-bigG/14, whose image tower has 1.8 billion parameters in 48 layers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--half", action="store_true", help="weights in float16")
    parser.add_argument("--keep", type=Path, help="leave the bundle here")
    arguments = parser.parse_args()
    print(machine())
    size = 2 if arguments.half else 4
    layers = round(arguments.gigabytes * 1e9 / (12 * WIDTH**2 * size)) + 1
    shape = Shape("random-vit-large", 224, 32, WIDTH, layers, 64, 1, 256, 1000)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary) / "bundle"
        started = time.perf_counter()
        bundle = write_vit_bundle(folder, shape, half=arguments.half, external=True)
        weights = bundle.path("image.onnx.data").stat().st_size
        print(f"written  {layers} layers of {WIDTH}, {weights / 1e9:.2f} GB, in {_since(started)}")
        if weights <= 1 << 31 and arguments.gigabytes > 2:
            raise SystemExit("the weights are not larger than 2 GiB")
        command = [sys.executable, "-m", "embedserve", "check", str(folder), "--json", "--device", "cpu"]
        started = time.perf_counter()
        done = subprocess.run([*command, "--seconds", "1"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        report = json.loads(done.stdout)
        print(
            f"checked  in {_since(started)}: loaded in {report['load_seconds']:.1f} s, hashes included; "
            f"{report['speed']['resident_bytes'] / 1e9:.2f} GB resident; "
            f"{report['speed']['images_per_second']:.2f} images/s"
        )
        _serve(folder)


def _serve(folder: Path) -> None:
    with server("--encoder", str(folder), "--device", "cpu") as running:
        with httpx2.Client(base_url=f"http://127.0.0.1:{running.port}", timeout=120) as client:
            client.put("/v1/collections/large").raise_for_status()
            form = {}
            for seed in range(2):
                file = io.BytesIO()
                noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
                Image.fromarray(noise).save(file, "PNG")
                form = {"file": (f"{seed}.png", file.getvalue(), "image/png")}
                client.post("/v1/collections/large/items", files=form).raise_for_status()
            answer = client.post("/v1/collections/large/search", files={"image": form["file"]})
            best = answer.raise_for_status().json()["hits"][0]
        print(
            f"served   ready in {running.seconds_to_ready:.1f} s; {resident_bytes(running.pid) / 1e9:.2f} GB "
            f"resident; the image put in last is found first: {best['id']}, score {best['score']:.4f}"
        )


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.1f} s"


if __name__ == "__main__":
    main()
