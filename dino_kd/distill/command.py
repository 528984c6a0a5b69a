"""`dino-kd distill`: one student, or several arms and students side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dino_kd.config import load_settings
from dino_kd.distill.arm_scores import (
    NEIGHBOURS,
    RESULT_FILE,
    answer_of_student,
    open_exam,
    record,
)
from dino_kd.distill.arms import compare, training_cost
from dino_kd.distill.story import distill
from dino_kd.distributed import is_main_process, on_main, process_group
from dino_kd.models.classifier_file import CLASSIFIER_FILE
from dino_kd.schema import DistillConfig


def main(argv: list[str]) -> int:
    """`dino-kd distill [CONFIG] a.b=c ...`."""
    settings = load_settings(DistillConfig, argv, command="distill")
    if settings.arms or settings.students:
        compare(settings)
        return 0
    with process_group(settings.device) as device:
        run_dir = distill(settings)
        if settings.data.test is not None:
            sentence = score_on_test(settings, run_dir, device)
            if is_main_process():
                print(sentence)
    return 0


def score_on_test(settings: DistillConfig, run_dir: Path, device: torch.device) -> str:
    """Score the student on `data.test`, by its own classifier or else by nearest neighbours.

    Every process calls this and gets the sentence; `RESULT_FILE` has the rest. Raises
    CheckpointError when the student's answers are not finite.
    """
    exam = open_exam(settings)
    if (run_dir / CLASSIFIER_FILE).is_file():  # spares a pass over the training images
        exam = dataclasses.replace(exam, bank=None, bank_labels=None)
    answer = answer_of_student(run_dir, exam, settings, device)

    def write() -> str:
        training = training_cost(run_dir, settings.optim.batch_size)
        metrics = record(run_dir, answer, exam, settings, device, training=training, teacher=None)
        scores = f"k-NN (k={NEIGHBOURS}) top-1 {metrics[f'knn{NEIGHBOURS}_top1']:.2f} %"
        if "top1" in metrics:
            scores = f"top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} %"
        return f"{scores} on {len(answer.indices):,} test images; {run_dir / RESULT_FILE}"

    return on_main(write)
