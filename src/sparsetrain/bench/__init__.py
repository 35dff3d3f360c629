"""The benchmark suite behind `sparsetrain bench`: nothing here is needed to train.

    timing      pinned rounds in turn, medians of ratios of the same round
    machine     CPU, caches, versions, load
    processes   one process per thread count, JSON and TOML files
    ceilings    multiply-adds from registers, L1, L2, L3 and memory (ceilings.cc, built on demand)
    problems    one layer on one input, with its float64 reference
    contestants one class per library
    layers, models, memory    what is measured
    tables, plots, page       what is shown; compare: old against new

What a number means is said in benchmarks/README.md of the repository.
"""
