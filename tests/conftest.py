"""Settings under which every test runs: the strictest that JAX offers."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the time here: XLA's own passes run as usual, LLVM's do not, nor does, up
# to jax 0.11, the emitter that writes fusions in MLIR first. Where the compiled program itself is
# the claim, helpers.compile_as_user sets these options back; commands that run as processes are
# compiled as a user's are.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=4"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1"
)

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_programs():
    """Give compiled programs back: each holds memory maps, of which a process has 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """The processes share compiled programs, with those of a parallel pytest worker too."""
    cache = tmp_path_factory.getbasetemp().parent / "jax-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog.\n" * 60)
    return path
