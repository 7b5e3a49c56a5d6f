"""Which features `compiler.cpu` reads out of a kernel's cpuinfo, on x86 and on ARM, and where there is none."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from compiler import cpu
from compiler.cpu import FAST_ON, WIDE_SUMS, features, has

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Some CPU with avx512_fp16 in its name
flags\t\t: fpu sse2 fma avx2 amx_bf16 avx512f avx512_bf16 avx2x
bugs\t\t: amx_int8

processor\t: 1
flags\t\t: fpu sse2 fma avx2 amx_bf16 avx512f avx512_bf16
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd evtstrm i8mm bf16 sve\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("machine", "content", "expected"),
    [
        ("x86_64", X86, "x86_64 avx2 fma avx512f avx512_bf16 amx_bf16"),
        ("AMD64", X86, "AMD64 avx2 fma avx512f avx512_bf16 amx_bf16"),
        ("aarch64", ARM, "aarch64 asimd bf16 i8mm sve"),
        ("aarch64", X86, "aarch64"),
        ("x86_64", "", "x86_64"),
        ("x86_64", "flags\t:", "x86_64"),
        ("x86_64", "no colon here\nflags : avx2", "x86_64 avx2"),
    ],
)
def test_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, content: str, expected: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    (tmp_path / "cpuinfo").write_text(content)
    assert features(tmp_path / "cpuinfo") == expected


def test_without_a_cpuinfo_the_architecture_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert features(tmp_path / "missing") == "arm64"


def test_bytes_that_are_no_text_are_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_bytes(b"model name\t: \xff\xfe\nflags\t: avx2 \xff fma\n")
    assert features(tmp_path / "cpuinfo") == "x86_64 avx2 fma"


def test_the_order_does_not_follow_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache key is made of it."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    (tmp_path / "one").write_text("flags : fma avx2")
    (tmp_path / "two").write_text("flags : avx2 fma")
    assert features(tmp_path / "one") == features(tmp_path / "two")


def test_here() -> None:
    assert features().split()[0] == platform.machine()


def test_the_number_of_threads_is_no_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is pinned, so it must not make another release; what caps the instructions does."""
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    before = features()
    assert before.endswith(" MKL_CBWR=COMPATIBLE")
    for name in ("MKL_NUM_THREADS", "MKL_DOMAIN_NUM_THREADS", "MKL_DYNAMIC"):
        monkeypatch.setenv(name, "1")
    assert features() == before


def test_no_other_variable_gets_into_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    before = features()
    for name in ("MKL_DIR", "MKL_VERBOSE", "ONEDNN_VERBOSE", "DNNL_JIT_DUMP", "MKL_CBWR_OF_MINE"):
        monkeypatch.setenv(name, "/home/somebody/conda")
    assert features() == before
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert features() == f"{before} ONEDNN_MAX_CPU_ISA=AVX2"


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize(
    ("cap", "wide", "bf16"),
    [
        (None, True, True),
        ("DEFAULT", True, True),
        ("AVX512_CORE_BF16", True, True),
        ("avx512_core_vnni", True, False),
        ("AVX2_VNNI", False, False),  # this CPU has the other VNNI
        ("AVX512_CORE", False, False),
        ("AVX2", False, False),
        ("SSE41", False, False),
    ],
)
def test_what_a_cap_leaves(monkeypatch: pytest.MonkeyPatch, variable: str, cap: str | None, *, wide: bool, bf16: bool) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if cap is not None:
        monkeypatch.setenv(variable, cap)
    monkeypatch.setattr(cpu, "features", lambda: "x86_64 avx2 fma avx512f avx512_vnni avx512_bf16")
    assert (has(WIDE_SUMS), has(FAST_ON["bf16"])) == (wide, bf16)
