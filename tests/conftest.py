"""Tests run on sixteen virtual CPU devices, with compiled programs kept between runs."""

import os
import pathlib

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "16")
# Programs here run for moments, so most of the time goes into compiling them: let XLA emit machine
# code the quick way. At level 1 results are to the bit those of the defaults; at level 0 products
# are rounded before they are added, which tests of ill-conditioned inputs notice.
QUICK = (
    "--xla_backend_optimization_level=1",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join([*QUICK, os.environ.get("XLA_FLAGS", "")])  # yours come last
cache = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def pytest_configure(config):
    """Tests of a GPU have what JAX finds; all others run on the CPU."""
    os.environ.setdefault("JAX_PLATFORMS", "" if config.option.markexpr == "gpu" else "cpu")
