"""What the theory predicts for a run on any model: P1 to P6, each with its proof and its test.

    python -m theory.predictions
    python -m theory.predictions --problem softmax --steps 3000 --seeds 3

The command tests the six predictions on convex simulations and on the published numbers of
arXiv 2410.15483 and writes config.json, results.parquet, summary.json and the figure of the
verdicts to runs/predictions/.
"""

from theory.predictions.claims import PREDICTIONS, Prediction, verdicts
from theory.predictions.end_points import Optima
from theory.predictions.verdicts import Verdict

__all__ = ["PREDICTIONS", "Optima", "Prediction", "Verdict", "verdicts"]
