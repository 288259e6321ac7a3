"""What the book needs and the wheel leaves out: OpenMoji scenes, the trained family, studies, claims, errata, pages.

Nothing outside this folder imports from it.
"""
