"""Turns pictures and prompts into what training and evaluation read: latents, conditioning, the retain set."""
