# What every prediction shares. `batch` (pairs per call of match) is the matcher's choice.
seed = 2022
predict = dict(
    chunk=64,  # pairs per committed chunk; part of a cell's key
    cache_mib=2048,  # budget of the feature cache
    cache_on="memory",  # or "disk": in the output folder, for budgets beyond the memory
)
