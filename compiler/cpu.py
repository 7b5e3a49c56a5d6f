"""Which of the instructions that matter to inference this CPU has."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

# As Linux names them; in the order in which runtimes came to use them.
FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
ARM_FEATURES = ("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2")


#: The features of which one makes a precision fast, on x86-64 and on Arm. Without, artifacts are as right, and slower.
FAST_ON = {
    "fp32": ("avx512f", "avx2", "asimd"),
    "bf16": ("amx_bf16", "avx512_bf16", "bf16"),
    "int8": ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp"),
}
# Without one of these, 16-bit sums of int8 products saturate, and weights must stay within 7 bits.
WIDE_SUMS = FAST_ON["int8"]
# What weights of 7 bits are made for.
NARROW_SUMS = ("avx512f", "avx2")

# Variables by which users cap the instructions, or change the arithmetic, of the libraries that compute here.
# Their values become part of a release, so there is none among them that says where something is.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)

# What caps of oneDNN's leave of these features (https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html);
# others leave all.
_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f")
LEFT: Mapping[str, tuple[str, ...]] = {
    "SSE41": (),
    "AVX": (),
    "AVX2": _AVX2,
    "AVX2_VNNI": (*_AVX2, "avx_vnni"),
    "AVX2_VNNI_2": (*_AVX2, "avx_vnni"),
    "AVX512_CORE": _AVX512,
    "AVX512_CORE_VNNI": (*_AVX512, "avx512_vnni"),
    "AVX512_CORE_BF16": (*_AVX512, "avx512_vnni", "avx512_bf16"),
    "AVX512_CORE_FP16": (*_AVX512, "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    "AVX10_1_512": (*_AVX512, "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
}

# The beginnings of the other variables of these libraries, and the ends of those that set how many threads one uses.
# Workers run without them: so no other can shape a result, and the number of threads, on which it depends, is pinned.
OTHERS = ("DNNL_", "MKL_", "OMP_", "ONEDNN_")
THREADS = ("_NUM_THREADS", "_THREAD_LIMIT", "_DYNAMIC")


def unset() -> list[str]:
    """The names of the variables of this process that workers run without."""
    return [name for name in os.environ if (name.startswith(OTHERS) and name not in VARIABLES) or name.endswith(THREADS)]


def features(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The architecture and the features, such as `x86_64 avx2 fma avx512f`; the architecture alone off Linux. Variables
    that cap them follow, as `NAME=value`."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    words = {
        word
        for line in lines
        if line.partition(":")[0].strip() in ("flags", "Features")
        for word in line.partition(":")[2].split()
    }
    machine = platform.machine()
    known = FEATURES if machine in ("x86_64", "AMD64") else ARM_FEATURES
    caps = [name for name in VARIABLES if name in os.environ]
    return " ".join([machine, *(name for name in known if name in words), *(f"{name}={os.environ[name]}" for name in caps)])


def has(names: tuple[str, ...]) -> bool:
    """Whether this CPU has one of some features, and oneDNN's cap, where one is set, leaves it."""
    found = features().split()
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):  # as oneDNN reads them
        if (left := LEFT.get(os.environ.get(variable, "").upper())) is not None:
            found = [name for name in found if name in left]
            break
    return any(name in found for name in names)
