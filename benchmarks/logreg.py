"""Own logistic regression against scikit-learn's, both by L-BFGS: CPU seconds, loss, agreement.

python benchmarks/logreg.py                      made-up features, 10,000 x 256, 10 classes
python benchmarks/logreg.py TRAIN.pt TEST.pt     stored (features, labels), standardised here

CPU time, because neighbours on a busy machine do not lengthen it; one thread (OMP_NUM_THREADS=1
OPENBLAS_NUM_THREADS=1), because threads that wait in a spin do.
"""

from __future__ import annotations

import sys
import time
import warnings

import numpy as np
import torch
from torch import Tensor

from dino_kd.classifiers import LinearClassifier, accuracy, learn_scaling
from dino_kd.logistic import fit_logistic

CS = [0.001, 0.01, 0.1]


def made_up(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten classes in 256 correlated dimensions; deviations fall as 1 / index."""
    fixed, drawn = (torch.Generator().manual_seed(s) for s in (0, seed))
    centres = 0.12 * torch.randn(10, 256, generator=fixed)
    mixing, _ = torch.linalg.qr(torch.randn(256, 256, generator=fixed))
    labels = torch.randint(0, 10, (count,), generator=drawn)
    values = centres[labels] + torch.randn(count, 256, generator=drawn)
    return (values / torch.arange(1, 257)) @ mixing, labels


def mean_objective(model: LinearClassifier, features: Tensor, labels: Tensor, c: float) -> float:
    """Mean cross-entropy plus penalty, in nats."""
    loss = torch.nn.functional.cross_entropy(model.logits(features), labels)
    return float(loss + model.weight.square().sum() / (2 * c * len(labels)))


def main(argv: list[str]) -> None:
    """A table: for each c, what both need and how far apart they end."""
    from sklearn.linear_model import LogisticRegression

    if argv:
        (train, labels), (test, truth) = (torch.load(p, weights_only=True) for p in argv)
    else:
        (train, labels), (test, truth) = made_up(10_000, seed=1), made_up(5_000, seed=2)
    scaling = learn_scaling("standard", train)
    train, test = scaling.apply(train), scaling.apply(test)
    classes = int(labels.max()) + 1
    print(f"{len(train):,} x {train.shape[1]} features, {classes} classes, tol 1e-4, 1000 steps")
    print("own: a path of cs, the rotation in the first; sklearn: each c alone")
    print(f"{'c':>7}  {'own s':>7} {'steps':>5}  {'sklearn s':>9} {'steps':>5}  {'ratio':>6}  "
          f"{'loss, own - sklearn':>19}  {'top-1 %, both':>13}")  # fmt: skip
    started = time.process_time()
    total = np.zeros(2)
    for fit in fit_logistic(train, labels, classes, CS):
        own = time.process_time() - started
        started = time.process_time()
        rival = LogisticRegression(C=fit.c, max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the steps tell
            rival.fit(train.numpy(), labels.numpy())
        theirs = time.process_time() - started
        total += own, theirs
        other = LinearClassifier(
            torch.from_numpy(rival.coef_).double(), torch.from_numpy(rival.intercept_).double()
        )
        gap = mean_objective(fit, train, labels, fit.c) - mean_objective(
            other, train, labels, fit.c
        )
        scores = [accuracy(m.logits(test), truth)["top1"] for m in (fit, other)]
        print(f"{fit.c:7g}  {own:7.2f} {fit.iterations:5}  {theirs:9.2f} {rival.n_iter_[0]:5}  "
              f"{theirs / own:6.1f}  {gap:19.1e}  {scores[0]:6.2f} {scores[1]:6.2f}")  # fmt: skip
        started = time.process_time()
    print(f"  total  {total[0]:7.2f}        {total[1]:9.2f}        {total[1] / total[0]:6.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
