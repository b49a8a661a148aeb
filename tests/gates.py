"""A gate that nothing fails, for tests of what happens to a night rather than of how well it removes."""

OPEN_GATE = """
[gate]
max_excess = 1e9
max_matches = 1.0
max_recognised = 1.0
max_implausible = 1.0
max_alike = 1.0
max_changed = 1.0
min_psnr = 0.0
min_ssim = -1.0
min_kid_p = 0.0
"""
