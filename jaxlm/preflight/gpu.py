"""GPUs that are not here: the description from which the CUDA plugin compiles, without a driver.

The plugin needs no GPU if it is told what one is (XLA's `GpuTargetConfigProto`, as text). Numbers are those
of the vendor's data sheets and of compute capability 9.0.
"""

# What an SXM board of that name is.
MEMORY = {"h100": 85_520_809_984, "h200": 150_754_820_096}  # bytes, as the driver says
BANDWIDTH = {"h100": 3_352_320_000_000, "h200": 4_916_736_000_000}  # bytes/s
KINDS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 device_memory_size: {memory}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{kind}"
"""
# Choosing kernels by measurement needs a device.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": "0"}


def target_config(name: str) -> str:
    """The description of a GPU, for `jax.experimental.topologies.get_topology_desc(target_config=...)`.

    >>> "device_memory_size: 150754820096" in target_config("h200")
    True
    """
    return _TARGET.format(kind=KINDS[name], memory=MEMORY[name], bandwidth=BANDWIDTH[name])
