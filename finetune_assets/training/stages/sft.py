"""Supervised fine-tuning: a base model and rows in, a LoRA adapter with everything needed to use it out.

TRL's SFTTrainer over PEFT, fed with token ids (the chat template is applied in one place, `chat.template`). On a CPU
in fp32 the same inputs give the same bytes. Not in here: other stages, several GPUs, resuming in mid-run.
"""

from __future__ import annotations

import json
import math
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.chat.pinning import pinned
from finetune_assets.chat.template import chat_settings, resolve_template
from finetune_assets.chat.tokenizer import load_tokenizer
from finetune_assets.machine.device import Device
from finetune_assets.models.decoding import load_network
from finetune_assets.recipe import ModelSection, TrainSection, did_you_mean
from finetune_assets.reporting.errors import BadInput, StepFailed
from finetune_assets.reporting.events import Progress, message
from finetune_assets.training.monitor import curve
from finetune_assets.training.monitor.log import Log, callback
from finetune_assets.training.rows import EncodedRows, encode_file

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl.trainer.sft_config import SFTConfig


def train(
    base: Path,
    rows: Path,
    validation: Path | None,
    out: Path,
    *,
    train: TrainSection,
    model: ModelSection,
    device: Device,
    progress: Progress,
) -> dict[str, Any]:
    """Train a LoRA adapter and write it to `out` (an existing, empty folder).

    Args:
        base: Hugging Face folder of the base model (safetensors).
        rows: conversations to learn, JSON Lines.
        validation: conversations to measure the loss on; None or an empty file for none.
        out: gets adapter, tokenizer with chat template, chat.json, training_log.jsonl and loss.png.
        progress: is called with each event (see `training.watch`).

    Returns:
        The report: counts of rows, tokens and parameters, losses (nats per learnt token), speed (tokens of prompts
        and answers per second, padding not counted), seconds, peak memory (GiB), device and precision.

    Raises:
        BadInput: rows or settings do not fit the base model, or nothing is left to learn.
        StepFailed: out of memory, or the loss became infinite.
    """
    progress(message(f"loading the base model on {device.name} in {device.precision}"))
    tokenizer = load_tokenizer(base, trust_remote_code=model.trust_remote_code)
    tokenizer.chat_template = pinned(resolve_template(model.template, tokenizer))
    data = encode_file(rows, tokenizer, train, model)
    if not data.rows:
        raise BadInput(
            f"{rows.name} has no row to learn from ({data.dropped} rows have no token of an answer within "
            f"train.cutoff_len = {train.cutoff_len})",
            "raise train.cutoff_len, or look at the data sets",
        )
    held = encode_file(validation, tokenizer, train, model) if validation else EncodedRows([], 0, 0)
    try:
        return _run(base, data, held, out, tokenizer, train, model, device, progress)
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            raise _out_of_memory(train, device, error) from error
        raise


def _run(
    base: Path,
    data: EncodedRows,
    held: EncodedRows,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    train: TrainSection,
    model: ModelSection,
    device: Device,
    progress: Progress,
) -> dict[str, Any]:
    """`train` once the rows are encoded."""
    from peft import PeftModel
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.sft_trainer import SFTTrainer

    network = load_network(base, device.dtype, trust_remote_code=model.trust_remote_code)
    arguments = trainer_arguments(train, device, out, evaluate=bool(held.rows))
    log = Log(progress, 0 if train.max_steps > 0 else round(data.tokens * train.num_train_epochs))
    trainer = SFTTrainer(
        model=network,
        args=arguments,
        train_dataset=data.dataset(),
        eval_dataset=held.dataset() if held.rows else None,
        processing_class=tokenizer,
        peft_config=lora_config(train, network),
        callbacks=[callback(log)],
    )
    trainer.remove_callback(PrinterCallback)
    adapted = trainer.model
    assert isinstance(adapted, PeftModel)
    trainable, total = adapted.get_nb_trainable_parameters()
    progress(
        message(f"training {trainable:,} of {total:,} parameters on {len(data.rows)} rows ({data.tokens:,} tokens)")
    )
    initial = out / "initial" if train.pissa_init else None
    if initial is not None:
        adapted.save_pretrained(str(initial), save_embedding_layers=False)
    outcome = trainer.train()
    losses = log.losses
    validations = log.validation_losses
    _save(adapted, tokenizer, out, initial, model, log)
    return {
        "rows": len(data.rows),
        "validation_rows": len(held.rows),
        "cut_rows": data.cut,
        "dropped_rows": data.dropped + held.dropped,
        "tokens": data.tokens,
        "learnt_tokens": data.learnt_tokens,
        "steps": outcome.global_step,
        "epochs": train.num_train_epochs if train.max_steps < 0 else trainer.state.epoch,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "first_loss": losses[0][1],
        "final_loss": curve.smooth([loss for _, loss in losses])[-1],
        "train_loss": outcome.training_loss,
        "validation_loss": validations[-1][1] if validations else None,
        "tokens_per_second": log.tokens / log.seconds,
        "seconds": log.seconds,
        "peak_memory_gib": _peak_memory_gib(device),
        "device": device.name,
        "device_memory_gib": device.memory_gib,
        "precision": device.precision,
    }


def trainer_arguments(train: TrainSection, device: Device, out: Path, *, evaluate: bool) -> SFTConfig:
    """The recipe's section in the trainer's words."""
    from trl.trainer.sft_config import SFTConfig

    sampling = "sequential" if train.disable_shuffling else "group_by_length" if train.group_by_length else "random"
    return SFTConfig(
        output_dir=str(out),
        seed=train.seed,
        data_seed=train.seed,
        per_device_train_batch_size=train.per_device_train_batch_size,
        per_device_eval_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        learning_rate=train.learning_rate,
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optim,
        bf16=device.precision == "bf16",
        fp16=device.precision == "fp16",
        use_cpu=device.kind == "cpu",
        gradient_checkpointing=not train.disable_gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy=sampling,
        dataloader_pin_memory=device.kind == "cuda",
        eval_strategy=train.eval_strategy if evaluate else "no",
        prediction_loss_only=True,
        logging_steps=train.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen, not replaced by the mean of the others
        save_strategy="no",
        report_to="none",
        push_to_hub=False,
        disable_tqdm=True,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def lora_config(train: TrainSection, network: PreTrainedModel) -> LoraConfig:
    """The LoRA settings (https://arxiv.org/abs/2106.09685) for `network`.

    Variants: rsLoRA (2312.03732), DoRA (2402.09353), PiSSA (2404.02948).

    Raises:
        BadInput: train.lora_target names a module that the model does not have, or that cannot be adapted.
    """
    from peft import LoraConfig

    initial: Any = True
    if train.pissa_init:
        initial = f"pissa_niter_{train.pissa_iter}" if train.pissa_iter >= 0 else "pissa"
    return LoraConfig(
        task_type="CAUSAL_LM",
        init_lora_weights=initial,
        r=train.lora_rank,
        lora_alpha=train.lora_alpha or 2 * train.lora_rank,
        lora_dropout=train.lora_dropout,
        target_modules=lora_targets(train.lora_target, network),
        use_rslora=train.use_rslora,
        use_dora=train.use_dora,
        bias="none",
    )


def lora_targets(wanted: str, network: PreTrainedModel) -> list[str]:
    """The names of the linear layers to adapt: all but the output layer, or those of a comma-separated list.

    Each name is checked, since PEFT passes over unknown ones without a word.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    head = network.get_output_embeddings()
    known = sorted(
        {
            name.rpartition(".")[2]
            for name, module in network.named_modules()
            if isinstance(module, (Linear, Conv1D)) and module is not head
        }
    )
    if wanted == "all":
        return known
    names = list(dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise BadInput(
                f"train.lora_target: {type(network).__name__} has no linear layer {name!r}{did_you_mean(name, known)}",
                f"use all, or some of: {', '.join(known)}",
            )
    if not names:
        raise BadInput("train.lora_target is empty", f"use all, or some of: {', '.join(known)}")
    return names


def _save(
    network: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    initial: Path | None,
    model: ModelSection,
    log: Log,
) -> None:
    """Write the adapter and what belongs to it; nothing in it names this machine or this moment.

    Args:
        initial: where the adapter lies as it was before training, if it began with a part of the base's weights. What
            is written is the difference of the two, a plain adapter of the base as it was.
    """
    import torch

    for name, weight in network.named_parameters():
        if weight.requires_grad and not torch.isfinite(weight).all():
            raise StepFailed(f"the trained weights are not finite ({name})", "lower train.learning_rate")
    network.peft_config["default"].base_model_name_or_path = model.model_name_or_path
    network.save_pretrained(
        str(out),
        save_embedding_layers=False,  # "auto" would ask the Hub about the vocabulary
        path_initial_model_for_weight_conversion=str(initial) if initial is not None else None,
    )
    if initial is not None:
        shutil.rmtree(initial)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's model card: an empty form
    config = out / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(settings["target_modules"])  # a set: its order differs from run to run
    _write_json(config, settings)
    tokenizer.save_pretrained(out)
    _write_json(out / "chat.json", chat_settings(tokenizer, model.default_system))
    with (out / "training_log.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps(entry.as_json()) + "\n" for entry in log.entries)
    curve.draw(out / "loss.png", log.losses, log.validation_losses)


def _write_json(path: Path, value: object) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has a class of its own for accelerators only; on the CPU it is a RuntimeError with these words."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return bool(re.search(r"out of memory|can't allocate memory|not enough memory", str(error), re.IGNORECASE))


def _out_of_memory(train: TrainSection, device: Device, error: BaseException) -> StepFailed:
    batch, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    ways = []
    if batch > 1:
        ways.append(
            f"set train.per_device_train_batch_size: {batch // 2} and train.gradient_accumulation_steps: "
            f"{math.ceil(accumulation * batch / (batch // 2))} (the same rows per optimiser step)"
        )
    if train.disable_gradient_checkpointing:
        ways.append("set train.disable_gradient_checkpointing: false (slower, far less memory)")
    ways.append(f"lower train.cutoff_len (now {train.cutoff_len}), or take a smaller base model")
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return StepFailed(
        f"out of memory on {device.name} ({device.memory_gib:.1f} GiB) with batches of {batch} rows: {first}",
        "; or ".join(ways),
    )


def _peak_memory_gib(device: Device) -> float:
    """The most memory taken at any time: the accelerator's on cuda, this process's main memory elsewhere."""
    if device.kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
