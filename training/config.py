"""The settings of a run that do not depend on its method. Each field is a key of `embedserve train --set`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from embedserve.errors import InvalidField
from training.precision import PrecisionName

__all__ = ["TrainConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run. Raises InvalidField for numbers that make no sense.

    `training.settings.resolve` fills in what follows from the data and the machine: see its table.
    """

    method: str
    """A name from `embedserve train --list`."""
    data: str
    """Folder of images, list of images (CSV, Parquet, JSONL), WebDataset tars, MNIST or CIFAR files."""
    backbone: str = "resnet18"
    """A torchvision or timm name, or vit_small/16; follows the image size."""
    start: str = ""
    """Weights to start from: a run, a file, 'starter', 'imagenet', 'published:NAME'. A tenth of the lr."""
    size: int = 32
    """Pixels of a side of a full-size view; follows the images, and is at most 64 without a GPU."""
    stored_size: int = 32
    """Pixels of a side of the decoded images that crops are cut from."""
    epochs: int = 100
    """Passes over the images; follows their number."""
    batch_size: int = 256
    """Images of one step, over all processes and accumulated parts; follows their number."""
    accumulate: int = 1
    """Parts that a step's batch is cut into to save memory; negatives and batch norm see one part."""
    group_by: str = ""
    """Where positives come from beside augmentation: 'folder', 'name' or a column of the list."""
    label_by: str = ""
    """The column of the list with the labels that k-NN is measured by."""
    holdout: float = 0.1
    """Share of the images kept out of training to measure k-NN on, if the data has no test part."""
    cache: Literal["auto", "device", "host", "stream"] = "auto"
    """Where decoded images live: on the GPU, in a memory-mapped file, or decoded again every time."""
    cache_folder: str = ""
    """Folder of that file; empty for the user's cache folder."""
    workers: int = 0
    """Threads that decode images; 0 takes one for each core."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:0."""
    precision: PrecisionName = "auto"
    """What networks compute in; auto is bf16 on a GPU that has it. Losses are always float32."""
    compile: bool = False
    """Compile the backbone with torch.compile: minutes at the start, faster steps afterwards."""
    cuda_graphs: bool = True
    """Replay the backbone's calls as CUDA graphs, so that a small network does not wait for the CPU. With one
    GPU only."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, at some cost on a GPU."""
    sync_batch_norm: bool = True
    """Batch statistics over all processes; without it each process has its own."""
    seed: int = 0
    """Of weights, order, views and everything else that is random."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    knn_every: int = 1
    """Epochs between two measurements of k-NN."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; there is one at the end in any case."""
    keep: int = 2
    """Checkpoints that are kept beside the best one."""
    tensorboard: bool = False
    """Write TensorBoard files into the run folder as well."""
    wandb: bool = False
    """Log to Weights & Biases as well."""

    def __post_init__(self) -> None:
        for name in (
            "size",
            "stored_size",
            "epochs",
            "accumulate",
            "log_every",
            "knn_every",
            "checkpoint_every",
            "keep",
        ):
            _at_least(name, getattr(self, name), 1)
        _at_least("batch_size", self.batch_size, 2)
        _at_least("workers", self.workers, 0)
        if not 0 <= self.holdout <= 0.5:
            raise InvalidField(f"holdout={self.holdout} is not within 0 to 0.5.", param="holdout")
        if self.batch_size % self.accumulate:
            raise InvalidField(
                f"batch_size={self.batch_size} cannot be cut into accumulate={self.accumulate} equal parts.",
                param="accumulate",
            )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InvalidField(f"{name}={value}; it must be at least {least}.", param=name)
