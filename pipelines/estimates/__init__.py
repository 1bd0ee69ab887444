"""What a run will take, before it starts: time and price of each stage.

`speeds` knows what was measured and how the rest follows from it, `networks` and `tokens` how large
things are, `prices` what machines cost, `stages` puts them together, and `text` prints them.
"""
