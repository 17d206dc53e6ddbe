"""Watching a run: what is measured, what is wrong, and what a person gets to see of it.

    statistics.py   how far features spread: standard deviation and effective rank
    monitor.py      losses between two log lines, and when to raise an alarm
    alarms.py       what an alarm says: what is wrong, and what to change
    logs.py         metrics.jsonl, TensorBoard, Weights & Biases
    quality.py      which checkpoint is the best
    progress.py     the terminal
    plots.py        curves.png      grids.py   views.png and neighbours.png
    report.py       the run's README.md

matplotlib, rich, TensorBoard and Weights & Biases are imported when something of theirs is used, not before.
"""

from training.watch.alarms import Alarm
from training.watch.grids import neighbours_picture, views_picture
from training.watch.logs import RunLog
from training.watch.monitor import Monitor
from training.watch.plots import curves_picture
from training.watch.progress import Progress
from training.watch.quality import score
from training.watch.report import write_readme
from training.watch.statistics import feature_statistics

__all__ = [
    "Alarm",
    "Monitor",
    "Progress",
    "RunLog",
    "curves_picture",
    "feature_statistics",
    "neighbours_picture",
    "score",
    "views_picture",
    "write_readme",
]
