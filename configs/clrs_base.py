# python train_base.py configs/clrs_base.py
# four sorting algorithms as the CLRS benchmark records them: a file of traces
task = "tests/data/clrs_sorts.jsonl.gz"
block_size = 208
steps = 7000
