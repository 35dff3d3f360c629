"""Complete training recipes: what `sparsetrain train` runs.

`text` fine-tunes a transformer encoder on a text classification set. Every recipe is built from
the same parts: `engine` (lanes that train side by side on the same batches), `pruning` (the
gradual magnitude pruning that comes first), `checkpoint` (atomic files, resume after a kill) and
`report` (table, JSON, plot). Nothing here is imported by `import sparsetrain`.
"""
