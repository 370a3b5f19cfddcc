"""Keys of other training programs (transformers, PEFT, TRL, Axolotl, LLaMA-Factory), and the keys that replace them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Replacement:
    """What replaces a foreign key.

    key: the dotted key here; `methods.X` is a key X of a method's block; "": there is none. how: how the value
    converts, or why there is no such key.
    """

    key: str
    how: str = "the same value"

    def words(self) -> str:
        """The advice, as the end of "unknown key": ", here training.lr (the same value)"."""
        if not self.key:
            return f"; {self.how}"
        where = "a method's key " if self.key.startswith("methods.") else ""
        return f", here {where}{self.key.removeprefix('methods.')} ({self.how})"


def replacement_of(word: str) -> Replacement | None:
    """What replaces a key that is written as another program writes it; None if it is no known one."""
    return FOREIGN_NAMES.get(word.strip().lower().replace("-", "_"))


_ACCUMULATION = (
    "training.batch_size counts all rows of an optimizer step: per_device_train_batch_size x "
    "gradient_accumulation_steps x processes"
)
_NOT_CUT = "the same value; longer rows are skipped and counted, never cut"
_SECTION_KEYS = {
    f"{section}.{key}": Replacement(f"{section}.{key}")
    for section, keys in {
        "training": ("lr", "steps", "epochs", "batch_size", "schedule", "warmup_steps", "warmup_ratio", "weight_decay"),
        "data": ("num_train", "num_eval", "num_test", "max_length", "loss_on"),
        "model": ("dtype", "trust_remote_code"),
    }.items()
    for key in keys
}

FOREIGN_NAMES: dict[str, Replacement] = {
    **{key.partition(".")[2]: found for key, found in _SECTION_KEYS.items()},
    # Length and batches.
    "num_train_epochs": Replacement("training.epochs"),
    "num_epochs": Replacement("training.epochs"),
    "max_steps": Replacement("training.steps", "the same value; for -1 leave it out and set training.epochs"),
    "max_train_steps": Replacement("training.steps"),
    "train_batch_size": Replacement("training.batch_size", _ACCUMULATION),
    "per_device_train_batch_size": Replacement(
        "training.micro_batch_size", f"the same value: the rows that a worker holds at once; {_ACCUMULATION}"
    ),
    "per_gpu_train_batch_size": Replacement(
        "training.micro_batch_size", f"the same value: the rows that a worker holds at once; {_ACCUMULATION}"
    ),
    "micro_batch_size": Replacement("training.micro_batch_size"),
    "gradient_accumulation_steps": Replacement(
        "training.micro_batch_size",
        f"batch_size / (gradient_accumulation_steps x workers.num_workers); {_ACCUMULATION}",
    ),
    "grad_accumulation_steps": Replacement(
        "training.micro_batch_size", f"batch_size / (grad_accumulation_steps x workers.num_workers); {_ACCUMULATION}"
    ),
    "per_device_eval_batch_size": Replacement("", "leave it out: as many rows are evaluated at once as memory allows"),
    "eval_batch_size": Replacement("", "leave it out: as many rows are evaluated at once as memory allows"),
    # The optimizer.
    "learning_rate": Replacement("training.lr"),
    "lr_scheduler_type": Replacement(
        "training.schedule", "constant, linear or cosine; constant_with_warmup is constant with training.warmup_steps"
    ),
    "lr_scheduler": Replacement("training.schedule", "constant, linear or cosine"),
    "scheduler": Replacement("training.schedule", "constant, linear or cosine"),
    "num_warmup_steps": Replacement("training.warmup_steps"),
    "adam_beta1": Replacement("training.beta1"),
    "adam_beta2": Replacement("training.beta2"),
    "adam_epsilon": Replacement("training.epsilon"),
    "max_grad_norm": Replacement("training.clip_norm", "the same value; for 0, which never clips, null"),
    "gradient_clip_val": Replacement("training.clip_norm", "the same value; for 0, which never clips, null"),
    "optim": Replacement("", "leave it out: every method is trained with AdamW"),
    "optimizer": Replacement("", "leave it out: every method is trained with AdamW"),
    "gradient_checkpointing": Replacement("training.activation_checkpointing"),
    "seed": Replacement("grid.seed", "a list, such as [0, 1, 2]"),
    "seeds": Replacement("grid.seed", "the same list"),
    # What is observed.
    "logging_steps": Replacement("training.report_every"),
    "eval_steps": Replacement("training.eval_every"),
    "save_steps": Replacement("training.checkpoint_every"),
    **{
        key: Replacement("", f"leave it out: training.{every} says how often")
        for key, every in (
            ("eval_strategy", "eval_every"),
            ("evaluation_strategy", "eval_every"),
            ("save_strategy", "checkpoint_every"),
            ("logging_strategy", "report_every"),
        )
    },
    # Rows.
    "dataset": Replacement("data.name"),
    "datasets": Replacement("data.name", "one source; several are values of the axis grid: {data.name: [...]}"),
    "dataset_name": Replacement("data.name"),
    "dataset_path": Replacement("data.name"),
    "train_file": Replacement("data.name"),
    "validation_file": Replacement("data.eval_name"),
    "test_file": Replacement("data.test_name"),
    "dataset_config_name": Replacement("data.subset"),
    "dataset_text_field": Replacement("data.columns", "{text: NAME_OF_THE_COLUMN}"),
    "max_seq_length": Replacement("data.max_length", _NOT_CUT),
    "max_seq_len": Replacement("data.max_length", _NOT_CUT),
    "sequence_len": Replacement("data.max_length", _NOT_CUT),
    "model_max_length": Replacement("data.max_length", _NOT_CUT),
    "cutoff_len": Replacement("data.max_length", _NOT_CUT),
    "block_size": Replacement("data.max_length", _NOT_CUT),
    "max_train_samples": Replacement("data.num_train"),
    "max_samples": Replacement("data.num_train"),
    "max_eval_samples": Replacement("data.num_eval"),
    "val_set_size": Replacement("data.num_eval", "a number of rows; a share times the number of rows"),
    "val_size": Replacement("data.num_eval", "a number of rows; a share times the number of rows"),
    "test_size": Replacement("data.num_test", "a number of rows; a share times the number of rows"),
    "train_on_inputs": Replacement("data.loss_on", "true is all, false is completion"),
    "train_on_prompt": Replacement("data.loss_on", "true is all, false is completion"),
    "completion_only_loss": Replacement("data.loss_on", "true is completion, false is all"),
    "assistant_only_loss": Replacement("data.loss_on", "true is completion, false is all"),
    "packing": Replacement("", "leave it out: rows are never joined; `pack` here is how many trials share one base"),
    # The base.
    "model_name": Replacement("model.name"),
    "model_name_or_path": Replacement("model.name"),
    "base_model": Replacement("model.name"),
    "base_model_name_or_path": Replacement("model.name"),
    "pretrained_model_name_or_path": Replacement("model.name"),
    "model_revision": Replacement("model.revision"),
    "torch_dtype": Replacement("model.dtype", "bfloat16, float32 or float64"),
    "bf16": Replacement("model.dtype", "bfloat16; adapters are trained in float32 either way"),
    "fp16": Replacement("model.dtype", "bfloat16 in place of float16; adapters are trained in float32 either way"),
    "load_in_4bit": Replacement("", "leave it out: the base is not quantised"),
    "load_in_8bit": Replacement("", "leave it out: the base is not quantised"),
    # The methods.
    "r": Replacement("methods.rank"),
    "lora_r": Replacement("methods.rank"),
    "lora_rank": Replacement("methods.rank"),
    "rank": Replacement("methods.rank"),
    "lora_alpha": Replacement("methods.alpha"),
    "lora_dropout": Replacement("methods.dropout"),
    "lora_target": Replacement("methods.target_modules"),
    "lora_target_modules": Replacement("methods.target_modules"),
    "target_modules": Replacement("methods.target_modules"),
    "use_rslora": Replacement("methods.rslora"),
    "use_dora": Replacement("methods", "a method of its own, dora"),
    "loraplus_lr_ratio": Replacement("methods.lr_ratio", "of the method lora_plus, the same value"),
    "lr_ratio": Replacement("methods.lr_ratio", "of the method lora_plus"),
    "init_lora_weights": Replacement("methods", "pissa is a method of its own; lora starts as true does in PEFT"),
    "peft_type": Replacement("methods", "the method's name, in lower case"),
    "task_type": Replacement("", "leave it out: every base is a causal language model"),
    # How it runs.
    "output_dir": Replacement("storage.path"),
    "report_to": Replacement("tracking.uri", "an MLflow address; every sweep is recorded in MLflow"),
    "num_processes": Replacement("workers.num_workers"),
    "fsdp": Replacement("workers.strategy", "shard"),
    "deepspeed": Replacement("workers.strategy", "shard"),
}
"""Foreign key -> its replacement. Keys of this program that are written in the wrong section are among them."""
