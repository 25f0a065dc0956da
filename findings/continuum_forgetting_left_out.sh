#!/usr/bin/env bash
# continuum 1.2.7: of what was forgotten, most is left out of its `forgetting`, `backward_transfer` and `remembering`, and
# `forward_transfer` is of the past.
#
# The library gives the metrics of continual learning from the answers to the test data after each task, with the papers
# that define them. One would expect those papers' numbers. What is seen: the average of forgetting (Chaudhry et al. 2018,
# eq. 3) leaves out the task before the last and takes the best accuracy from all but the last two moments, and still divides
# by all; backward transfer averages over all moments, as Diaz-Rodriguez et al. 2018 do, but leaves out each time what the
# latest task did to the one just before it (its documentation names Lopez-Paz and Ranzato 2017, who take the last moment
# alone: -0.500 and -0.750 below). So after two tasks nothing is ever forgotten. Forward transfer, which is of tasks that
# are not learned yet, averages accuracies of those that are.
# Seen, of accuracies of three tasks (columns) after each (rows) of 1, 0.2, 0.2; 0.5, 1, 0.2; 0.5, 0, 1:
#
#   after task 2: forgetting 0.000 (0.500), backward transfer 0.000 (-0.500), remembering 1.000 (0.500),
#   forward transfer 0.500 (0.200)
#   after task 3: forgetting 0.250 (0.750), backward transfer -0.167 (-0.667), remembering 0.833 (0.333),
#   forward transfer 0.333 (0.200)
#
# in brackets by the definitions. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# six: it is imported, and not asked for
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 continuum==1.2.7 six==1.17.0
cat > "$folder/metrics.py" << 'PYTHON'
import warnings

warnings.filterwarnings("ignore")
import numpy as np
from continuum.metrics import Logger

ACCURACIES = np.array([[1.0, 0.2, 0.2], [0.5, 1.0, 0.2], [0.5, 0.0, 1.0]])
SAMPLES = 10
NAMES = ("forgetting", "backward_transfer", "remembering", "forward_transfer")


def defined(tasks):
    """By the definitions, from the matrix alone."""
    matrix = ACCURACIES[:tasks, :tasks]
    forgotten = [matrix[task : tasks - 1, task].max() - matrix[-1, task] for task in range(tasks - 1)]
    below, above = np.tril_indices(tasks, -1), np.triu_indices(tasks, 1)
    backward = (matrix - matrix.diagonal())[below].mean()
    return np.mean(forgotten), backward, 1 - abs(min(backward, 0)), matrix[above].mean()


logger = Logger(list_subsets=["test"])
for number, row in enumerate(ACCURACIES, 1):
    right = [np.arange(SAMPLES) < round(share * SAMPLES) for share in row]
    tasks = np.repeat(np.arange(3), SAMPLES)
    logger.add([np.concatenate(right).astype(int), np.ones(3 * SAMPLES, dtype=int), tasks], subset="test")
    if number > 1:
        found = [getattr(logger, name) for name in NAMES]
        expected = defined(number)
        said = [f"{name.replace('_', ' ')} {one:.3f} ({other:.3f})" for name, one, other in zip(NAMES, found, expected)]
        print(f"after task {number}: {', '.join(said)}")
        seen = {2: (0, 0, 1, 0.5), 3: (0.25, -1 / 6, 5 / 6, 1 / 3)}[number]
        assert np.allclose(found, seen)
        assert not np.isclose(found, expected).any()
    logger.end_task()
PYTHON
"$folder/venv/bin/python" "$folder/metrics.py"
