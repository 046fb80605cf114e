"""The environment variables of child processes: short lists of what each needs, so that no secret is passed on.

Other variables are not passed on: hub tokens, cloud keys, the URL of the failure webhook, database passwords.
docs/trust.md gives the reason for each group, and a test compares it with the lists below.
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
        names: names of variables.
        prefixes: beginnings of names; names that look like a secret are excluded.
    """

    names: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        return name in self.names or (name.startswith(self.prefixes) and SECRET.search(name) is None)


SYSTEM = Group(
    # the last two show to which project a process belongs
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
PIP = re.compile("PIP_")  # unmasked: the URL of an index may contain its password, which pip needs
OLLAMA = Group(prefixes=("OLLAMA_",))

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # use neither the variable nor the file that `hf auth login` writes
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_TOKEN_PATH": os.devnull,
}
"""The variables of children that read a model from a folder and need no hub."""


def for_worker(*, trust: bool, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a worker process.

    Args:
        trust: whether the model's own code may run.
    """
    own = _chosen(environment, SYSTEM, THREADS, ACCELERATORS, LIBRARIES)
    return own | OFFLINE | _modules(trust)


def for_converter(*, trust: bool, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of llama.cpp's converter, which uses the CPU."""
    own = _chosen(environment, SYSTEM, THREADS, LIBRARIES)
    return own | OFFLINE | _modules(trust) | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def for_pip(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of pip, which downloads a pinned wheel and runs nothing of it."""
    pip = {name: value for name, value in environment.items() if PIP.match(name)}
    return _chosen(environment, SYSTEM, NETWORK) | pip


def for_ollama(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of an Ollama server that this program starts."""
    return _chosen(environment, SYSTEM, THREADS, ACCELERATORS, OLLAMA)


def _chosen(environment: Mapping[str, str], *groups: Group) -> dict[str, str]:
    return {name: value for name, value in environment.items() if any(group.has(name) for group in groups)}


def _modules(trust: bool) -> dict[str, str]:
    """Return the folder where transformers copies a model's code before running it; none if it must not run."""
    return {} if trust else {"HF_MODULES_CACHE": os.devnull}
