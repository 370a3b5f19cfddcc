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
    from loragrid.comparison import Comparison, load_comparison
    from loragrid.config import Experiment, ExperimentError, experiment_from_mapping, load_experiment
    from loragrid.custom_sweep import recording, trainable
    from loragrid.item_scores import load_scores
    from loragrid.planning import Plan, plan
    from loragrid.report_files import write_report
    from loragrid.selection import Verdict
    from loragrid.sweep import SweepResult, run
    from loragrid.verdict import judge, load_verdict

_HOME = {
    "Comparison": "comparison",
    "load_comparison": "comparison",
    "Experiment": "config",
    "ExperimentError": "config",
    "experiment_from_mapping": "config",
    "load_experiment": "config",
    "recording": "custom_sweep",
    "trainable": "custom_sweep",
    "load_scores": "item_scores",
    "Plan": "planning",
    "plan": "planning",
    "write_report": "report_files",
    "Verdict": "selection",
    "SweepResult": "sweep",
    "run": "sweep",
    "judge": "verdict",
    "load_verdict": "verdict",
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
