"""DeepSpeed's configuration. Options whose default does not suit, or has changed between versions, are explicit."""

from expunge.settings import ShardingSettings

BUCKET = 5_000_000
"""The number of elements that are communicated at once. DeepSpeed's default of 5e8 is a buffer of 2 GB. A guess that
works well on gloo."""


def deepspeed_config(sharding: ShardingSettings) -> dict[str, object]:
    """Return the dictionary that `deepspeed.initialize` takes."""
    offload = sharding.offload_optimizer
    return {
        "train_micro_batch_size_per_gpu": 1,  # used only in DeepSpeed's own log
        "gradient_accumulation_steps": 1,  # the engine sets the boundaries itself
        "gradient_clipping": 0.0,  # explicit, as the default is 1.0: the clip is folded into the surgery's coefficients
        "steps_per_print": None,
        "bf16": {"enabled": sharding.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": sharding.zero_stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            # Only where DeepSpeed insists: the Gram matrix has the norm anyway. With offload it always reports 0.
            "compute_grad_norm": offload or sharding.zero_stage in (0, 3),
            "offload_optimizer": {"device": "cpu", "pin_memory": True} if offload else None,
            "overlap_comm": False,  # the shards are read right after a backward pass
        },
    }
