"""The default configuration of the testbed models, as tables like those of a config file."""

MODELS: dict[str, dict[str, object]] = {
    # One gradient for all requests, because its figures were measured that way; memory would allow one each. No extra
    # steps for up to 16 requests: the model knows only 100 people, and unrelated outputs would suffer.
    "faces": {"source": "testbed:faces", "training": {"objectives": "batch", "steps_cover": 16}},
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
        "evaluation_prompts": tuple(
            f"the flag of {country}"
            for country in ("France", "India", "Mexico", "Norway", "Ghana", "Chile", "Greece", "Nepal", "Cuba", "Qatar")
        ),
        "guidance": 2.0,
        "prompt_tokens": 1,
        # Chosen on two sets of 16 requests each (README of `unlearning`).
        "training": {
            "learning_rate": 3e-3,
            "forget_weight": 2.0,
            "weighting": "x0",
            "density": "band",
            "band_level": 0.5,
        },
    },
    # The defaults, not tuned yet. Tune on people 1-20 only (0 to 19 in the code): the others are for reports.
    "people": {"source": "testbed:people"},
}
