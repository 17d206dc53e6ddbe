"""Memory of a process that embeds inputs of ever other shapes, by the settings of ONNX Runtime.

    python -m benchmarks.memory [BUNDLE] [--requests 100]

Each line is a fresh process that gets the same random requests: 1 to 32 images, or 1 to 32 texts of one
random length up to the context. "As served" has both towers loaded, the others one. Speed is per CPU second,
so that a busy machine does not decide; run it on an idle one all the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.machine import machine
from embedserve.bundle import Bundle, open_bundle
from embedserve.check import resident_bytes
from embedserve.encoder import Encoder, resolve
from embedserve.graph import available_cores, session_options
from embedserve.tokenizer import Tokenizer

MOST = 32  # inputs of one request
MB = 1024 * 1024

Batch = NDArray[np.generic]
Run = Callable[[Batch], object]


# ---------------------------------------------------------------------------------------- what is compared


def defaults(bundle: Bundle, tower: str) -> Run:
    options = ort.SessionOptions()
    options.intra_op_num_threads = available_cores()
    return _session(bundle, tower, options)


def plans_off(bundle: Bundle, tower: str) -> Run:
    return _session(bundle, tower, session_options(available_cores()))


def rounded(bundle: Bundle, tower: str) -> Run:
    run = plans_off(bundle, tower)

    def rounded_up(batch: Batch) -> object:
        more = [(0, 0)] * batch.ndim
        more[0] = (0, (1 << (len(batch) - 1).bit_length()) - len(batch))
        if tower == "text":
            more[1] = (0, -batch.shape[1] % 8)
        return run(np.pad(batch, more))

    return rounded_up


def no_arena(bundle: Bundle, tower: str) -> Run:
    options = session_options(available_cores())
    options.enable_cpu_mem_arena = False
    return _session(bundle, tower, options)


def arena_shrunk(bundle: Bundle, tower: str) -> Run:
    shrink = ort.RunOptions()
    shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return _session(bundle, tower, session_options(available_cores()), shrink)


def as_served(bundle: Bundle, tower: str) -> Run:
    encoder = Encoder(bundle)
    if tower == "image":
        return lambda batch: encoder.embed_images(list(batch))
    return lambda batch: encoder.embed_texts(batch.tolist())


VARIANTS = {
    "ONNX Runtime's defaults": defaults,
    "memory plans off": plans_off,
    "plans off, shapes rounded up": rounded,
    "plans off, no arena": no_arena,
    "plans off, arena shrunk after each run": arena_shrunk,
    "as served: plans off, runs kept small": as_served,
}


def _session(
    bundle: Bundle, tower: str, options: ort.SessionOptions, run_options: ort.RunOptions | None = None
) -> Run:
    described = bundle.description.image if tower == "image" else bundle.description.text
    if described is None:
        raise SystemExit(f"'{bundle.folder}' has no {tower} tower.")
    path = str(bundle.path(described.file))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch}, run_options)


# ------------------------------------------------------------------------------------------------ one line


def requests_for(bundle: Bundle, tower: str) -> Callable[[np.random.Generator], Batch]:
    image, text = bundle.description.image, bundle.description.text
    if tower == "image" and image is not None:
        side = (image.preprocessing.height, image.preprocessing.width, 3)
        return lambda random: random.integers(0, 256, (random.integers(1, MOST + 1), *side), dtype=np.uint8)
    if tower == "text" and text is not None:
        ids = Tokenizer(text, bundle.path(text.tokenizer)).vocabulary
        longest = text.context_length
        shortest = longest if text.padding == "context" else 2
        return lambda random: random.integers(
            1, ids, (random.integers(1, MOST + 1), random.integers(shortest, longest + 1))
        )
    raise SystemExit(f"'{bundle.folder}' has no {tower} tower.")


def one_line(bundle: Bundle, tower: str, variant: str, requests: int) -> dict[str, float]:
    make_request = requests_for(bundle, tower)
    run = VARIANTS[variant](bundle, tower)
    random = np.random.default_rng(0)
    loaded, after, inputs, used = resident_bytes(), [], 0, 0.0
    for number in range(1, requests + 1):
        batch = make_request(random)
        before = _cpu_seconds()
        run(batch)
        used += _cpu_seconds() - before
        inputs += len(batch)
        if number in (-(-requests // 4), requests):
            after.append(resident_bytes())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"loaded": loaded, "quarter": after[0], "end": after[-1], "peak": peak, "speed": inputs / used}


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# ---------------------------------------------------------------------------------------------- the tables


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", default="starter", help="'starter' or a folder")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--tower", choices=("image", "text"), help="only this one")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # of the child processes
    arguments = parser.parse_args()
    bundle = open_bundle(resolve(arguments.bundle), verify=False)
    if arguments.variant:
        print(json.dumps(one_line(bundle, arguments.tower, arguments.variant, arguments.requests)))
        return
    print(f"{arguments.requests} requests on {machine()}. Resident memory in MB.")
    described = bundle.description
    there = [name for name, has in (("image", described.image), ("text", described.text)) if has]
    for tower in [arguments.tower] if arguments.tower else there:
        print(f"\n| {bundle.name}, {tower} | loaded | after a quarter | end | peak | inputs per CPU second |")
        print("|---|---|---|---|---|---|")
        for variant in VARIANTS:
            found = _in_a_process(bundle.folder, tower, variant, arguments.requests)
            sizes = " | ".join(f"{found[name] / MB:.0f}" for name in ("loaded", "quarter", "end", "peak"))
            print(f"| {variant} | {sizes} | {found['speed']:.1f} |", flush=True)


def _in_a_process(folder: Path, tower: str, variant: str, requests: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory", str(folder)]
    command += ["--tower", tower, "--variant", variant, "--requests", str(requests)]
    found: dict[str, float] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    )
    return found


if __name__ == "__main__":
    main()
