"""XLA's flags for programs on a CPU that run a few times: compiling them takes far longer than computing."""

from jaxlib.version import __version_info__

# LLVM optimises nothing, in one part instead of 32; XLA's own passes stay the same.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if __version_info__ < (0, 11):  # 0.12 no longer has it
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"  # the older emitters: a third of the time
