"""Supervised fine-tuning: trains a LoRA adapter of a base model on the rows of a split.

TRL's SFTTrainer with PEFT gets token ids, since `chat.template` is the one place that applies the chat template. On a
CPU in fp32 the same inputs give the same bytes. Several GPUs and resuming a run are not supported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.chat.pinning import pinned
from finetune_assets.chat.template import resolve_template
from finetune_assets.chat.tokenizer import load_tokenizer
from finetune_assets.machine.device import Device
from finetune_assets.models.loading import load_network
from finetune_assets.recipe import ModelSection, TrainSection
from finetune_assets.reporting.errors import BadInput
from finetune_assets.reporting.events import Progress, message
from finetune_assets.training.adapter_folder import save_adapter
from finetune_assets.training.arguments import trainer_arguments
from finetune_assets.training.methods.by_name import METHODS
from finetune_assets.training.monitor import curve
from finetune_assets.training.monitor.log import Log, callback
from finetune_assets.training.monitor.memory import peak_memory_gib
from finetune_assets.training.out_of_memory import explain_out_of_memory
from finetune_assets.training.rows import EncodedRows, encode_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.trainer_utils import TrainOutput
    from trl.trainer.sft_trainer import SFTTrainer


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
        rows: split to learn.
        validation: split to measure the validation loss on; None or an empty file for none.
        out: receives adapter, tokenizer with chat template, chat.json, training_log.jsonl and loss.png.
        progress: is called with each event of `training.monitor.log`.

    Returns:
        the report: numbers of rows, tokens and parameters, losses (nats per learnt token), speed (tokens per second,
        prompts included, padding not), seconds, peak memory (GiB), device and precision.

    Raises:
        BadInput: rows or settings do not fit the base model, or no row has a label.
        StepFailed: memory ran out, or the loss or a weight is not finite.
    """
    progress(message(f"loading the base model on {device.name} in {device.precision}"))
    tokenizer = load_tokenizer(base, trust_remote_code=model.trust_remote_code)
    tokenizer.chat_template = pinned(resolve_template(model.template, tokenizer))
    data = encode_file(rows, tokenizer, train, model)
    if not data.rows:
        raise BadInput(
            f"{rows.name} has no row to learn from ({data.dropped} rows have no token of an answer within "
            f"train.cutoff_len = {train.cutoff_len})",
            "raise train.cutoff_len, or check the data sets",
        )
    held = encode_file(validation, tokenizer, train, model) if validation else EncodedRows([], 0, 0)
    with explain_out_of_memory(train, device):
        return _run(_Job(base, out, tokenizer, data, held, train, model, device), progress)


@dataclass(frozen=True)
class _Job:
    """Inputs of a run, once the rows are encoded.

    Attributes:
        data, held: rows to learn, and rows to measure the validation loss on.
    """

    base: Path
    out: Path
    tokenizer: PreTrainedTokenizerBase
    data: EncodedRows
    held: EncodedRows
    train: TrainSection
    model: ModelSection
    device: Device


def _run(job: _Job, progress: Progress) -> dict[str, Any]:
    """Train, write the adapter, and return the report."""
    from peft import PeftModel

    total_tokens = 0 if job.train.max_steps > 0 else round(job.data.tokens * job.train.num_train_epochs)
    log = Log(progress, total_tokens)
    trainer = _trainer(job, log)
    adapted = trainer.model
    assert isinstance(adapted, PeftModel)
    trainable, total = adapted.get_nb_trainable_parameters()
    rows, tokens = len(job.data.rows), job.data.tokens
    progress(message(f"training {trainable:,} of {total:,} parameters on {rows} rows ({tokens:,} tokens)"))
    initial = job.out / "initial" if job.train.pissa_init else None
    if initial is not None:
        adapted.save_pretrained(str(initial), save_embedding_layers=False)
    outcome = trainer.train()
    save_adapter(adapted, job.tokenizer, job.out, initial, job.model, log)
    return _report(job, log, outcome, epochs=trainer.state.epoch, parameters=(trainable, total))


def _trainer(job: _Job, log: Log) -> SFTTrainer:
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.sft_trainer import SFTTrainer

    network = load_network(job.base, job.device.dtype, trust_remote_code=job.model.trust_remote_code)
    trainer = SFTTrainer(
        model=network,
        args=trainer_arguments(job.train, job.device, job.out, evaluate=bool(job.held.rows)),
        train_dataset=job.data.dataset(),
        eval_dataset=job.held.dataset() if job.held.rows else None,
        processing_class=job.tokenizer,
        peft_config=METHODS[job.train.finetuning_type](job.train, network),
        callbacks=[callback(log)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _report(
    job: _Job, log: Log, outcome: TrainOutput, *, epochs: float | None, parameters: tuple[int, int]
) -> dict[str, Any]:
    trainable, total = parameters
    return {
        "rows": len(job.data.rows),
        "validation_rows": len(job.held.rows),
        "cut_rows": job.data.cut,
        "dropped_rows": job.data.dropped + job.held.dropped,
        "tokens": job.data.tokens,
        "learnt_tokens": job.data.learnt_tokens,
        "steps": outcome.global_step,
        "epochs": job.train.num_train_epochs if job.train.max_steps < 0 else epochs,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "first_loss": log.losses[0][1],
        "final_loss": curve.smooth([loss for _, loss in log.losses])[-1],
        "train_loss": outcome.training_loss,
        "validation_loss": log.validation_losses[-1][1] if log.validation_losses else None,
        "tokens_per_second": log.tokens / log.seconds,
        "seconds": log.seconds,
        "peak_memory_gib": peak_memory_gib(job.device),
        "device": job.device.name,
        "device_memory_gib": job.device.memory_gib,
        "precision": job.device.precision,
    }
