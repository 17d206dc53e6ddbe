"""Runs every benchmark that needs nothing but the dev environment, one after the other: `make bench`."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("serving", "decode", "memory", "store")
"""Those of quality (`starter_quality`, `demo_quality`, `starter_precision`) are run by name."""


def main() -> None:
    for name in BENCHMARKS:
        print(f"\n## {name}\n", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
