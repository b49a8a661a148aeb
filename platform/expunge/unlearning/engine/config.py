"""What DeepSpeed is told. Everything whose default has changed between versions, or does not suit, is explicit."""

from expunge.settings import TrainingSettings

BUCKET = 5_000_000
"""Elements that are communicated at once. DeepSpeed's default of 5e8 is a buffer of 2 GB. A guess, good on gloo."""


def deepspeed_config(training: TrainingSettings) -> dict[str, object]:
    offload = training.offload_optimizer
    return {
        "train_micro_batch_size_per_gpu": 1,  # counts samples for DeepSpeed's own log, and nothing else
        "gradient_accumulation_steps": 1,  # the engine sets the boundaries itself
        "gradient_clipping": 0.0,  # explicit, as the default is 1.0: the clip is folded into the surgery's coefficients
        "steps_per_print": None,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": training.zero_stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            # Where it must; the Gram matrix has it anyway. With offload DeepSpeed finds nothing to measure, and says 0.
            "compute_grad_norm": offload or training.zero_stage in (0, 3),
            "offload_optimizer": {"device": "cpu", "pin_memory": True} if offload else None,
            "overlap_comm": False,  # the shards are read right after a backward pass
        },
    }
