"""LoraGrid: which fine-tuning method, at which rank and learning rate, for your model and your data?

    import loragrid as lg

    experiment = lg.load_experiment("experiments/quickstart.yaml")
    result = lg.run(experiment)
    result.to_pandas()

The names below are the whole public interface; they are imported when first used, so that `import loragrid` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loragrid.comparison.item_scores import load_scores
    from loragrid.comparison.selection import Verdict
    from loragrid.comparison.table import Comparison, load_comparison
    from loragrid.comparison.verdict import judge, load_verdict
    from loragrid.config.experiment import Experiment, ExperimentError
    from loragrid.planning.plan import Plan, plan
    from loragrid.report.files import write_report
    from loragrid.sweep.run import SweepResult, run
    from loragrid.sweep.trainable import recording, trainable
    from loragrid.trials.load import experiment_from_mapping, load_experiment

_HOME = {
    "Comparison": "comparison.table",
    "load_comparison": "comparison.table",
    "Experiment": "config.experiment",
    "ExperimentError": "config.experiment",
    "experiment_from_mapping": "trials.load",
    "load_experiment": "trials.load",
    "recording": "sweep.trainable",
    "trainable": "sweep.trainable",
    "load_scores": "comparison.item_scores",
    "Plan": "planning.plan",
    "plan": "planning.plan",
    "write_report": "report.files",
    "Verdict": "comparison.selection",
    "SweepResult": "sweep.run",
    "run": "sweep.run",
    "judge": "comparison.verdict",
    "load_verdict": "comparison.verdict",
}

__all__ = [
    "Comparison",
    "Experiment",
    "ExperimentError",
    "Plan",
    "SweepResult",
    "Verdict",
    "experiment_from_mapping",
    "judge",
    "load_comparison",
    "load_experiment",
    "load_scores",
    "load_verdict",
    "plan",
    "recording",
    "run",
    "trainable",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'loragrid' has no attribute {name!r}")
    return getattr(importlib.import_module(f"loragrid.{_HOME[name]}"), name)
