"""The names of the MLflow tags that more than one room reads or writes."""

DEVICE_TAG = "loragrid.device"
"""Set by a worker; a trial without it was never started."""
DIRTY_TAG = "loragrid.git.dirty"
CHANGES_TAG = "loragrid.git.changes"

OUT_OF_MEMORY_TAG = "loragrid.out_of_memory"
"""Marks a trial that ended because memory ran out."""

WRITES_BASE_TAG = "loragrid.writes_base"
"""Marks a trial whose method trains the base itself: its result is a whole model, not an adapter."""

ADAPTED_LAYERS_TAG = "loragrid.adapted_layers"
"""The number and the names of the layers that a trial adapts, and those that it leaves out, as a sentence."""

SPLIT_TAG = "loragrid.pack.split"
"""Why a trial's pack was halved."""

COST_SHAPE_TAG = "loragrid.cost.shape"
"""Equal for trials whose costs in a pack of one are equal; such trials are measured once."""

SAMPLES_PROBLEM_TAG = "loragrid.samples.problem"
"""Why a trial has no sample answers although it finished."""

PHASE_TAG = "loragrid.phase"
"""`tune` or `confirm`: whether the trial helps to choose a setting, or trains a chosen setting with a fresh seed."""

CONFIRM_CHOICE_TAG = "loragrid.confirm.choice"
"""Of a sweep: the settings that were chosen to be trained again, and the fresh seeds, see `trials/confirm.Chosen`."""

WEIGHTS_TAG = "loragrid.model.weights"
"""Identifies a trial's base: a digest of its weights and config, or its commit on the hub."""
MODEL_LOCATION_TAG = "loragrid.model.location"
"""Where the worker found the base: an absolute folder, a hub id, or the package of an embedded model."""
MODEL_FILES_TAG = "loragrid.model.files"
"""Digests of the files of a base in a folder, as JSON: file -> digest."""
MODEL_CONFIG_TAG = "loragrid.model.config"
"""The config of a base in a folder, as JSON."""
UNUSED_WEIGHTS_TAG = "loragrid.model.unused_weights"
"""The weights of a base's checkpoint that its architecture does not use, in short; absent if there are none."""

DATA_DIGEST_TAG = "loragrid.data.digest"
"""Identifies the tokens, labels and groups of all rows of a trial."""
MADE_FROM_TAG = "loragrid.data.made_from"
"""What the rows depend on, as JSON: digests of the sources and the tokenizer, and the settings that split them."""
LEFT_OUT_TAG = "loragrid.data.left_out"
"""The rows that were read and not used, as JSON: reason -> number of rows."""
EXAMPLES_TAG = "loragrid.data.left_out.examples"
"""What is wrong with rows that were skipped as bad rows, as JSON: reason -> its most frequent faults, each as the
number of rows and one row's fault in words."""

ASKED_TAG = "loragrid.trial_id.in_epochs"
"""Of a trial whose length is in epochs: its id before its rows were known, which other rows do not change."""
FOUND_TAG = "loragrid.parameters.found"
"""The parameters that the experiment leaves open and the trial's rows gave a value, as a JSON list of dotted keys."""

PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
KIND_TAG = "loragrid.kind"
SWEEP_TAG = "loragrid.sweep"
TRIAL_TAG = "loragrid.trial_id"
METHOD_TAG = "loragrid.method"
LABEL_TAG = "loragrid.label"
REASON_TAG = "loragrid.reason"
QUESTION_TAG = "loragrid.question"
ANSWER_TAG = "loragrid.answer"
"""The first sentence of the sweep's verdict; one sentence per task if the sweep has several."""
