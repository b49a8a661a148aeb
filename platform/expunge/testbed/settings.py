"""The default configuration of the testbed models, as tables like those of a config file.

None of them has training settings of its own: what works here must work on a model that nobody tuned.
"""

MODELS: dict[str, dict[str, object]] = {
    "faces": {"source": "testbed:faces"},
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
    },
    # Tune on people 1-20 only (0 to 19 in the code): the others are for reports.
    "people": {"source": "testbed:people"},
}
