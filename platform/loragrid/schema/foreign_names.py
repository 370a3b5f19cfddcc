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
    "fsdp_config": Replacement("workers.strategy", "shard"),
    "run_name": Replacement("", "the experiment's name is the key name at the top"),
    "project": Replacement("", "the experiment's name is the key name at the top"),
    "wandb_project": Replacement("", "leave it out: sweeps are recorded in MLflow, under the experiment's name"),
    "mlflow_tracking_uri": Replacement("tracking.uri"),
    "mlflow_experiment_name": Replacement("", "the experiment's name is the key name at the top"),
    "save_total_limit": Replacement("", "leave it out: a trial keeps its last state"),
    # PEFT's LoraConfig.
    "peft_method": Replacement("methods", "the method's name, in lower case"),
    "adapter": Replacement("methods", "the method's name, such as [lora]; for qlora, lora: the base is not quantised"),
    "finetuning_type": Replacement("methods", "the method's name: [lora] or [full]"),
    "bias": Replacement("", "for none leave it out: adapters leave all biases frozen; the method full trains them"),
    "lora_bias": Replacement("", "for false leave it out: an adapter has no bias of its own"),
    **dict.fromkeys(
        ("rank_pattern", "alpha_pattern"),
        Replacement("", "leave it out: all layers of a trial have one rank and alpha; exclude_modules leaves some out"),
    ),
    "inference_mode": Replacement("", "leave it out: LoraGrid trains, and an exported adapter is for inference"),
    "fan_in_fan_out": Replacement("", "leave it out: it is read off each layer"),
    "layer_replication": Replacement("", "leave it out: the base keeps its own layers"),
    "lora_target_linear": Replacement("methods.target_modules", "for true all-linear, which is the default"),
    "peft_layers_to_transform": Replacement("methods.layers_to_transform"),
    "peft_layers_pattern": Replacement("methods.layers_pattern"),
    "layers_to_transform": Replacement("methods.layers_to_transform"),
    "layers_pattern": Replacement("methods.layers_pattern"),
    "exclude_modules": Replacement("methods.exclude_modules"),
    "peft_use_dora": Replacement("methods", "a method of its own, dora"),
    "peft_use_rslora": Replacement("methods.rslora"),
    "pissa_init": Replacement("methods", "a method of its own, pissa"),
    "peft_init_lora_weights": Replacement("methods", "pissa is a method of its own; lora starts as true does in PEFT"),
    **dict.fromkeys(
        (
            "modules_to_save",
            "lora_modules_to_save",
            "additional_target",
            "trainable_token_indices",
            "target_parameters",
        ),
        Replacement("", "leave it out: LoraGrid adapts linear layers; the method full trains embeddings and head too"),
    ),
    **dict.fromkeys(
        (
            *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "arrow_config", "kasa_config"),
            *("velora_config", "monteclora_config", "use_qalora", "qalora_group_size", "use_bdlora"),
            "alora_invocation_tokens",
        ),
        Replacement("methods", "a method of its own, if there is one; `loragrid methods` lists them"),
    ),
    **dict.fromkeys(
        ("megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying"),
        Replacement("", "leave it out: it has no meaning for adapters on the linear layers of a plain base"),
    ),
    # Further keys of trainers.
    **dict.fromkeys(
        ("group_by_length", "train_sampling_strategy", "length_column_name", "curriculum_sampling"),
        Replacement("", "leave it out: the seed shuffles the rows, and every method sees them in the same order"),
    ),
    **dict.fromkeys(
        ("sample_packing", "pad_to_sequence_len", "eval_sample_packing", "neat_packing", "padding_free"),
        Replacement("", "leave it out: rows are padded and never joined"),
    ),
    **dict.fromkeys(
        ("tf32", "flash_attention", "flash_attn", "attn_implementation", "torch_compile", "use_liger_kernel"),
        Replacement("", "leave it out: the engine chooses kernels that compute the same; engine.mode may compile"),
    ),
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "use_gradient_checkpointing"),
        Replacement("training.activation_checkpointing", "true or false"),
    ),
    **dict.fromkeys(
        ("label_smoothing_factor", "neftune_noise_alpha", "lr_scheduler_kwargs", "optim_args", "cosine_min_lr_ratio"),
        Replacement("", "leave it out: there is no such change of the loss, the embeddings, AdamW or the schedules"),
    ),
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        Replacement("", "leave it out: every trial is measured at its last step; early_stopping ends settings early"),
    ),
    "early_stopping_patience": Replacement("", "leave it out: the section early_stopping ends settings early"),
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_pin_memory", "dataset_num_proc", "preprocessing_num_workers"),
        Replacement("", "leave it out: rows are tokenised once and kept in memory"),
    ),
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict", "remove_unused_columns", "stage"),
        Replacement("", "leave it out: every trial trains, and is evaluated on rows of its own"),
    ),
    "resume_from_checkpoint": Replacement("", "leave it out: `loragrid run --resume` continues a sweep"),
    "push_to_hub": Replacement("", "leave it out: `loragrid export` writes a folder, which can be uploaded"),
    "data_seed": Replacement("grid.seed", "a list, such as [0, 1, 2]; it shuffles the rows, too"),
    # Rows and base.
    "template": Replacement("data.chat_template", "the name of one of the tokenizer's templates, or a file"),
    "dataset_dir": Replacement("data.name", "the path of the file"),
    "chat_template_path": Replacement("data.chat_template"),
    "chat_template_jinja": Replacement("data.chat_template", "a file"),
    "max_prompt_length": Replacement("data.max_length", f"prompt and completion together; {_NOT_CUT}"),
    "revision": Replacement("model.revision"),
    "tokenizer_name": Replacement("", "leave it out: the tokenizer is the model's own"),
    "tokenizer_config": Replacement("", "leave it out: the tokenizer is the model's own"),
    **dict.fromkeys(
        ("quantization_bit", "quantization_config", "gptq", "use_qlora"),
        Replacement("", "leave it out: the base is not quantised"),
    ),
}
"""Foreign key -> its replacement. Keys of this program that are written in the wrong section are among them."""
