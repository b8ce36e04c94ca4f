"""Losses behind the interfaces of other packages; each file needs its package and is imported by
name alone, so that `import mmfast` needs none of them."""
