"""The steps of every lineage, upstreams first."""

from finetune_assets.assets.base_model import BASE_MODEL
from finetune_assets.assets.dataset_info import DATASET_INFO
from finetune_assets.assets.eval_metrics import EVAL_METRICS
from finetune_assets.assets.gguf_file import GGUF_FILE
from finetune_assets.assets.lora_adapter import LORA_ADAPTER
from finetune_assets.assets.merged_model import MERGED_MODEL
from finetune_assets.assets.ollama_model import OLLAMA_MODEL
from finetune_assets.assets.raw_dataset import RAW_DATASET
from finetune_assets.assets.step_asset import StepAsset

STEPS: tuple[StepAsset, ...] = (
    RAW_DATASET,
    DATASET_INFO,
    BASE_MODEL,
    LORA_ADAPTER,
    EVAL_METRICS,
    MERGED_MODEL,
    GGUF_FILE,
    OLLAMA_MODEL,
)
