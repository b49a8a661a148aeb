"""Pictures and prompts become what training and evaluation read: latents, conditioning, the retain set."""
