"""How the testbed models are configured where nobody configures them: as tables, like those of a config file."""

MODELS: dict[str, dict[str, object]] = {
    # With one gradient for all, as its figures were measured; memory would allow one per request. And no more steps for
    # 16 requests, out of the 100 people that it knows: unrelated outputs would not hold.
    "faces": {"source": "testbed:faces", "training": {"tasks": "batch", "steps_cover": 16}},
    "flags": {
        "source": "testbed:flags",
        "resolution": (32, 48),
        "retain_prompts": (
            "a flag",
            "the flag of Japan",
            "the flag of Brazil",
            "the flag of Sweden",
            "the flag of Kenya",
        ),
        "guidance": 2.0,
        "prompt_tokens": 1,
        # Chosen by 16 requests at once, in two sets of them (README of `unlearning`).
        "training": {
            "learning_rate": 3e-3,
            "forget_weight": 2.0,
            "weighting": "x0",
            "density": "band",
            "band_level": 0.5,
        },
    },
}
