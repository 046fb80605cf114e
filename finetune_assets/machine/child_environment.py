"""The environment variables of child processes: short lists of what each needs, so that no secret gets there.

What is not listed is not passed on: tokens of hubs, keys of clouds, the address of the failure webhook, passwords of
databases. docs/trust.md gives the reason for each group, and a test compares it with the lists below.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

SECRET = re.compile(r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|KEY|WEBHOOK|AUTH|COOKIE", re.IGNORECASE)


@dataclass(frozen=True)
class Group:
    """Variables that belong together.

    Args:
        names: exactly these.
        prefixes: all variables whose names begin so, except those that are named like a secret.
    """

    names: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        return name in self.names or (name.startswith(self.prefixes) and SECRET.search(name) is None)


SYSTEM = Group(
    # the last two say to whoever looks at the processes which project each belongs to
    names=("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TEMP", "TMP", "LANG", "LANGUAGE", "TZ", "VIRTUAL_ENV",
           "CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH",
           "FINETUNE_PROJECT", "DAGSTER_HOME"),
    prefixes=("LC_", "PYTHON", "XDG_"),
)  # fmt: skip
THREADS = Group(prefixes=("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "VECLIB_", "NUMEXPR_", "MALLOC_"))
ACCELERATORS = Group(
    names=("LOCAL_RANK",),
    prefixes=("CUDA_", "CUDNN_", "CUBLAS_", "NCCL_", "NVIDIA_", "ROCM_", "ROCR_", "HIP_", "HSA_", "AMD_", "MIOPEN_",
              "PYTORCH_", "TORCH", "TRITON_", "ONEAPI_", "SYCL_", "ZE_", "GGML_"),
)  # fmt: skip
LIBRARIES = Group(
    names=("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE",
           "TRANSFORMERS_CACHE", "TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "MPLBACKEND", "MPLCONFIGDIR"),
    prefixes=("HF_HUB_DISABLE_", "HF_DATASETS_DISABLE_"),
)  # fmt: skip
NETWORK = Group(
    names=("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
           "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"),
)  # fmt: skip
PIP = re.compile("PIP_")  # whole: the address of an index may hold its password, and pip needs it
OLLAMA = Group(prefixes=("OLLAMA_",))

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # neither the variable nor the file that `hf auth login` writes
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_TOKEN_PATH": os.devnull,
}
"""What children get that work with a model's files: these lie in a folder, nothing is asked of a hub."""


def for_worker(*, trust: bool, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a worker process gets.

    Args:
        trust: whether the model's own code may run.
    """
    own = _chosen(environment, SYSTEM, THREADS, ACCELERATORS, LIBRARIES)
    return own | OFFLINE | _modules(trust)


def for_converter(*, trust: bool, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What llama.cpp's converter gets: it works on the CPU."""
    own = _chosen(environment, SYSTEM, THREADS, LIBRARIES)
    return own | OFFLINE | _modules(trust) | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def for_pip(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What pip gets when it fetches a pinned wheel, of which it runs nothing."""
    pip = {name: value for name, value in environment.items() if PIP.match(name)}
    return _chosen(environment, SYSTEM, NETWORK) | pip


def for_ollama(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What an Ollama server gets that we start."""
    return _chosen(environment, SYSTEM, THREADS, ACCELERATORS, OLLAMA)


def _chosen(environment: Mapping[str, str], *groups: Group) -> dict[str, str]:
    return {name: value for name, value in environment.items() if any(group.has(name) for group in groups)}


def _modules(trust: bool) -> dict[str, str]:
    """Where transformers copies a model's code before it runs it: no folder, so that it cannot, where none may run."""
    return {} if trust else {"HF_MODULES_CACHE": os.devnull}
