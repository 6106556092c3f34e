"""Profiles of a network: where its time goes, operation by operation, against what the machine can do, and its memory.

found = measure(mf.create_model("memnet_m6r6.denoise"), image, backend="cpu")    # image [N, C_in, H, W] in [0, 1]
table.rows(found), table.values(found)                          # numbers
trace.encoded(found), plots.roofline(table.values(found))       # files
"""

from memnet_fast.profile.measuring import Profile, measure

__all__ = ["Profile", "measure"]
