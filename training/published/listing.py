"""The table of published checkpoints for people.

python -m training.published > docs/published.md
"""

from __future__ import annotations

from collections.abc import Iterator

from training.published.table import NETWORKS, TABLE, Checkpoint

__all__ = ["document", "rows"]

HEADER = """\
# Published encoders

<!-- Written by `python -m training.published`; edit training/published/table.py instead. -->

Self-supervised encoders as their authors published them. Any of them becomes a bundle to serve, or the
start of a training on your own images:

```sh
embedserve export published:dino/vits16 --out dino
embedserve export published:moco_v2/resnet50-800ep --weights moco_v2_800ep_pretrain.pth.tar --out moco
embedserve train simclr --data photos --out runs/x --set start=published:dino/resnet50
embedserve train simclr --data photos --out runs/y --set start=published:byol/resnet50@pretrain_res50x1.pkl
```

Without a local copy the file is downloaded from its authors into torch.hub's cache (`TORCH_HOME`); where
they state a hash it is verified. No code from a file is run: torch's files are read as weights alone, pickles
by a reader that knows arrays and dictionaries and nothing else. Every tensor of a file is accounted for, and
the file of another method or network is refused with what it looks like.

**Mind the licence.** It is that of the repository that publishes the file, and several forbid commercial use.
It is written into the bundle and its model card.

Images are resized to 256 pixels at the shortest side and the middle 224×224 are taken, as the authors do for
evaluation. *Linear* is top-1 accuracy on ImageNet of a linear layer on frozen features, as the authors report
it. The size of a file is given where the page states it; others have at least 4 bytes a parameter, and about
four times that where an optimiser's state and a second network are inside.
"""


def rows() -> Iterator[dict[str, str]]:
    """One for each checkpoint, as text; the keys are the columns. For listings on the command line."""
    for checkpoint in TABLE.values():
        yield _row(checkpoint)


def document() -> str:
    """docs/published.md."""
    methods: dict[str, list[Checkpoint]] = {}
    for checkpoint in TABLE.values():
        methods.setdefault(checkpoint.release.method, []).append(checkpoint)
    return "\n".join([HEADER, *map(_section, methods.values())])


def _row(checkpoint: Checkpoint) -> dict[str, str]:
    release = checkpoint.release
    dim, millions = NETWORKS[checkpoint.network]
    return {
        "name": f"published:{checkpoint.full_name}",
        "network": checkpoint.network,
        "parameters": f"{millions:.0f} M",
        "vector": f"{dim}, {release.vector}",
        "epochs": str(checkpoint.epochs or ""),
        "linear": f"{checkpoint.top1:.1f}" if checkpoint.top1 else "",
        "licence": release.licence,
        "file": checkpoint.file or f"converted with {release.converter}",
        "size": checkpoint.size,
        "page": release.page,
    }


def _section(checkpoints: list[Checkpoint]) -> str:
    first = checkpoints[0].release
    spec = first.preprocessing
    mean = "no mean and std, values 0..1" if not any(first.mean) else f"mean {first.mean}, std {first.std}"
    lines = [
        f"## {first.title}",
        "",
        f"[{first.paper}](https://arxiv.org/abs/{first.paper.removeprefix('arXiv:')}) · "
        f"files at <{first.page}> · licence {first.licence} · {spec.interpolation}, {mean}",
        "",
        *dict.fromkeys(note for checkpoint in checkpoints for note in checkpoint.release.notes),
    ]
    if first.converter:
        lines.append(
            f"The authors' TensorFlow files are converted with <{first.converter}>; what it writes is read "
            "here, with `--weights`."
        )
    lines += ["", "| name | network | vector | epochs | linear | file |", "|---|---|---|---|---|---|"]
    for checkpoint in checkpoints:
        row = _row(checkpoint)
        file = f"[{row['file']}]({checkpoint.url})" if checkpoint.url else "converted"
        size = f", {row['size']}" if row["size"] else ""
        cells = (
            f"`{checkpoint.full_name}`",
            f"`{row['network']}`, {row['parameters']}",
            row["vector"],
            row["epochs"],
            row["linear"],
            file + size,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(_without_double_blanks(lines)) + "\n"


def _without_double_blanks(lines: list[str]) -> Iterator[str]:
    before = ""
    for line in lines:
        if line or before:
            yield line
        before = line
