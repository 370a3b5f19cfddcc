"""The names of the MLflow tags that more than one room reads or writes."""

DEVICE_TAG = "loragrid.device"
"""Set by a worker; a trial without it was never started."""
DIRTY_TAG = "loragrid.git.dirty"
CHANGES_TAG = "loragrid.git.changes"

OUT_OF_MEMORY_TAG = "loragrid.out_of_memory"
"""Marks a trial that ended because memory ran out."""

SPLIT_TAG = "loragrid.pack.split"
"""Why a trial's pack was halved."""

COST_SHAPE_TAG = "loragrid.cost.shape"
"""Equal for trials whose costs in a pack of one are equal; such trials are measured once."""

PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
KIND_TAG = "loragrid.kind"
SWEEP_TAG = "loragrid.sweep"
TRIAL_TAG = "loragrid.trial_id"
METHOD_TAG = "loragrid.method"
LABEL_TAG = "loragrid.label"
REASON_TAG = "loragrid.reason"
QUESTION_TAG = "loragrid.question"
